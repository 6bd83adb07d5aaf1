/* The table of options, and the checks that concern more than one of them. */
#include "config.h"
#include "../base/gpus.h"
#include "../base/timer.h"
#include "together.h"
#include <stdlib.h>
#include <string.h>

#define AT(field) offsetof(Config, field)
static const Option options[] = {
    {"data", OPT_STRING, AT(data), NULL, 0, 0, NULL, "Data", "PATH", "training data: a text file, or token shards (.bin; one file, or several by a quoted glob)"},
    {"val", OPT_STRING, AT(val), NULL, 0, 0, NULL, "Data", "PATH", "validation data, likewise; without it, the last part of a text in --data is kept for validation"},
    {"val-fraction", OPT_FLOAT, AT(val_fraction), "0.05", 0.0001, 0.5, NULL, "Data", "F", "how large that part is"},
    {"tokenizer", OPT_STRING, AT(tokenizer), NULL, 0, 0, NULL, "Data", "DIR", "folder with vocab.json and merges.txt, or tokenizer.json; without it, a BPE vocabulary is trained on the text in --data, or comes with --init-from"},
    {"vocab-size", OPT_INT, AT(vocab_size), "0", 0, 1 << 24, NULL, "Data", "N", "tokens in the vocabulary; 0: for text by its size (512 to 32768), with --tokenizer its own, for shards 50257 (uint16) or 128256 (uint32)"},

    {"model", OPT_STRING, AT(model), NULL, 0, 0, NULL, "Model", "NAME", "shape by name: gpt2 (124M), gpt2-medium (350M), gpt2-large (774M), gpt2-xl (1558M), gpt3-125m, -350m, -760m, -1.3b, -2.7b, -6.7b, -13b"},
    {"layers", OPT_INT, AT(layers), "0", 0, 10000, NULL, "Model", "N", "transformer blocks; 0: of --model or --init-from, else 4"},
    {"channels", OPT_INT, AT(channels), "0", 0, 1 << 20, NULL, "Model", "N", "width, a multiple of --heads; 0: of --model or --init-from, else 128"},
    {"heads", OPT_INT, AT(heads), "0", 0, 65536, NULL, "Model", "N", "attention heads; 0: of --model or --init-from, else 4"},
    {"seq-len", OPT_INT, AT(seq_len), "0", 0, 1 << 24, NULL, "Model", "T", "tokens per sample; 0: of --model or --init-from, else 128"},
    {"init-from", OPT_STRING, AT(init_from), NULL, 0, 0, NULL, "Model", "PATH", "take shape and weights from a run directory (its newest checkpoint), a Hugging Face GPT-2 directory, a .safetensors file, or llm.c weights (.bin)"},

    {"out", OPT_STRING, AT(out), NULL, 0, 0, NULL, "Run", "DIR", "run directory: checkpoints (step_N), metrics.jsonl, config.txt, and the token files made from text"},
    {"resume", OPT_CHOICE, AT(resume), "auto", 0, 0, "auto|never", "Run", "HOW", "auto: continue from the newest valid checkpoint in --out; never: refuse a directory that holds one"},
    {"save-every", OPT_INT, AT(save_every), "500", 0, 1e15, NULL, "Run", "N", "write a checkpoint every N steps, besides the one at the end or at a stop; 0: only those"},
    {"save-async", OPT_CHOICE, AT(save_async), "on", 0, 0, "on|off", "Run", "HOW", "on: copy what is saved to the host's memory and train on while it is written; off: wait for it; same files"},
    {"keep", OPT_INT, AT(keep), "3", 1, 1e9, NULL, "Run", "K", "keep the newest K checkpoints, remove older ones"},
    {"keep-every", OPT_INT, AT(keep_every), "0", 0, 1e15, NULL, "Run", "M", "but keep every checkpoint whose step is a multiple of M; 0: none"},
    {"allow-change", OPT_STRING, AT(allow_change), NULL, 0, 0, NULL, "Run", "CLASSES", "let a resumed run differ in what is otherwise refused: data, tokenizer, batch, schedule, optimizer, device, seed (comma separated)"},
    {"log-every", OPT_INT, AT(log_every), "1", 1, 1e9, NULL, "Run", "N", "print a line every N steps; metrics.jsonl has all steps"},
    {"max-time", OPT_STRING, AT(max_time), NULL, 0, 0, NULL, "Run", "TIME", "save and exit with code 75 before this process is so old (3h, 45m, 1h30m, 90s; the save included); likewise when a file STOP appears in --out; a file SAVE there: a checkpoint now"},
    {"trace", OPT_STRING, AT(trace), NULL, 0, 0, NULL, "Run", "FILE", "write a timeline of the first steps that chrome://tracing or Perfetto opens"},
    {"trace-steps", OPT_INT, AT(trace_steps), "5", 1, 1e6, NULL, "Run", "N", "how many steps the timeline covers"},
    {"config", OPT_STRING, AT(config), NULL, 0, 0, NULL, "Run", "FILE", "read options from lines `name = value` (a run's config.txt is one); the command line wins"},

    {"batch", OPT_INT, AT(batch), "8", 1, 1 << 20, "auto", "Length and batch", "B", "samples computed at a time (micro-batch); memory grows with it; auto: as many as fit the memory that is free at the start (a resumed run chooses again)"},
    {"total-batch", OPT_INT, AT(total_batch), "0", 0, 1e12, NULL, "Length and batch", "TOKENS", "tokens per step, a multiple of --batch x --seq-len, reached by gradient accumulation; 0: one micro-batch"},
    {"steps", OPT_INT, AT(steps), "0", 0, 1e12, NULL, "Length and batch", "N", "train for N steps; give one of --steps, --tokens, --epochs; none of them: 2000 steps"},
    {"tokens", OPT_INT, AT(tokens), "0", 0, 1e16, NULL, "Length and batch", "N", "or for N tokens, rounded up to a whole step"},
    {"epochs", OPT_INT, AT(epochs), "0", 0, 1e9, NULL, "Length and batch", "N", "or for N passes over the data, rounded up to a whole step"},

    {"lr", OPT_FLOAT, AT(lr), "1e-3", 0, 1e3, NULL, "Optimizer", "X", "learning rate after the warm-up"},
    {"lr-schedule", OPT_CHOICE, AT(lr_schedule), "cosine", 0, 0, "cosine|linear|constant|wsd", "Optimizer", "NAME", "how it falls from there; wsd: constant, then a fall at the end"},
    {"warmup", OPT_INT, AT(warmup), "-1", -1, 1e12, NULL, "Optimizer", "N", "steps in which it rises to --lr; -1: a twentieth of the steps, at most 700"},
    {"final-lr", OPT_FLOAT, AT(final_lr), "0.1", 0, 1, NULL, "Optimizer", "F", "learning rate of the last step, as a fraction of --lr (not with constant)"},
    {"decay-fraction", OPT_FLOAT, AT(decay_fraction), "0.2", 0, 1, NULL, "Optimizer", "F", "wsd: the part of the steps in which it falls"},
    {"weight-decay", OPT_FLOAT, AT(weight_decay), "0.1", 0, 100, NULL, "Optimizer", "X", "AdamW: decay of matrices and embeddings"},
    {"beta1", OPT_FLOAT, AT(beta1), "0.9", 0, 0.999999, NULL, "Optimizer", "X", "AdamW: decay rate of the mean of gradients"},
    {"beta2", OPT_FLOAT, AT(beta2), "0.95", 0, 0.999999, NULL, "Optimizer", "X", "AdamW: decay rate of the mean of their squares"},
    {"eps", OPT_FLOAT, AT(eps), "1e-8", 1e-20, 1, NULL, "Optimizer", "X", "AdamW: added to the denominator"},
    {"grad-clip", OPT_FLOAT, AT(grad_clip), "1", 0, 1e30, NULL, "Optimizer", "X", "scale gradients down to this global norm; 0: no clipping"},
    {"skip-loss-z", OPT_FLOAT, AT(skip_loss_z), "0", 0, 1e6, NULL, "Optimizer", "Z", "skip the update of a step whose loss lies more than Z standard deviations above the mean of the last 128 applied steps; 0: never"},
    {"skip-norm-z", OPT_FLOAT, AT(skip_norm_z), "0", 0, 1e6, NULL, "Optimizer", "Z", "likewise for the gradient norm"},
    {"max-skipped", OPT_INT, AT(max_skipped), "10", 1, 1e9, NULL, "Optimizer", "K", "after K steps in a row so skipped, apply the next one in any case: a level that has shifted for good is taken in"},
    {"max-nonfinite", OPT_INT, AT(max_nonfinite), "10", 1, 1e9, NULL, "Optimizer", "K", "stop with exit code 5 after K steps in a row with a NaN or infinite loss or norm (their updates are always skipped)"},
    {"seed", OPT_INT, AT(seed), "1337", 0, 9e15, NULL, "Optimizer", "N", "decides initial weights, order of the data and random samples"},

    {"val-every", OPT_INT, AT(val_every), "250", 0, 1e15, NULL, "Validation and samples", "N", "validate at the start, every N steps and at the end; 0: at the end alone"},
    {"val-batches", OPT_INT, AT(val_batches), "0", 0, 1e12, NULL, "Validation and samples", "N", "on the first N micro-batches of the validation data; 0: on all"},
    {"sample-every", OPT_INT, AT(sample_every), "0", 0, 1e15, NULL, "Validation and samples", "N", "print generated text every N steps and at the end; 0: never"},
    {"sample-tokens", OPT_INT, AT(sample_tokens), "64", 1, 1e6, NULL, "Validation and samples", "N", "length of such a text"},
    {"eval-only", OPT_BOOL, AT(eval_only), NULL, 0, 0, NULL, "Validation and samples", NULL, "do not train: print the loss of --init-from on --val"},

    {"generate", OPT_BOOL, AT(generate), NULL, 0, 0, NULL, "Generation", NULL, "do not train: write text with the model of --init-from"},
    {"prompt", OPT_STRING, AT(prompt), NULL, 0, 0, NULL, "Generation", "TEXT", "text to continue; without it, a new document"},
    {"max-tokens", OPT_INT, AT(max_tokens), "256", 1, 1e8, NULL, "Generation", "N", "stop after N tokens, or before at the end of the document"},
    {"temperature", OPT_FLOAT, AT(temperature), "1", 0, 100, NULL, "Generation", "X", "below 1: likelier tokens more often; 0: always the likeliest; this, --top-k and --top-p count for --sample-every too"},
    {"top-k", OPT_INT, AT(top_k), "0", 0, 1 << 24, NULL, "Generation", "K", "choose among the K likeliest tokens; 0: among all"},
    {"top-p", OPT_FLOAT, AT(top_p), "1", 0, 1, NULL, "Generation", "P", "choose among the fewest likeliest tokens that together have probability P"},

    {"processes", OPT_INT, AT(processes), "1", 1, 1 << 20, NULL, "Several processes", "N", "start N processes here that train one model together (under mpirun, srun or torchrun's variables it is they that start them); with --dry-run: plan for N"},
    {"gpus", OPT_INT, AT(gpus), NULL, 1, 1024, NULL, "Several processes", "N", "start N processes here, one for each GPU: --processes N with --device cuda; with --dry-run: predict a run on nodes of N GPUs: memory of each, time of a step, MFU, tokens a day, time and cost"},
    {"share-gpus", OPT_BOOL, AT(share_gpus), NULL, 0, 0, NULL, "Several processes", NULL, "let several processes use one GPU; without it, more processes on a machine than GPUs are an error"},
    {"zero", OPT_CHOICE, AT(zero), "auto", 0, 0, "auto|0|1", "Several processes", "STAGE", "1: each process holds its part of AdamW's state (ZeRO-1); 0: each holds all; same bits; auto: 1"},
    {"reduce-dtype", OPT_CHOICE, AT(reduce_dtype), "fp32", 0, 0, "fp32|bf16", "Several processes", "NAME", "number format of gradients on their way between processes"},
    {"transport", OPT_CHOICE, AT(transport), "auto", 0, 0, "auto|nccl|host|mpi", "Several processes", "HOW", "nccl: from GPU to GPU by NCCL, each process with a GPU of its own; host: through the processes' memory and sockets; mpi: the same, but by MPI, in a build with it and under its launcher; auto: NCCL where it can be had, else host"},
    {"timeout", OPT_FLOAT, AT(timeout), "300", 1, 1e6, NULL, "Several processes", "SECONDS", "how long a process waits for the others in a step before the run ends with exit code 6 and says where each was; start, saving and validation may take ten times as long"},
    {"check-replicas", OPT_INT, AT(check_replicas), "100", 0, 1e12, NULL, "Several processes", "M", "every M steps and before each save, compare what all processes hold alike; a difference ends the run with exit code 9; 0: never"},
    {"rank-logs", OPT_STRING, AT(rank_logs), NULL, 0, 0, NULL, "Several processes", "DIR", "each process but the first writes what it says to DIR/rank-NNNN.log; without it only the first one speaks"},

    {"nodes", OPT_INT, AT(nodes), NULL, 1, 1024, NULL, "Plan (with --dry-run)", "M", "predict for M nodes of --gpus each; without it, one"},
    {"gpu-name", OPT_CHOICE, AT(gpu_name), NULL, 0, 0, GPU_NAMES, "Plan (with --dry-run)", "NAME", "which GPU; without it, H100"},
    {"assume-mfu", OPT_FLOAT, AT(assume_mfu), NULL, 0.001, 1, NULL, "Plan (with --dry-run)", "F", "MFU of a GPU while it computes, as you measured it; without it, what others reported for such a model"},
    {"network", OPT_FLOAT, AT(network), NULL, 0.001, 1e6, NULL, "Plan (with --dry-run)", "GB/S", "what a node sends to the other nodes, all its adapters together, in gigabytes a second; without it, 50 (one adapter of 400 Gbit/s)"},
    {"bus", OPT_FLOAT, AT(bus), NULL, 0.001, 1e6, NULL, "Plan (with --dry-run)", "GB/S", "bus bandwidth of a reduce-scatter inside a node; without it, of --gpu-name's link (H100: 370)"},
    {"gpu-price", OPT_FLOAT, AT(gpu_price), NULL, 0, 1e6, NULL, "Plan (with --dry-run)", "X", "price of a GPU an hour, for the cost"},

    {"device", OPT_CHOICE, AT(device), "auto", 0, 0, "auto|cpu|cuda|emu", "Machine", "NAME", "where to compute; auto: a GPU where the program is built with CUDA and one is there, else the CPU; emu: CUDA emulated on a CPU, in test builds"},
    {"gpu", OPT_INT, AT(gpu), "0", 0, 1023, NULL, "Machine", "N", "which of the visible GPUs; with several processes, that of the first one on each machine"},
    {"dtype", OPT_CHOICE, AT(dtype), "auto", 0, 0, "auto|fp32|bf16", "Machine", "NAME", "number format of weights and activations (master weights, moments and gradients are fp32 in any case); auto: bf16 on a GPU, fp32 on the CPU, which has no other"},
    {"rounding", OPT_CHOICE, AT(rounding), "nearest", 0, 0, "nearest|stochastic", "Machine", "HOW", "how master weights are rounded to bf16 weights; with fp32 there is nothing to round"},
    {"attention", OPT_CHOICE, AT(attention), "ours", 0, 0, "ours|hopper|cudnn", "Machine", "WHOSE", "attention on a GPU in bf16: own kernels; own kernels for H100 and H200, which no hardware has run yet; or cuDNN's where the build has it"},
    {"head-chunk", OPT_INT, AT(head_chunk), "0", 0, 1 << 30, NULL, "Machine", "ROWS", "rows of logits that exist at a time, less memory for more passes; 0: the backend chooses"},
    {"fused-gelu", OPT_CHOICE, AT(fused_gelu), "auto", 0, 0, "auto|on|off", "Machine", "HOW", "let the GPU's library take GELU in the product before it, where that is faster; auto: on, but off with --recompute gelu, which then gives the same bits"},
    {"own-products", OPT_CHOICE, AT(own_products), "off", 0, 0, "on|off|only", "Machine", "HOW", "let the program's own matrix products for H100 and H200 compete with the GPU library's (only: take its products where there are none of ours); off, because no hardware has run them yet"},
    {"graphs", OPT_CHOICE, AT(graphs), "on", 0, 0, "on|off", "Machine", "HOW", "record a step's GPU work once and replay it; same bits"},
    {"early-launch", OPT_CHOICE, AT(early_launch), "off", 0, 0, "off|on", "Machine", "HOW", "launch GPU kernels before those in front have ended, where the GPU can (sm_90 and later): shorter gaps, same bits; off because no GPU has measured it yet"},
    {"plan-file", OPT_STRING, AT(plan_file), NULL, 0, 0, NULL, "Machine", "FILE", "keeps the algorithms chosen for GPU products, so that a resumed run computes the same bits; without it, matmul_plans.txt in --out when training"},
    {"print-plans", OPT_BOOL, AT(print_plans), NULL, 0, 0, NULL, "Machine", NULL, "print the algorithm of each product before the first step"},
    {"gpu-stats", OPT_BOOL, AT(gpu_stats), NULL, 0, 0, NULL, "Machine", NULL, "power, temperature, clock and throttling of the GPU in each step's line"},
    {"recompute", OPT_CHOICE, AT(recompute), "none", 0, 0, "none|gelu|block", "Machine", "WHAT", "compute again in the backward what need not be kept (block: most), to save memory; results are the same bits"},
    {"threads", OPT_INT, AT(threads), "0", 0, 4096, NULL, "Machine", "N", "CPU threads; 0: one a core"},
    {"dry-run", OPT_BOOL, AT(dry_run), NULL, 0, 0, NULL, "Machine", NULL, "do not train: print shapes, memory and steps without allocating or writing anything"},
    {"help", OPT_BOOL, AT(help), NULL, 0, 0, NULL, "Machine", NULL, "print this text"},
    {"version", OPT_BOOL, AT(version), NULL, 0, 0, NULL, "Machine", NULL, "print build and features"},
};
#undef AT

