/* The choice of algorithms for matrix products, on the emulator with its twin of cuBLASLt: what the plan file keeps and what of it is believed,
 * what is rejected, what happens without memory, what --print-plans says. Results are compared with plain sums each time. */
#include "llmc/base/io.h"
#include "llmc/ops.h"
#include "test.h"
#include <ctype.h>
#include <sys/stat.h>
#include <unistd.h>

#ifdef LLMC_EMU
enum { N = 512, C = 16, OC = 24 }; /* so that k is long for the gradient of w, whose fastest algorithm is a split one */
enum { OUT, PRE, DINP, DW, DB, RESULTS };
static const size_t result_n[RESULTS] = {N * OC, N * OC, N * C, OC * C, OC};
static const char *const result_names[RESULTS] = {"out", "pre_gelu", "dinp", "dw", "db"};
static char folder[] = "/tmp/llmc-test-matmul-XXXXXX", plan_path[100];

/* ---- what went to stderr ------------------------------------------------------------------------------------------------ */

static int old_stderr;
static FILE *caught;
static void catch_stderr(void) {
    fflush(stderr);
    CHECK((caught = tmpfile()) != NULL, "no temporary file");
    old_stderr = dup(STDERR_FILENO);
    dup2(fileno(caught), STDERR_FILENO);
}
static void release_stderr(char **text) {
    fflush(stderr);
    dup2(old_stderr, STDERR_FILENO);
    close(old_stderr);
    const long size = ftell(caught) >= 0 && fseek(caught, 0, SEEK_END) == 0 ? ftell(caught) : 0;
    *text = xcalloc((size_t)size + 1, 1);
    rewind(caught);
    CHECK(fread(*text, 1, (size_t)size, caught) == (size_t)size, "reading back what went to stderr");
    fclose(caught);
}
static int count(const char *text, const char *what) {
    int n = 0;
    for (const char *p = text; (p = strstr(p, what)); p += strlen(what)) n++;
    return n;
}

/* ---- a linear layer, forward and backward, on a backend of its own ---------------------------------------------------------- */

typedef struct {
    float *results[RESULTS];
    char *plans, *said;       /* what print_plans prints; what went to stderr */
    size_t scratch;
} Outcome;

static void outcome_free(Outcome *o) {
    for (int i = 0; i < RESULTS; i++) free(o->results[i]);
    free(o->plans), free(o->said);
    *o = (Outcome){0};
}

static float input(int seed, size_t i) { return (float)((int)((i + (size_t)seed * 7919) * 2654435761u >> 16 & 255) - 128) / 256; } /* exact in bf16 */

static void *operand(Backend *b, int seed, size_t n) { /* seed 0: the room alone, for floats */
    Error e = {0};
    char *host = xcalloc(n, 4);
    for (size_t i = 0; i < n; i++) {
        const float x = input(seed, i);
        memcpy(host + i * b->elem_bytes, (const char *)&x + 4 - b->elem_bytes, b->elem_bytes);
    }
    void *p = b->alloc(b, MEM_OTHER, "test", n * 4, &e);
    CHECK(p, "%s", e.text);
    if (seed) b->upload(b, p, host, n * b->elem_bytes);
    free(host);
    return p;
}

static void result(Backend *b, Outcome *o, int which, const void *p) {
    const size_t n = result_n[which], each = which == DW || which == DB ? 4 : b->elem_bytes;
    char *host = xcalloc(n, each);
    o->results[which] = xcalloc(n, sizeof(float));
    b->download(b, host, p, n * each);
    for (size_t i = 0; i < n; i++) memcpy((char *)&o->results[which][i] + 4 - each, host + i * each, each);
    free(host);
}

typedef struct {
    const char *dtype, *file, *mode; /* mode: LLMC_EMU_MATMUL */
    long spare;               /* bytes of memory beside operands and scratch; 0: plenty */
    size_t scratch;           /* with spare: what planning takes */
    double peak;
    bool own;                 /* --own-products on */
} Setting;

