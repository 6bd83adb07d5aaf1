/* Models from elsewhere: config.json beside good weights, a weights file of either kind. What is small enough is imported. */
#include "fuzz.h"
#include "llmc/run/checkpoint.h"

static void import(const char *path) {
    GPT2Config config = {0};
    Error e = {0};
    if (!fuzz_verdict(import_config(path, &config, &e), &e)) return;
    if (config.L > 8 || config.C > 64 || config.V > 4096 || config.T > 256) return;
    GPT2 model;
    Backend *cpu = cpu_backend_create(&e);
    CHECK(gpt2_create(&model, cpu, &config, false, &e), "%s", e.text);
    fuzz_verdict(import_weights(path, &model, &e), &e);
    gpt2_destroy(&model);
    cpu->destroy(cpu);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static const char *const names[] = {"config.json", "x.safetensors", "x.bin"};
    if (size < 1) return 0;
    if (!fuzz_folder) fuzz_copy("dev/test/golden/checkpoint_v1/step_00000014/model.safetensors", "model.safetensors");
    int which = data[0] % 4 % 3;
    if (data[0] % 4 == 3) fuzz_write_safetensors(names[which = 1], data + 1, size - 1);
    else fuzz_write(names[which], data + 1, size - 1);
    char *path = fuzz_path(names[which]);
    import(which ? path : fuzz_folder);
    free(path);
    return 0;
}
