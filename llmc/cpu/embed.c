/* Token and position embedding, and its backward in a fixed order of summation. */
#include "cpu.h"

static size_t token_at(const Tokens *tokens, size_t i, size_t V, const char *op) {
    int32_t id = tokens->p[i];
    CHECK(id >= 0 && (size_t)id < V, "%s: token %d at position %zu, vocabulary %zu", op, id, i, V);
    return (size_t)id;
}

void cpu_embed_forward(Backend *b, const EmbedForward *a) {
    CHECK(a->B && a->T && a->C && a->V, "embed_forward: B %zu, T %zu, C %zu, V %zu", a->B, a->T, a->C, a->V);
    if (cpu_planning(b)) return;
    CHECK(a->out.p && a->tokens.p && a->wte.p && a->wpe.p, "embed_forward: operand absent");
#pragma omp parallel for schedule(static) if (a->B * a->T * a->C > 16384)
    for (size_t n = 0; n < a->B * a->T; n++) {
        const float *token = (const float *)a->wte.p + token_at(&a->tokens, n, a->V, "embed_forward") * a->C;
        const float *position = (const float *)a->wpe.p + n % a->T * a->C;
        float *out = (float *)a->out.p + n * a->C;
        for (size_t c = 0; c < a->C; c++) out[c] = token[c] + position[c];
    }
}

enum { STRIP = 64 };      /* channels per job: a job adds all rows in ascending order to its channels */

void cpu_embed_backward(Backend *b, const EmbedBackward *a) {
    CHECK(a->B && a->T && a->C && a->V, "embed_backward: B %zu, T %zu, C %zu, V %zu", a->B, a->T, a->C, a->V);
    if (cpu_planning(b)) return;
    CHECK(a->dwte.p && a->dwpe.p && a->dout.p && a->tokens.p, "embed_backward: operand absent");
#pragma omp parallel for schedule(static) if (a->B * a->T * a->C > 16384)
    for (size_t c0 = 0; c0 < a->C; c0 += STRIP) {
        size_t end = size_min(c0 + STRIP, a->C);
        for (size_t n = 0; n < a->B * a->T; n++) {
            float *dtoken = a->dwte.p + token_at(&a->tokens, n, a->V, "embed_backward") * a->C;
            float *dposition = a->dwpe.p + n % a->T * a->C;
            const float *dout = (const float *)a->dout.p + n * a->C;
            for (size_t c = c0; c < end; c++) {
                dtoken[c] += dout[c];
                dposition[c] += dout[c];
            }
        }
    }
}
