/* The text side of matrix products: a product in words, and the file that keeps the chosen algorithms from one process to the next. Knows
 * nothing of what the values mean. */
#include "backend.cuh"
#include "../base/io.h"
#include <unistd.h>

namespace LLMC_NS {

const char *product_text(const Product *p, char text[PRODUCT_TEXT]) {
    static const char *const epilogues[] = {"none", "bias", "bias_gelu", "dgelu", "bias_grad"};
    snprintf(text, PRODUCT_TEXT, "M=%zu N=%zu K=%zu a=%c%zu b=%c%zu c=%zu %s %s %s", p->M, p->N, p->K, p->a_transposed ? 't' : 'n', p->a_row,
             p->b_transposed ? 't' : 'n', p->b_row, p->c_row, p->c_float ? "float" : "elem", p->add ? "add" : "set", epilogues[p->epilogue]);
    return text;
}

static PlanFile::Line *find(const PlanFile *f, const char *key) {
    for (size_t i = 0; i < f->n; i++)
        if (!strcmp(f->lines[i].key, key)) return &f->lines[i];
    return NULL;
}

static void put(PlanFile *f, const char *key, const char *value) {
    PlanFile::Line *line = find(f, key);
    if (!line) {
        if (f->n == f->room) f->lines = (PlanFile::Line *)xrealloc(f->lines, (f->room = f->room ? 2 * f->room : 64) * sizeof *f->lines);
        line = &f->lines[f->n++];
        *line = PlanFile::Line{xstrdup(key), NULL};
    }
    char *fresh = xstrdup(value);
    free(line->value);
    line->value = fresh;
}

/* Adds the lines of `text` whose key is not there yet; returns how many lines are not of the form. */
static size_t parse(PlanFile *f, char *text) {
    size_t bad = 0;
    for (char *line = text; *line;) {
        char *end = line + strcspn(line, "\n"), *next = *end ? end + 1 : end;
        *end = 0;
        char *middle = strstr(line, " = ");
        if (middle) {
            *middle = 0;
            if (*line && middle[3] && !find(f, line)) put(f, line, middle + 3);
            else bad += !*line || !middle[3];
        } else bad += *line != 0;
        line = next;
    }
    return bad;
}

static void read_into(PlanFile *f, bool complain) {
    Error e = {};
    size_t bytes = 0;
    if (!path_exists(f->path)) return;
    char *text = file_read(f->path, &bytes, &e);
    if (!text) {
        if (complain) fprintf(stderr, "warning: %s; matrix products are timed anew\n", e.text);
        return;
    }
    size_t cut = strlen(text) < bytes, bad = cut + parse(f, text); /* what follows a NUL is no text */
    if (bad && complain) fprintf(stderr, "warning: plan file %s: %zu lines ignored, expected KEY = VALUE\n", f->path, bad);
    free(text);
}

void plan_file_open(PlanFile *f, const char *path) {
    *f = PlanFile{};
    if (!path) return;
    f->path = xstrdup(path);
    read_into(f, true);
}

const char *plan_file_get(PlanFile *f, const char *key) {
    const PlanFile::Line *line = find(f, key);
    if (!line && f->path) read_into(f, false), line = find(f, key);
    return line ? line->value : NULL;
}

void plan_file_put(PlanFile *f, const char *key, const char *value) {
    put(f, key, value);
    f->changed = true;
}

/* The temporary file is this process's own: ranks of one run may save at the same time. */
void plan_file_save(PlanFile *f) {
    if (!f->path || !f->changed) return;
    read_into(f, false);
    Error e = {};
    char *temporary = xasprintf("%s.%ld", f->path, (long)getpid());
    FileWriter *w = file_create(temporary, &e);
    bool ok = w != NULL;
    for (size_t i = 0; ok && i < f->n; i++) {
        char *line = xasprintf("%s = %s\n", f->lines[i].key, f->lines[i].value);
        ok = file_write(w, line, strlen(line), &e);
        free(line);
    }
    if (w && !ok) file_abandon(w);
    ok = ok && file_commit(w, NULL, NULL, &e) && path_rename(temporary, f->path, &e);
    if (!ok) fprintf(stderr, "warning: %s; the algorithms of the matrix products are not kept\n", e.text);
    f->changed = false;
    free(temporary);
}

void plan_file_close(PlanFile *f) {
    for (size_t i = 0; i < f->n; i++) free(f->lines[i].key), free(f->lines[i].value);
    free(f->lines);
    free(f->path);
    *f = PlanFile{};
}

} /* namespace */
