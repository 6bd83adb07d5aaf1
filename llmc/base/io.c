/* Durable file writing, whole small files, directories, and the fault injection of test builds. Every call that changes the disk
 * goes through one of the sys_ functions, so that a test can kill the process or fail the call at each of them in turn.
 * Not here: formats, checkpoint logic, memory mapping. */
#include "io.h"
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#include <xxhash.h>

enum { BUFFER_BYTES = 1 << 20 };

/* ---- fault injection -------------------------------------------------------------------------------------------- */

#ifdef LLMC_FAULT_INJECTION
#include <pthread.h>
#include <stdatomic.h>

enum { SLOW_MILLISECONDS = 20 }; /* where none are given */
typedef enum { FAULT_SIGNAL, FAULT_ERRNO, FAULT_SHORT, FAULT_SLOW, FAULT_FLIP } FaultKind;
typedef struct {
    FaultKind kind;
    int number;      /* the signal, errno of FAULT_ERRNO, milliseconds of FAULT_SLOW */
    int rank;        /* -1: any */
    char point[24];  /* "io" or the name of a fault_point */
    int64_t at;
} Fault;

static Fault faults[16];
static int n_faults;
static atomic_int_fast64_t io_calls;
static pthread_once_t faults_once = PTHREAD_ONCE_INIT;
static int own_rank;

void fault_rank(int rank) { own_rank = rank; }

static int errno_by_name(const char *name) {
    static const struct { const char *name; int number; } known[] = {
        {"ENOSPC", ENOSPC}, {"EIO", EIO}, {"EDQUOT", EDQUOT}, {"EROFS", EROFS}, {"EACCES", EACCES},
        {"EINTR", EINTR}, {"EFBIG", EFBIG}, {"EMFILE", EMFILE}, {"EPERM", EPERM}, {"EEXIST", EEXIST}};
    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++)
        if (!strcmp(known[i].name, name)) return known[i].number;
    return 0;
}

static int signal_by_name(const char *name) {
    static const struct { const char *name; int number; } known[] = {{"kill", SIGKILL}, {"stop", SIGSTOP}, {"term", SIGTERM}, {"abort", SIGABRT}, {"segv", SIGSEGV}, {"usr1", SIGUSR1}};
    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++)
        if (!strcmp(known[i].name, name)) return known[i].number;
    return 0;
}

/* One of kill@POINT=N (or another signal), errno=NAME@io=N, short@io=N, slow=MS@io=N; each may end in ,rank=R. */
static bool fault_parse(const char *text, Fault *f) {
    char action[24];
    long long at;
    int end = -1, length = 0;
    if (sscanf(text, "%23[^@]@%23[a-z_]=%lld%n", action, f->point, &at, &end) != 3) return false;
    f->rank = -1;
    if (text[end] && (sscanf(text + end, ",rank=%d%n", &f->rank, &length) != 1 || text[end + length] || f->rank < 0)) return false;
    f->at = at;
    bool io = !strcmp(f->point, "io");
    if (at < (io ? 1 : 0)) return false;
    f->kind = !strcmp(action, "short") ? FAULT_SHORT : !strncmp(action, "slow", 4) ? FAULT_SLOW : !strcmp(action, "flip") ? FAULT_FLIP
            : !strncmp(action, "errno=", 6) ? FAULT_ERRNO : FAULT_SIGNAL;
    if (f->kind == FAULT_FLIP) return !io;
    if (f->kind == FAULT_SLOW) return (f->number = action[4] == '=' ? atoi(action + 5) : action[4] ? 0 : SLOW_MILLISECONDS) > 0;
    f->number = f->kind == FAULT_ERRNO ? errno_by_name(action + 6) : f->kind == FAULT_SIGNAL ? signal_by_name(action) : 0;
    if (f->kind == FAULT_SIGNAL) return f->number && (!io || f->number == SIGKILL);
    return io && (f->kind == FAULT_SHORT || f->number);
}

