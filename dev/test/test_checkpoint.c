/* Checkpoints at rest: P2, P3, P5, P6, P11 (loading), P12, P13, P14 on a tiny model. Kills and full disks: test_checkpoint_faults.c. */
#include "checkpoint_fixture.h"
#include <fcntl.h>
#include <sys/stat.h>

/* ---- P2 ---- */

static void flip_bit(const char *path, uint64_t byte, int bit) {
    int fd = open(path, O_RDWR);
    unsigned char c = 0;
    EXPECT(pread(fd, &c, 1, (off_t)byte) == 1, "%s: byte %llu", path, (unsigned long long)byte);
    c ^= (unsigned char)(1 << bit);
    EXPECT(pwrite(fd, &c, 1, (off_t)byte) == 1);
    close(fd);
}

static const char *const part_names[] = {"model.safetensors", "optimizer-0000-of-0001.safetensors", "config.json", "training_state.json",
                                         "manifest.json"};
enum { N_PARTS = sizeof part_names / sizeof *part_names };

TEST(P2_a_thousand_bit_flips) {
    char *run = run_with("flips", (int64_t[]){10}, 1), *dir = step_dir(run, 10);
    Manifest m;
    Error e = {0};
    int named = 0;
    EXPECT(checkpoint_verify(dir, &e) && manifest_read(dir, &m, &e), "%s", e.text);
    for (uint64_t i = 0; i < 1000; i++) {
        const char *name = part_names[i % N_PARTS];
        char *path = path_join(dir, name);
        struct stat st;
        EXPECT(stat(path, &st) == 0);
        uint64_t byte = rng4(2, 0, 0, i).v[0] % (uint64_t)st.st_size;
        flip_bit(path, byte, (int)(i / 7 % 8));
        e = (Error){0};
        EXPECT(!checkpoint_verify(dir, &e) && e.code == EXIT_DATA && strstr(e.text, name), "%s byte %llu: %s", name, (unsigned long long)byte, e.text);
        for (size_t t = 0; i % N_PARTS < 2 && t < m.parts[0].n_tensors * (i % N_PARTS + 1); t++) {
            const PartTensor *p = &m.parts[i % N_PARTS ? 2 : 0].tensors[t];
            if (byte < p->begin || byte >= p->begin + p->bytes) continue;
            char *word = xasprintf("tensor %s ", p->name);
            EXPECT(strstr(e.text, word) && strstr(e.text, p->hash) && strstr(e.text, "found checksum"), "%s: %s", word, e.text);
            free(word);
            named++;
        }
        flip_bit(path, byte, (int)(i / 7 % 8));
        free(path);
    }
    EXPECT(named > 250, "%d flips hit a tensor", named);
    EXPECT(checkpoint_verify(dir, &e), "%s", e.text);
    manifest_free(&m);
    free(dir), free(run);
}

/* The ends of files, where random flips seldom hit; a blank for a newline is still the same JSON. */
TEST(P2_first_and_last_bytes) {
    char *run = run_with("ends", (int64_t[]){10}, 1), *dir = step_dir(run, 10);
    Error e = {0};
    for (size_t i = 0; i < N_PARTS; i++) {
        char *path = path_join(dir, part_names[i]);
        size_t n = 0;
        char *content = file_read(path, &n, &e);
        for (size_t k = 0; k < 48 && k < n; k++) {
            size_t at = k < 8 ? k : n - 1 - (k - 8);
            int fd = open(path, O_RDWR);
            char blank = content[at] == ' ' ? '\t' : ' ';
            EXPECT(pwrite(fd, &blank, 1, (off_t)at) == 1);
            EXPECT(!checkpoint_verify(dir, &e) && strstr(e.text, part_names[i]), "%s byte %zu: %s", part_names[i], at, e.text);
            EXPECT(pwrite(fd, &content[at], 1, (off_t)at) == 1 && close(fd) == 0);
        }
        free(content);
        free(path);
    }
    EXPECT(checkpoint_verify(dir, &e), "%s", e.text);
    free(dir), free(run);
}

