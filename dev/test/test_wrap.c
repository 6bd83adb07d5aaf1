/* The wrappers and ops as data: the tables against the comments of ops.h, and each wrapper around the real CPU backend. */
#include "llmc/base/timer.h"
#include "llmc/train.h"
#include "op_cases.h"
#include <ctype.h>
#include <jansson.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

/* ---- ops as data -------------------------------------------------------------------------------------------------- */

/* Distinct primes, so that a wrong shape gives a wrong number; C = H D. */
enum { SB = 2, ST = 3, SH = 5, SD = 7, SC = SH * SD, SN = 11, SV = 13, SOC = 17, Sn = 19, SVp = 23 };
/* The arguments of an op with every size set to its letter's prime. */
static void set_letters(OpId op, AnyArgs *args) {
    static const struct { const char *letter; size_t value; } letters[] = {
        {"B", SB}, {"T", ST}, {"C", SC}, {"N", SN}, {"V", SV}, {"Vp", SVp}, {"OC", SOC}, {"H", SH}, {"D", SD}, {"n", Sn}};
    OpCase k = {.op = op, .absent = ""};
    memset(args, 0, sizeof *args);
    OpSize sizes[OP_MAX_SIZES];
    int n = op_sizes(op, args, sizes);
    for (int i = 0; i < n; i++)
        for (size_t l = 0; l < sizeof letters / sizeof *letters; l++)
            if (!strcmp(sizes[i].name, letters[l].letter)) k.sizes[i] = letters[l].value;
    set_sizes(args, &k);
}

/* Elements of a shape as ops.h writes it, "(B, T, 3C)". */
static size_t shape_elements(const char *s) {
    static const struct { const char *letter; size_t value; } letters[] = {
        {"OC", SOC}, {"Vp", SVp}, {"B", SB}, {"T", ST}, {"C", SC}, {"N", SN}, {"V", SV}, {"n", Sn}};
    size_t product = 1;
    for (s++; *s && *s != ')';) {
        if (isdigit((unsigned char)*s)) { product *= (size_t)strtoul(s, (char **)&s, 10); continue; }
        size_t i = 0;
        while (i < sizeof letters / sizeof *letters && strncmp(s, letters[i].letter, strlen(letters[i].letter))) i++;
        if (i < sizeof letters / sizeof *letters) { product *= letters[i].value; s += strlen(letters[i].letter); }
        else s++;
    }
    return product;
}

static const char *const kind_types[] = {"Act", "Par", "Grad", "Stat", "Master", "Moment", "Tokens", "Saved", "Step"};

/* Compares one declared handle, with its comment, with the row of the table. */
static void compare_row(OpId op, const Operand *o, const char *type, const char *name, const char *comment, size_t saved_bytes) {
    EXPECT(!strcmp(o->name, name), "%s: table has %s where the header has %s", op_names[op], o->name, name);
    EXPECT(!strcmp(kind_types[o->kind], type), "%s.%s: kind %s, header %s", op_names[op], name, kind_types[o->kind], type);
    const char *after = comment + strspn(comment, " ");
    size_t n = 1;
    if (*after == '(') { n = shape_elements(after); after = strchr(after, ')') + 1; }
    else if (!strncmp(after, "opaque", 6)) { n = saved_bytes; after += 6; }
    after += strspn(after, " ");
    OperandMode mode = !strncmp(after, "in", 2) ? MODE_IN : !strncmp(after, "+=", 2) ? MODE_ADD : MODE_OUT;
    EXPECT(mode != MODE_OUT || *after == '=', "%s.%s: no mode in \"%s\"", op_names[op], name, comment);
    EXPECT(o->mode == mode, "%s.%s: mode %d, header \"%s\"", op_names[op], name, (int)o->mode, comment);
    EXPECT(o->n == n, "%s.%s: %zu elements, header says %zu", op_names[op], name, o->n, n);
    bool optional = strstr(after, "optional") || strstr(after, "may be absent") || strstr(after, "present exactly when");
    EXPECT(o->optional == optional, "%s.%s: optional %d, header \"%s\"", op_names[op], name, o->optional, comment);
}