static Backend *create(const Setting *s) {
    Error e = {0};
    CudaOptions options = {.dtype = s->dtype ? s->dtype : "bf16", .attention = "ours", .plan_file = s->file, .fuse_gelu = true, .graphs = true, .own_products = s->own ? OWN_ON : OWN_OFF};
    if (s->mode) setenv("LLMC_EMU_MATMUL", s->mode, 1);
    else unsetenv("LLMC_EMU_MATMUL");
    Backend *b = emu_backend_create(&options, &e);
    CHECK(b, "%s", e.text);
    b->peak_flops = s->peak;
    return b;
}

static void limit_memory(Backend *b, const Setting *s) {
    char bytes[32];
    unsetenv("LLMC_EMU_MEMORY");
    if (!s->spare) return;
    const size_t used = ((size_t)4 << 30) - b->room(b);
    snprintf(bytes, sizeof bytes, "%zu", used + s->scratch + (size_t)s->spare);
    setenv("LLMC_EMU_MEMORY", bytes, 1);
}

static Outcome run(Setting s) {
    Outcome o = {0};
    Error e = {0};
    catch_stderr();
    Backend *b = create(&s);
    LinearForward f = {.out = {operand(b, 0, N * OC)}, .pre_gelu = {operand(b, 0, N * OC)}, .inp = {operand(b, 1, N * C)}, .w = {operand(b, 2, OC * C)},
                       .b = {operand(b, 3, OC)}, .N = N, .C = C, .OC = OC};
    LinearBackward g = {.dinp = {operand(b, 0, N * C)}, .dw = {operand(b, 0, OC * C)}, .db = {operand(b, 0, OC)}, .dout = {operand(b, 4, N * OC)},
                        .inp = f.inp, .w = f.w, .pre_gelu = {operand(b, 5, N * C)}, .N = N, .C = C, .OC = OC};
    limit_memory(b, &s);
    for (int again = 0; again < 2; again++) { /* the second plan has nothing new */
        b->plan_begin(b);
        b->linear_forward(b, &f);
        b->linear_backward(b, &g);
        CHECK(b->plan_end(b, &e), "%s", e.text);
    }
    o.scratch = b->memory[MEM_SCRATCH];
    b->linear_forward(b, &f);
    b->linear_backward(b, &g);
    b->linear_backward(b, &g); /* twice: dw and db add */
    const void *const p[RESULTS] = {f.out.p, f.pre_gelu.p, g.dinp.p, g.dw.p, g.db.p};
    for (int i = 0; i < RESULTS; i++) result(b, &o, i, p[i]);
    size_t length;
    FILE *text = open_memstream(&o.plans, &length);
    b->print_plans(b, text);
    fclose(text);
    b->destroy(b);
    unsetenv("LLMC_EMU_MEMORY");
    unsetenv("LLMC_EMU_MATMUL");
    release_stderr(&o.said);
    return o;
}

/* ---- the same by plain sums --------------------------------------------------------------------------------------------------- */

static double gelu(double x) { return 0.5 * x * (1 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))); }
static double gelu_slope(double x) { return (gelu(x + 1e-5) - gelu(x - 1e-5)) / 2e-5; }

static void expect(const Outcome *o, int which, size_t i, double exact, double size, double rounding) {
    const double found = (double)o->results[which][i];
    EXPECT(fabs(found - exact) <= rounding * fabs(exact) + 1e-6 * size, "%s[%zu] is %.8g, by plain sums %.8g", result_names[which], i, found, exact);
}