static void faults_read(void) {
    const char *text = getenv("LLMC_FAULT");
    if (!text || !*text) return;
    fprintf(stderr, "fault injection is on: LLMC_FAULT=%s\n", text);
    char *copy = xstrdup(text), *rest = copy;
    for (char *one; (one = strsep(&rest, ";"));) {
        if (n_faults < (int)(sizeof faults / sizeof faults[0]) && fault_parse(one, &faults[n_faults])) {
            n_faults++;
            continue;
        }
        fprintf(stderr, "error: LLMC_FAULT: found \"%s\"; expected at most 16 of kill@io=K, kill@POINT=N, slow=MS@io=K, slow=MS@POINT=N, flip@POINT=N, "
                        "errno=NAME@io=K, short@io=K, each with ,rank=R or without, separated by ';'\n", one);
        exit(EXIT_USAGE);
    }
    free(copy);
}

static const Fault *fault_at(const char *point, int64_t value) {
    for (int i = 0; i < n_faults; i++)
        if ((value == faults[i].at || (faults[i].kind == FAULT_SLOW && value > faults[i].at && strcmp(point, "io"))) && !strcmp(faults[i].point, point) &&
            (faults[i].rank < 0 || faults[i].rank == own_rank))
            return &faults[i];
    return NULL;
}

/* Signals do not cut it short. */
static void lose_time(int milliseconds) {
    struct timespec left = {milliseconds / 1000, milliseconds % 1000 * 1000000L};
    while (nanosleep(&left, &left) && errno == EINTR) {}
}

void fault_point(const char *name, int64_t value) {
    pthread_once(&faults_once, faults_read);
    const Fault *f = fault_at(name, value);
    if (f && f->kind == FAULT_SIGNAL) raise(f->number);
    if (f && f->kind == FAULT_SLOW) lose_time(f->number);
}

bool fault_flip(const char *name, int64_t value) {
    pthread_once(&faults_once, faults_read);
    const Fault *f = fault_at(name, value);
    return f && f->kind == FAULT_FLIP;
}

/* Counts one call. Returns true with errno set where it shall fail; *bytes (may be NULL) is halved where it shall be short. */
static bool fault_io(size_t *bytes) {
    pthread_once(&faults_once, faults_read);
    const Fault *f = fault_at("io", atomic_fetch_add(&io_calls, 1) + 1);
    if (!f) return false;
    if (f->kind == FAULT_SIGNAL) raise(f->number);
    if (f->kind == FAULT_SHORT) {
        if (bytes && *bytes > 1) *bytes /= 2;
        return false;
    }
    if (f->kind == FAULT_SLOW) {
        lose_time(f->number);
        return false;
    }
    errno = f->number;
    return true;
}
#else
static inline bool fault_io(size_t *bytes) { (void)bytes; return false; }
#endif

static ssize_t sys_write(int fd, const void *data, size_t bytes) { return fault_io(&bytes) ? -1 : write(fd, data, bytes); }
static int sys_fsync(int fd) { return fault_io(NULL) ? -1 : fsync(fd); }
static int sys_rename(const char *from, const char *to) { return fault_io(NULL) ? -1 : rename(from, to); }
static int sys_mkdir(const char *path) { return fault_io(NULL) ? -1 : mkdir(path, 0777); }
static int sys_unlink(const char *path) { return fault_io(NULL) ? -1 : unlink(path); }
static int sys_rmdir(const char *path) { return fault_io(NULL) ? -1 : rmdir(path); }

/* ---- messages --------------------------------------------------------------------------------------------------- */

