/* What a run is made of, once its options are resolved: data, tokenizer, model shape, length. And the three things one can do with it. */
#ifndef LLMC_RUN_SESSION_H
#define LLMC_RUN_SESSION_H
#include "../data/loader.h"
#include "../data/tokenizer.h"
#include "../dist/nccl.h"
#include "../gpt2.h"
#include "checkpoint.h"
#include "config.h"
#include "device.h"
#include "ranks.h"
#include "schedule.h"
#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    const Config *options;
    Comm *comm;               /* the ranks of the run; not the session's own */
    Ranks ranks;              /* the same as numbers; with --dry-run those that are planned for */
    char *init_from;          /* options->init_from, a run directory replaced by its newest checkpoint; or NULL */
    Tokenizer *tokenizer;     /* NULL: unknown */
    char *tokenizer_dir;      /* where it was loaded from */
    Backend *backend;         /* NULL with --dry-run */
    Backend *device;          /* what backend wraps where there are several ranks, else NULL */
    Comm *devices;            /* by which they tell each other gradients and weights, else NULL: by comm */
    DeviceQueue queue;        /* of devices */
    char transport_line[300]; /* how ranks exchange them, for the start-up table */
    char backend_line[DEVICE_LINE]; /* what it is, for the start-up table */
    char *plan_file;          /* CudaOptions, or NULL */
    int lock;                 /* descriptor whose lock keeps other processes out of the run directory; -1: none */
    GPT2Config shape;
    size_t T;                 /* tokens per sample, at most shape.T */
    Dataset train, val;       /* n_shards 0: none */
    size_t B;                 /* micro-batch */
    /* training alone */
    size_t samples_per_step, n_micro;
    Schedule schedule;
} Session;

/* Settles tokenizer, token files (text is tokenized into RUN/data, once), model shape, batch and steps. Messages on stderr tell what was decided. */
bool session_open(Session *s, const Config *options, Comm *comm, Error *e); /* all ranks together; one failure is all ranks' */
void session_close(Session *s);

/* The start-up table: model, parameters, FLOPs per token, memory by class, data, batch, steps. memory: bytes by MemClass; room: bytes that are
 * left on the device (SIZE_MAX: not known). */
void session_print(const Session *s, const size_t memory[MEM_CLASS_COUNT], size_t room, FILE *out);

/* --print-plans, once the activations are there. */
void session_print_plans(const Session *s, FILE *out);

/* Each returns an exit code and prints its own error. */
int run_train(Session *s);
int run_eval(Session *s);
int run_generate(Session *s);
int run_dry(Session *s);

/* --batch auto: the largest micro-batch that fits the backend's room, and divides the samples of --total-batch where that is given. */
bool plan_batch(Session *s, Error *e);
Keep keep_by_name(const char *recompute);
/* Settles the data of a session: finds or makes token files (prepare.c). s->tokenizer is loaded or trained on the way. */
bool prepare_data(Session *s, Error *e);
bool data_is_text(const char *path);                  /* NULL: false */
/* Vocabulary that suits a text file, by its size. */
size_t default_vocab_size(const char *text_path);

#ifdef __cplusplus
}
#endif
#endif