/* Rewrites a file with the first `bytes` of its content; zeros follow where that is longer. */
static void expect_rejected_at(const char *dir, const char *name, uint64_t bytes) {
    char *path = path_join(dir, name);
    size_t n;
    Error e = {0};
    char *content = file_read(path, &n, &e);
    if (bytes != n) {
        EXPECT(truncate(path, (off_t)bytes) == 0);
        EXPECT(!checkpoint_verify(dir, &e) && strstr(e.text, name), "%s cut to %llu of %zu: %s", name, (unsigned long long)bytes, n, e.text);
        FILE *f = fopen(path, "wb");
        EXPECT(f && fwrite(content, 1, n, f) == n && fclose(f) == 0);
    }
    free(content);
    free(path);
}

TEST(P2_every_truncation_boundary) {
    char *run = run_with("cut", (int64_t[]){10}, 1), *dir = step_dir(run, 10);
    Manifest m;
    Error e = {0};
    EXPECT(manifest_read(dir, &m, &e), "%s", e.text);
    for (size_t i = 0; i < N_PARTS; i++) {
        char *path = path_join(dir, part_names[i]);
        struct stat st;
        EXPECT(stat(path, &st) == 0);
        free(path);
        uint64_t size = (uint64_t)st.st_size;
        for (uint64_t cut = 0; cut < 10; cut++) expect_rejected_at(dir, part_names[i], cut);
        for (uint64_t k = 0; k < 20; k++) expect_rejected_at(dir, part_names[i], rng4(3, 0, (uint32_t)i, k).v[0] % size);
        expect_rejected_at(dir, part_names[i], size - 1);
        expect_rejected_at(dir, part_names[i], size + 1);
    }
    for (size_t i = 0; i < m.n; i++)
        for (size_t t = 0; t < m.parts[i].n_tensors; t++)
            for (uint64_t d = 0; d < 3; d++) expect_rejected_at(dir, m.parts[i].name, m.parts[i].tensors[t].begin + d - 1);
    EXPECT(checkpoint_verify(dir, &e), "%s", e.text);
    manifest_free(&m);
    free(dir), free(run);
}

TEST(P2_every_file_deleted_or_one_too_many) {
    char *run = run_with("delete", (int64_t[]){10}, 1), *dir = step_dir(run, 10), *aside = path_join(root, "aside");
    Error e = {0};
    for (size_t i = 0; i < N_PARTS; i++) {
        char *path = path_join(dir, part_names[i]);
        EXPECT(rename(path, aside) == 0);
        EXPECT(!checkpoint_verify(dir, &e) && strstr(e.text, part_names[i]), "%s: %s", part_names[i], e.text);
        EXPECT(mkdir(path, 0777) == 0 && !checkpoint_verify(dir, &e) && strstr(e.text, part_names[i]), "%s: %s", part_names[i], e.text);
        EXPECT(rmdir(path) == 0 && rename(aside, path) == 0);
        free(path);
    }
    char *surplus = path_join(dir, "optimizer-0001-of-0002.safetensors"), *hidden = path_join(dir, ".nfs0001");
    EXPECT(file_replace(surplus, "x", 1, &e), "%s", e.text);
    EXPECT(!checkpoint_verify(dir, &e) && strstr(e.text, "optimizer-0001-of-0002"), "%s", e.text);
    EXPECT(unlink(surplus) == 0 && file_replace(hidden, "x", 1, &e) && checkpoint_verify(dir, &e), "%s", e.text);
    free(surplus), free(hidden), free(aside), free(dir), free(run);
}

TEST(P2_tokenizer_files_are_copied_and_watched) {
    static const char *const names[] = {"vocab.json", "merges.txt", "tokenizer_config.json"};
    char *run = path_join(root, "tokenized"), *dir = step_dir(run, 10), *tokenizer = path_join(root, "tokenizer");
    GPT2 model = tiny();
    TrainState s = state_at(10, 10);
    RunIdentity id = identity();
    Error e = {0};
    model_fill(&model, 10);
    id.tokenizer_dir = tokenizer;
    EXPECT(dir_create(tokenizer, &e), "%s", e.text);
    for (int i = 0; i < 3; i++) {
        char *path = path_join(tokenizer, names[i]);
        EXPECT(file_replace(path, names[i], strlen(names[i]), &e), "%s", e.text);
        free(path);
    }
    EXPECT(checkpoint_save(run, &model, &s, &id, &e) && checkpoint_verify(dir, &e), "%s", e.text);
    expect_loads(dir, 10, 10);
    for (int i = 0; i < 3; i++) {
        char *path = path_join(dir, names[i]), *content = file_read(path, NULL, &e);
        EXPECT(content && !strcmp(content, names[i]));
        flip_bit(path, 3, 1);
        EXPECT(!checkpoint_verify(dir, &e) && strstr(e.text, names[i]), "%s", e.text);
        flip_bit(path, 3, 1);
        free(content), free(path);
    }
    gpt2_destroy(&model);
    free(run), free(dir), free(tokenizer);
}

