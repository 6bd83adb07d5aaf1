/* training_state.json: TrainState and the run's facts, exactly. Numbers have 17 significant digits; NaN is null, infinities are
 * "inf" and "-inf", unsigned 64-bit integers are strings (JSON integers of common readers are signed). */
#include "checkpoint_private.h"
#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { STATE_VERSION = 2 };

/* ---- one list of fields drives writing and reading ---- */
typedef enum { FIELD_I64, FIELD_U64, FIELD_U32, FIELD_F64, FIELD_WINDOW } FieldType;
static const struct {
    const char *name;
    FieldType type;
    int since;                /* format version that brought it; older files give 0 */
    size_t offset, bytes;
} fields[] = {
#define FIELD_SINCE(version, member, type) {#member, type, version, offsetof(TrainState, member), sizeof((TrainState *)0)->member}
#define FIELD(member, type) FIELD_SINCE(1, member, type)
    FIELD(step, FIELD_I64),
    FIELD(updates, FIELD_I64),
    FIELD(samples, FIELD_U64),
    FIELD(seed, FIELD_U64),
    FIELD(monitor.loss.values, FIELD_WINDOW),
    FIELD(monitor.loss.n, FIELD_U32),
    FIELD(monitor.loss.next, FIELD_U32),
    FIELD(monitor.norm.values, FIELD_WINDOW),
    FIELD(monitor.norm.n, FIELD_U32),
    FIELD(monitor.norm.next, FIELD_U32),
    FIELD(monitor.nonfinite_in_row, FIELD_I64),
    FIELD(monitor.nonfinite_total, FIELD_I64),
    FIELD(monitor.spikes_total, FIELD_I64),
    FIELD_SINCE(2, monitor.spikes_in_row, FIELD_I64),
    FIELD_SINCE(2, last_val_step, FIELD_I64),
    FIELD(best_val_loss, FIELD_F64),
    FIELD(last_val_loss, FIELD_F64),
    FIELD(seconds, FIELD_F64),
#undef FIELD
#undef FIELD_SINCE
};
enum {
    N_FIELDS = sizeof fields / sizeof *fields,
    FIELD_BYTES = 12 * 8 + 2 * (MONITOR_WINDOW * 4 + 2 * 4)
};
_Static_assert(sizeof(TrainState) == FIELD_BYTES, "a field was added to TrainState or Monitor: list it above, or resume loses it");

static json_t *real_to_json(double x) {
    if (isnan(x)) return json_null();
    return isinf(x) ? json_string(x > 0 ? "inf" : "-inf") : json_real(x);
}

static bool real_from_json(const json_t *value, double *x) {
    const char *text = json_string_value(value);
    *x = json_is_null(value) ? (double)NAN : text ? (text[0] == '-' ? -(double)INFINITY : (double)INFINITY) : json_number_value(value);
    return json_is_null(value) || json_is_number(value) || (text && (strcmp(text, "inf") == 0 || strcmp(text, "-inf") == 0));
}

static json_t *field_to_json(FieldType type, const void *at) {
    char text[32];
    switch (type) {
    case FIELD_I64: return json_integer(*(const int64_t *)at);
    case FIELD_U32: return json_integer(*(const uint32_t *)at);
    case FIELD_F64: return real_to_json(*(const double *)at);
    case FIELD_U64: snprintf(text, sizeof text, "%" PRIu64, *(const uint64_t *)at); return json_string(text);
    case FIELD_WINDOW: break;
    }
    json_t *values = json_array();
    for (int i = 0; i < MONITOR_WINDOW; i++) json_array_append_new(values, real_to_json((double)((const float *)at)[i]));
    return values;
}

static bool u64_from_json(const json_t *value, uint64_t *x) {
    const char *text = json_string_value(value);
    if (!text || !*text || text[strspn(text, "0123456789")]) return false;
    errno = 0;
    *x = strtoull(text, NULL, 10);
    return errno == 0;
}