static const char *hint(int number) {
    switch (number) {
    case ENOSPC: case EDQUOT: return "the disk or quota is full: free some space, keep fewer checkpoints (--keep), or write elsewhere (--out)";
    case EACCES: case EPERM: return "check owner and permissions, or choose another place";
    case EROFS: return "the file system is read-only: choose another place (--out)";
    case ENOENT: case ENOTDIR: return "check the spelling and that its directory exists";
    case EISDIR: return "a file is expected here, not a directory";
    case EEXIST: case ENOTEMPTY: return "something else stands there: move it away or choose another name";
    case EFBIG: return "a file size limit was reached: see ulimit -f, or write to another file system";
    case EMFILE: case ENFILE: return "too many open files: see ulimit -n";
    case ENAMETOOLONG: return "use a shorter path";
    case ENOMEM: return "not enough memory for it: is this the file you meant?";
    default: return "check the disk and the system log (dmesg)";
    }
}

static bool fail_errno(Error *e, int code, const char *action, const char *path) {
    int number = errno;
    return fail(e, code, "%s: could not %s: %s; %s", path, action, strerror(number), hint(number));
}

/* ---- writing ---------------------------------------------------------------------------------------------------- */

struct FileWriter {
    int fd;
    int broken;             /* errno of the first failed write: nothing after it can succeed */
    char *path;
    char *buffer;
    size_t filled;
    uint64_t size;
    XXH3_state_t *hash;
};

static void hash_text(XXH128_hash_t hash, char out[33]) {
    XXH128_canonical_t canonical;
    XXH128_canonicalFromHash(&canonical, hash);
    for (int i = 0; i < 16; i++) snprintf(out + 2 * i, 3, "%02x", canonical.digest[i]);
}

static XXH3_state_t *hash_create(void) {
    XXH3_state_t *state = XXH3_createState();
    CHECK(state, "out of host memory for a checksum");
    XXH3_128bits_reset(state);
    return state;
}

/* Writes everything: short writes and interruptions are continued. */
static bool write_all(int fd, const char *data, size_t bytes) {
    while (bytes) {
        ssize_t n = sys_write(fd, data, bytes);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) {
            if (n == 0) errno = ENOSPC;
            return false;
        }
        data += n;
        bytes -= (size_t)n;
    }
    return true;
}

static bool sync_fd(int fd) {
    int r;
    do r = sys_fsync(fd);
    while (r < 0 && errno == EINTR);
    return r == 0;
}

FileWriter *file_create(const char *path, Error *e) {
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (fd < 0) {
        fail_errno(e, EXIT_STORAGE, "create the file", path);
        return NULL;
    }
    FileWriter *f = xcalloc(1, sizeof *f);
    f->fd = fd;
    f->path = xstrdup(path);
    f->buffer = xmalloc(BUFFER_BYTES);
    f->hash = hash_create();
    return f;
}

static bool writer_failed(FileWriter *f, const char *action, Error *e) {
    f->broken = errno;
    return fail_errno(e, EXIT_STORAGE, action, f->path);
}

static bool writer_put(FileWriter *f, const char *data, size_t bytes, Error *e) {
    XXH3_128bits_update(f->hash, data, bytes);
    return write_all(f->fd, data, bytes) || writer_failed(f, "write", e);
}

static bool writer_flush(FileWriter *f, Error *e) {
    size_t bytes = f->filled;
    f->filled = 0;
    return writer_put(f, f->buffer, bytes, e);
}

bool file_write(FileWriter *f, const void *data, size_t bytes, Error *e) {
    if (f->broken) {
        errno = f->broken;
        return fail_errno(e, EXIT_STORAGE, "write", f->path);
    }
    if (!bytes) return true;
    f->size += bytes;
    if (bytes > BUFFER_BYTES - f->filled && !writer_flush(f, e)) return false;
    if (bytes >= BUFFER_BYTES) return writer_put(f, data, bytes, e);
    memcpy(f->buffer + f->filled, data, bytes);
    f->filled += bytes;
    return true;
}

/* Closes and frees; false with errno where close reports what an earlier write lost (network file systems do). */
static bool writer_free(FileWriter *f) {
    bool ok = close(f->fd) == 0 || errno == EINTR;
    int number = errno;
    XXH3_freeState(f->hash);
    free(f->buffer);
    free(f->path);
    free(f);
    errno = number;
    return ok;
}

