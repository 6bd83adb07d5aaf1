/* Checkpoints. RUN/step_NNNNNNNN/ is a Hugging Face model directory (model.safetensors float32 with GPT-2's names and layout, config.json,
 * tokenizer files when known) plus optimizer-RRRR-of-WWWW.safetensors (m and v, ranges named in its metadata), training_state.json and
 * manifest.json (every file's size and XXH3-128, run id, step). Written under a temporary name, fsynced, renamed, parent
 * fsynced: a directory with the final name is complete, or a later read finds out why it is not. */
#ifndef LLMC_RUN_CHECKPOINT_H
#define LLMC_RUN_CHECKPOINT_H
#include "../dist/comm.h"
#include "../gpt2.h"
#include "monitor.h"
#ifdef __cplusplus
extern "C" {
#endif

/* Every mutable field of training that is not a tensor. */
typedef struct {
    int64_t step;             /* steps done */
    int64_t updates;          /* of them applied (AdamW's t) */
    uint64_t samples;         /* data position */
    uint64_t seed;
    Monitor monitor;
    int64_t last_val_step;    /* when last_val_loss was measured; -1: not yet. A resumed run makes up for a validation that was cut off */
    double best_val_loss, last_val_loss;  /* NaN: none yet */
    double seconds;           /* training time so far */
} TrainState;

/* What must not change between the parts of a run, as name = value lines; each line belongs to a class ("data", "tokenizer", "shape",
 * "batch", "schedule", "optimizer", ...) that --allow-change takes. A value of NULL (not given) is recorded as empty. A fact that came
 * with a later version has `absent`: what a checkpoint without it means; with that value it is not recorded either. */
typedef struct { const char *class_name, *name, *value, *absent; } FixedFact;
typedef struct {
    char run_id[33];          /* random, made when the run starts; in every file of the run */
    const FixedFact *facts;
    size_t n_facts;
    const char *tokenizer_dir;/* its files are copied into each checkpoint; NULL: none */
    Comm *comm;               /* the ranks of the run, all of which save and load together; NULL: one */
} RunIdentity;

bool run_id_create(char run_id[33]);
/* Writes RUN/step_N: rank 0 the model and what describes it, each rank its part of the optimizer state; one failure fails all. Previous checkpoints are untouched whatever happens. EXIT_STORAGE; EXIT_USAGE when the directory holds another run's.
 * A step_N of the same state is kept as it is; another is replaced (for a moment it is step_N.replaced, which is also found). */
bool checkpoint_save(const char *run_dir, const GPT2 *model, const TrainState *state, const RunIdentity *id, Error *e);
/* The same in parts, all called by all ranks alike: begin copies what is saved to the host and has threads write it, which touch nothing but the
 * copies and files; training may go on. The files are those of checkpoint_save, byte for byte. Until finish, nothing of the checkpoint is seen,
 * and model (its values may change), facts' owner and tokenizer_dir stay. One save at a time in a run directory. */
typedef struct Saving Saving;
typedef struct { void *p; size_t bytes; } SaveMemory; /* of copies: zeros at first; the owner frees p */
typedef struct {
    bool apart;               /* false, or where memory for copies lacks (said on `report`): begin has written the files when it returns */
    int keep;                 /* checkpoint_retain follows the save; 0: it does not */
    int64_t keep_every;
    FILE *report;             /* may be NULL */
    SaveMemory *memory;       /* kept from save to save, as new memory takes several times longer to copy to; NULL: the save's own */
} SaveHow;
Saving *checkpoint_begin(const char *run_dir, const GPT2 *model, const TrainState *state, const RunIdentity *id, const SaveHow *how, Error *e); /* NULL: failed on all */
bool checkpoint_ready(Saving *s);               /* asked between steps: does what is due; true when finish will not wait. One number travels, behind the step's own */
bool checkpoint_finish(Saving *s, Error *e);    /* waits for all ranks' files, makes them the checkpoint, frees s; one failure is all ranks' */
void checkpoint_abandon(Saving *s);             /* by a rank that leaves alone: waits for its own files, and leaves what is there hidden */
size_t checkpoint_copy_bytes(const GPT2Config *config, Ranks ranks); /* host memory of begin's copies, on rank 0 */
/* Removes what keep_last and keep_every leave out, and temporary left-overs of this run; never the only valid one. keep_last >= 1 valid
 * ones stay, and steps that keep_every divides (0 = none); damaged ones go only when keep_last newer valid ones exist. */
bool checkpoint_retain(const char *run_dir, int keep_last, int64_t keep_every, Error *e);
/* Full check of one directory: manifest, sizes, checksums, headers, and no file that the manifest does not list (hidden ones do not count).
 * The message names file, (tensor,) expected, found. EXIT_DATA. */
bool checkpoint_verify(const char *dir, Error *e);
/* Path of the newest valid checkpoint; says on `report` (may be NULL) each one it rejected and why. Returns false with
 * e->code EXIT_NO_CHECKPOINT when some exist and none is valid, and false with e->code 0 when there are none at all. */
bool checkpoint_newest(const char *run_dir, char path[4096], FILE *report, Error *e);
/* Loads weights, m, v, state; the ranks of id->comm share the work of the checksums, so one may refuse what others take. id->facts are compared with the recorded ones: a difference whose class is not in allow
 * (comma separated, may be NULL) is EXIT_USAGE and names class, name, recorded value, present value. id->run_id is filled in. */
bool checkpoint_load(const char *dir, GPT2 *model, TrainState *state, RunIdentity *id, const char *allow, Error *e);
/* The recorded value of a fact, for tools and for the start of a resumed run; caller frees; NULL when absent. */
char *checkpoint_fact(const char *dir, const char *name);

/* ---- models from elsewhere: a HF GPT-2 directory (one or several safetensors files), a .safetensors file, or a llm.c weights .bin (fp32 v3,
 * bf16 v5). Settings that the engine does not have are EXIT_DATA with field, found, supported. ---- */
/* Shape, from config.json in the directory or beside the file; without one, from the tensors, with heads of 64 and a note on stderr. */
bool import_config(const char *path, GPT2Config *config, Error *e);
bool import_weights(const char *path, GPT2 *model, Error *e);          /* missing, surplus, misshapen tensors are named */
/* The directory of `path` when it holds tokenizer files, else NULL; caller frees. */
char *import_tokenizer_dir(const char *path);
/* model.safetensors + config.json (+ tokenizer files) into dir, as from_pretrained takes it. */
bool export_model(const char *dir, const GPT2 *model, const char *tokenizer_dir, Error *e);
#ifdef __cplusplus
}
#endif
#endif