const OptionTable config_table = {
    "train_gpt2",
    "train_gpt2 --data TEXT_OR_SHARDS --out DIR [options]          train, or continue a stopped run\n"
    "       train_gpt2 --generate --init-from DIR [--prompt TEXT]         write text with a trained model\n"
    "       train_gpt2 --eval-only --init-from DIR --val TEXT_OR_SHARDS   measure a trained model\n"
    "       train_gpt2 --dry-run --model NAME [options]                   show what a run would need",
    options, sizeof options / sizeof *options};

static const char *const change_classes[] = {"data", "tokenizer", "shape", "batch", "schedule", "optimizer", "device", "seed"};
enum { N_CHANGE_CLASSES = sizeof change_classes / sizeof *change_classes };

bool change_allowed(const Config *c, const char *class_name) {
    const char *list = c->allow_change;
    for (size_t n = strlen(class_name); list; list = strchr(list, ',') ? strchr(list, ',') + 1 : NULL)
        if (strncmp(list, class_name, n) == 0 && (list[n] == 0 || list[n] == ',')) return true;
    return false;
}

static bool check_allow_change(const Config *c, Error *e) {
    for (const char *word = c->allow_change; word;) {
        size_t n = strcspn(word, ",");
        int i = 0;
        while (i < N_CHANGE_CLASSES && (strlen(change_classes[i]) != n || strncmp(word, change_classes[i], n) != 0)) i++;
        if (i == N_CHANGE_CLASSES)
            return fail(e, EXIT_USAGE, "--allow-change: found \"%.*s\", expected one or several of data,tokenizer,shape,batch,schedule,optimizer,device,seed", (int)n, word);
        word = word[n] ? word + n + 1 : NULL;
    }
    return true;
}

