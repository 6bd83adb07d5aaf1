/* What all wrappers share: a Backend whose ops all arrive at one function as (op number, arguments), and whose memory calls, marks and
 * plans go to the backend it wraps. */
#ifndef LLMC_WRAP_WRAPPER_H
#define LLMC_WRAP_WRAPPER_H
#include "../ops.h"

typedef struct {
    Backend backend;          /* first, so that a Backend * is a Wrapper * */
    bool planning;            /* between plan_begin and plan_end, when ops compute nothing */
    void (*run)(Backend *, OpId, const void *args); /* every op */
    char *name;
} Wrapper;

/* Fills in a zeroed wrapper named "kind(inner's name)" that forwards everything but ops, which go to run. */
void wrapper_init(Wrapper *w, const char *kind, Backend *inner, void (*run)(Backend *, OpId, const void *args));
void wrapper_set_ops(Backend *backend);       /* the op pointers alone, for a backend without inner */

/* The forwarding itself, for a wrapper that does something besides. */
void *wrapper_alloc(Backend *b, MemClass class, const char *what, size_t bytes, Error *e);
void wrapper_release(Backend *b, void *p);
void wrapper_plan_begin(Backend *b);
bool wrapper_plan_end(Backend *b, Error *e);
void wrapper_mark(Backend *b, Mark mark, size_t unit);
bool wrapper_replay(Backend *b, uint64_t key);     /* false: a wrapper must see the ops */
void wrapper_record_end(Backend *b, uint64_t key); /* nothing */
void wrapper_sync(Backend *b);
void wrapper_destroy(Backend *b);
#endif