/* One line of a struct: "Type a, b; / * comment * /". Returns how many operands it declares. */
static int compare_line(OpId op, const char *line, const Operand *operands, int n_operands, int at, size_t saved_bytes) {
    char type[32], names[64], comment[400];
    if (sscanf(line, " %31[A-Za-z] %63[^;]; /* %399[^\n]", type, names, comment) != 3) return 0;
    size_t k = 0;
    while (k < sizeof kind_types / sizeof *kind_types && strcmp(type, kind_types[k])) k++;
    if (k == sizeof kind_types / sizeof *kind_types) return 0;
    int n = 0;
    for (char *save, *name = strtok_r(names, ", ", &save); name; name = strtok_r(NULL, ", ", &save), n++) {
        EXPECT(at + n < n_operands, "%s: %s is not in the table", op_names[op], name);
        if (at + n < n_operands) compare_row(op, &operands[at + n], type, name, comment, saved_bytes);
    }
    return n;
}

TEST(tables_agree_with_header) {
    static const char *const structs[] = {
#define STRUCT(name, Args) "} " #Args ";",
        LLMC_OPS(STRUCT)
#undef STRUCT
    };
    FILE *f = fopen("llmc/ops.h", "r");
    EXPECT(f, "llmc/ops.h is not here");
    if (!f) return;
    static char text[100000];
    text[fread(text, 1, sizeof text - 1, f)] = 0;
    fclose(f);
    Backend *null = null_backend_create("fp32");
    for (int op = 0; op < OP_COUNT; op++) {
        AnyArgs args;
        set_letters((OpId)op, &args);
        Operand operands[OP_MAX_OPERANDS];
        int n = op_operands(null, (OpId)op, &args, operands), at = 0;
        char *end = strstr(text, structs[op]), *begin = end;
        EXPECT(end, "no %s in the header", structs[op]);
        if (!end) continue;
        while (begin > text && strncmp(begin, "typedef struct {", 16)) begin--;
        for (char *line = strchr(begin, '\n') + 1; line < end; line = strchr(line, '\n') + 1)
            at += compare_line((OpId)op, line, operands, n, at, SB * ST * SH * sizeof(float));
        EXPECT(at == n, "%s: header has %d operands, table %d", op_names[op], at, n);
    }
    null->destroy(null);
}

/* Each row's field is where the handle is: a pointer written there comes back in that row and no other. */
TEST(tables_find_their_fields) {
    Backend *null = null_backend_create("fp32");
    char target;
    for (int op = 0; op < OP_COUNT; op++) {
        AnyArgs args;
        set_letters((OpId)op, &args);
        Operand before[OP_MAX_OPERANDS], after[OP_MAX_OPERANDS];
        int n = op_operands(null, (OpId)op, &args, before);
        for (int i = 0; i < n; i++) {
            void *p = &target;
            memcpy((char *)&args + before[i].field, &p, sizeof p);
            op_operands(null, (OpId)op, &args, after);
            for (int k = 0; k < n; k++) EXPECT((after[k].p == p) == (k == i), "%s row %d, set %d", op_names[op], k, i);
            p = NULL;
            memcpy((char *)&args + before[i].field, &p, sizeof p);
        }
    }
    null->destroy(null);
}

TEST(bytes_and_flops) {
    Backend *null = null_backend_create("fp32");
    float x;
    void *p = &x;
    LinearBackward lb = {.dinp = {p}, .dw = {p}, .db = {p}, .dout = {p}, .inp = {p}, .w = {p}, .N = 2, .C = 3, .OC = 5};
    EXPECT(op_bytes(null, OP_linear_backward, &lb) == 4.0 * (6 + 2 * 15 + 2 * 5 + 10 + 6 + 15), "%g", op_bytes(null, OP_linear_backward, &lb));
    EXPECT(op_flops(OP_linear_backward, &lb) == 2.0 * 2 * (2 * 3 * 5), "%g", op_flops(OP_linear_backward, &lb));
    lb.dinp.p = NULL;
    EXPECT(op_flops(OP_linear_backward, &lb) == 2.0 * (2 * 3 * 5), "%g", op_flops(OP_linear_backward, &lb));
    EmbedForward ef = {.out = {p}, .tokens = {p}, .wte = {p}, .wpe = {p}, .B = 2, .T = 3, .C = 5, .V = 50257};
    EXPECT(op_bytes(null, OP_embed_forward, &ef) == 4.0 * (30 + 6 + 30 + 15), "%g", op_bytes(null, OP_embed_forward, &ef));
    AttentionForward af = {.B = 2, .T = 4, .H = 3, .D = 5};
    EXPECT(op_flops(OP_attention_forward, &af) == 2 * 2 * 2.0 * 3 * 4 * 4 * 5 / 2, "%g", op_flops(OP_attention_forward, &af));
    AttentionDecode ad = {.B = 2, .T = 9, .H = 3, .D = 5, .n = 2, .position = 4}; /* keys: 5, then 6 */
    EXPECT(op_flops(OP_attention_decode, &ad) == 2 * 2 * 2.0 * 3 * 5 * (5 + 6), "%g", op_flops(OP_attention_decode, &ad));
    Backend *half = null_backend_create("bf16");
    EXPECT(op_bytes(half, OP_embed_forward, &ef) == 4.0 * 6 + 2.0 * (30 + 30 + 15) && !strcmp(half->dtype, "bf16"), "%g", op_bytes(half, OP_embed_forward, &ef));
    half->destroy(half);
    Operand step = {.kind = KIND_STEP, .n = 1};
    EXPECT(operand_bytes(null, &step) == sizeof(StepState), "%zu", operand_bytes(null, &step));
    null->destroy(null);
}

