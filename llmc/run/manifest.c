/* manifest.json: every file of a checkpoint with its size and checksum, and a checksum per tensor so that damage can be named.
 * The manifest ends with the checksum of its own text, so that no byte of a checkpoint is unwatched. */
#include "checkpoint_private.h"
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

enum { MANIFEST_VERSION = 1, HASH_CHUNK = 1 << 20 };
#define MANIFEST "manifest.json"
#define SEAL "\"manifest_xxh3_128\": \""      /* what stands before the manifest's own checksum */
#define SEAL_END "\"\n}\n"

static void digest_hex(XXH128_hash_t digest, char hash[33]) {
    XXH128_canonical_t bytes;
    XXH128_canonicalFromHash(&bytes, digest);
    for (int i = 0; i < 16; i++) snprintf(hash + 2 * i, 3, "%02x", bytes.digest[i]);
}

void hash_hex(const void *data, size_t bytes, char hash[33]) { digest_hex(XXH3_128bits(data, bytes), hash); }

json_t *json_read_object(const char *path, Error *e) {
    size_t bytes;
    json_error_t where;
    char *text = file_read(path, &bytes, e);
    if (!text) return NULL;
    json_t *root = json_loadb(text, bytes, JSON_REJECT_DUPLICATES, &where);
    if (!root) fail(e, EXIT_DATA, "%s:%d:%d: not valid JSON: %s", path, where.line, where.column, where.text);
    else if (!json_is_object(root)) {
        fail(e, EXIT_DATA, "%s: found JSON that is not an object; expected { ... }", path);
        json_decref(root);
        root = NULL;
    }
    free(text);
    return root;
}

Part *manifest_add(Manifest *m, const char *name) {
    m->parts = xrealloc(m->parts, (m->n + 1) * sizeof *m->parts);
    m->parts[m->n] = (Part){.name = xstrdup(name)};
    return &m->parts[m->n++];
}

void manifest_free(Manifest *m) {
    for (size_t i = 0; i < m->n; i++) {
        for (size_t t = 0; t < m->parts[i].n_tensors; t++) free(m->parts[i].tensors[t].name);
        free(m->parts[i].tensors);
        free(m->parts[i].name);
    }
    free(m->parts);
    *m = (Manifest){0};
}

/* ---- writing ---- */

static json_t *part_to_json(const Part *p) {
    json_t *part = json_pack("{s:s, s:I, s:s}", "name", p->name, "bytes", (json_int_t)p->bytes, "xxh3_128", p->hash);
    json_t *tensors = json_array();
    for (size_t i = 0; i < p->n_tensors; i++) {
        const PartTensor *t = &p->tensors[i];
        json_array_append_new(tensors, json_pack("{s:s, s:I, s:I, s:s}", "name", t->name, "begin", (json_int_t)t->begin, "bytes",
                                                 (json_int_t)t->bytes, "xxh3_128", t->hash));
    }
    if (p->n_tensors) json_object_set(part, "tensors", tensors);
    json_decref(tensors);
    return part;
}

char *part_to_text(const Part *p) {
    json_t *json = part_to_json(p);
    char *text = json_dumps(json, JSON_COMPACT);
    CHECK(text, "json_dumps of %s", p->name);
    json_decref(json);
    return text;
}

bool manifest_write(const char *dir, const Manifest *m, Error *e) {
    json_t *files = json_array();
    for (size_t i = 0; i < m->n; i++) json_array_append_new(files, part_to_json(&m->parts[i]));
    json_t *root = json_pack("{s:s, s:i, s:s, s:I, s:o}", "format", "llmc-checkpoint", "version", MANIFEST_VERSION, "run_id", m->run_id,
                             "step", (json_int_t)m->step, "files", files);
    CHECK(root, "manifest of step %lld", (long long)m->step);
    char *text = json_dumps(root, JSON_INDENT(1));
    CHECK(text, "json_dumps of the manifest of step %lld", (long long)m->step);
    size_t length = strlen(text) - 2; /* without the last newline and brace: the seal takes their place */
    char *sealed = xasprintf("%.*s,\n " SEAL, (int)length, text), hash[33];
    hash_hex(sealed, strlen(sealed), hash);
    char *whole = xasprintf("%s%s" SEAL_END, sealed, hash), *path = path_join(dir, MANIFEST);
    FileWriter *w = file_create(path, e);
    bool ok = w != NULL;
    if (ok && !file_write(w, whole, strlen(whole), e)) { file_abandon(w); ok = false; }
    else ok = ok && file_commit(w, NULL, NULL, e);
    free(path); free(whole); free(sealed); free(text);
    json_decref(root);
    return ok;
}

/* ---- reading ---- */