bool file_commit(FileWriter *f, uint64_t *size, char hash[33], Error *e) {
    bool ok = file_write(f, NULL, 0, e) && writer_flush(f, e) && (sync_fd(f->fd) || writer_failed(f, "flush to disk (fsync)", e));
    if (size) *size = f->size;
    if (hash) hash_text(XXH3_128bits_digest(f->hash), hash);
    char *path = xstrdup(f->path);
    if (!writer_free(f) && ok) ok = fail_errno(e, EXIT_STORAGE, "close", path);
    free(path);
    return ok;
}

void file_abandon(FileWriter *f) {
    if (!f) return;
    struct stat st;
    if (fstat(f->fd, &st) == 0 && S_ISREG(st.st_mode)) sys_unlink(f->path); /* never a device that was given as a file */
    writer_free(f);
}

bool file_replace(const char *path, const void *data, size_t bytes, Error *e) {
    char *temporary = xasprintf("%s.tmp", path);
    FileWriter *f = file_create(temporary, e);
    bool ok = false;
    if (f && !file_write(f, data, bytes, e)) file_abandon(f);
    else if (f) {
        ok = file_commit(f, NULL, NULL, e) && path_rename(temporary, path, e);
        /* After a failed rename or fsync the temporary file is of no use; where the rename happened it is gone already. */
        if (!ok) sys_unlink(temporary);
    }
    free(temporary);
    return ok;
}

/* ---- reading ---------------------------------------------------------------------------------------------------- */

static ssize_t read_some(int fd, void *out, size_t bytes) {
    ssize_t n;
    do n = read(fd, out, bytes);
    while (n < 0 && errno == EINTR);
    return n;
}

/* Reads to the end: pipes and /proc do not know their size beforehand. NULL with errno on failure. */
static char *read_all(int fd, size_t *bytes) {
    struct stat st;
    if (fstat(fd, &st)) return NULL;
    size_t capacity = (st.st_size > 0 ? (size_t)st.st_size : 4096) + 2, n = 0;
    char *text = malloc(capacity);
    while (text) {
        ssize_t got = read_some(fd, text + n, capacity - n - 1);
        if (got <= 0) {
            if (got == 0) break;
            int number = errno;
            free(text);
            errno = number;
            return NULL;
        }
        n += (size_t)got;
        if (n + 1 < capacity) continue;
        char *larger = realloc(text, capacity *= 2);
        if (!larger) free(text);
        text = larger;
    }
    if (!text) {
        errno = ENOMEM;
        return NULL;
    }
    text[n] = 0;
    *bytes = n;
    return text;
}

char *file_read(const char *path, size_t *bytes, Error *e) {
    size_t n = 0;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        fail_errno(e, EXIT_DATA, "open for reading", path);
        return NULL;
    }
    char *text = read_all(fd, &n);
    if (!text) fail_errno(e, EXIT_DATA, "read", path);
    close(fd);
    if (bytes) *bytes = n;
    return text;
}

bool file_hash(const char *path, uint64_t *size, char hash[33], Error *e) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return fail_errno(e, EXIT_DATA, "open for reading", path);
    XXH3_state_t *state = hash_create();
    char *buffer = xmalloc(BUFFER_BYTES);
    uint64_t total = 0;
    ssize_t n;
    while ((n = read_some(fd, buffer, BUFFER_BYTES)) > 0) {
        XXH3_128bits_update(state, buffer, (size_t)n);
        total += (uint64_t)n;
    }
    bool ok = n == 0 || fail_errno(e, EXIT_DATA, "read", path);
    if (size) *size = total;
    if (hash) hash_text(XXH3_128bits_digest(state), hash);
    free(buffer);
    XXH3_freeState(state);
    close(fd);
    return ok;
}

/* ---- directories and paths -------------------------------------------------------------------------------------- */