static bool window_from_json(const json_t *value, float *values) {
    bool ok = json_array_size(value) == MONITOR_WINDOW;
    for (size_t i = 0; ok && i < MONITOR_WINDOW; i++) {
        double x;
        ok = real_from_json(json_array_get(value, i), &x);
        values[i] = (float)x;
    }
    return ok;
}

static bool field_from_json(FieldType type, const json_t *value, void *at) {
    json_int_t n = json_integer_value(value);
    switch (type) {
    case FIELD_I64: *(int64_t *)at = n; return json_is_integer(value);
    case FIELD_U32: *(uint32_t *)at = (uint32_t)n; return json_is_integer(value) && n >= 0 && n <= UINT32_MAX;
    case FIELD_U64: return u64_from_json(value, at);
    case FIELD_F64: return real_from_json(value, at);
    case FIELD_WINDOW: return window_from_json(value, at);
    }
    return false;
}

/* ---- facts ---- */

/* A value as JSON can hold it: text that is not UTF-8 (a file name may be anything) in hexadecimal. */
static json_t *fact_text(const char *value) {
    if (!value) value = "";  /* an option that was not given */
    json_t *text = json_string(value);
    if (text) return text;
    char *hex = xmalloc(2 * strlen(value) + 5);
    memcpy(hex, "hex:", 5);
    for (size_t i = 0; value[i]; i++) snprintf(hex + 4 + 2 * i, 3, "%02x", (unsigned char)value[i]);
    text = json_string(hex);
    free(hex);
    return text;
}

char *state_to_json(const TrainState *state, const RunIdentity *id) {
    json_t *root = json_pack("{s:s, s:i, s:s}", "format", "llmc-training-state", "version", STATE_VERSION, "run_id", id->run_id);
    json_t *values = json_object(), *facts = json_array();
    for (int i = 0; i < N_FIELDS; i++)
        json_object_set_new(values, fields[i].name, field_to_json(fields[i].type, (const char *)state + fields[i].offset));
    for (size_t i = 0; i < id->n_facts; i++) {
        const FixedFact *f = &id->facts[i];
        if (f->absent && strcmp(f->value, f->absent) == 0) continue;
        json_array_append_new(facts, json_pack("{s:s, s:s, s:o}", "class", f->class_name, "name", f->name, "value", fact_text(f->value)));
    }
    json_object_set_new(root, "state", values);
    json_object_set_new(root, "facts", facts);
    char *text = json_dumps(root, JSON_INDENT(1) | JSON_REAL_PRECISION(17));
    CHECK(text, "json_dumps of the training state of step %lld", (long long)state->step);
    json_decref(root);
    return text;
}

static bool state_parse(const char *path, const json_t *root, TrainState *state, char run_id[33], Error *e) {
    const char *format = json_string_value(json_object_get(root, "format")), *run = json_string_value(json_object_get(root, "run_id"));
    int64_t version = json_integer_value(json_object_get(root, "version"));
    const json_t *values = json_object_get(root, "state");
    if (!format || strcmp(format, "llmc-training-state") != 0 || !run || strlen(run) > 32 || !json_is_array(json_object_get(root, "facts")))
        return fail(e, EXIT_DATA, "%s: not the training state of a run (format \"llmc-training-state\", run_id, facts)", path);
    if (version < 1 || version > STATE_VERSION)
        return fail(e, EXIT_DATA, "%s: found format version %lld, this build reads 1 to %d; use a newer build", path, (long long)version,
                    STATE_VERSION);
    memset(state, 0, sizeof *state);
    snprintf(run_id, 33, "%s", run);
    for (int i = 0; i < N_FIELDS; i++)
        if (version >= fields[i].since &&
            !field_from_json(fields[i].type, json_object_get(values, fields[i].name), (char *)state + fields[i].offset))
            return fail(e, EXIT_DATA, "%s: field state.%s is missing or not of the expected type", path, fields[i].name);
    return (state->monitor.loss.n <= MONITOR_WINDOW && state->monitor.loss.next < MONITOR_WINDOW && state->monitor.norm.n <= MONITOR_WINDOW &&
            state->monitor.norm.next < MONITOR_WINDOW) ||
           fail(e, EXIT_DATA, "%s: a monitor window's n or next lies outside its %d values", path, MONITOR_WINDOW);
}