int64_t config_planned_ranks(const Config *c) { return c->gpus ? c->gpus * (c->nodes ? c->nodes : 1) : c->processes; }

static bool check_plan(const Config *c, Error *e) {
    const char *given = c->nodes ? "nodes" : c->gpu_name ? "gpu-name" : c->assume_mfu > 0 ? "assume-mfu" : c->network > 0 ? "network" : c->bus > 0 ? "bus" :
                        c->gpu_price > 0 ? "gpu-price" : NULL;
    int64_t ranks = config_planned_ranks(c);
    if (given && !c->dry_run) return fail(e, EXIT_USAGE, "--%s is for a plan: give --dry-run too, or leave it out", given);
    if (given && !c->gpus) return fail(e, EXIT_USAGE, "--%s is for a plan of GPUs: give --gpus N, the GPUs of a node", given);
    if (!c->gpus || !c->dry_run) return true;
    if (c->processes > 1 && c->processes != ranks)
        return fail(e, EXIT_USAGE, "--processes %lld contradicts --gpus %lld x --nodes %lld = %lld, one process a GPU; leave --processes out",
                    (long long)c->processes, (long long)c->gpus, (long long)(ranks / c->gpus), (long long)ranks);
    if (strcmp(c->device, "auto") != 0 && strcmp(c->device, "cuda") != 0)
        return fail(e, EXIT_USAGE, "--gpus contradicts --device %s; leave one of them out", c->device);
    if (strcmp(c->dtype, "fp32") == 0)
        return fail(e, EXIT_USAGE, "--gpus predicts bf16 alone, whose peaks are known; found --dtype fp32; leave it out, or plan memory alone with --processes");
    return true;
}