/* Two checkpoints of one run: their files must not be mixed. */
TEST(P2_files_of_another_checkpoint) {
    char *run = run_with("mixed", (int64_t[]){10, 20}, 2);
    for (size_t i = 0; i < N_PARTS; i++) {
        char *from = xasprintf("%s/step_00000010/%s", run, part_names[i]), *to = xasprintf("%s/step_00000020/%s", run, part_names[i]);
        char *dir = step_dir(run, 20), *keep = path_join(root, "keep");
        Error e = {0};
        EXPECT(rename(to, keep) == 0 && link(from, to) == 0);
        EXPECT(!checkpoint_verify(dir, &e), "%s of another step was accepted", part_names[i]);
        EXPECT(unlink(to) == 0 && rename(keep, to) == 0 && checkpoint_verify(dir, &e), "%s", e.text);
        free(from), free(to), free(dir), free(keep);
    }
    free(run);
}

/* ---- P3 ---- */

TEST(P3_newest_valid_and_why_not_the_newer) {
    enum { K = 4 };
    int64_t steps[K] = {10, 20, 30, 40};
    for (int bad = 0; bad <= K; bad++) {
        char *run = run_with("fallback", steps, K), path[4096], said[8192] = "";
        for (int i = 0; i < bad; i++) {
            char *file = xasprintf("%s/step_%08lld/%s", run, (long long)steps[K - 1 - i], part_names[i % N_PARTS]);
            flip_bit(file, 50 + (uint64_t)i, i);
            free(file);
        }
        Error e = {0};
        FILE *report = fmemopen(said, sizeof said, "w");
        bool found = checkpoint_newest(run, path, report, &e);
        fclose(report);
        EXPECT(found == (bad < K), "%d bad: %s", bad, e.text);
        if (found) expect_loads(path, (uint64_t)steps[K - 1 - bad], steps[K - 1 - bad]);
        else EXPECT(e.code == EXIT_NO_CHECKPOINT, "code %d", e.code);
        for (int i = 0; i < K; i++) {
            char *line = xasprintf("step_%08lld rejected: %s/step_%08lld/%s", (long long)steps[K - 1 - i], run, (long long)steps[K - 1 - i],
                                   part_names[i % N_PARTS]);
            EXPECT((strstr(said, line) != NULL) == (i < bad), "%d bad, line %d of: %s", bad, i, said);
            free(line);
        }
        free(run);
    }
    char path[4096];
    Error e = {.code = 77};
    EXPECT(!checkpoint_newest("/nowhere/at/all", path, NULL, &e) && e.code == 0, "code %d", e.code);
}

/* ---- P5 ---- */

TEST(P5_hundred_thousand_histories) {
    enum { MAX = 24 };
    for (uint64_t h = 0; h < 100000; h++) {
        int64_t steps[MAX];
        bool valid[MAX], removed[MAX];
        size_t n = 0;
        int keep_last = 1 + (int)(rng_u32(5, 0, 0, h) % 4);
        int64_t keep_every = rng_u32(5, 0, 1, h) % 5 * 10, step = 0;
        for (uint32_t event = 0; event < 12; event++) {
            Rng4 r = rng4(5, 1, event, h);
            if (r.v[0] % 3 == 0 && n) { valid[r.v[1] % n] = false; continue; }
            steps[n] = step += 1 + r.v[1] % 10;
            valid[n++] = r.v[2] % 4 != 0;
            retain_decide(removed, steps, valid, n, keep_last, keep_every);
            size_t left = 0, newest = n;
            for (size_t i = 0; i < n; i++) {
                size_t newer = 0;
                for (size_t j = i + 1; j < n; j++) newer += valid[j];
                bool want = newer >= (size_t)keep_last && (keep_every == 0 || steps[i] % keep_every != 0);
                EXPECT(removed[i] == want, "history %llu, step %lld", (unsigned long long)h, (long long)steps[i]);
                if (valid[i]) newest = i;
            }
            EXPECT(newest == n || !removed[newest], "history %llu: the newest valid one goes", (unsigned long long)h);
            for (size_t i = 0; i < n; i++)
                if (!removed[i]) steps[left] = steps[i], valid[left++] = valid[i];
            n = left;
        }
    }
}

