/* The table of options, and the checks that concern more than one of them. */
#include "config.h"
#include <string.h>

#define AT(field) offsetof(Config, field)
static const Option options[] = {
    {"data", OPT_STRING, AT(data), NULL, 0, 0, NULL, "Data", "PATH", "training data: a text file, or token shards (a file or a quoted glob)"},
    {"val", OPT_STRING, AT(val), NULL, 0, 0, NULL, "Data", "PATH", "validation data, likewise; absent with text: the last part of --data"},
    {"val-fraction", OPT_FLOAT, AT(val_fraction), "0.05", 0.0001, 0.5, NULL, "Data", "F", "that part, when --data is text and --val is absent"},
    {"tokenizer", OPT_STRING, AT(tokenizer), NULL, 0, 0, NULL, "Data", "DIR", "vocab.json + merges.txt (or tokenizer.json); absent with text: trained on it"},
    {"vocab-size", OPT_INT, AT(vocab_size), "0", 0, 1 << 24, NULL, "Data", "N", "vocabulary; 0: of the tokenizer, else by the text's size, else of the shard format"},

    {"model", OPT_STRING, AT(model), NULL, 0, 0, NULL, "Model", "NAME", "gpt2 (124M), gpt2-medium (350M), gpt2-large (774M), gpt2-xl (1558M), gpt3-125m ... gpt3-13b"},
    {"layers", OPT_INT, AT(layers), "0", 0, 10000, NULL, "Model", "N", "number of blocks; 0: of --model, else 4"},
    {"channels", OPT_INT, AT(channels), "0", 0, 1 << 20, NULL, "Model", "N", "width; 0: of --model, else 128"},
    {"heads", OPT_INT, AT(heads), "0", 0, 65536, NULL, "Model", "N", "attention heads; 0: of --model, else 4"},
    {"seq-len", OPT_INT, AT(seq_len), "0", 0, 1 << 24, NULL, "Model", "T", "tokens per sample; 0: of --model, else 128"},
    {"init-from", OPT_STRING, AT(init_from), NULL, 0, 0, NULL, "Model", "PATH", "start from a Hugging Face GPT-2 directory, .safetensors, llm.c weights .bin, or a run directory"},

    {"out", OPT_STRING, AT(out), NULL, 0, 0, NULL, "Run", "DIR", "run directory: checkpoints, metrics.jsonl, configuration"},
    {"resume", OPT_CHOICE, AT(resume), "auto", 0, 0, "auto|never", "Run", "HOW", "auto: continue what --out holds; never: refuse a used directory"},
    {"save-every", OPT_INT, AT(save_every), "500", 0, 1e15, NULL, "Run", "N", "checkpoint every N steps; 0: at the end alone"},
    {"keep", OPT_INT, AT(keep), "3", 1, 1e9, NULL, "Run", "K", "checkpoints to keep, the newest K"},
    {"keep-every", OPT_INT, AT(keep_every), "0", 0, 1e15, NULL, "Run", "M", "also keep every checkpoint whose step is a multiple of M; 0: none"},
    {"allow-change", OPT_STRING, AT(allow_change), NULL, 0, 0, NULL, "Run", "NAMES", "let a resumed run change: data, tokenizer, shape, batch, schedule, optimizer, seed (comma separated)"},
    {"log-every", OPT_INT, AT(log_every), "1", 1, 1e9, NULL, "Run", "N", "a console line every N steps"},
    {"trace", OPT_STRING, AT(trace), NULL, 0, 0, NULL, "Run", "FILE", "write a timeline of the ops for chrome://tracing or Perfetto"},
    {"trace-steps", OPT_INT, AT(trace_steps), "5", 1, 1e6, NULL, "Run", "N", "steps that --trace covers"},
    {"config", OPT_STRING, AT(config), NULL, 0, 0, NULL, "Run", "FILE", "read options from lines `name = value`; the command line wins"},

    {"batch", OPT_INT, AT(batch), "8", 1, 1 << 20, NULL, "Length and batch", "B", "samples per micro-batch"},
    {"total-batch", OPT_INT, AT(total_batch), "0", 0, 1e12, NULL, "Length and batch", "TOKENS", "tokens per step, a multiple of B x T; 0: B x T"},
    {"steps", OPT_INT, AT(steps), "0", 0, 1e12, NULL, "Length and batch", "N", "optimizer steps; give one of --steps, --tokens, --epochs (none: 2000 steps)"},
    {"tokens", OPT_INT, AT(tokens), "0", 0, 1e16, NULL, "Length and batch", "N", "tokens to train on, rounded up to a step"},
    {"epochs", OPT_INT, AT(epochs), "0", 0, 1e9, NULL, "Length and batch", "N", "passes over the data, rounded up to a step"},

    {"lr", OPT_FLOAT, AT(lr), "1e-3", 0, 1e3, NULL, "Optimizer", "X", "peak learning rate"},
    {"lr-schedule", OPT_CHOICE, AT(lr_schedule), "cosine", 0, 0, "cosine|linear|constant|wsd", "Optimizer", "NAME", "shape after the warm-up"},
    {"warmup", OPT_INT, AT(warmup), "-1", -1, 1e12, NULL, "Optimizer", "N", "warm-up steps; -1: a twentieth of the steps, at most 700"},
    {"final-lr", OPT_FLOAT, AT(final_lr), "0.1", 0, 1, NULL, "Optimizer", "F", "learning rate at the end, as a fraction of --lr"},
    {"decay-fraction", OPT_FLOAT, AT(decay_fraction), "0.2", 0, 1, NULL, "Optimizer", "F", "wsd: last part of the steps, in which the rate falls"},
    {"weight-decay", OPT_FLOAT, AT(weight_decay), "0.1", 0, 100, NULL, "Optimizer", "X", "on matrices and embeddings"},
    {"beta1", OPT_FLOAT, AT(beta1), "0.9", 0, 0.999999, NULL, "Optimizer", "X", "AdamW, first moment"},
    {"beta2", OPT_FLOAT, AT(beta2), "0.95", 0, 0.999999, NULL, "Optimizer", "X", "AdamW, second moment"},
    {"eps", OPT_FLOAT, AT(eps), "1e-8", 1e-20, 1, NULL, "Optimizer", "X", "AdamW, denominator"},
    {"grad-clip", OPT_FLOAT, AT(grad_clip), "1", 0, 1e30, NULL, "Optimizer", "X", "largest global gradient norm; 0: no clipping"},
    {"skip-loss-z", OPT_FLOAT, AT(skip_loss_z), "0", 0, 1e6, NULL, "Optimizer", "Z", "skip the update when the loss lies more than Z deviations above its window; 0: never"},
    {"skip-norm-z", OPT_FLOAT, AT(skip_norm_z), "0", 0, 1e6, NULL, "Optimizer", "Z", "likewise for the gradient norm"},
    {"max-nonfinite", OPT_INT, AT(max_nonfinite), "10", 1, 1e9, NULL, "Optimizer", "K", "stop with exit code 5 after K non-finite steps in a row"},
    {"seed", OPT_INT, AT(seed), "1337", 0, 9e15, NULL, "Optimizer", "N", "of weights, data order and samples"},

    {"val-every", OPT_INT, AT(val_every), "250", 0, 1e15, NULL, "Validation and samples", "N", "validate every N steps and at the end; 0: at the end alone"},
    {"val-batches", OPT_INT, AT(val_batches), "0", 0, 1e12, NULL, "Validation and samples", "N", "micro-batches of a validation; 0: all of the data"},
    {"sample-every", OPT_INT, AT(sample_every), "0", 0, 1e15, NULL, "Validation and samples", "N", "print generated text every N steps; 0: never"},
    {"sample-tokens", OPT_INT, AT(sample_tokens), "64", 1, 1e6, NULL, "Validation and samples", "N", "length of such a text"},
    {"eval-only", OPT_BOOL, AT(eval_only), NULL, 0, 0, NULL, "Validation and samples", NULL, "print the loss of --init-from on --val and exit"},

    {"generate", OPT_BOOL, AT(generate), NULL, 0, 0, NULL, "Generation", NULL, "generate text from --init-from and exit"},
    {"prompt", OPT_STRING, AT(prompt), NULL, 0, 0, NULL, "Generation", "TEXT", "text to continue; absent: a new document"},
    {"max-tokens", OPT_INT, AT(max_tokens), "256", 1, 1e9, NULL, "Generation", "N", "tokens to generate at most"},
    {"temperature", OPT_FLOAT, AT(temperature), "1", 0, 100, NULL, "Generation", "X", "0: always the likeliest token"},
    {"top-k", OPT_INT, AT(top_k), "0", 0, 1 << 24, NULL, "Generation", "K", "sample among the K likeliest; 0: all"},
    {"top-p", OPT_FLOAT, AT(top_p), "1", 0, 1, NULL, "Generation", "P", "sample among the likeliest that together reach P"},

    {"device", OPT_CHOICE, AT(device), "cpu", 0, 0, "cpu|cuda", "Machine", "NAME", "where to compute (this build: cpu)"},
    {"dtype", OPT_CHOICE, AT(dtype), "fp32", 0, 0, "fp32|bf16", "Machine", "NAME", "compute type (cpu: fp32)"},
    {"recompute", OPT_CHOICE, AT(recompute), "none", 0, 0, "none|gelu|block", "Machine", "WHAT", "recompute in the backward to save memory; the results are the same bits"},
    {"threads", OPT_INT, AT(threads), "0", 0, 4096, NULL, "Machine", "N", "CPU threads; 0: all cores"},
    {"processes", OPT_INT, AT(processes), "1", 1, 1 << 20, NULL, "Machine", "N", "with --dry-run: plan for N ranks"},
    {"dry-run", OPT_BOOL, AT(dry_run), NULL, 0, 0, NULL, "Machine", NULL, "print the plan (shapes, memory, steps) without allocating, and exit"},
    {"help", OPT_BOOL, AT(help), NULL, 0, 0, NULL, "Machine", NULL, "this text"},
    {"version", OPT_BOOL, AT(version), NULL, 0, 0, NULL, "Machine", NULL, "build and features"},
};
#undef AT