static void expect_right(const Outcome *o, bool bf16) {
    const double u = bf16 ? 0x1p-8 : 1e-6; /* the composed forms round twice */
    for (size_t n = 0; n < N; n += 7)
        for (size_t j = 0; j < OC; j++) {
            double sum = (double)input(3, j), size = 1;
            for (size_t k = 0; k < C; k++) sum += (double)input(1, n * C + k) * (double)input(2, j * C + k), size += 0.25;
            expect(o, PRE, n * OC + j, sum, size, u);
            expect(o, OUT, n * OC + j, gelu(sum), size + (bf16 ? 4e3 * fabs(sum) : 0), 2 * u);
        }
    for (size_t n = 0; n < N; n += 7)
        for (size_t c = 0; c < C; c++) {
            double sum = 0;
            for (size_t k = 0; k < OC; k++) sum += (double)input(4, n * OC + k) * (double)input(2, k * C + c);
            expect(o, DINP, n * C + c, sum * gelu_slope((double)input(5, n * C + c)), 6, 2 * u);
        }
    for (size_t j = 0; j < OC; j++) {
        double db = 0;
        for (size_t n = 0; n < N; n++) db += (double)input(4, n * OC + j);
        expect(o, DB, j, 2 * db, N, 0);
        for (size_t c = 0; c < C; c++) {
            double dw = 0;
            for (size_t n = 0; n < N; n++) dw += (double)input(4, n * OC + j) * (double)input(1, n * C + c);
            expect(o, DW, j * C + c, 2 * dw, N, 0);
        }
    }
}

static void expect_same_bits(const Outcome *a, const Outcome *b) {
    for (int i = 0; i < RESULTS; i++)
        EXPECT(!memcmp(a->results[i], b->results[i], result_n[i] * sizeof(float)), "%s has other bits", result_names[i]);
}

/* ---- files ------------------------------------------------------------------------------------------------------------------------ */

static char *content(void) {
    Error e = {0};
    size_t bytes;
    char *text = file_read(plan_path, &bytes, &e);
    CHECK(text, "%s", e.text);
    return text;
}
static void put_content(const char *text, size_t bytes) {
    FILE *f = fopen(plan_path, "w");
    CHECK(f && fwrite(text, 1, bytes, f) == bytes && fclose(f) == 0, "writing %s", plan_path);
}
static char *replaced(const char *text, const char *from, const char *to) { /* everywhere */
    char *out = xcalloc(strlen(text) * (1 + strlen(to)) + 1, 1), *at = out;
    for (const char *p = text; *p;) {
        if (!strncmp(p, from, strlen(from))) at = stpcpy(at, to), p += strlen(from);
        else *at++ = *p++;
    }
    return out;
}
/* A plan file as a run writes it, and that run. */
static char *fresh(Outcome *o, const char *dtype) {
    unlink(plan_path);
    *o = run((Setting){.dtype = dtype, .file = plan_path});
    return content();
}
/* The same run over what the file holds now: measures as many products as said, gives the same bits, leaves a file that holds `good`. */
static char *again(const Outcome *first, const char *good, int measured) {
    Outcome o = run((Setting){.file = plan_path});
    char *now = content();
    EXPECT(6 - count(o.plans, "from the plan file") == measured, "%s", o.plans);
    expect_same_bits(first, &o);
    for (const char *line = good; *line; line = strchr(line, '\n') + 1) {
        char *copy = xstrdup(line);
        copy[strcspn(copy, "\n")] = 0;
        EXPECT(strstr(now, copy), "the file lacks \"%s\"", copy);
        free(copy);
    }
    for (int i = 0; i < RESULTS; i++) free(o.results[i]);
    free(o.plans), free(now);
    return o.said;
}

/* ---- the tests --------------------------------------------------------------------------------------------------------------------- */

