/* The communicator between GPUs: NCCL, loaded at run time. Its operations are on device memory, in a queue of the device, and the host waits for
 * none of them. Its sums are in an order of NCCL's choosing: the same on every rank, and the same every time on the same machines, but
 * not that of the ranks. */
#ifndef LLMC_DIST_NCCL_H
#define LLMC_DIST_NCCL_H
#include "comm.h"
#ifdef __cplusplus
extern "C" {
#endif

/* The queue that operations go into: functions of a backend (llmc/ops.h says what they do), with context before their other arguments. */
typedef struct {
    void *stream;                      /* a cudaStream_t */
    void *context;
    void (*call)(void *context, void (*fn)(void *), void *arg); /* the host calls fn(arg) when the queue gets there; fn uses no device */
    void (*round)(void *context, uint16_t *to, const float *from, size_t rows, size_t stride, size_t n, size_t own);
    void (*sum)(void *context, float *data, const uint16_t *others, size_t parts, size_t own, size_t n);
    uint16_t *room;                    /* (room_elements) device memory for what is sent in bf16 and comes in it, the caller's; NULL: nothing will be */
    size_t room_elements;              /* 16 a rank or more */
    bool emulated;                     /* the twin of NCCL that comes with the emulator, instead of the library */
} DeviceQueue;

/* All ranks together; host is how they meet and agree, and how they ask each other who is missing when nothing moves; it stays the caller's, until after
 * destroy. NULL on all with *e: EXIT_USAGE where the library (libnccl.so.2, or what LLMC_NCCL
 * names) is missing or too old on any, EXIT_HANG where the ranks do not come together within limit seconds, EXIT_DEVICE for NCCL's own errors.
 * Of the Comm: reduce_scatter in WIRE_BF16 sends each rank its part and has the bits of tcp.c; broadcast does not exist (NULL); wait holds the host. Later failures end the process as those of
 * tcp.c do: EXIT_PEER when NCCL lost a peer, EXIT_HANG when no operation has ended for the limit of phase(), by a message that says which ranks have not come to it, EXIT_DEVICE else. */
Comm *nccl_comm_create(Comm *host, const DeviceQueue *queue, double limit, Error *e);

/* ---- NCCL's C interface, as far as it is used (NCCL 2.14 or later; values and layouts as its documentation and nccl.h give them) ---- */
typedef struct { char bytes[128]; } NcclId;
typedef struct { size_t size; unsigned magic, version; int blocking, padding; } NcclConfig; /* as of 2.14; later versions take it by its size and version */
enum { NCCL_OK = 0, NCCL_REMOTE = 6, NCCL_IN_PROGRESS = 7, NCCL_UINT8 = 1, NCCL_FLOAT32 = 7, NCCL_FLOAT64 = 8, NCCL_BF16 = 9, NCCL_SUM = 0, NCCL_VERSION_LEAST = 21400 };
#define NCCL_CONFIG_MAGIC 0xcafebeefu
typedef struct {
    int (*get_version)(int *version);
    int (*get_unique_id)(NcclId *id);
    int (*comm_init)(void **comm, int size, NcclId id, int rank, NcclConfig *config);
    int (*async_error)(void *comm, int *error);
    int (*reduce_scatter)(const void *from, void *to, size_t to_n, int type, int sum, void *comm, void *stream);
    int (*all_gather)(const void *from, void *to, size_t from_n, int type, void *comm, void *stream);
    int (*all_reduce)(const void *from, void *to, size_t n, int type, int sum, void *comm, void *stream);
    int (*group_start)(void);
    int (*group_end)(void);
    int (*send)(const void *from, size_t n, int type, int to, void *comm, void *stream);
    int (*receive)(void *to, size_t n, int type, int from, void *comm, void *stream);
    int (*finalize)(void *comm);
    int (*destroy)(void *comm);
    int (*abort)(void *comm);
    const char *(*error_text)(int error);
    const char *(*last_error)(void *comm);
} NcclApi;
#ifdef LLMC_EMU
extern const NcclApi nccl_twin;        /* dev/emu */
#endif

#ifdef __cplusplus
}
#endif
#endif
