/* The batches that a run of train_gpt2 trains on, for another program to train on the same: by the loader that the run itself has.
 *   batches --data GLOB --seq-len T --samples G --steps S [--seed 1337] [--vocab-size 50257] --out FILE
 * FILE: int32 of this machine, (S, G, T + 1): the samples of each step in order, their T inputs and the last target. */
#include "../../llmc/data/loader.h"
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    const char *data, *out;
    size_t T, G, steps, V;
    uint64_t seed;
} Options;

static Options parse(int argc, char **argv) {
    Options o = {.V = 50257, .seed = 1337};
    const struct option table[] = {{"data", 1, NULL, 'd'}, {"out", 1, NULL, 'o'}, {"seq-len", 1, NULL, 't'}, {"samples", 1, NULL, 'g'}, {"steps", 1, NULL, 's'},
                                   {"seed", 1, NULL, 'r'}, {"vocab-size", 1, NULL, 'v'}, {NULL, 0, NULL, 0}};
    for (int k; (k = getopt_long(argc, argv, "", table, NULL)) != -1;) {
        unsigned long long n = optarg ? strtoull(optarg, NULL, 10) : 0;
        switch (k) {
        case 'd': o.data = optarg; break;
        case 'o': o.out = optarg; break;
        case 't': o.T = n; break;
        case 'g': o.G = n; break;
        case 's': o.steps = n; break;
        case 'r': o.seed = n; break;
        case 'v': o.V = n; break;
        default: exit(EXIT_USAGE);
        }
    }
    if (o.data && o.out && o.T && o.G && o.steps && optind == argc) return o;
    fprintf(stderr, "usage: batches --data GLOB --seq-len T --samples G --steps S [--seed N] [--vocab-size V] --out FILE\n");
    exit(EXIT_USAGE);
}

static bool write_samples(FILE *f, const int32_t *inputs, const int32_t *targets, const Options *o, Error *e) {
    for (size_t b = 0; b < o->G; b++, inputs += o->T, targets += o->T) {
        CHECK(!memcmp(inputs + 1, targets, (o->T - 1) * sizeof *inputs), "sample %zu: targets that are not the next inputs", b);
        if (fwrite(inputs, sizeof *inputs, o->T, f) != o->T || fwrite(targets + o->T - 1, sizeof *targets, 1, f) != 1)
            return fail(e, EXIT_STORAGE, "%s: cannot be written; is the disk full?", o->out);
    }
    return true;
}

static bool write_batches(const Options *o, const Dataset *dataset, Error *e) {
    Loader *loader = loader_create(&(LoaderConfig){.dataset = dataset, .V = o->V, .seed = o->seed, .global_batch = o->G, .world = 1, .B = o->G}, e);
    FILE *f = loader ? fopen(o->out, "wb") : NULL;
    bool ok = f || (loader ? fail(e, EXIT_STORAGE, "%s: cannot be written", o->out) : false);
    for (size_t s = 0; ok && s < o->steps; s++) {
        const int32_t *inputs, *targets;
        ok = loader_next(loader, &inputs, &targets, e) && write_samples(f, inputs, targets, o, e);
    }
    if (f && fclose(f) && ok) ok = fail(e, EXIT_STORAGE, "%s: cannot be written; is the disk full?", o->out);
    loader_destroy(loader);
    return ok;
}

int main(int argc, char **argv) {
    Options o = parse(argc, argv);
    Error e = {0};
    Dataset dataset;
    if (!dataset_open(&dataset, o.data, o.T, &e)) return error_print(&e);
    if (write_batches(&o, &dataset, &e)) printf("batches: %zu steps of %zu x %zu tokens, %.2f epochs\n", o.steps, o.G, o.T, (double)o.steps * (double)o.G / (double)dataset.n_windows);
    dataset_close(&dataset);
    return e.code ? error_print(&e) : 0;
}