static bool exists(const char *run, int64_t step) {
    char *dir = step_dir(run, step);
    bool found = path_exists(dir);
    free(dir);
    return found;
}

TEST(P5_on_disk) {
    int64_t steps[] = {10, 20, 30, 40, 50};
    char *run = run_with("retain", steps, 5);
    Error e = {0};
    EXPECT(checkpoint_retain(run, 2, 20, &e), "%s", e.text);
    EXPECT(!exists(run, 10) && exists(run, 20) && !exists(run, 30) && exists(run, 40) && exists(run, 50));
    /* The newest rots without changing size: it does not count, and the one valid of the rest stays. */
    char *rotten = xasprintf("%s/step_00000050/model.safetensors", run), *cut = xasprintf("%s/step_00000040/model.safetensors", run);
    flip_bit(rotten, 20000, 3);
    EXPECT(truncate(cut, 100) == 0);
    EXPECT(checkpoint_retain(run, 1, 0, &e), "%s", e.text);
    EXPECT(exists(run, 20) && exists(run, 40) && exists(run, 50));
    /* None valid: nothing is removed. */
    char *last = xasprintf("%s/step_00000020/config.json", run), *left = path_join(run, ".tmp-step_00000060");
    EXPECT(unlink(last) == 0 && dir_create(left, &e) && checkpoint_retain(run, 1, 0, &e), "%s", e.text);
    EXPECT(exists(run, 20) && exists(run, 40) && exists(run, 50) && !hidden_left(run));
    EXPECT(checkpoint_retain("/nowhere/at/all", 1, 0, &e), "%s", e.text);
    free(rotten), free(cut), free(last), free(left), free(run);
}

/* ---- P6 ---- */

TEST(P6_run_ids_differ) {
    enum { N = 500 };
    static char ids[N][33];
    for (int i = 0; i < N; i++) {
        EXPECT(run_id_create(ids[i]) && strlen(ids[i]) == 32 && strspn(ids[i], "0123456789abcdef") == 32);
        for (int k = 0; k < i; k++) EXPECT(strcmp(ids[i], ids[k]) != 0);
    }
}

TEST(P6_run_id_in_every_file_and_no_other_run_beside_it) {
    char *run = run_with("used", (int64_t[]){10}, 1);
    for (size_t i = 0; i < N_PARTS; i++) {
        char *path = xasprintf("%s/step_00000010/%s", run, part_names[i]);
        size_t n;
        char *content = file_read(path, &n, NULL);
        EXPECT(content && memmem(content, n, RUN_ID, 32), "%s", part_names[i]);
        free(content);
        free(path);
    }
    GPT2 model = tiny();
    RunIdentity other = identity();
    Error e = {0};
    for (int64_t step = 10; step < 30; step += 10) {
        TrainState s = state_at(1, step);
        other.run_id[0] = 'f';
        EXPECT(!checkpoint_save(run, &model, &s, &other, &e) && e.code == EXIT_USAGE && strstr(e.text, "belongs to run"), "%s", e.text);
    }
    expect_newest(run, (int64_t[]){10, 10}, (uint64_t[]){10, 10}, "another run");
    gpt2_destroy(&model);
    free(run);
}

/* ---- P12 ---- */

static bool load_with(const char *dir, const FixedFact *now, size_t n, const char *allow, Error *e) {
    GPT2 model = tiny();
    TrainState s;
    RunIdentity id = {.facts = now, .n_facts = n};
    model_fill(&model, 999);
    memset(&s, 0, sizeof s);
    *e = (Error){0};
    bool ok = checkpoint_load(dir, &model, &s, &id, allow, e);
    EXPECT(ok || (model_differences(&model, 999) == 0 && s.step == 0 && id.run_id[0] == 0), "a refused load touched something");
    gpt2_destroy(&model);
    return ok;
}

