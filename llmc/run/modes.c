/* The other things one can do with a model: evaluate it, generate from it. */
#include "generate.h"
#include "log.h"
#include "session.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---- evaluation --------------------------------------------------------------------------------------------------- */

/* Bytes of text that the targets of the first n_tokens of the dataset stand for; end of text counts none. */
static bool target_bytes(const Session *s, uint64_t n_tokens, uint64_t *bytes, Error *e) {
    size_t T = s->val.T, length;
    int32_t *inputs = xmalloc(2 * T * sizeof *inputs), *targets = inputs + T;
    bool ok = true;
    *bytes = 0;
    for (uint64_t w = 0; ok && w < n_tokens / T; w++) {
        ok = dataset_window(&s->val, w, s->shape.V, inputs, targets, e);
        for (size_t t = 0; ok && t < T; t++)
            if (targets[t] != tokenizer_end_of_text(s->tokenizer) && tokenizer_token(s->tokenizer, targets[t], &length)) *bytes += length;
    }
    free(inputs);
    return ok;
}

static bool print_evaluation(const Session *s, const Evaluation *v, Error *e) {
    printf("val loss %.6f\n", v->loss);
    printf("perplexity %.4f over %llu tokens\n", exp(v->loss), (unsigned long long)v->tokens);
    if (!s->tokenizer) return true;
    uint64_t bytes;
    if (!target_bytes(s, v->tokens, &bytes, e)) return false;
    if (bytes) printf("bits per byte %.6f over %llu bytes\n", v->loss * (double)v->tokens / log(2.0) / (double)bytes, (unsigned long long)bytes);
    return true;
}

/* A model to read from, with activations for B x T when acts is given. */
static bool open_model(const Session *s, GPT2 *model, Acts *acts, Error *e) {
    if (!gpt2_create(model, s->backend, &s->shape, false, e) || !import_weights(s->init_from, model, e)) return false;
    model->head_chunk = (size_t)s->options->head_chunk;
    return !acts || gpt2_acts_create(acts, model, s->B, s->T, KEEP_NONE, false, e);
}

static int close_model(GPT2 *model, Acts *acts, const Error *e) {
    if (acts && acts->blocks) gpt2_acts_destroy(acts, model);
    if (model->backend) gpt2_destroy(model);
    return e->code ? error_print(e) : EXIT_OK;
}

int run_eval(Session *s) {
    Error error = {0}, *e = &error;
    GPT2 model = {0};
    Acts acts = {0};
    Evaluation v;
    if (open_model(s, &model, &acts, e)) {
        session_print(s, s->backend->memory, s->backend->room(s->backend), stderr);
        session_print_plans(s, stderr);
        if (evaluate(&model, &acts, &s->val, (uint64_t)s->options->val_batches, NULL, NULL, &v, e)) print_evaluation(s, &v, e);
    }
    return close_model(&model, &acts, e);
}

/* ---- generation --------------------------------------------------------------------------------------------------- */

static void emit_token(void *context, int32_t id) {
    const Session *s = context;
    size_t bytes = 0;
    const char *text = id == tokenizer_end_of_text(s->tokenizer) ? NULL : tokenizer_token(s->tokenizer, id, &bytes);
    if (text) fwrite(text, 1, bytes, stdout);
    fflush(stdout);
}

int run_generate(Session *s) {
    Error error = {0}, *e = &error;
    const Config *o = s->options;
    if (!s->tokenizer) {
        fail(e, EXIT_USAGE, "%s holds no tokenizer files; give --tokenizer DIR (vocab.json and merges.txt)", s->init_from);
        return error_print(e);
    }
    GPT2 model = {0};
    int32_t *ids = NULL, end = tokenizer_end_of_text(s->tokenizer);
    size_t n = 0, capacity = 0;
    if (o->prompt) tokenizer_encode(s->tokenizer, o->prompt, strlen(o->prompt), &ids, &n, &capacity);
    ids = xrealloc(ids, (n + 1 + (size_t)o->max_tokens) * sizeof *ids);
    if (n == 0) ids[n++] = end >= 0 ? end : 0;
    if (open_model(s, &model, NULL, e)) {
        Sampling sampling = {.temperature = o->temperature, .top_k = o->top_k, .top_p = o->top_p, .seed = (uint64_t)o->seed};
        if (o->prompt) fputs(o->prompt, stdout);
        if (generate(&model, ids, n, (size_t)o->max_tokens, end, &sampling, emit_token, s, e)) putchar('\n');
    }
    free(ids);
    return close_model(&model, NULL, e);
}

