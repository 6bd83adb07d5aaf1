/* The order of training data: a bijection per epoch, samples exactly once (P9), the same global batch for any number of ranks and
 * any micro-batch (P10), and a reader thread that can be stopped at any time. */
#include "../../llmc/base/rng.h"
#include "../../llmc/data/loader.h"
#include "test.h"
#include <fcntl.h>
#include <ftw.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { T = 4, V = 65536, MAX_SAMPLES = 4096 };
static char dir[256];

static int remove_one(const char *path, const struct stat *st, int type, struct FTW *f) {
    (void)st, (void)type, (void)f;
    return remove(path);
}

/* Uneven shards in which the first token of window w is w: 37 + 0 + 1 + 60 + 8 = 106 windows, which no batch used here divides. */
static void make_dataset(Dataset *d) {
    const size_t tokens[] = {37 * T + 1, T, T + 1, 60 * T + 3, 8 * T + 4};
    nftw(dir, remove_one, 16, FTW_DEPTH | FTW_PHYS);
    mkdir(dir, 0700);
    Error e = {0};
    char path[512];
    int32_t window = 0;
    for (int i = 0; i < 5; i++) {
        snprintf(path, sizeof path, "%s/s_%d.bin", dir, i);
        ShardWriter *w = shard_create(path, V, &e);
        size_t n = (tokens[i] - 1) / T;
        for (size_t t = 0; w && t < tokens[i]; t++) {
            int32_t id = t % T ? (int32_t)(40000 + t) : t / T < n ? window++ : 60000;
            EXPECT(shard_append(w, &id, 1, &e), "%s", e.text);
        }
        EXPECT(w && shard_commit(w, &e), "%s", e.text);
    }
    snprintf(path, sizeof path, "%s/s_*.bin", dir);
    EXPECT(dataset_open(d, path, T, &e) && d->n_windows == 106 && window == 106, "%s", e.text);
}

/* ---- permute ---- */

TEST(permute_is_a_bijection_for_every_n) {
    static uint8_t seen[2001];
    const uint64_t seeds[] = {0, 1, 1337, 0xFFFFFFFFFFFFFFFFu};
    for (size_t k = 0; k < 4; k++)
        for (uint64_t n = 1; n <= 2000; n++) {
            memset(seen, 0, n);
            uint64_t wrong = 0;
            for (uint64_t i = 0; i < n; i++) {
                uint64_t p = permute(seeds[k], 3 * k + n % 2, n, i);
                if (p >= n || seen[p]) wrong++;
                else seen[p] = 1;
            }
            EXPECT(!wrong, "n = %d, seed %d: %d repeats", (int)n, (int)k, (int)wrong);
        }
}