static bool text_field(const json_t *object, const char *key, char *out, size_t room) {
    const char *s = json_string_value(json_object_get(object, key));
    if (!s || strlen(s) >= room) return false;
    memcpy(out, s, strlen(s) + 1);
    return true;
}

static bool count_field(const json_t *object, const char *key, uint64_t *out) {
    const json_t *n = json_object_get(object, key);
    *out = (uint64_t)json_integer_value(n);
    return json_is_integer(n) && json_integer_value(n) >= 0;
}

/* A name that cannot lead out of the directory. */
static bool plain_name(const char *name) { return name && name[0] && name[0] != '.' && !strchr(name, '/'); }

static bool part_from_json(Manifest *m, const json_t *file) {
    const char *name = json_string_value(json_object_get(file, "name"));
    if (!plain_name(name)) return false;
    Part *p = manifest_add(m, name);
    const json_t *tensors = json_object_get(file, "tensors");
    p->tensors = xcalloc(json_array_size(tensors), sizeof *p->tensors);
    for (size_t i = 0; i < json_array_size(tensors); i++) {
        const json_t *entry = json_array_get(tensors, i);
        PartTensor *t = &p->tensors[p->n_tensors];
        if (!json_is_string(json_object_get(entry, "name")) || !count_field(entry, "begin", &t->begin) ||
            !count_field(entry, "bytes", &t->bytes) || !text_field(entry, "xxh3_128", t->hash, sizeof t->hash))
            return false;
        t->name = xstrdup(json_string_value(json_object_get(entry, "name")));
        p->n_tensors++;
    }
    return count_field(file, "bytes", &p->bytes) && text_field(file, "xxh3_128", p->hash, sizeof p->hash);
}

bool part_from_text(Manifest *m, const char *text) {
    json_t *json = json_loads(text, JSON_REJECT_DUPLICATES, NULL);
    bool ok = json && part_from_json(m, json);
    json_decref(json);
    return ok;
}

/* The text is what was written: its last bytes are the checksum of all before. */
static bool seal_check(const char *path, const char *text, size_t bytes, Error *e) {
    size_t tail = 32 + strlen(SEAL_END);
    char expected[33];
    if (bytes < tail + strlen(SEAL) || memcmp(text + bytes - strlen(SEAL_END), SEAL_END, strlen(SEAL_END)) ||
        memcmp(text + bytes - tail - strlen(SEAL), SEAL, strlen(SEAL)))
        return fail(e, EXIT_DATA, "%s: found %zu bytes without the checksum that ends a manifest; it is damaged or cut off", path, bytes);
    hash_hex(text, bytes - tail, expected);
    if (memcmp(text + bytes - tail, expected, 32))
        return fail(e, EXIT_DATA, "%s: found checksum %.32s, expected %s for its content; it is damaged", path, text + bytes - tail, expected);
    return true;
}

static bool manifest_parse(Manifest *m, const char *path, const char *text, size_t bytes, Error *e) {
    json_t *root = json_loadb(text, bytes, JSON_REJECT_DUPLICATES, NULL);
    const json_t *files = json_object_get(root, "files");
    const char *format = json_string_value(json_object_get(root, "format"));
    int64_t version = json_integer_value(json_object_get(root, "version"));
    uint64_t step = 0;
    bool ok = true;
    if (!format || strcmp(format, "llmc-checkpoint") != 0)
        ok = fail(e, EXIT_DATA, "%s: not the manifest of a checkpoint (format \"llmc-checkpoint\")", path);
    else if (version < 1 || version > MANIFEST_VERSION)
        ok = fail(e, EXIT_DATA, "%s: found format version %lld, this build reads 1 to %d; use a newer build", path, (long long)version,
                  MANIFEST_VERSION);
    ok = ok && text_field(root, "run_id", m->run_id, sizeof m->run_id) && count_field(root, "step", &step) && json_array_size(files) > 0;
    for (size_t i = 0; ok && i < json_array_size(files); i++) ok = part_from_json(m, json_array_get(files, i));
    if (!ok && !(e && e->code)) fail(e, EXIT_DATA, "%s: a field of the manifest is missing or of the wrong type", path);
    m->step = (int64_t)step;
    json_decref(root);
    return ok;
}

bool manifest_read(const char *dir, Manifest *m, Error *e) {
    Error local = {0};
    size_t bytes = 0;
    char *path = path_join(dir, MANIFEST);
    *m = (Manifest){0};
    char *text = file_read(path, &bytes, &local);
    bool ok = text && seal_check(path, text, bytes, &local) && manifest_parse(m, path, text, bytes, &local);
    free(text);
    free(path);
    if (ok) return true;
    manifest_free(m);
    if (e) *e = local;
    return false;
}

/* ---- checking ---- */