TEST(a_second_run_reads_the_plan_file_and_measures_nothing) {
    for (int fp32 = 0; fp32 < 2; fp32++) {
        struct stat before, after;
        Outcome first, second;
        char *text = fresh(&first, fp32 ? "fp32" : "bf16");
        CHECK(stat(plan_path, &before) == 0, "%s", plan_path);
        second = run((Setting){.dtype = fp32 ? "fp32" : "bf16", .file = plan_path});
        CHECK(stat(plan_path, &after) == 0, "%s", plan_path);
        char *now = content();
        const int products = fp32 ? 4 : 6; /* in fp32 GELU is not fused */
        EXPECT(count(text, "\n") == products + 1 && count(text, fp32 ? " fp32 " : " bf16 ") == products + 1, "%s", text);
        EXPECT(count(text, "emulated_GPU cublasLt-1 ") == products + 1 && count(text, "copy = bytes_per_second ") == 1, "%s", text);
        EXPECT(count(first.said, "timing the algorithms of") == 1 && count(first.plans, "from the plan file") == 0, "%s%s", first.said, first.plans);
        EXPECT(!*second.said && count(second.plans, "from the plan file") == products, "%s%s", second.said, second.plans);
        EXPECT(!strcmp(text, now) && before.st_ino == after.st_ino && before.st_mtim.tv_sec == after.st_mtim.tv_sec &&
               before.st_mtim.tv_nsec == after.st_mtim.tv_nsec, "the file was written again");
        expect_right(&first, !fp32);
        expect_same_bits(&first, &second);
        outcome_free(&first), outcome_free(&second);
        free(text), free(now);
    }
}

TEST(print_plans_says_what_was_chosen) {
    static const struct { const char *product, *chosen; double M, N, K; } lines[] = { /* algorithm tile stages cluster split-K workspace */
        {"M=512 N=24 K=16 a=n16 b=t16 c=24 elem set bias |", "| 1 128x128 3 1 1 0.1 MiB |", 512, 24, 16},
        {"M=512 N=24 K=16 a=n16 b=t16 c=24 elem set bias_gelu |", "| 1 128x128 3 1 1 0.1 MiB |", 512, 24, 16},
        {"M=512 N=16 K=24 a=n24 b=n16 c=16 elem set none |", "| 1 128x128 3 1 1 0.1 MiB |", 512, 16, 24},
        {"M=512 N=16 K=24 a=n24 b=n16 c=16 elem set dgelu |", "| 1 128x128 3 1 1 0.1 MiB |", 512, 16, 24},
        {"M=24 N=16 K=512 a=t24 b=n16 c=16 float add none |", "| 0 64x64 3 1 4 0.0 MiB |", 24, 16, 512},
        {"M=24 N=16 K=512 a=t24 b=n16 c=16 float add bias_grad |", "| 0 64x64 3 1 4 0.0 MiB |", 24, 16, 512}};
    const double peak = 1e10;
    Outcome o = run((Setting){.peak = peak});
    EXPECT(count(o.plans, "\n") == 8 && strstr(o.plans, "products (emulated_GPU cublasLt-1 bf16)") && strstr(o.plans, "a copy moves "), "%s", o.plans);
    for (size_t i = 0; i < sizeof lines / sizeof *lines; i++) {
        double us, tflops, percent, rate;
        const char *line = strstr(o.plans, lines[i].product), *end = line ? strchr(line, '\n') : NULL, *chosen = line ? strstr(line, lines[i].chosen) : NULL;
        EXPECT(chosen && chosen < end, "no line \"%s ... %s\" in\n%s", lines[i].product, lines[i].chosen, o.plans);
        if (!chosen) continue;
        const bool parsed = sscanf(chosen + strlen(lines[i].chosen), " %lf us %lf TFLOP/s %lf %%", &us, &tflops, &percent) == 3;
        EXPECT(parsed && us >= 100, "%s", line);
        rate = 2 * lines[i].M * lines[i].N * lines[i].K / (1e-6 * us);
        EXPECT(parsed && fabs(tflops - 1e-12 * rate) < 0.06 && fabs(percent - 100 * rate / peak) < 0.06 + 1e-3 * percent, "%g us %g TFLOP/s %g %%", us, tflops, percent);
        EXPECT(!strstr(lines[i].product, "elu") || count(line, " | fused\n"), "%s", line);
    }
    expect_right(&o, true);
    outcome_free(&o);
    o = run((Setting){0});
    EXPECT(count(o.plans, "TFLOP/s n/a") == 6, "%s", o.plans);
    outcome_free(&o);
}

