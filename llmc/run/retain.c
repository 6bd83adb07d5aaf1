/* Which checkpoints of a run stay. The decision is a pure function; the rest lists directories and removes them.
 * A directory that goes is renamed out of sight first, so that a crash never leaves a half-removed checkpoint under its name. */
#include "checkpoint_private.h"
#include <dirent.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define HIDDEN_SAVE ".tmp-step_"
#define HIDDEN_TRASH ".trash-step_"

/* "step_00000010" or "step_00000010.replaced"; at least 8 digits, as they are written. */
static bool step_name(const char *name, int64_t *step, bool *replaced) {
    char *end;
    if (strncmp(name, "step_", 5) != 0 || strspn(name + 5, "0123456789") < 8) return false;
    errno = 0;
    *step = strtoll(name + 5, &end, 10);
    *replaced = strcmp(end, ".replaced") == 0;
    return errno == 0 && (*end == 0 || *replaced);
}

static int by_step(const void *a, const void *b) {
    const StepDir *x = a, *y = b;
    if (x->step != y->step) return x->step < y->step ? -1 : 1;
    return (int)y->replaced - (int)x->replaced;
}

bool steps_list(const char *run_dir, StepDir **steps, size_t *n, Error *e) {
    *steps = NULL;
    *n = 0;
    DIR *d = opendir(run_dir);
    if (!d) return errno == ENOENT || fail(e, EXIT_DATA, "cannot list the run directory %s: %s", run_dir, strerror(errno));
    for (struct dirent *entry; (entry = readdir(d));) {
        StepDir s;
        if (!step_name(entry->d_name, &s.step, &s.replaced)) continue;
        s.path = path_join(run_dir, entry->d_name);
        *steps = xrealloc(*steps, (*n + 1) * sizeof **steps);
        (*steps)[(*n)++] = s;
    }
    closedir(d);
    if (*n) qsort(*steps, *n, sizeof **steps, by_step);
    return true;
}

void steps_free(StepDir *steps, size_t n) {
    for (size_t i = 0; i < n; i++) free(steps[i].path);
    free(steps);
}

void retain_decide(bool *remove, const int64_t *steps, const bool *valid, size_t n, int keep_last, int64_t keep_every) {
    int kept = 0;
    for (size_t i = n; i-- > 0;) {
        remove[i] = kept >= keep_last && !(keep_every > 0 && steps[i] % keep_every == 0);
        if (valid[i] && kept < keep_last) kept++;
    }
}

static bool shallow_valid(const char *dir) {
    Manifest m;
    if (!manifest_read(dir, &m, NULL)) return false;
    bool ok = manifest_check(dir, &m, 0, 0, NULL);
    manifest_free(&m);
    return ok;
}

static bool remove_hidden_first(const char *path, Error *e) {
    const char *slash = strrchr(path, '/');
    char *trash = xasprintf("%.*s.trash-%s", (int)(slash ? slash + 1 - path : 0), path, slash ? slash + 1 : path);
    bool ok = path_remove_tree(trash, e) && path_rename(path, trash, e) && path_remove_tree(trash, e);
    free(trash);
    return ok;
}

/* What a crash left of saves and removals. */
static bool remove_leftovers(const char *run_dir, Error *e) {
    DIR *d = opendir(run_dir);
    if (!d) return errno == ENOENT || fail(e, EXIT_DATA, "cannot list the run directory %s: %s", run_dir, strerror(errno));
    bool ok = true;
    for (struct dirent *entry; ok && (entry = readdir(d));) {
        if (strncmp(entry->d_name, HIDDEN_SAVE, strlen(HIDDEN_SAVE)) != 0 &&
            strncmp(entry->d_name, HIDDEN_TRASH, strlen(HIDDEN_TRASH)) != 0)
            continue;
        char *path = path_join(run_dir, entry->d_name);
        ok = path_remove_tree(path, e);
        free(path);
    }
    closedir(d);
    return ok;
}

/* Reading every byte of every checkpoint after each save would cost more than the save. So validity here means manifest, files and
 * sizes; but before anything is removed, one checkpoint that stays has passed the full check, and one that failed it does not count. */
static void decide(bool *remove, StepDir *dirs, size_t n, int keep_last, int64_t keep_every) {
    int64_t *steps = xcalloc(n, sizeof *steps);
    bool *valid = xcalloc(n, sizeof *valid);
    for (size_t i = 0; i < n; i++) {
        steps[i] = dirs[i].step;
        valid[i] = shallow_valid(dirs[i].path);
    }
    for (bool verified = false; !verified;) {
        retain_decide(remove, steps, valid, n, keep_last, keep_every);
        size_t newest = n;
        for (size_t i = 0; i < n; i++)
            if (valid[i]) newest = i;
        if (newest == n) break;  /* none valid: nothing is removed */
        verified = valid[newest] = checkpoint_verify(dirs[newest].path, NULL);
    }
    free(valid);
    free(steps);
}

/* A replaced copy whose successor is valid was only waiting for its removal. */
static bool remove_replaced(const char *run_dir, Error *e) {
    StepDir *dirs;
    size_t n;
    if (!steps_list(run_dir, &dirs, &n, e)) return false;
    bool ok = true;
    for (size_t i = 0; ok && i + 1 < n; i++)
        if (dirs[i].replaced && dirs[i + 1].step == dirs[i].step && checkpoint_verify(dirs[i + 1].path, NULL))
            ok = remove_hidden_first(dirs[i].path, e);
    steps_free(dirs, n);
    return ok;
}

bool checkpoint_retain(const char *run_dir, int keep_last, int64_t keep_every, Error *e) {
    StepDir *dirs;
    size_t n;
    CHECK(keep_last >= 1 && keep_every >= 0, "keep_last %d, keep_every %lld", keep_last, (long long)keep_every);
    if (!remove_replaced(run_dir, e) || !steps_list(run_dir, &dirs, &n, e)) return false;
    bool *remove = xcalloc(n, sizeof *remove), ok = true;
    if (n > (size_t)keep_last) decide(remove, dirs, n, keep_last, keep_every);
    for (size_t i = 0; ok && i < n; i++)
        if (remove[i]) ok = remove_hidden_first(dirs[i].path, e);
    free(remove);
    steps_free(dirs, n);
    return ok && remove_leftovers(run_dir, e);
}