/* XXH3-128 of a range of a file; false when it cannot be read. */
static bool range_hash(int fd, uint64_t begin, uint64_t bytes, char hash[33]) {
    XXH3_state_t *state = XXH3_createState();
    char *buffer = xmalloc(HASH_CHUNK);
    CHECK(state, "out of host memory: XXH3 state");
    XXH3_128bits_reset(state);
    bool ok = true;
    for (uint64_t done = 0, k; ok && done < bytes; done += k) {
        k = bytes - done < HASH_CHUNK ? bytes - done : HASH_CHUNK;
        ok = pread_full(fd, buffer, (size_t)k, begin + done);
        if (ok) XXH3_128bits_update(state, buffer, (size_t)k);
    }
    digest_hex(XXH3_128bits_digest(state), hash);
    XXH3_freeState(state);
    free(buffer);
    return ok;
}

/* The checksum of the file is wrong: say where. */
static bool damage_message(const char *path, const Part *p, const char *found, Error *e) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    char hash[33] = "";
    for (size_t i = 0; fd >= 0 && i < p->n_tensors; i++) {
        const PartTensor *t = &p->tensors[i];
        if (range_hash(fd, t->begin, t->bytes, hash) && strcmp(hash, t->hash) == 0) continue;
        close(fd);
        return fail(e, EXIT_DATA, "%s: tensor %s (bytes %llu to %llu) is damaged: found checksum %s, expected %s", path, t->name,
                    (unsigned long long)t->begin, (unsigned long long)(t->begin + t->bytes), hash, t->hash);
    }
    if (fd >= 0) close(fd);
    return fail(e, EXIT_DATA, "%s: %s is damaged: found checksum %s, expected %s", path, p->n_tensors ? "its header" : "the file", found,
                p->hash);
}

static bool size_check(const char *path, const Part *p, Error *e) {
    struct stat st;
    if (stat(path, &st)) return fail(e, EXIT_DATA, "%s: the file is missing (%s), expected %llu bytes", path, strerror(errno),
                                      (unsigned long long)p->bytes);
    if (!S_ISREG(st.st_mode)) return fail(e, EXIT_DATA, "%s: found something that is not a regular file, expected one of %llu bytes", path,
                                          (unsigned long long)p->bytes);
    if ((uint64_t)st.st_size == p->bytes) return true;
    const char *cut = "";
    for (size_t i = 0; i < p->n_tensors; i++)
        if (!*cut && (uint64_t)st.st_size < p->tensors[i].begin + p->tensors[i].bytes) cut = p->tensors[i].name;
    return fail(e, EXIT_DATA, "%s: found %llu bytes, expected %llu%s%s%s", path, (unsigned long long)st.st_size, (unsigned long long)p->bytes,
                *cut ? " (cut off in or before tensor " : "", cut, *cut ? ")" : "");
}

static bool part_check(const char *dir, const Part *p, bool deep, Error *e) {
    char *path = path_join(dir, p->name), hash[33];
    bool ok = size_check(path, p, e);
    if (ok && deep) {
        ok = file_hash(path, NULL, hash, e);
        if (ok && strcmp(hash, p->hash) != 0) ok = damage_message(path, p, hash, e);
        StFile f;
        if (ok && p->n_tensors && (ok = st_open(&f, path, e))) st_close(&f);
    }
    free(path);
    return ok;
}

/* A file that the manifest does not list could be taken for a part by other programs. Hidden files (.nfsNNNN, .DS_Store) do not matter. */
static bool surplus_check(const char *dir, const Manifest *m, Error *e) {
    DIR *d = opendir(dir);
    if (!d) return fail(e, EXIT_DATA, "cannot list %s: %s", dir, strerror(errno));
    bool ok = true;
    for (struct dirent *entry; ok && (entry = readdir(d));) {
        const char *name = entry->d_name;
        bool listed = name[0] == '.' || strcmp(name, MANIFEST) == 0;
        for (size_t i = 0; !listed && i < m->n; i++) listed = strcmp(name, m->parts[i].name) == 0;
        if (!listed) ok = fail(e, EXIT_DATA, "%s/%s: found a file that the manifest does not list; move it out of the checkpoint", dir, name);
    }
    closedir(d);
    return ok;
}

bool manifest_check(const char *dir, const Manifest *m, size_t first, size_t every, Error *e) {
    bool ok = surplus_check(dir, m, e);
    for (size_t i = 0; ok && i < m->n; i++) ok = part_check(dir, &m->parts[i], every && i % every == first, e);
    return ok;
}

bool checkpoint_verify(const char *dir, Error *e) {
    Manifest m;
    if (!manifest_read(dir, &m, e)) return false;
    bool ok = manifest_check(dir, &m, 0, 1, e);
    manifest_free(&m);
    return ok;
}