/* One line of the file spoiled: what stands after " = " in the line of the product with epilogue `epilogue`. */
static char *spoiled(const char *good, const char *epilogue, const char *value) {
    char key[32];
    snprintf(key, sizeof key, " %s = ", epilogue);
    const char *at = strstr(good, key);
    CHECK(at, "no line of %s", epilogue);
    at += strlen(key);
    return xasprintf("%.*s%s%s", (int)(at - good), good, value, strchr(at, '\n'));
}

TEST(a_line_that_is_not_to_be_used_is_named_and_measured_anew) {
    Outcome first;
    char *good = fresh(&first, "bf16"), *algo = strstr(good, "bias = algo ") + strlen("bias = algo "), spoil[9][200];
    CHECK(strlen(algo) > 128 && algo[128] == ' ', "%s", good);
    snprintf(spoil[0], 200, "algo %.127s us 5.0", algo);                  /* short */
    snprintf(spoil[1], 200, "algo %.127sx us 5.0", algo);                 /* no hex */
    snprintf(spoil[2], 200, "algo %.128s us -5.0", algo);
    snprintf(spoil[3], 200, "algo %.128s us nan", algo);
    snprintf(spoil[4], 200, "algo %.128s", algo);
    snprintf(spoil[5], 200, "algo ff%.126s us 5.0", algo + 2);            /* unknown to the library */
    snprintf(spoil[6], 200, "algo 04%.126s us 5.0", algo + 2);            /* known, but not for this product */
    snprintf(spoil[7], 200, "algo %.126sff us 5.0", algo);
    snprintf(spoil[8], 200, "none of your business");
    for (int i = 0; i < 9; i++) {
        char *bad = spoiled(good, "bias", spoil[i]);
        put_content(bad, strlen(bad));
        char *said = again(&first, good, 1);
        EXPECT(count(said, "warning: ") == 1 && strstr(said, plan_path) && strstr(said, "elem set bias\" is not to be used; the product is timed anew"),
               "%s: \"%s\"", spoil[i], said);
        free(bad), free(said);
    }
    char *said = again(&first, good, 0);
    EXPECT(!*said, "%s", said);
    free(said), free(good);
    outcome_free(&first);
}

TEST(lines_that_are_no_plans_are_counted_and_dropped) {
    Outcome first;
    char *good = fresh(&first, "bf16"), *said;
    char *bad = xasprintf("# nothing\n = 5\nkey = \n%s\n\ngpu =algo\n", good);
    put_content(bad, strlen(bad));
    said = again(&first, good, 0);
    EXPECT(!strncmp(said, "warning: plan file", 18) && strstr(said, "4 lines ignored, expected KEY = VALUE") && count(said, "\n") == 1, "%s", said);
    free(said);

    put_content(good, strlen(good) - 40); /* the write of a full disk: the last line is the copy's */
    said = again(&first, "", 0);
    EXPECT(count(said, "warning") <= 1, "%s", said);
    free(said);
    put_content("", 0);
    said = again(&first, good, 6);
    EXPECT(!count(said, "warning"), "%s", said);
    free(said);
    put_content("a = b\0c = d\n", 12);
    said = again(&first, good, 6);
    EXPECT(count(said, "warning") == 1 && strstr(said, "1 lines ignored"), "%s", said);
    free(said), free(good), free(bad);
    outcome_free(&first);
}

TEST(plans_of_another_gpu_version_or_type_do_not_count_and_stay) {
    const char *const others[][2] = {{"emulated_GPU ", "another_GPU "}, {"cublasLt-1 ", "cublasLt-2 "}, {" bf16 ", " fp32 "}, {"M=512 ", "M=511 "}};
    Outcome first;
    char *good = fresh(&first, "bf16");
    for (int i = 0; i < 4; i++) {
        char *other = replaced(good, others[i][0], others[i][1]), *said;
        put_content(other, strlen(other));
        char *both = xasprintf("%s%s", good, other);
        said = again(&first, both, i == 3 ? 4 : 6); /* the gradient of w has another M */
        EXPECT(!count(said, "warning") && count(said, "timing the algorithms") == 1, "%s", said);
        free(other), free(both), free(said);
    }
    free(good);
    outcome_free(&first);
}