/* ---- null --------------------------------------------------------------------------------------------------------- */

TEST(null_accounts_for_memory) {
    Backend *null = null_backend_create("fp32");
    Error e = {0};
    char *a = null->alloc(null, MEM_WEIGHTS, "a", 1000, &e), *b = null->alloc(null, MEM_WEIGHTS, "b", (size_t)1 << 45, &e);
    char *c = null->alloc(null, MEM_SCRATCH, "c", 1, &e);
    EXPECT(a && b && c && a + 1000 <= b && b + ((size_t)1 << 45) <= c, "%p %p %p", a, b, c);
    EXPECT((uintptr_t)a % 256 == 0 && (uintptr_t)b % 256 == 0 && (uintptr_t)c % 256 == 0, "%p %p %p", a, b, c);
    EXPECT(null->memory[MEM_WEIGHTS] == 1000 + ((size_t)1 << 45) && null->memory[MEM_SCRATCH] == 1, "%zu", null->memory[MEM_WEIGHTS]);
    null->release(null, b);
    EXPECT(null->memory[MEM_WEIGHTS] == 1000 && null->memory_peak[MEM_WEIGHTS] == 1000 + ((size_t)1 << 45), "%zu", null->memory[MEM_WEIGHTS]);
    float value = 7;
    null->upload(null, a, &value, sizeof value);
    null->download(null, &value, a + 996, sizeof value);
    EXPECT(value == 0, "%g", value);
    GeluForward gelu = {.out = {a}, .pre_gelu = {a + 512}, .n = 100};
    null->plan_begin(null);
    null->gelu_forward(null, &gelu);
    EXPECT(null->plan_end(null, &e), "%s", e.text);
    EXPECT(!null->alloc(null, MEM_OTHER, "too much", SIZE_MAX - 10, &e) && e.code == EXIT_DATA, "%s", e.text);
    null->release(null, a);
    null->release(null, c);
    EXPECT(null->memory[MEM_WEIGHTS] == 0 && null->memory[MEM_SCRATCH] == 0, "%zu", null->memory[MEM_WEIGHTS]);
    null->destroy(null);
}

/* Runs f in a child process; true when it aborted. */
static bool aborts(void (*f)(Backend *, char *), Backend *b, char *p) {
    fflush(stdout);
    pid_t pid = fork();
    if (pid == 0) {
        if (!freopen("/dev/null", "w", stderr)) _exit(1);
        f(b, p);
        _exit(0);
    }
    int status;
    return waitpid(pid, &status, 0) == pid && WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT;
}

static void good_gelu(Backend *b, char *p) { b->gelu_forward(b, &(GeluForward){.out = {p}, .pre_gelu = {p + 1024}, .n = 250}); }
static void long_gelu(Backend *b, char *p) { b->gelu_forward(b, &(GeluForward){.out = {p}, .pre_gelu = {p + 1024}, .n = 251}); }
static void absent_gelu(Backend *b, char *p) { b->gelu_forward(b, &(GeluForward){.out = {p}, .n = 250}); }
static void freed_gelu(Backend *b, char *p) { b->release(b, p); good_gelu(b, p); }

