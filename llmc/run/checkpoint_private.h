/* What the files behind checkpoint.h share: safetensors.c, manifest.c, model_files.c, state_json.c, retain.c, checkpoint.c, save.c,
 * import.c, import_bin.c. Nothing outside llmc/run includes it, except the tests of retention's decision. */
#ifndef LLMC_RUN_CHECKPOINT_PRIVATE_H
#define LLMC_RUN_CHECKPOINT_PRIVATE_H
#include "checkpoint.h"
#include "safetensors.h"
#include <jansson.h>

/* ---- small helpers (manifest.c, safetensors.c) ---- */
bool pread_full(int fd, void *to, size_t bytes, uint64_t offset);  /* false with errno set; 0 = the file ended too early */
void hash_hex(const void *data, size_t bytes, char hash[33]);      /* XXH3-128 as in io.h */
/* A JSON object from a file; EXIT_DATA with file, line and column. */
json_t *json_read_object(const char *path, Error *e);

/* ---- manifest: what a checkpoint consists of ---- */
typedef struct {
    char *name;
    uint64_t begin, bytes;    /* in the file */
    char hash[33];
} PartTensor;
typedef struct {
    char *name;               /* of a file in the directory */
    uint64_t bytes;
    char hash[33];
    PartTensor *tensors;      /* of a safetensors file, so that damage can be named */
    size_t n_tensors;
} Part;
typedef struct {
    char run_id[33];          /* empty for an exported model */
    int64_t step;
    Part *parts;
    size_t n;
} Manifest;
Part *manifest_add(Manifest *m, const char *name);
/* A part as text, for a manifest that another rank writes; to be freed. */
char *part_to_text(const Part *p);
bool part_from_text(Manifest *m, const char *text);
void manifest_free(Manifest *m);
bool manifest_write(const char *dir, const Manifest *m, Error *e);  /* EXIT_STORAGE */
bool manifest_read(const char *dir, Manifest *m, Error *e);         /* EXIT_DATA: damaged, unknown version */
/* All files there, none that is not listed, sizes right; of the files first, first + every, ... (every 0: of none) also checksums and safetensors headers. */
bool manifest_check(const char *dir, const Manifest *m, size_t first, size_t every, Error *e);

/* ---- what a save writes from: the model itself, in the thread that trains it, or host copies, which any thread may read ---- */
typedef struct {
    const GPT2 *model;        /* with copies: its layout and configuration alone are looked at */
    Comm *comm;               /* may be NULL for one rank without copies */
    float *copies;            /* NULL: the model itself. Else of this memory: */
    float *master, *m, *v;    /* (n_elements) on rank 0, none elsewhere; m and v as this rank holds them, none where rank 0 writes them for all */
} Source;
size_t source_bytes(size_t n_elements, Ranks ranks);  /* of the copies */
bool source_reserve(Source *s, SaveMemory *memory);   /* false: no memory for copies */
void source_copy(Source *s);                          /* all ranks together */

/* ---- files of a checkpoint; each adds itself to the manifest ---- */
/* From the model itself, where the ranks hold parts of the master weights, all others call join_model_files meanwhile. */
bool write_model_files(const char *dir, const Source *s, const char *tokenizer_dir, Manifest *m, Error *e);
void join_model_files(const Source *s);
StTensor file_tensor(const ParamTensor *t, uint64_t begin);        /* name, dtype, shape as a file holds it */
bool write_optimizer_file(const char *dir, const Source *s, Manifest *m, Error *e); /* what this rank holds; nothing: no file */
bool write_text_file(const char *dir, const char *name, const char *text, Manifest *m, Error *e);

/* The optimizer files of a checkpoint, opened and found to cover every element of m and v once. */
typedef struct {
    StFile *files;
    json_t **metadata;
    size_t n;
} OptimizerSet;
bool optimizer_open(OptimizerSet *set, const char *dir, const Manifest *m, const GPT2 *model, Error *e);
bool optimizer_read(const OptimizerSet *set, GPT2 *model, Error *e);
void optimizer_close(OptimizerSet *set);

/* ---- training_state.json ---- */
char *state_to_json(const TrainState *state, const RunIdentity *id);
bool state_read(const char *dir, json_t **root, TrainState *state, char run_id[33], Error *e);
bool facts_compare(const char *dir, const json_t *root, const RunIdentity *id, const char *allow, Error *e);
const char *facts_find(const json_t *root, const char *name);

/* ---- directories of a run ---- */
typedef struct {
    int64_t step;
    bool replaced;            /* step_N.replaced: an older copy of step N, left by a crash during its replacement */
    char *path;
} StepDir;
/* Sorted from oldest to newest (a replaced copy before its successor); a missing run_dir has none. */
bool steps_list(const char *run_dir, StepDir **steps, size_t *n, Error *e);
void steps_free(StepDir *steps, size_t n);
/* Decides without touching anything: remove[i] for checkpoints in ascending order. The newest keep_last valid ones stay, so do the
 * steps that keep_every divides, and everything newer than the oldest of the former; with no valid one all stay. */
void retain_decide(bool *remove, const int64_t *steps, const bool *valid, size_t n, int keep_last, int64_t keep_every);

/* ---- weights in Hugging Face form ---- */
typedef struct {
    StFile *files;
    size_t n;
} WeightSet;
bool weights_open(WeightSet *set, const char *path, Error *e);
bool weights_check(const WeightSet *set, const char *path, const GPT2 *model, Error *e);
bool weights_read(const WeightSet *set, GPT2 *model, bool finite, Error *e); /* finite: NaN or infinity is an error */
void weights_close(WeightSet *set);

/* llm.c weights (import_bin.c) */
bool bin_is_weights(const char *path);
bool bin_config(const char *path, GPT2Config *config, Error *e);
bool bin_weights(const char *path, GPT2 *model, Error *e);
#endif