TEST(P12_each_changed_fact_is_refused_unless_allowed) {
    char *run = run_with("facts", (int64_t[]){10}, 1), *dir = step_dir(run, 10);
    Error e;
    for (size_t i = 0; i < N_FACTS; i++) {
        FixedFact now[N_FACTS + 1];
        memcpy(now, facts, sizeof facts);
        now[i].value = "changed";
        EXPECT(!load_with(dir, now, N_FACTS, NULL, &e) && e.code == EXIT_USAGE, "%s", facts[i].name);
        EXPECT(strstr(e.text, facts[i].name) && strstr(e.text, facts[i].class_name) && strstr(e.text, facts[i].value) && strstr(e.text, "\"changed\"") &&
               strstr(e.text, strcmp(facts[i].class_name, "shape") ? "--allow-change" : "another shape cannot be continued"), "%s", e.text);
        EXPECT(load_with(dir, now, N_FACTS, facts[i].class_name, &e), "%s", e.text);
        char *list = xasprintf("x,%s,y", facts[i].class_name), *near = xasprintf("%ss,%.2s", facts[i].class_name, facts[i].class_name);
        EXPECT(load_with(dir, now, N_FACTS, list, &e), "%s", e.text);
        EXPECT(!load_with(dir, now, N_FACTS, near, &e));
        free(list), free(near);
        /* no longer stated; stated for the first time */
        memcpy(now, facts, sizeof facts);
        memmove(now + i, now + i + 1, (N_FACTS - i - 1) * sizeof *now);
        EXPECT(!load_with(dir, now, N_FACTS - 1, NULL, &e) && strstr(e.text, facts[i].name) && strstr(e.text, "now nothing"), "%s", e.text);
        memcpy(now, facts, sizeof facts);
        now[N_FACTS] = (FixedFact){"data", "brand new", NULL, NULL};
        EXPECT(!load_with(dir, now, N_FACTS + 1, NULL, &e) && strstr(e.text, "recorded nothing"), "%s", e.text);
    }
    EXPECT(load_with(dir, facts, N_FACTS, NULL, &e), "%s", e.text);
    EXPECT(!load_with(dir, NULL, 0, "shape", &e) && strstr(e.text, "--allow-change data,tokenizer,batch,schedule,optimizer:"), "%s", e.text);
    EXPECT(load_with(dir, NULL, 0, "shape,data,tokenizer,batch,schedule,optimizer", &e), "%s", e.text);
    char *value = checkpoint_fact(dir, "total-batch");
    EXPECT(value && !strcmp(value, "512") && !checkpoint_fact(dir, "nothing of that name"));
    free(value), free(dir), free(run);
}

/* A fact of a later version: where it is not recorded, its old meaning counts, and with that it is not recorded. */
TEST(P12_facts_that_older_checkpoints_lack) {
    char *run = run_with("older", (int64_t[]){10}, 1), *dir = step_dir(run, 10), *later = path_join(root, "later");
    FixedFact now[N_FACTS + 1];
    Error e;
    memcpy(now, facts, sizeof facts);
    now[N_FACTS] = (FixedFact){"device", "dtype", "fp32", "fp32"};
    EXPECT(load_with(dir, now, N_FACTS + 1, NULL, &e), "%s", e.text);
    now[N_FACTS].value = "bf16";
    EXPECT(!load_with(dir, now, N_FACTS + 1, NULL, &e) && strstr(e.text, "dtype (class device): recorded \"fp32\", now \"bf16\""), "%s", e.text);
    EXPECT(load_with(dir, now, N_FACTS + 1, "device", &e), "%s", e.text);
    const char *const values[] = {"fp32", "bf16"};
    for (int i = 0; i < 2; i++) {
        RunIdentity id = {.facts = now, .n_facts = N_FACTS + 1};
        memcpy(id.run_id, RUN_ID, 33);
        GPT2 model = tiny();
        TrainState s = state_at(10, 10 + i);
        now[N_FACTS].value = values[i];
        EXPECT(checkpoint_save(later, &model, &s, &id, &e), "%s", e.text);
        char *saved = step_dir(later, 10 + i), *recorded = checkpoint_fact(saved, "dtype");
        EXPECT(i ? recorded && !strcmp(recorded, "bf16") : !recorded, "%s recorded", recorded ? recorded : "nothing");
        EXPECT(load_with(saved, now, N_FACTS + 1, NULL, &e), "%s", e.text);
        now[N_FACTS].value = values[1 - i];
        EXPECT(!load_with(saved, now, N_FACTS + 1, NULL, &e), "another dtype is taken for the same");
        free(saved), free(recorded);
        gpt2_destroy(&model);
    }
    free(later), free(dir), free(run);
}

