/* Durable file writing: every byte that must survive a crash goes through these calls. They are also the places where
 * test builds (-DLLMC_FAULT_INJECTION) inject faults, counted over the process:
 *   LLMC_FAULT="kill@io=K"          SIGKILL at the K-th call (1-based) to write, fsync, rename, mkdir or unlink below
 *   LLMC_FAULT="errno=ENOSPC@io=K"  the K-th such call fails with that errno
 *   LLMC_FAULT="short@io=K"         the K-th such call, if a write, takes only half of the bytes
 *   LLMC_FAULT="slow=MS@io=K"       the K-th such call comes MS milliseconds later
 *   LLMC_FAULT="kill@step=S"        SIGKILL where fault_point("step", S) is reached; likewise other named points, and at those also
 *                                   stop, term, usr1, abort, segv: SIGSTOP, SIGTERM, SIGUSR1, SIGABRT, SIGSEGV
 *   LLMC_FAULT="slow=MS@step=S"     MS milliseconds (20 without =MS) lost there, and at each later one of the name
 *   LLMC_FAULT="flip@step=S"        fault_flip("step", S) is true: whoever asks flips a bit of what it holds
 *   ",rank=R" behind any of them: on that rank of several alone.
 * Several faults are separated by ";"; anything else is refused with exit code 2.
 * The build that can do this says so once on stderr when LLMC_FAULT is set. */
#ifndef LLMC_BASE_IO_H
#define LLMC_BASE_IO_H
#include "error.h"
#include <stdint.h>
#include <stdio.h>
#ifdef __cplusplus
extern "C" {
#endif

/* A file being written: sequential, buffered (1 MiB), checksummed as it goes (XXH3-128). */
typedef struct FileWriter FileWriter;
FileWriter *file_create(const char *path, Error *e);              /* EXIT_STORAGE on failure, returns NULL */
bool file_write(FileWriter *f, const void *data, size_t bytes, Error *e);
/* Flushes, fsyncs, closes. size and hash (32 hex digits + NUL) may be NULL. On failure the file is closed too. */
bool file_commit(FileWriter *f, uint64_t *size, char hash[33], Error *e);
void file_abandon(FileWriter *f);                                  /* closes and unlinks */

/* Whole small files. file_replace writes PATH.tmp, fsyncs, renames over PATH, fsyncs the parent. */
bool file_replace(const char *path, const void *data, size_t bytes, Error *e);
char *file_read(const char *path, size_t *bytes, Error *e);        /* NUL-terminated; caller frees; EXIT_DATA */
bool file_hash(const char *path, uint64_t *size, char hash[33], Error *e); /* XXH3-128 of the content */

bool dir_create(const char *path, Error *e);                       /* like mkdir -p */
bool dir_sync(const char *path, Error *e);                         /* fsync of a directory */
bool path_rename(const char *from, const char *to, Error *e);      /* rename + fsync of to's parent */
bool path_remove_tree(const char *path, Error *e);                 /* like rm -r; missing is fine */
bool path_exists(const char *path);
bool path_is_dir(const char *path);
char *path_join(const char *a, const char *b);                     /* caller frees */

/* One whole line (ends with \n) appended with a single write(2) to a descriptor opened with O_APPEND. */
bool line_append(int fd, const char *line, size_t bytes, Error *e);

/* Named point for fault injection; does nothing in ordinary builds. */
#ifdef LLMC_FAULT_INJECTION
void fault_point(const char *name, int64_t value);
bool fault_flip(const char *name, int64_t value);
void fault_rank(int rank);             /* which rank this process is, once it is known */
#else
static inline void fault_rank(int rank) { (void)rank; }
static inline void fault_point(const char *name, int64_t value) { (void)name; (void)value; }
static inline bool fault_flip(const char *name, int64_t value) { (void)name; (void)value; return false; }
#endif

#ifdef __cplusplus
}
#endif
#endif