TEST(what_another_process_adds_meanwhile_is_kept) {
    Outcome first;
    char *good = fresh(&first, "bf16"), *now;
    Error e = {0};
    unlink(plan_path);
    catch_stderr();
    Backend *early = create(&(Setting){.file = plan_path}); /* has read the file: there is none */
    put_content(good, strlen(good));
    LinearForward f = {.N = 3, .C = 8, .OC = 16};
    early->plan_begin(early);
    early->linear_forward(early, &f);
    CHECK(early->plan_end(early, &e), "%s", e.text);
    early->destroy(early);
    char *said;
    release_stderr(&said);
    now = content();
    EXPECT(count(now, "M=3 N=16 K=8 ") == 1 && count(now, "\n") == count(good, "\n") + 1, "%s", now);
    free(now), free(said);
    said = again(&first, good, 0);
    EXPECT(!*said, "%s", said);
    free(good), free(said);
    outcome_free(&first);
}

TEST(a_file_that_cannot_be_written_is_one_warning) {
    char *nowhere = xasprintf("%s/missing/plans", folder);
    Outcome o = run((Setting){.file = nowhere}), p = run((Setting){.file = folder});
    EXPECT(count(o.said, "warning: ") == 1 && strstr(o.said, nowhere) && strstr(o.said, "the algorithms of the matrix products are not kept"), "%s", o.said);
    EXPECT(count(p.said, "warning: ") == 2 && strstr(p.said, "matrix products are timed anew") && strstr(p.said, "are not kept"), "%s", p.said);
    expect_right(&o, true);
    expect_same_bits(&o, &p);
    outcome_free(&o), outcome_free(&p);
    free(nowhere);
}

TEST(an_algorithm_that_is_wrong_or_does_not_repeat_is_rejected) {
    for (int fp32 = 0; fp32 < 2; fp32++) {
        const char *dtype = fp32 ? "fp32" : "bf16";
        const int products = fp32 ? 4 : 6;
        Outcome good = run((Setting){.dtype = dtype}), o = run((Setting){.dtype = dtype, .mode = "wrong,unrepeatable"});
        EXPECT(count(o.said, "times its rounding; not used") == products, "%s", o.said);
        EXPECT(count(o.said, "gives other bits the second time; not used") == products, "%s", o.said);
        EXPECT(strstr(o.said, "cuBLASLt candidate") && count(o.said, "of product M=24 N=16 K=512 a=t24 b=n16 c=16 float add bias_grad ") == 2, "%s", o.said);
        EXPECT(!strcmp(o.plans, good.plans), "%s%s", o.plans, good.plans);
        expect_right(&o, !fp32);
        expect_same_bits(&good, &o);
        outcome_free(&good), outcome_free(&o);
    }
}

TEST(without_memory_to_measure_the_first_choice_is_used_and_not_kept) {
    unlink(plan_path);
    Outcome plenty = run((Setting){0});
    Outcome o = run((Setting){.file = plan_path, .spare = 4096, .scratch = plenty.scratch});
    EXPECT(count(o.said, "to time matrix products in are not to be had; the library's first choice is used, with no epilogue but a bias") == 6, "%s", o.said);
    EXPECT(count(o.plans, "| 0 64x64 3 1 1 0.0 MiB | not timed") == 3 && count(o.plans, "| composed") == 3 && access(plan_path, F_OK) != 0, "%s", o.plans);
    expect_right(&o, true);
    outcome_free(&o);
    o = run((Setting){.file = plan_path, .spare = 100 << 10, .scratch = plenty.scratch}); /* room for the products, not for the copies */
    EXPECT(count(o.said, "are not to be had; fused products are not compared with composed ones") == 1 && count(o.said, "warning") == 1, "%s", o.said);
    EXPECT(count(o.plans, "us ") >= 6 && !strstr(o.plans, "a copy moves") && count(o.plans, "| fused") == 3, "%s", o.plans);
    expect_right(&o, true);
    outcome_free(&o), outcome_free(&plenty);
}