static int compare_u64(const void *a, const void *b) {
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

/* Big n: no two of many images coincide, all are in range, and they spread over the whole range. */
TEST(permute_for_big_n) {
    enum { M = 200000 };
    static uint64_t image[M];
    const uint64_t ns[] = {((uint64_t)1 << 20) + 1, ((uint64_t)1 << 32) - 5, ((uint64_t)1 << 32) + 1, ((uint64_t)1 << 40) + 7,
                           (uint64_t)1 << 62, UINT64_MAX};
    for (size_t k = 0; k < sizeof ns / sizeof *ns; k++) {
        double mean = 0;
        for (uint64_t i = 0; i < M; i++) {
            image[i] = permute(7, 0, ns[k], i % 2 ? ns[k] - 1 - i / 2 : i / 2); /* from both ends */
            EXPECT(image[i] < ns[k], "out of range");
            mean += (double)image[i] / (double)ns[k] / M;
        }
        qsort(image, M, sizeof *image, compare_u64);
        size_t repeats = 0;
        for (size_t i = 1; i < M; i++) repeats += image[i] == image[i - 1];
        EXPECT(!repeats, "n %zu: %zu repeats", k, repeats);
        EXPECT(fabs(mean - 0.5) < 5 * sqrt(1.0 / 12 / M), "n %zu: mean %g", k, mean);
    }
}

/* A whole permutation of 2^20 + 1: with n just above a power of four, cycle walking does the most work. */
TEST(permute_whole_million) {
    uint64_t n = ((uint64_t)1 << 20) + 1;
    uint8_t *seen = calloc(n, 1);
    uint64_t repeats = 0;
    for (uint64_t i = 0; i < n; i++) repeats += seen[permute(99, 12345678901, n, i)]++;
    EXPECT(!repeats, "%d repeats", (int)repeats);
    free(seen);
}

/* 5 sigma above the mean of chi-square with df degrees of freedom. */
static double chi_square_limit(double df) { return df + 5 * sqrt(2 * df); }

TEST(permute_looks_random) {
    enum { N = 50, SEEDS = 20000 };
    static double first[N], pair[N][N];
    memset(first, 0, sizeof first);
    memset(pair, 0, sizeof pair);
    for (uint64_t seed = 0; seed < SEEDS; seed++) {
        uint64_t a = permute(seed, 0, N, 0), b = permute(seed, 0, N, 1);
        first[a]++;
        pair[a][b]++;
    }
    double chi1 = 0, chi2 = 0, e1 = (double)SEEDS / N, e2 = (double)SEEDS / N / (N - 1);
    for (int a = 0; a < N; a++) {
        chi1 += (first[a] - e1) * (first[a] - e1) / e1;
        for (int b = 0; b < N; b++)
            if (a != b) chi2 += (pair[a][b] - e2) * (pair[a][b] - e2) / e2;
    }
    EXPECT(chi1 < chi_square_limit(N - 1), "first position: chi-square %g", chi1);
    EXPECT(chi2 < chi_square_limit(N * (N - 1) - 1), "first two positions: chi-square %g", chi2);
    int adjacent = 0, fixed = 0, same_epoch = 0, same_seed = 0;
    enum { M = 10000 };
    for (uint64_t i = 0; i + 1 < M; i++) {
        uint64_t p = permute(5, 0, M, i), q = permute(5, 0, M, i + 1);
        adjacent += p + 1 == q || q + 1 == p;
        fixed += p == i;
        same_epoch += p == permute(5, 1, M, i);
        same_seed += p == permute(6, 0, M, i);
    }
    /* Poisson with means 2, 1, 1, 1 */
    EXPECT(adjacent <= 12 && fixed <= 9 && same_epoch <= 9 && same_seed <= 9, "%d %d %d %d", adjacent, fixed, same_epoch, same_seed);
    uint64_t high = (uint64_t)1 << 32;
    EXPECT(permute(5, 0, M, 1) != permute(5, high, M, 1) || permute(5, 0, M, 2) != permute(5, high, M, 2), "epoch's upper half is ignored");
    EXPECT(permute(5, 0, M, 1) != permute(5 + high, 0, M, 1) || permute(5, 0, M, 2) != permute(5 + high, 0, M, 2), "seed's upper half is ignored");
}

/* The order is part of the promise to resume: these values were recorded when it was first defined. */
TEST(permute_does_not_change_between_versions) {
    const uint64_t expected[4] = {161007, 282003, 737684, 837996};
    for (uint64_t i = 0; i < 4; i++) EXPECT(permute(1337, 1, 1000003, i) == expected[i], "%d: %d", (int)i, (int)permute(1337, 1, 1000003, i));
}

/* ---- loader ---- */

/* Takes n steps from a loader of one rank, checks shapes, appends the window ids to out. */
static size_t take_steps(const LoaderConfig *c, size_t n, int32_t *out) {
    Error e = {0};
    Loader *l = loader_create(c, &e);
    EXPECT(l, "%s", e.text);
    if (!l) return 0;
    size_t per_rank = c->global_batch / c->world, used = 0;
    for (size_t s = 0; s < n; s++) {
        EXPECT(loader_position(l) == c->position + s * c->global_batch, "position %d", (int)loader_position(l));
        for (size_t m = 0; m < per_rank / c->B; m++) {
            const int32_t *in, *target;
            EXPECT(loader_next(l, &in, &target, &e), "%s", e.text);
            if (test_errors) break;
            for (size_t b = 0; b < c->B; b++) {
                out[used++] = in[b * T];
                EXPECT(!memcmp(in + b * T + 1, target + b * T, (T - 1) * sizeof *in), "targets are not inputs shifted by one");
            }
        }
    }
    EXPECT(loader_position(l) == c->position + n * c->global_batch, "position at the end");
    loader_destroy(l);
    return used;
}

/* P9: resumes at random steps; over whole epochs each sample comes exactly as often as there were epochs. */
TEST(P9_each_sample_once_an_epoch_with_random_resumes) {
    Dataset d;
    make_dataset(&d);
    static int32_t ids[MAX_SAMPLES];
    const size_t batches[] = {1, 2, 8, 24, 53};
    for (uint32_t round = 0; round < 20; round++) {
        size_t G = batches[round % 5], epochs = round % 2 ? 1 : 3, total = epochs * 106, used = 0;
        size_t steps = (total + G - 1) / G;
        LoaderConfig c = {.dataset = &d, .V = V, .seed = round, .global_batch = G, .world = 1, .B = G, .ahead = 1 + round % 5};
        for (size_t s = 0; s < steps && !test_errors;) {
            size_t n = 1 + rng_u32(round, 0, 0, s) % (steps - s);
            c.position = s * G;
            used += take_steps(&c, n, ids + used);
            s += n;
        }
        int count[106] = {0}, wrong = 0;
        for (size_t i = 0; i < total; i++) {
            if (i && i % 106 == 0) /* at each epoch's end, not only at the last one */
                for (int w = 0; w < 106; w++) wrong += count[w] != (int)(i / 106);
            count[ids[i]]++;
            wrong += (uint64_t)ids[i] != permute(round, i / 106, 106, i % 106);
        }
        for (int w = 0; w < 106; w++) wrong += count[w] != (int)epochs;
        EXPECT(!wrong && used == steps * G, "G %zu, %zu epochs: %d wrong", G, epochs, wrong);
    }
    dataset_close(&d);
}

/* P10: the ranks' samples of a step, put side by side, are the same sequence for every W and B. */
TEST(P10_global_batch_does_not_depend_on_ranks_or_micro_batch) {
    Dataset d;
    make_dataset(&d);
    enum { G = 24, STEPS = 14 }; /* 336 samples: three epochs and a bit, with epoch ends inside steps */
    static int32_t whole[G * STEPS], part[G * STEPS], joined[G * STEPS];
    LoaderConfig c = {.dataset = &d, .V = V, .seed = 42, .global_batch = G, .world = 1, .B = G};
    take_steps(&c, STEPS, whole);
    const size_t worlds[] = {1, 2, 3, 4, 8};
    int checked = 0;
    for (size_t k = 0; k < 5; k++)
        for (size_t B = 1; B <= G / worlds[k]; B++) {
            size_t W = worlds[k], per = G / W;
            if (per % B) continue;
            for (size_t rank = 0; rank < W; rank++) {
                LoaderConfig r = c;
                r.world = W, r.rank = rank, r.B = B, r.ahead = 1 + (B + rank) % 4;
                EXPECT(take_steps(&r, STEPS, part) == per * STEPS, "count");
                for (size_t s = 0; s < STEPS; s++) memcpy(joined + s * G + rank * per, part + s * per, per * sizeof *part);
            }
            EXPECT(!memcmp(joined, whole, sizeof whole), "W %zu, B %zu", W, B);
            checked++;
        }
    EXPECT(checked == 8 + 6 + 4 + 4 + 2, "%d combinations", checked);
    dataset_close(&d);
}

TEST(bad_configurations_are_usage_errors) {
    Dataset d;
    make_dataset(&d);
    const LoaderConfig good = {.dataset = &d, .V = V, .global_batch = 24, .world = 4, .rank = 3, .B = 3, .position = 48};
    const struct { LoaderConfig c; const char *piece; } cases[] = {
        {{.dataset = &d, .V = V, .global_batch = 24, .world = 5, .rank = 0, .B = 1}, "multiple of 5 processes"},
        {{.dataset = &d, .V = V, .global_batch = 24, .world = 4, .rank = 0, .B = 4}, "multiple of 64 tokens"},
        {{.dataset = &d, .V = V, .global_batch = 24, .world = 4, .rank = 4, .B = 3}, "rank 4"},
        {{.dataset = &d, .V = V, .global_batch = 24, .world = 0, .rank = 0, .B = 3}, "rank 0 of 0"},
        {{.dataset = &d, .V = V, .global_batch = 24, .world = 1, .rank = 0, .B = 0}, "--batch"},
        {{.dataset = &d, .V = V, .global_batch = 0, .world = 1, .rank = 0, .B = 3}, "0 samples"},
        {{.dataset = &d, .V = V, .global_batch = 24, .world = 1, .rank = 0, .B = 3, .position = 25}, "position 25"},
        {{.dataset = &d, .V = 0, .global_batch = 24, .world = 1, .rank = 0, .B = 3}, "vocabulary"},
    };
    Error e = {0};
    Loader *l = loader_create(&good, &e);
    EXPECT(l && loader_position(l) == 48, "%s", e.text);
    loader_destroy(l);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        e = (Error){0};
        l = loader_create(&cases[i].c, &e);
        EXPECT(!l && e.code == EXIT_USAGE && strstr(e.text, cases[i].piece), "case %zu: %s", i, e.text);
        loader_destroy(l);
    }
    dataset_close(&d);
}

