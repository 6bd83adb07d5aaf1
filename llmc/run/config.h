/* The options of train_gpt2: one table, one struct. What an option means for several of them together is checked here too. */
#ifndef LLMC_RUN_CONFIG_H
#define LLMC_RUN_CONFIG_H
#include "../base/options.h"
#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    /* modes */
    bool help, version, dry_run, eval_only, generate;
    /* data */
    const char *data, *val, *tokenizer;
    double val_fraction;
    int64_t vocab_size;
    /* model */
    const char *model, *init_from;
    int64_t layers, channels, heads, seq_len;
    /* run */
    const char *out, *resume, *allow_change, *config, *trace, *max_time, *save_async;
    double started;                  /* not an option: when this process began, on the clock seconds_now() */
    int64_t save_every, keep, keep_every, log_every, trace_steps;
    /* batch and length */
    int64_t batch /* 0: auto */, total_batch, steps, tokens, epochs;
    /* optimizer */
    double lr, final_lr, decay_fraction, weight_decay, beta1, beta2, eps, grad_clip, skip_loss_z, skip_norm_z;
    const char *lr_schedule;
    int64_t warmup, seed, max_nonfinite, max_skipped;
    /* validation and samples */
    int64_t val_every, val_batches, sample_every, sample_tokens;
    /* generation */
    const char *prompt;
    int64_t max_tokens, top_k;
    double temperature, top_p;
    /* machine */
    const char *device, *dtype, *recompute, *attention, *rounding, *fused_gelu, *own_products, *graphs, *early_launch, *plan_file;
    int64_t threads, head_chunk, gpu;
    bool print_plans, gpu_stats;
    /* ranks */
    int64_t processes, gpus, check_replicas;
    bool share_gpus;
    const char *zero, *reduce_dtype, *transport, *rank_logs;
    double timeout;
    /* plans past one machine; 0 or NULL: not given */
    int64_t nodes;
    const char *gpu_name;
    double assume_mfu, network, bus, gpu_price;
} Config;

extern const OptionTable config_table;

/* Parses and checks; *e is EXIT_USAGE with one message, and nothing is left to free. */
bool config_parse(Config *c, int argc, char **argv, Error *e);
void config_free(Config *c);
/* Ranks that --dry-run plans for. */
int64_t config_planned_ranks(const Config *c);
/* Is the class ("data", "batch", ...) one of those that --allow-change names? */
bool change_allowed(const Config *c, const char *class_name);

#ifdef __cplusplus
}
#endif
#endif