TEST(a_slow_epilogue_is_composed_and_the_file_decides_alike) {
    unlink(plan_path);
    Outcome first = run((Setting){.file = plan_path, .mode = "slow-epilogue"}), second = run((Setting){.file = plan_path});
    EXPECT(count(first.plans, " | composed\n") == 3 && count(first.plans, " | fused\n") == 0, "%s", first.plans);
    EXPECT(count(second.plans, " | composed\n") == 3 && count(second.plans, "from the plan file") == 6 && !*second.said, "%s%s", second.plans, second.said);
    expect_right(&first, true);
    expect_same_bits(&first, &second);
    outcome_free(&first), outcome_free(&second);
}

TEST(what_the_library_cannot_do_is_ours) {
    for (int fp32 = 0; fp32 < 2; fp32++) {
        unlink(plan_path);
        Setting s = {.dtype = fp32 ? "fp32" : "bf16", .file = plan_path, .mode = "plain"};
        Outcome first = run(s);
        s.mode = NULL;
        Outcome second = run(s); /* the file says that there is nothing */
        EXPECT(count(first.plans, "our plain kernel") == 3 && count(first.plans, "not in the library") == (fp32 ? 1 : 3), "%s", first.plans);
        EXPECT(!strcmp(first.plans, second.plans) && !count(second.said, "timing"), "%s%s", second.plans, second.said);
        expect_right(&first, !fp32);
        expect_same_bits(&first, &second);
        outcome_free(&first), outcome_free(&second);
    }
}

TEST(own_products_win_where_they_are_faster_and_are_kept) {
    unlink(plan_path);
    const Setting on = {.file = plan_path, .mode = "own-fast", .own = true};
    Outcome first = run(on), second = run(on);
    char *text = content();
    EXPECT(count(first.plans, "| own 128x192 - 2 ") == 6 && count(first.plans, " | library ") == 6 && count(first.plans, ", own ") == 6, "%s", first.plans);
    EXPECT(count(first.plans, "c=16 float add none | own 128x192 - 2 2 0.0 MiB |") == 1 && count(first.plans, " | fused\n") == 3, "%s", first.plans);
    EXPECT(count(text, "emulated_GPU cublasLt-1+own-1 bf16 ") == 7 && count(text, " = own 128x192 ") == 6, "%s", text);
    EXPECT(!*second.said && count(second.plans, "from the plan file") == 6 && count(second.plans, "| own 128x192 - 2 ") == 6, "%s%s", second.plans, second.said);
    expect_right(&first, true);
    expect_same_bits(&first, &second);
    Outcome off = run((Setting){.file = plan_path}), none = run((Setting){0}); /* off: its own lines in the same file */
    char *both = content();
    EXPECT(!count(off.plans, "own ") && !count(off.plans, "from the plan file") && !count(off.said, "warning") && strstr(both, text), "%s%s", off.plans, off.said);
    expect_same_bits(&off, &none);
    outcome_free(&second), outcome_free(&off), outcome_free(&none);
    second = run((Setting){.file = plan_path, .mode = "plain", .own = true});
    EXPECT(!*second.said && count(second.plans, "| own 128x192 - 2 ") == 6, "%s%s", second.plans, second.said);
    outcome_free(&second);
    free(text), free(both);
    outcome_free(&first);
}