/* "a/b/" -> "a", "b" -> ".", "/b" -> "/"; caller frees. */
static char *path_parent(const char *path) {
    char *parent = xstrdup(path);
    size_t n = strlen(parent);
    while (n > 1 && parent[n - 1] == '/') n--;
    while (n > 0 && parent[n - 1] != '/') n--;
    while (n > 1 && parent[n - 1] == '/') n--;
    parent[n] = 0;
    if (n) return parent;
    free(parent);
    return xstrdup(".");
}

bool dir_sync(const char *path, Error *e) {
    int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) return fail_errno(e, EXIT_STORAGE, "open the directory", path);
    /* Some network and FUSE file systems have no fsync of directories and say EINVAL; there is nothing more one can do there. */
    bool ok = sync_fd(fd) || errno == EINVAL || errno == ENOTSUP || fail_errno(e, EXIT_STORAGE, "flush the directory to disk (fsync)", path);
    close(fd);
    return ok;
}

static bool parent_sync(const char *path, Error *e) {
    char *parent = path_parent(path);
    bool ok = dir_sync(parent, e);
    free(parent);
    return ok;
}

bool dir_create(const char *path, Error *e) {
    if (path_is_dir(path)) return true;
    if (!*path) return fail(e, EXIT_STORAGE, "could not create a directory with an empty name; give a path");
    char *parent = path_parent(path);
    bool ok = !strcmp(parent, path) || dir_create(parent, e);
    if (ok && sys_mkdir(path)) {
        int number = errno;
        bool made_by_another = number == EEXIST && path_is_dir(path);
        errno = number;
        ok = made_by_another || fail_errno(e, EXIT_STORAGE, "create the directory", path);
    } else if (ok)
        ok = dir_sync(parent, e);
    free(parent);
    return ok;
}

bool path_rename(const char *from, const char *to, Error *e) {
    if (sys_rename(from, to)) {
        int number = errno;
        return fail(e, EXIT_STORAGE, "%s: could not rename to %s: %s; %s", from, to, strerror(number), hint(number));
    }
    return parent_sync(to, e);
}

static bool remove_dir(const char *path, Error *e) {
    DIR *dir = opendir(path);
    if (!dir) return errno == ENOENT || fail_errno(e, EXIT_STORAGE, "open the directory", path);
    bool ok = true;
    for (struct dirent *entry; ok && (entry = readdir(dir));) {
        if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, "..")) continue;
        char *child = path_join(path, entry->d_name);
        ok = path_remove_tree(child, e);
        free(child);
    }
    closedir(dir);
    return ok && (sys_rmdir(path) == 0 || errno == ENOENT || fail_errno(e, EXIT_STORAGE, "remove the directory", path));
}

bool path_remove_tree(const char *path, Error *e) {
    struct stat st;
    if (lstat(path, &st)) return errno == ENOENT || fail_errno(e, EXIT_STORAGE, "look at it for removal", path);
    if (S_ISDIR(st.st_mode)) return remove_dir(path, e);
    return sys_unlink(path) == 0 || errno == ENOENT || fail_errno(e, EXIT_STORAGE, "remove", path);
}

bool path_exists(const char *path) {
    struct stat st;
    return lstat(path, &st) == 0;
}

bool path_is_dir(const char *path) {
    struct stat st;
    return stat(path, &st) == 0 && S_ISDIR(st.st_mode);
}

char *path_join(const char *a, const char *b) {
    size_t n = strlen(a);
    return xasprintf("%s%s%s", a, n && a[n - 1] != '/' ? "/" : "", b);
}

/* ---- lines ------------------------------------------------------------------------------------------------------ */

bool line_append(int fd, const char *line, size_t bytes, Error *e) {
    CHECK(bytes && line[bytes - 1] == '\n', "a line of %zu bytes must end with a newline", bytes);
    if (write_all(fd, line, bytes)) return true;
    int number = errno;
    return fail(e, EXIT_STORAGE, "could not append a line of %zu bytes: %s; %s", bytes, strerror(number), hint(number));
}