TEST(null_finds_wrong_operands) {
    Backend *null = null_backend_create("fp32");
    Error e = {0};
    char *p = null->alloc(null, MEM_OTHER, "p", 2024, &e);
    EXPECT(!aborts(good_gelu, null, p), "a good call aborts");
    EXPECT(aborts(long_gelu, null, p), "an operand beyond its memory passes");
    EXPECT(aborts(absent_gelu, null, p), "an absent operand passes");
    EXPECT(aborts(freed_gelu, null, p), "an operand in released memory passes");
    null->destroy(null);
}

/* ---- count and trace around the CPU backend ------------------------------------------------------------------------ */

static Backend *cpu(void) {
    Error e = {0};
    Backend *b = cpu_backend_create(&e);
    CHECK(b, "%s", e.text);
    return b;
}

/* Notes every op that passes, to compare others' records with. */
typedef struct { OpId op; double bytes, flops, seconds; OpSize sizes[OP_MAX_SIZES]; int n_sizes; } Note;
typedef struct { Wrapper w; Note notes[1000]; size_t n; } Recorder;

static void record_run(Backend *b, OpId op, const void *args) {
    Recorder *r = (Recorder *)b;
    double begin = seconds_now();
    op_run(b->inner, op, args);
    if (r->w.planning) return;
    CHECK(r->n < sizeof r->notes / sizeof *r->notes, "too many calls");
    Note *note = &r->notes[r->n++];
    *note = (Note){.op = op, .bytes = op_bytes(b, op, args), .flops = op_flops(op, args), .seconds = seconds_now() - begin};
    note->n_sizes = op_sizes(op, args, note->sizes);
}

static Backend *recorder_create(Backend *inner) {
    Recorder *r = xcalloc(1, sizeof *r);
    wrapper_init(&r->w, "record", inner, record_run);
    return &r->w.backend;
}

static void run_case(Backend *b, const OpCase *k) {
    Call c;
    call_create(&c, b, k);
    call_fill(&c, FILL_ZERO, FILL_VALUES);
    call_run(&c);
    call_destroy(&c);
}

TEST(count_counts) {
    Backend *inner = cpu(), *count = count_backend_create(inner), *recorder = recorder_create(count);
    uint64_t want[OP_COUNT] = {0};
    for (int i = 0; i < N_OP_CASES; i++) run_case(recorder, &op_cases[i]);
    const Recorder *r = (const Recorder *)recorder;
    for (size_t i = 0; i < r->n; i++) want[r->notes[i].op]++;
    for (int op = 0; op < OP_COUNT; op++)
        EXPECT(count_backend_calls(count)[op] == want[op] && want[op] > 0, "%s: %llu calls, %llu counted", op_names[op], (unsigned long long)want[op],
               (unsigned long long)count_backend_calls(count)[op]);
    EXPECT(!strcmp(count->name, "count(cpu)") && count->inner == inner && count->elem_bytes == 4, "%s", count->name);
    recorder->destroy(recorder);
    count->destroy(count);
    inner->destroy(inner);
}

static char *temporary_file(void) {
    const char *folder = getenv("TMPDIR");
    char *path = xasprintf("%s/llmc_test_XXXXXX", folder ? folder : "/tmp");
    int fd = mkstemp(path);
    CHECK(fd >= 0, "%s", path);
    close(fd);
    return path;
}

/* destroy says the summary on stderr: not in a test. */
static void destroy_quietly(Backend *b) {
    fflush(stderr);
    int saved = dup(2);
    CHECK(freopen("/dev/null", "w", stderr), "stderr");
    b->destroy(b);
    fflush(stderr);
    dup2(saved, 2);
    close(saved);
}

static double number(const json_t *event, const char *key) { return json_number_value(json_object_get(event, key)); }

