/* Token shards: any bytes, as every kind of shard. */
#include "fuzz.h"
#include "llmc/data/shards.h"

enum { T = 4, V = 300, MOST_WINDOWS = 64 };

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    fuzz_write("x.bin", data, size);
    char *path = fuzz_path("x.bin");
    Dataset dataset;
    Error e = {0};
    shard_is_tokens(path);
    if (fuzz_verdict(dataset_open(&dataset, path, T, &e), &e)) {
        int32_t inputs[T], targets[T];
        for (uint64_t w = 0; w < dataset.n_windows && w < MOST_WINDOWS; w++) {
            uint64_t from_end = dataset.n_windows - 1 - w;
            if (!fuzz_verdict(dataset_window(&dataset, w % 2 ? from_end : w, V, inputs, targets, &e), &e)) continue;
            for (int t = 0; t < T; t++) CHECK(inputs[t] >= 0 && inputs[t] < V && targets[t] >= 0 && targets[t] < V, "an id outside the vocabulary");
        }
        dataset_close(&dataset);
    }
    free(path);
    return 0;
}