bool state_read(const char *dir, json_t **root, TrainState *state, char run_id[33], Error *e) {
    char *path = path_join(dir, "training_state.json");
    *root = json_read_object(path, e);
    bool ok = *root && state_parse(path, *root, state, run_id, e);
    if (!ok) {
        json_decref(*root);
        *root = NULL;
    }
    free(path);
    return ok;
}

static const json_t *fact_entry(const json_t *root, const char *name) {
    size_t i;
    json_t *fact;
    json_array_foreach(json_object_get(root, "facts"), i, fact) {
        const char *text = json_string_value(json_object_get(fact, "name"));
        if (text && strcmp(text, name) == 0) return fact;
    }
    return NULL;
}

const char *facts_find(const json_t *root, const char *name) {
    return json_string_value(json_object_get(fact_entry(root, name), "value"));
}

/* Is `word` one of the comma-separated words of `list`? */
static bool list_has(const char *list, const char *word) {
    for (size_t n = strlen(word); list; list = strchr(list, ',') ? strchr(list, ',') + 1 : NULL)
        if (strncmp(list, word, n) == 0 && (list[n] == 0 || list[n] == ',')) return true;
    return false;
}

typedef struct {
    const char *allow;
    char *text;               /* one line per difference that is not allowed */
    char *classes;            /* of these differences, comma separated */
} Differences;

static void difference_add(Differences *d, const char *class_name, const char *name, const char *recorded, const char *present) {
    if (list_has(d->allow, class_name)) return;
    const char *quote[2] = {recorded ? "\"" : "", present ? "\"" : ""};
    char *text = xasprintf("%s\n  %s (class %s): recorded %s%s%s, now %s%s%s", d->text ? d->text : "", name, class_name, quote[0],
                           recorded ? recorded : "nothing", quote[0], quote[1], present ? present : "nothing", quote[1]);
    free(d->text);
    d->text = text;
    if (list_has(d->classes, class_name)) return;
    char *classes = xasprintf("%s%s%s", d->classes ? d->classes : "", d->classes ? "," : "", class_name);
    free(d->classes);
    d->classes = classes;
}

bool facts_compare(const char *dir, const json_t *root, const RunIdentity *id, const char *allow, Error *e) {
    Differences d = {.allow = allow};
    size_t i;
    json_t *fact;
    for (i = 0; i < id->n_facts; i++) {
        const FixedFact *f = &id->facts[i];
        json_t *present = fact_text(f->value);
        const char *recorded = facts_find(root, f->name);
        if (!recorded) recorded = f->absent;
        if (!recorded || strcmp(recorded, json_string_value(present)) != 0) difference_add(&d, f->class_name, f->name, recorded, f->value);
        json_decref(present);
    }
    json_array_foreach(json_object_get(root, "facts"), i, fact) {
        const char *name = json_string_value(json_object_get(fact, "name")), *class_name = json_string_value(json_object_get(fact, "class"));
        bool present = false;
        for (size_t k = 0; k < id->n_facts; k++) present = present || (name && strcmp(id->facts[k].name, name) == 0);
        if (!present && name && class_name) difference_add(&d, class_name, name, facts_find(root, name), NULL);
    }
    if (!d.text) return true;
    if (list_has(d.classes, "shape"))
        fail(e, EXIT_USAGE, "the run in %s was made with other settings; restore them, or choose another --out: another shape cannot be continued:%s",
             dir, d.text);
    else
        fail(e, EXIT_USAGE, "the run in %s was made with other settings; restore them, choose another --out, or accept the change with "
             "--allow-change %s:%s", dir, d.classes, d.text);
    free(d.classes);
    free(d.text);
    return false;
}