TEST(P12_values_that_are_not_utf8) {
    char *run = path_join(root, "utf8"), *dir = step_dir(run, 10);
    FixedFact now[] = {{"data", "path", "caf\xe9.bin", NULL}, {"data", "none", NULL, NULL}};
    RunIdentity id = {.facts = now, .n_facts = 2};
    memcpy(id.run_id, RUN_ID, 33);
    GPT2 model = tiny();
    TrainState s = state_at(10, 10);
    Error e = {0};
    EXPECT(checkpoint_save(run, &model, &s, &id, &e) && load_with(dir, now, 2, NULL, &e), "%s", e.text);
    now[0].value = "caf\xe8.bin";
    EXPECT(!load_with(dir, now, 2, NULL, &e));
    gpt2_destroy(&model);
    free(dir), free(run);
}

TEST(P12_another_shape_cannot_be_allowed) {
    char *run = run_with("shape", (int64_t[]){10}, 1), *dir = step_dir(run, 10);
    static const size_t shapes[][5] = {{3, 16, 2, 50, 8}, {2, 32, 2, 50, 8}, {2, 16, 4, 50, 8}, {2, 16, 2, 51, 8}, {2, 16, 2, 50, 9}};
    for (size_t i = 0; i < 5; i++) {
        GPT2 model = model_create(shapes[i][0], shapes[i][1], shapes[i][2], shapes[i][3], shapes[i][4]);
        TrainState s;
        RunIdentity id = identity();
        Error e = {0};
        EXPECT(!checkpoint_load(dir, &model, &s, &id, "shape", &e) && e.code == EXIT_USAGE && strstr(e.text, "layers 2"), "%zu: %s", i, e.text);
        gpt2_destroy(&model);
    }
    free(dir), free(run);
}

/* ---- P13 ---- */

/* Every byte of the state differs from the poison before, and equals what was saved after. */
TEST(P13_every_field_comes_back) {
    char *run = path_join(root, "poison"), *dir = step_dir(run, 123456789);
    GPT2 model = tiny();
    RunIdentity id = identity();
    Error e = {0};
    for (int round = 0; round < 3; round++) {
        TrainState s = state_at(40, 123456789), got;
        if (round == 1) s.best_val_loss = -INFINITY, s.last_val_loss = -0.0, s.monitor.loss.values[5] = -0.0f, s.monitor.norm.values[6] = INFINITY;
        if (round == 2) memset(&s.monitor, 0, sizeof s.monitor), s.samples = 0, s.updates = INT64_MIN, s.best_val_loss = 5e-324;
        s.last_val_loss = round ? s.last_val_loss : 1e308;
        path_remove_tree(run, NULL);
        model_fill(&model, 40);
        EXPECT(checkpoint_save(run, &model, &s, &id, &e), "%s", e.text);
        model_fill(&model, 41);
        EXPECT(model_differences(&model, 40) > 20000);
        memset(&got, 0x7b, sizeof got);
        EXPECT(checkpoint_load(dir, &model, &got, &id, NULL, &e), "%s", e.text);
        EXPECT(model_differences(&model, 40) == 0);
        if (round == 2) s.last_val_loss = got.last_val_loss = 0;  /* NaN: compared elsewhere */
        EXPECT(memcmp(&s, &got, sizeof s) == 0, "round %d", round);
    }
    gpt2_destroy(&model);
    free(dir), free(run);
}