TEST(errors_of_the_reader_come_in_order) {
    Dataset d;
    make_dataset(&d);
    uint64_t bad = permute(3, 0, 106, 9); /* the tenth sample is damaged */
    const Shard *s = d.shards;
    while (bad >= s->first_window + s->n_windows) s++;
    off_t at = (off_t)(1024 + 2 * T * (bad - s->first_window) + 2);
    int fd = open(s->path, O_WRONLY);
    EXPECT(pwrite(fd, "\xff\xff", 2, at) == 2, "write");
    close(fd);
    LoaderConfig c = {.dataset = &d, .V = V - 1, .seed = 3, .global_batch = 2, .world = 1, .B = 2, .ahead = 8};
    Error e = {0};
    Loader *l = loader_create(&c, &e);
    const int32_t *in, *target;
    usleep(20000); /* the reader has met the damage long before the consumer asks */
    for (uint64_t k = 0; k < 4; k++)
        EXPECT(loader_next(l, &in, &target, &e) && (uint64_t)in[0] == permute(3, 0, 106, 2 * k), "%d: %s", (int)k, e.text);
    for (int again = 0; again < 2; again++) {
        e = (Error){0};
        EXPECT(!loader_next(l, &in, &target, &e), "damage not seen");
        char offset[64];
        snprintf(offset, sizeof offset, "byte %d: found token id 65535", (int)at);
        EXPECT(e.code == EXIT_DATA && strstr(e.text, s->path) && strstr(e.text, offset), "%s", e.text);
    }
    EXPECT(loader_position(l) == 8, "%d", (int)loader_position(l));
    loader_destroy(l);
    dataset_close(&d);
}