TEST(own_products_that_are_slower_or_wrong_are_not_taken) {
    Outcome library = run((Setting){0}), slow = run((Setting){.own = true}), wrong = run((Setting){.own = true, .mode = "own-wrong"});
    EXPECT(!count(slow.plans, "| own ") && count(slow.plans, " | library ") == 6 && count(slow.said, "warning") == 0, "%s%s", slow.plans, slow.said);
    EXPECT(!count(wrong.plans, "| own ") && count(wrong.plans, " | library ") == 0, "%s", wrong.plans);
    EXPECT(count(wrong.said, "warning: our candidate 128x") == 18 && count(wrong.said, "times its rounding; not used") == 18 && count(wrong.said, "128x160, 1 part of product M=512") == 4, "%s", wrong.said);
    expect_same_bits(&library, &slow), expect_same_bits(&library, &wrong);
    const size_t scratch = slow.scratch;
    outcome_free(&library), outcome_free(&slow), outcome_free(&wrong);
    Outcome only = run((Setting){.own = true, .mode = "plain,own-fast"}); /* the library has nothing */
    EXPECT(count(only.plans, "| own 128x") == 6 && count(only.plans, " | library ") == 0, "%s", only.plans);
    expect_right(&only, true);
    outcome_free(&only);
    Outcome tight = run((Setting){.own = true, .mode = "own-fast", .spare = 4096, .scratch = scratch}); /* nothing can be timed, or checked */
    EXPECT(count(tight.plans, "| own ") == 0, "%s", tight.plans);
    outcome_free(&tight);
}

TEST(own_lines_of_the_plan_file_that_are_not_to_be_used) {
    const char *const spoil[] = {"own 128x192 0 us 5", "own 128x200 1 us 5", "own 128x192 17 us 5", "own 128x192 3 us 5", "own 128x192 1 us -1", "own 128x192 1", "own none 1 us 5"};
    unlink(plan_path);
    const Setting on = {.file = plan_path, .mode = "own-fast", .own = true};
    Outcome first = run(on);
    char *good = content();
    for (size_t i = 0; i < sizeof spoil / sizeof *spoil; i++) {
        char *bad = spoiled(good, "bias", spoil[i]);
        put_content(bad, strlen(bad));
        Outcome o = run(on);
        EXPECT(count(o.said, "elem set bias\" is not to be used; the product is timed anew") == 1 && count(o.plans, "from the plan file") == 5, "%s: %s%s", spoil[i], o.said, o.plans);
        expect_same_bits(&first, &o);
        outcome_free(&o), free(bad);
    }
    free(good);
    outcome_free(&first);
}

TEST(own_products_are_for_bf16) {
    Error e = {0};
    CudaOptions options = {.dtype = "fp32", .attention = "ours", .own_products = OWN_ON};
    EXPECT(!emu_backend_create(&options, &e) && e.code == EXIT_USAGE && strstr(e.text, "--own-products: these products are in bf16 alone"), "%d %s", e.code, e.text);
}

int main(int argc, char **argv) {
    test_start(argc, argv);
    CHECK(mkdtemp(folder), "%s", folder);
    snprintf(plan_path, sizeof plan_path, "%s/plans", folder);
    RUN(a_second_run_reads_the_plan_file_and_measures_nothing);
    RUN(print_plans_says_what_was_chosen);
    RUN(a_line_that_is_not_to_be_used_is_named_and_measured_anew);
    RUN(lines_that_are_no_plans_are_counted_and_dropped);
    RUN(plans_of_another_gpu_version_or_type_do_not_count_and_stay);
    RUN(what_another_process_adds_meanwhile_is_kept);
    RUN(a_file_that_cannot_be_written_is_one_warning);
    RUN(an_algorithm_that_is_wrong_or_does_not_repeat_is_rejected);
    RUN(without_memory_to_measure_the_first_choice_is_used_and_not_kept);
    RUN(a_slow_epilogue_is_composed_and_the_file_decides_alike);
    RUN(what_the_library_cannot_do_is_ours);
    RUN(own_products_win_where_they_are_faster_and_are_kept);
    RUN(own_products_that_are_slower_or_wrong_are_not_taken);
    RUN(own_lines_of_the_plan_file_that_are_not_to_be_used);
    RUN(own_products_are_for_bf16);
    unlink(plan_path);
    rmdir(folder);
    return test_done();
}
#else
TEST(emulated_products) { SKIP("no C++ compiler in this build"); }
int main(int argc, char **argv) {
    test_start(argc, argv);
    RUN(emulated_products);
    return test_done();
}
#endif