/* Optimizer state in pieces, as several processes write it, loads like the one file (P11's loader half). */
TEST(P11_optimizer_state_in_pieces) {
    enum { W = 3 };
    char *run = run_with("pieces", (int64_t[]){10}, 1), *dir = step_dir(run, 10);
    GPT2 model = tiny();
    Manifest m;
    Error e = {0};
    EXPECT(manifest_read(dir, &m, &e), "%s", e.text);
    model_fill(&model, 10);
    size_t n = model.layout.n_tensors;
    Manifest split = {.n = 0};
    for (int rank = 0; rank < W; rank++) {
        StTensor *tensors = xcalloc(2 * n, sizeof *tensors);
        json_t *metadata = json_object();
        size_t count = 0;
        const float **from = xcalloc(2 * n, sizeof *from);
        for (size_t i = 0; i < 2 * n; i++) {
            const ParamTensor *t = &model.layout.tensors[i % n];
            size_t all = t->file_rows * t->cols, cut = i % n == 0 ? 7 : all / W;
            size_t begin = rank * cut, end = rank == W - 1 ? all : begin + cut;
            if (i % n == 3 && rank != 1) continue;                   /* a tensor that one rank holds alone */
            if (i % n == 3) begin = 0, end = all;
            char *key = xasprintf("range.%s", t->name);
            json_object_set_new(metadata, key, json_sprintf("%zu %zu", begin, end));
            free(key);
            tensors[count] = (StTensor){.name = xasprintf("%c.%s", i < n ? 'm' : 'v', t->name), .dtype_name = "F32", .n_dims = 1, .shape = {end - begin},
                                        .begin = count ? tensors[count - 1].end : 0};
            tensors[count].end = tensors[count].begin + (end - begin) * 4;
            from[count++] = (i < n ? model.m.p : model.v.p) + t->offset + begin;
        }
        char *name = xasprintf("optimizer-%04d-of-%04d.safetensors", rank, W), *path = path_join(dir, name), *text = json_dumps(metadata, 0);
        FileWriter *w = file_create(path, &e);
        EXPECT(w && st_write_header(w, tensors, count, text, &e), "%s", e.text);
        for (size_t i = 0; i < count; i++) file_write(w, from[i], tensors[i].end - tensors[i].begin, &e), free(tensors[i].name);
        EXPECT(file_commit(w, NULL, NULL, &e), "%s", e.text);
        manifest_add(&split, name);
        free(name), free(path), free(text), free(from), free(tensors);
        json_decref(metadata);
    }
    OptimizerSet set;
    GPT2 other = tiny();
    model_fill(&other, 10);
    for (size_t i = 0; i < n; i++) {  /* other moments, same weights */
        const ParamTensor *t = &other.layout.tensors[i];
        memset(other.m.p + t->offset, 1, t->file_rows * t->cols * 4);
        memset(other.v.p + t->offset, 1, t->file_rows * t->cols * 4);
    }
    EXPECT(optimizer_open(&set, dir, &split, &other, &e) && optimizer_read(&set, &other, &e), "%s", e.text);
    EXPECT(model_differences(&other, 10) == 0);
    optimizer_close(&set);
    for (size_t missing = 0; missing < W; missing++) {
        Manifest less = {.n = 0};
        for (size_t i = 0; i < W; i++)
            if (i != missing) manifest_add(&less, split.parts[i].name);
        EXPECT(!optimizer_open(&set, dir, &less, &other, &e) && strstr(e.text, "shard is missing"), "%s", e.text);
        manifest_free(&less);
    }
    manifest_add(&split, split.parts[1].name);
    EXPECT(!optimizer_open(&set, dir, &split, &other, &e) && strstr(e.text, "overlap"), "%s", e.text);
    manifest_free(&split);
    manifest_free(&m);
    gpt2_destroy(&other);
    gpt2_destroy(&model);
    free(dir), free(run);
}

