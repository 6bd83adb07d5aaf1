/* A checkpoint directory with one file replaced; the manifest agrees with it, so that damage behind the checksums is met too. */
#include "fuzz.h"
#include "llmc/run/checkpoint_private.h"

#define GOLDEN "dev/test/golden/checkpoint_v1/step_00000014"
static const char *const names[] = {"manifest.json", "training_state.json", "config.json", "model.safetensors", "optimizer-0000-of-0001.safetensors"};
enum { N_NAMES = sizeof names / sizeof *names };

static Backend *cpu;
static GPT2 model;

static void restore(int i) {
    char *from = path_join(GOLDEN, names[i]);
    fuzz_copy(from, names[i]);
    free(from);
}

static void start(void) {
    Error e = {0};
    GPT2Config config = {0};
    for (int i = 0; i < N_NAMES; i++) restore(i);
    cpu = cpu_backend_create(&e);
    CHECK(import_config(fuzz_folder, &config, &e) && gpt2_create(&model, cpu, &config, true, &e), "%s", e.text);
}

/* The golden manifest with the replaced file's size and checksum, and no checksums of its tensors. */
static void reseal(const char *name) {
    Manifest m = {0};
    Error e = {0};
    CHECK(manifest_read(GOLDEN, &m, &e), "%s", e.text);
    for (size_t i = 0; i < m.n; i++) {
        if (strcmp(m.parts[i].name, name)) continue;
        char *path = fuzz_path(name);
        CHECK(file_hash(path, &m.parts[i].bytes, m.parts[i].hash, &e), "%s", e.text);
        for (size_t t = 0; t < m.parts[i].n_tensors; t++) free(m.parts[i].tensors[t].name);
        m.parts[i].n_tensors = 0;
        free(path);
    }
    CHECK(manifest_write(fuzz_folder, &m, &e), "%s", e.text);
    manifest_free(&m);
}

/* A manifest whose checksum is right, whatever it says. */
static void write_sealed(const uint8_t *data, size_t size) {
    char *text = xasprintf("%.*s,\n \"manifest_xxh3_128\": \"", (int)size, (const char *)data), hash[33];
    hash_hex(text, strlen(text), hash);
    char *whole = xasprintf("%s%s\"\n}\n", text, hash);
    fuzz_write("manifest.json", whole, strlen(whole));
    free(text);
    free(whole);
}

/* What was accepted can be used. */
static void use_state(TrainState *state) {
    monitor_z(&state->monitor.loss, 1);
    monitor_z(&state->monitor.norm, 1);
    monitor_step(&state->monitor, 1, 1, SKIP_NONE);
}

/* Without the rest of the directory, which makes it many times faster. */
static void read_state(void) {
    json_t *root;
    TrainState state;
    RunIdentity id = {.n_facts = 0};
    Error e = {0};
    if (!fuzz_verdict(state_read(fuzz_folder, &root, &state, id.run_id, &e), &e)) return;
    fuzz_verdict(facts_compare(fuzz_folder, root, &id, NULL, &e), &e);
    use_state(&state);
    json_decref(root);
}

static void load(void) {
    Error e = {0};
    TrainState state;
    RunIdentity id = {.n_facts = 0};
    fuzz_verdict(checkpoint_verify(fuzz_folder, &e), &e);
    e = (Error){0};
    if (fuzz_verdict(checkpoint_load(fuzz_folder, &model, &state, &id, NULL, &e), &e)) use_state(&state);
    free(checkpoint_fact(fuzz_folder, "data"));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size < 1) return 0;
    if (!cpu) start();
    int which = data[0] % (N_NAMES + 1) % N_NAMES; /* the last value: a sealed manifest */
    if (data[0] % (N_NAMES + 1) == N_NAMES) write_sealed(data + 1, size - 1);
    else fuzz_write(names[which], data + 1, size - 1);
    if (which == 1) read_state();
    if (which != 1 || data[0] >= 128) {
        if (which) reseal(names[which]);
        load();
        if (which) restore(0);
    }
    restore(which);
    return 0;
}