/* What is handed out stays as it is while the reader goes on, however far behind or ahead the consumer is. */
TEST(a_micro_batch_is_stable_until_the_next_call) {
    Dataset d;
    make_dataset(&d);
    for (size_t ahead = 1; ahead <= 3; ahead++) {
        LoaderConfig c = {.dataset = &d, .V = V, .seed = 8, .global_batch = 6, .world = 1, .B = 3, .ahead = ahead};
        Error e = {0};
        Loader *l = loader_create(&c, &e);
        for (uint64_t k = 0; k < 60; k++) {
            const int32_t *in, *target;
            EXPECT(loader_next(l, &in, &target, &e), "%s", e.text);
            if (k % 7 == 0) usleep(300);
            for (uint64_t b = 0; b < 3; b++) EXPECT((uint64_t)in[b * T] == permute(8, (3 * k + b) / 106, 106, (3 * k + b) % 106), "%d", (int)k);
            EXPECT(loader_position(l) == (k + 1) / 2 * 6, "position counts whole steps only");
        }
        loader_destroy(l);
    }
    dataset_close(&d);
}

/* The reader runs ahead by as much as it was told: that much comes even when the files are gone. */
TEST(reads_ahead) {
    Dataset d;
    make_dataset(&d);
    LoaderConfig c = {.dataset = &d, .V = V, .seed = 2, .global_batch = 2, .world = 1, .B = 2, .ahead = 8};
    Error e = {0};
    Loader *l = loader_create(&c, &e);
    const int32_t *in, *target;
    EXPECT(loader_next(l, &in, &target, &e), "%s", e.text);
    usleep(100000);
    for (size_t i = 0; i < d.n_shards; i++) EXPECT(!truncate(d.shards[i].path, 0), "truncate");
    for (uint64_t k = 1; k <= 8; k++)
        EXPECT(loader_next(l, &in, &target, &e) && (uint64_t)in[0] == permute(2, 0, 106, 2 * k), "%d: %s", (int)k, e.text);
    EXPECT(!loader_next(l, &in, &target, &e) && strstr(e.text, "shorter"), "%s", e.text);
    loader_destroy(l);
    dataset_close(&d);
}

TEST(destroyed_at_any_time) {
    Dataset d;
    make_dataset(&d);
    for (uint32_t round = 0; round < 300; round++) {
        LoaderConfig c = {.dataset = &d, .V = V, .seed = round, .global_batch = 4, .world = 1, .B = 1 + round % 2, .ahead = round % 4};
        Error e = {0};
        Loader *l = loader_create(&c, &e);
        const int32_t *in, *target;
        for (uint32_t k = 0; k < rng_u32(1, 0, round, 0) % 12; k++) EXPECT(loader_next(l, &in, &target, &e), "%s", e.text);
        if (round % 3 == 0) usleep(rng_u32(1, 0, round, 1) % 200);
        loader_destroy(l);
    }
    loader_destroy(NULL);
    dataset_close(&d);
}

int main(int argc, char **argv) {
    test_start(argc, argv);
    snprintf(dir, sizeof dir, "%s/llmc_loader_XXXXXX", getenv("TMPDIR") ? getenv("TMPDIR") : "/tmp");
    if (!mkdtemp(dir)) return 1;
    RUN(permute_is_a_bijection_for_every_n);
    RUN(permute_for_big_n);
    RUN(permute_whole_million);
    RUN(permute_looks_random);
    RUN(permute_does_not_change_between_versions);
    RUN(P9_each_sample_once_an_epoch_with_random_resumes);
    RUN(P10_global_batch_does_not_depend_on_ranks_or_micro_batch);
    RUN(bad_configurations_are_usage_errors);
    RUN(errors_of_the_reader_come_in_order);
    RUN(a_micro_batch_is_stable_until_the_next_call);
    RUN(reads_ahead);
    RUN(destroyed_at_any_time);
    nftw(dir, remove_one, 16, FTW_DEPTH | FTW_PHYS);
    return test_done();
}