/* The position in the data is text of 64 bits in training_state.json: what is no such number is refused, never cut. */
TEST(a_position_that_is_no_number_of_64_bits_is_refused) {
    char *run = run_with("position", (int64_t[]){10}, 1), *dir = step_dir(run, 10), *path = path_join(dir, "training_state.json"), run_id[33];
    const char *bad[] = {"18446744073709551616", "99999999999999999999999", "-1", "+1", " 1", "1 ", "0x10", "1.5", ""};
    TrainState state;
    json_t *json = NULL;
    Error e = {0};
    EXPECT(state_read(dir, &json, &state, run_id, &e), "%s", e.text);
    json_decref(json);
    for (size_t i = 0; i <= sizeof bad / sizeof *bad; i++) {
        const char *value = i ? bad[i - 1] : "18446744073709551615";
        size_t n;
        char *text = file_read(path, &n, &e), *at = strstr(text, "\"samples\":");
        EXPECT(at != NULL);
        if (!at) { free(text); break; }
        char *rest = strchr(strchr(at, ':'), '"') + 1;
        rest = strchr(rest, '"');
        char *changed = xasprintf("%.*s\"samples\":\"%s%s", (int)(at - text), text, value, rest);
        bool ok = file_replace(path, changed, strlen(changed), &e) && state_read(dir, &json, &state, run_id, &e);
        EXPECT(ok == (i == 0), "\"%s\": %s", value, ok ? "taken" : e.text);
        if (ok) json_decref(json);
        if (i == 0) EXPECT(state.samples == UINT64_MAX);
        free(changed), free(text);
    }
    free(path), free(dir), free(run);
}

TEST(a_checkpoint_of_a_newer_version_says_so) {
    char *run = run_with("newer", (int64_t[]){10}, 1), *dir = step_dir(run, 10), *path = path_join(dir, "manifest.json"), hash[33];
    size_t n;
    Error e = {0};
    char *text = file_read(path, &n, &e), *version = strstr(text, "\"version\": 1");
    EXPECT(version != NULL);
    if (version) version[11] = '2';
    hash_hex(text, n - 36, hash);
    memcpy(text + n - 36, hash, 32);
    EXPECT(file_replace(path, text, n, &e) && !checkpoint_verify(dir, &e) && strstr(e.text, "version 2") && strstr(e.text, "newer build"), "%s", e.text);
    free(text), free(path), free(dir), free(run);
}

/* ---- P14 ---- */
static const char GOLDEN[] = "dev/test/golden/checkpoint_v1";
static GPT2 golden_model(void) { return model_create(1, 4, 2, 5, 2); }

/* --golden: makes the fixture; run once per released format version, under a new name. */
static int golden_make(void) {
    GPT2 model = golden_model();
    Error e = {0};
    model_fill(&model, 14);
    return save(GOLDEN, &model, 14, 14, &e) ? 0 : error_print(&e);
}

TEST(P14_version_1_loads) {
    char path[4096];
    GPT2 model = golden_model();
    RunIdentity id = identity();
    TrainState s, want = state_at(14, 14);
    Error e = {0};
    EXPECT(checkpoint_newest(GOLDEN, path, stderr, &e), "%s", e.text);
    EXPECT(checkpoint_load(path, &model, &s, &id, NULL, &e), "%s", e.text);
    want.monitor.spikes_in_row = want.last_val_step = 0;  /* came with version 2 */
    EXPECT(model_differences(&model, 14) == 0 && !memcmp(&s, &want, offsetof(TrainState, last_val_loss)) && isnan(s.last_val_loss));
    gpt2_destroy(&model);
}

int main(int argc, char **argv) {
    Error e = {0};
    if (!(cpu = cpu_backend_create(&e))) return error_print(&e);
    if (argc == 2 && !strcmp(argv[1], "--golden")) return golden_make();
    test_start(argc, argv);
    fixture_start();
    RUN(P2_a_thousand_bit_flips);
    RUN(P2_first_and_last_bytes);
    RUN(P2_every_truncation_boundary);
    RUN(P2_every_file_deleted_or_one_too_many);
    RUN(P2_tokenizer_files_are_copied_and_watched);
    RUN(P2_files_of_another_checkpoint);
    RUN(P3_newest_valid_and_why_not_the_newer);
    RUN(P5_hundred_thousand_histories);
    RUN(P5_on_disk);
    RUN(P6_run_ids_differ);
    RUN(P6_run_id_in_every_file_and_no_other_run_beside_it);
    RUN(P11_optimizer_state_in_pieces);
    RUN(P12_each_changed_fact_is_refused_unless_allowed);
    RUN(P12_facts_that_older_checkpoints_lack);
    RUN(P12_values_that_are_not_utf8);
    RUN(P12_another_shape_cannot_be_allowed);
    RUN(P13_every_field_comes_back);
    RUN(P14_version_1_loads);
    RUN(a_position_that_is_no_number_of_64_bits_is_refused);
    RUN(a_checkpoint_of_a_newer_version_says_so);
    return fixture_end();
}