static void check_op_event(const json_t *event, const Note *note, double *last_end) {
    const json_t *args = json_object_get(event, "args");
    EXPECT(!strcmp(json_string_value(json_object_get(event, "name")), op_names[note->op]), "%s", op_names[note->op]);
    double begin = number(event, "ts"), duration = number(event, "dur"), bytes = number(args, "bytes"), flops = number(args, "FLOPs");
    EXPECT(duration >= 1e6 * note->seconds - 0.002, "%s: %g us in the trace, took %g", op_names[note->op], duration, 1e6 * note->seconds);
    EXPECT(begin >= *last_end - 0.002, "%s begins at %g, the one before ended at %g", op_names[note->op], begin, *last_end);
    *last_end = begin + duration;
    EXPECT(bytes == note->bytes && flops == note->flops, "%s: %g bytes, %g FLOPs in the trace; %g, %g", op_names[note->op], bytes, flops, note->bytes, note->flops);
    for (int i = 0; i < note->n_sizes; i++)
        EXPECT((size_t)number(args, note->sizes[i].name) == note->sizes[i].value, "%s %s", op_names[note->op], note->sizes[i].name);
    if (duration > 100) EXPECT(fabs(number(args, "GB/s") - 1e-3 * bytes / duration) < 1e-2 * (1 + 1e-3 * bytes / duration), "%s", op_names[note->op]);
    if (duration > 100) EXPECT(fabs(number(args, "GFLOP/s") - 1e-3 * flops / duration) < 1e-2 * (1 + 1e-3 * flops / duration), "%s", op_names[note->op]);
}

static json_t *load_trace(const char *path) {
    json_error_t error;
    json_t *events = json_load_file(path, 0, &error);
    EXPECT(events && json_is_array(events), "line %d: %s", error.line, error.text);
    return events;
}

TEST(trace_has_every_op) {
    char *path = temporary_file();
    Error e = {0};
    Backend *inner = cpu(), *recorder = recorder_create(inner), *trace = trace_backend_create(recorder, path, &e);
    EXPECT(trace, "%s", e.text);
    for (int i = 0; i < N_OP_CASES; i++) run_case(trace, &op_cases[i]);
    trace->mark(trace, MARK_GRADS_FINAL, 7);
    destroy_quietly(trace);
    json_t *events = load_trace(path);
    const Recorder *r = (const Recorder *)recorder;
    double last_end = 0;
    if (!events) return;
    EXPECT(json_array_size(events) == r->n + 2, "%zu events for %zu ops", json_array_size(events), r->n);
    for (size_t i = 0; i < r->n; i++) check_op_event(json_array_get(events, i + 1), &r->notes[i], &last_end);
    const json_t *mark = json_array_get(events, r->n + 1);
    EXPECT(!strcmp(json_string_value(json_object_get(mark, "name")), "grads_final") && number(json_object_get(mark, "args"), "unit") == 7, "the mark");
    EXPECT(!strcmp(json_string_value(json_object_get(mark, "ph")), "i") && number(mark, "ts") >= last_end - 0.002, "the mark");
    json_decref(events);
    recorder->destroy(recorder);
    inner->destroy(inner);
    unlink(path);
    free(path);
}

TEST(trace_summary_adds_up) {
    Error e = {0};
    Backend *inner = cpu(), *trace = trace_backend_create(inner, "/dev/null", &e);
    for (int i = 0; i < N_OP_CASES; i++) run_case(trace, &op_cases[i]);
    char *text = NULL;
    size_t bytes;
    FILE *out = open_memstream(&text, &bytes);
    trace_backend_summary(trace, out);
    fclose(out);
    double percent = 0, last_ms = INFINITY;
    int rows = 0;
    for (char *save, *line = strtok_r(text, "\n", &save); line; line = strtok_r(NULL, "\n", &save)) {
        char op[32];
        double calls, ms, share, bandwidth, rate;
        if (sscanf(line, "%31s %lf %lf %lf %lf %lf", op, &calls, &ms, &share, &bandwidth, &rate) != 6) continue;
        EXPECT(ms <= last_ms && calls > 0 && bandwidth >= 0 && rate >= 0, "%s", line);
        last_ms = ms;
        percent += share;
        rows++;
    }
    EXPECT(rows == OP_COUNT && fabs(percent - 100) < 0.1, "%d rows, %g %%", rows, percent);
    free(text);
    destroy_quietly(trace);
    inner->destroy(inner);
}

