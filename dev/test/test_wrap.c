/* The wrappers and ops as data: the tables against the comments of ops.h, and each wrapper around the real CPU backend. */
#include "llmc/ops.h"
#include "test.h"
#include <ctype.h>

/* ---- ops as data -------------------------------------------------------------------------------------------------- */

/* Distinct primes, so that a wrong shape gives a wrong number; C = H D. */
enum { SB = 2, ST = 3, SH = 5, SD = 7, SC = SH * SD, SN = 11, SV = 13, SOC = 17, Sn = 19 };
typedef union {
#define MEMBER(name, Args) Args name;
    LLMC_OPS(MEMBER)
#undef MEMBER
} AnyArgs;

static void set_sizes(OpId op, AnyArgs *a) {
    memset(a, 0, sizeof *a);
    switch (op) {
    case OP_embed_forward: a->embed_forward = (EmbedForward){.B = SB, .T = ST, .C = SC, .V = SV}; break;
    case OP_add_norm_forward: a->add_norm_forward = (AddNormForward){.N = SN, .C = SC}; break;
    case OP_linear_forward: a->linear_forward = (LinearForward){.N = SN, .C = SC, .OC = SOC}; break;
    case OP_gelu_forward: a->gelu_forward = (GeluForward){.n = Sn}; break;
    case OP_attention_forward: a->attention_forward = (AttentionForward){.B = SB, .T = ST, .H = SH, .D = SD}; break;
    case OP_head_loss: a->head_loss = (HeadLoss){.N = SN, .C = SC, .V = SV}; break;
    case OP_head_logits: a->head_logits = (HeadLogits){.N = SN, .C = SC, .V = SV}; break;
    case OP_linear_backward: a->linear_backward = (LinearBackward){.N = SN, .C = SC, .OC = SOC}; break;
    case OP_attention_backward: a->attention_backward = (AttentionBackward){.B = SB, .T = ST, .H = SH, .D = SD}; break;
    case OP_add_norm_backward: a->add_norm_backward = (AddNormBackward){.N = SN, .C = SC}; break;
    case OP_embed_backward: a->embed_backward = (EmbedBackward){.B = SB, .T = ST, .C = SC, .V = SV}; break;
    case OP_loss_sum: a->loss_sum.n = Sn; break;
    case OP_sum_squares: a->sum_squares.n = Sn; break;
    case OP_step_decide: case OP_COUNT: break;
    case OP_adamw: a->adamw.n = Sn; break;
    case OP_cast_params: a->cast_params.n = Sn; break;
    }
}

/* Elements of a shape as ops.h writes it, "(B, T, 3C)". */
static size_t shape_elements(const char *s) {
    static const struct { const char *letter; size_t value; } letters[] = {
        {"OC", SOC}, {"B", SB}, {"T", ST}, {"C", SC}, {"N", SN}, {"V", SV}, {"n", Sn}};
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
    Backend *null = null_backend_create();
    for (int op = 0; op < OP_COUNT; op++) {
        AnyArgs args;
        set_sizes((OpId)op, &args);
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
    Backend *null = null_backend_create();
    char target;
    for (int op = 0; op < OP_COUNT; op++) {
        AnyArgs args;
        set_sizes((OpId)op, &args);
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
    Backend *null = null_backend_create();
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
    Operand step = {.kind = KIND_STEP, .n = 1};
    EXPECT(operand_bytes(null, &step) == sizeof(StepState), "%zu", operand_bytes(null, &step));
    null->destroy(null);
}

/* ---- null --------------------------------------------------------------------------------------------------------- */

TEST(null_accounts_for_memory) {
    Backend *null = null_backend_create();
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

int main(int argc, char **argv) {
    test_start(argc, argv);
    RUN(tables_agree_with_header);
    RUN(tables_find_their_fields);
    RUN(bytes_and_flops);
    RUN(null_accounts_for_memory);
    return test_done();
}