const OptionTable config_table = {
    "train_gpt2",
    "train_gpt2 --data TEXT_OR_SHARDS --out DIR [options]          train, or continue\n"
    "       train_gpt2 --generate --init-from DIR [--prompt TEXT]         write text\n"
    "       train_gpt2 --eval-only --init-from DIR --val TEXT_OR_SHARDS   measure",
    options, sizeof options / sizeof *options};

static bool check_together(const Config *c, Error *e) {
    if (c->eval_only + c->generate + c->dry_run > 1)
        return fail(e, EXIT_USAGE, "--eval-only, --generate and --dry-run exclude each other; give one");
    if ((c->steps > 0) + (c->tokens > 0) + (c->epochs > 0) > 1)
        return fail(e, EXIT_USAGE, "--steps, --tokens and --epochs exclude each other; give one");
    if (strcmp(c->device, "cpu") != 0)
        return fail(e, EXIT_USAGE, "--device %s: this program is built without CUDA; use --device cpu", c->device);
    if (strcmp(c->dtype, "fp32") != 0)
        return fail(e, EXIT_USAGE, "--dtype %s: the CPU backend computes in fp32; use --dtype fp32", c->dtype);
    if (c->processes > 1 && !c->dry_run)
        return fail(e, EXIT_USAGE, "--processes %lld: this build trains in one process; several can be planned with --dry-run", (long long)c->processes);
    if ((c->eval_only || c->generate) && !c->init_from)
        return fail(e, EXIT_USAGE, "--%s needs a model: give --init-from PATH", c->eval_only ? "eval-only" : "generate");
    if (c->eval_only && !c->val) return fail(e, EXIT_USAGE, "--eval-only needs data: give --val PATH");
    if (c->eval_only || c->generate || c->dry_run) return true;
    if (!c->data) return fail(e, EXIT_USAGE, "no training data: give --data PATH (a text file or token shards); --help lists the options");
    if (!c->out) return fail(e, EXIT_USAGE, "no run directory: give --out DIR (new, or one to continue)");
    return true;
}

bool config_parse(Config *c, int argc, char **argv, Error *e) {
    memset(c, 0, sizeof *c);
    if (!options_parse(&config_table, c, NULL, argc, argv, NULL, NULL, e)) return false;
    return c->help || c->version || check_together(c, e);
}

void config_free(Config *c) { options_free(&config_table, c); }