TEST(trace_stays_whole_beyond_its_limit) {
    char *path = temporary_file();
    Error e = {0};
    Backend *null = null_backend_create("fp32"), *trace = trace_backend_create(null, path, &e);
    float *p = trace->alloc(trace, MEM_OTHER, "p", 8, &e);
    for (int i = 0; i < 200100; i++) trace->gelu_forward(trace, &(GeluForward){.out = {p}, .pre_gelu = {p + 1}, .n = 1});
    destroy_quietly(trace);
    json_t *events = load_trace(path);
    EXPECT(json_array_size(events) == 200001, "%zu events", json_array_size(events));
    json_decref(events);
    EXPECT(!trace_backend_create(null, "/nonexistent/trace.json", &e) && e.code == EXIT_STORAGE && strstr(e.text, "/nonexistent/trace.json"), "%s", e.text);
    null->destroy(null);
    unlink(path);
    free(path);
}

/* ---- tee ------------------------------------------------------------------------------------------------------------ */

TEST(tee_of_equals_finds_nothing) {
    Backend *first = cpu(), *second = cpu(), *tee = tee_backend_create(first, second, 0, stdout);
    for (int i = 0; i < N_OP_CASES; i++) run_case(tee, &op_cases[i]);
    EXPECT(tee_backend_differences(tee) == 0, "%llu differences", (unsigned long long)tee_backend_differences(tee));
    EXPECT(second->memory[MEM_OTHER] == 0, "%zu bytes of shadows after all buffers were released", second->memory[MEM_OTHER]);
    tee->destroy(tee);
    first->destroy(first);
    second->destroy(second);
}

/* One element of one output of one op is wrong in the second backend: one difference, with its name. */
static void check_tee_notices(const OpCase *k, const Operand *o, int operand, Damage damage) {
    char *text = NULL, want[64];
    size_t bytes;
    FILE *report = open_memstream(&text, &bytes);
    Backend *first = cpu(), *second = cpu(), *broken = broken_create(second, damage, k->op, operand);
    Backend *tee = tee_backend_create(first, broken, 1e-5, report);
    run_case(tee, k);
    uint64_t differences = tee_backend_differences(tee);
    fclose(report);
    if (o->kind == KIND_STEP) snprintf(want, sizeof want, "tee: %s.%s.loss_sum: cpu", op_names[k->op], o->name);
    else snprintf(want, sizeof want, "tee: %s.%s[%zu]: cpu", op_names[k->op], o->name, o->n - 1);
    EXPECT(differences == 1 && strstr(text, want), "%s.%s: %llu differences, \"%s\"", op_names[k->op], o->name, (unsigned long long)differences, text);
    free(text);
    tee->destroy(tee);
    broken->destroy(broken);
    first->destroy(first);
    second->destroy(second);
}

/* "One corrupted element per tensor and one NaN are each reported as failures." */
TEST(tee_notices_one_element_and_one_nan) {
    bool seen[OP_COUNT] = {0};
    Backend *b = cpu();
    for (int i = 0; i < N_OP_CASES; i++) {
        const OpCase *k = &op_cases[i];
        Operand operands[OP_MAX_OPERANDS];
        int n = case_operands(b, k, operands);
        if (!is_small(operands, n)) continue;
        for (int o = 0; o < n; o++) {
            if (operands[o].mode == MODE_IN || operands[o].kind == KIND_SAVED || is_absent(k, &operands[o])) continue;
            check_tee_notices(k, &operands[o], o, DAMAGE_ELEMENT);
            check_tee_notices(k, &operands[o], o, DAMAGE_NAN);
            seen[k->op] = true;
        }
    }
    for (int op = 0; op < OP_COUNT; op++) EXPECT(seen[op], "%s has no case", op_names[op]);
    b->destroy(b);
}

/* What a backend saves is opaque, and its own: a second one that saves something wrong shows in the backward, which reads it. */
TEST(tee_keeps_saved_apart) {
    static const OpCase forward = {OP_attention_forward, {2, 7, 3, 5}, "", 0}, backward = {OP_attention_backward, {2, 7, 3, 5}, "", 0};
    Backend *first = cpu(), *second = cpu(), *broken = broken_create(second, DAMAGE_ELEMENT, OP_attention_forward, 1);
    Backend *tee = tee_backend_create(first, broken, 1e-5, NULL);
    run_case(tee, &forward);
    EXPECT(tee_backend_differences(tee) == 0, "opaque content is compared");
    run_case(tee, &backward);
    EXPECT(tee_backend_differences(tee) > 0, "the second's backward does not read what the second saved");
    tee->destroy(tee);
    broken->destroy(broken);
    first->destroy(first);
    second->destroy(second);
}