static bool check_together(const Config *c, Error *e) {
    if (c->eval_only + c->generate + c->dry_run > 1)
        return fail(e, EXIT_USAGE, "--eval-only, --generate and --dry-run exclude each other; give one");
    if ((c->steps > 0) + (c->tokens > 0) + (c->epochs > 0) > 1)
        return fail(e, EXIT_USAGE, "--steps, --tokens and --epochs exclude each other; give one");
    if (c->dry_run && !c->batch && !c->gpus) return fail(e, EXIT_USAGE, "--batch auto looks at the memory that is free; with --dry-run give a number, or --gpus N");
    if (!c->dry_run && c->gpus && c->processes > 1 && c->processes != c->gpus)
        return fail(e, EXIT_USAGE, "--gpus %lld starts one process for each, found --processes %lld; give one of them", (long long)c->gpus, (long long)c->processes);
    if (!c->dry_run && c->gpus && strcmp(c->device, "cpu") == 0) return fail(e, EXIT_USAGE, "--gpus %lld contradicts --device cpu; use --processes", (long long)c->gpus);
    if (c->max_time && duration_parse(c->max_time) < 0) return fail(e, EXIT_USAGE, "--max-time: found \"%s\", expected a time such as 3h, 45m, 1h30m, 90s", c->max_time);
    if (strcmp(c->transport, "nccl") == 0 && c->share_gpus) return fail(e, EXIT_USAGE, "--transport nccl needs a GPU for each process, found --share-gpus; use --transport host");
    if (c->processes > 1 && (c->eval_only || c->generate))
        return fail(e, EXIT_USAGE, "--%s runs in one process, found --processes %lld", c->eval_only ? "eval-only" : "generate", (long long)c->processes);
    if ((c->eval_only || c->generate) && !c->init_from)
        return fail(e, EXIT_USAGE, "--%s needs a model: give --init-from PATH", c->eval_only ? "eval-only" : "generate");
    if (c->eval_only && !c->val) return fail(e, EXIT_USAGE, "--eval-only needs data: give --val PATH");
    if (!check_allow_change(c, e) || !check_plan(c, e)) return false;
    if (c->eval_only || c->generate || c->dry_run) return true;
    if (!c->data) return fail(e, EXIT_USAGE, "no training data: give --data PATH (a text file or token shards); --help lists the options");
    if (!c->out) return fail(e, EXIT_USAGE, "no run directory: give --out DIR (new, or one to continue)");
    return true;
}

bool config_parse(Config *c, int argc, char **argv, Error *e) {
    memset(c, 0, sizeof *c);
    c->started = seconds_now();
    if (!options_parse(&config_table, c, NULL, argc, argv, NULL, NULL, e)) return false;
    if (c->help || c->version) return true;
    if (check_together(c, e)) {
        if (c->gpus) c->processes = c->gpus;
        if (c->gpus && strcmp(c->device, "auto") == 0) free((char *)c->device), c->device = xstrdup("cuda");
        return true;
    }
    config_free(c);
    return false;
}

void config_free(Config *c) { options_free(&config_table, c); }
