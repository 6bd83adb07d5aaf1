/* What all wrappers share: a Backend whose ops all arrive at one function as (op number, arguments), and whose memory calls, marks and
 * plans go to the backend it wraps. */
#ifndef LLMC_WRAP_WRAPPER_H
#define LLMC_WRAP_WRAPPER_H
#include "../ops.h"

typedef struct {
    Backend backend;          /* first, so that a Backend * is a Wrapper * */
    bool planning;            /* between plan_begin and plan_end, when no op computes */
    void (*run)(Backend *, OpId, const void *args); /* every op outside plan mode */
    char *name;
} Wrapper;

/* Fills in a zeroed wrapper named "kind(inner's name)" that forwards everything but ops. In plan mode ops go to inner directly. */
void wrapper_init(Wrapper *w, const char *kind, Backend *inner, void (*run)(Backend *, OpId, const void *args));
void wrapper_set_ops(Backend *backend);       /* the op pointers alone, for a backend without inner */
void wrapper_copy_memory(Backend *backend);   /* inner's figures of memory use become the wrapper's */
void wrapper_free(Wrapper *w);
#endif