/* ---- a whole training step through wrappers: operands are then parts of larger buffers ------------------------------------ */

static bool next_batch(void *context, size_t i, const int32_t **tokens, const int32_t **targets) {
    static const int32_t ids[2][17] = {{1, 5, 3, 0, 7, 7, 2, 9, 4, 1, 1, 8, 6, 3, 2, 5, 0}, {4, 2, 9, 9, 1, 0, 3, 8, 6, 5, 7, 2, 2, 1, 4, 0, 3}};
    (void)context;
    *tokens = ids[i];
    *targets = ids[i] + 1;
    return true;
}

static StepResult train_two_steps(Backend *b, Keep keep) {
    GPT2Config config = {.V = 10, .L = 2, .H = 2, .C = 12, .T = 8};
    Error e = {0};
    GPT2 model;
    Acts acts;
    Trainer trainer;
    CHECK(gpt2_config_check(&config, &e) && gpt2_create(&model, b, &config, true, &e), "%s", e.text);
    gpt2_init(&model, 1);
    CHECK(gpt2_acts_create(&acts, &model, 2, 8, keep, true, &e) && trainer_create(&trainer, &model, &acts, &e), "%s", e.text);
    StepParams params = {.lr = 1e-2f, .beta1 = 0.9f, .beta2 = 0.95f, .eps = 1e-8f, .weight_decay = 0.1f, .grad_clip = 1, .loss_limit = INFINITY, .norm_limit = INFINITY};
    StepResult result = {0};
    for (params.step = 0; params.step < 2; params.step++) result = train_step(&trainer, &params, 2, next_batch, NULL);
    trainer_destroy(&trainer);
    gpt2_acts_destroy(&acts, &model);
    gpt2_destroy(&model);
    return result;
}

TEST(training_through_wrappers) {
    static const Keep keeps[] = {KEEP_ALL, KEEP_NO_GELU, KEEP_RESIDUAL};
    for (int i = 0; i < 3; i++) {
        Backend *first = cpu(), *second = cpu(), *null = null_backend_create("fp32");
        StepResult plain = train_two_steps(first, keeps[i]);
        Backend *tee = tee_backend_create(first, second, 0, stdout), *count = count_backend_create(tee);
        StepResult wrapped = train_two_steps(count, keeps[i]);
        EXPECT(plain.loss == wrapped.loss && plain.grad_norm == wrapped.grad_norm && plain.updates == 2, "loss %.9g, %.9g", plain.loss, wrapped.loss);
        EXPECT(tee_backend_differences(tee) == 0, "%llu differences", (unsigned long long)tee_backend_differences(tee));
        EXPECT(second->memory[MEM_OTHER] == 0, "%zu bytes of shadows left", second->memory[MEM_OTHER]);
        EXPECT(count_backend_calls(count)[OP_head_loss] == 4 && count_backend_calls(count)[OP_adamw] == 2, "calls");
        EXPECT(count_backend_calls(count)[OP_attention_forward] == (keeps[i] == KEEP_RESIDUAL ? 16 : 8), "calls of attention_forward");
        train_two_steps(null, keeps[i]);
        for (int class = 0; class < MEM_CLASS_COUNT; class++)
            EXPECT(class == MEM_SCRATCH || null->memory_peak[class] == first->memory_peak[class], "%s: null %zu, cpu %zu", mem_class_names[class],
                   null->memory_peak[class], first->memory_peak[class]);
        count->destroy(count);
        tee->destroy(tee);
        first->destroy(first);
        second->destroy(second);
        null->destroy(null);
    }
}

int main(int argc, char **argv) {
    test_start(argc, argv);
    RUN(tables_agree_with_header);
    RUN(tables_find_their_fields);
    RUN(bytes_and_flops);
    RUN(null_accounts_for_memory);
    RUN(null_finds_wrong_operands);
    RUN(count_counts);
    RUN(trace_has_every_op);
    RUN(trace_summary_adds_up);
    RUN(trace_stays_whole_beyond_its_limit);
    RUN(tee_of_equals_finds_nothing);
    RUN(tee_notices_one_element_and_one_nan);
    RUN(tee_keeps_saved_apart);
    RUN(training_through_wrappers);
    return test_done();
}
