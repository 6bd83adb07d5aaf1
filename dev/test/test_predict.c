/* --dry-run --gpus: messages and steps by hand, what must hold for all sizes, and published runs of others against the prediction. */
#include "llmc/base/gpus.h"
#include "llmc/gpt2.h"
#include "llmc/run/predict.h"
#include "test.h"

static bool near(double a, double b) { return fabs(a - b) <= 1e-12 * fabs(b); }
static const Cluster h100 = {.gpus = 8, .nodes = 1, .peak_flops = 989.5e12, .mfu = 0.4, .bus = 370e9, .network = 50e9};

/* A model as --dry-run has it; units aligned for `ranks`. Freed by the caller. */
typedef struct { Work w; GPT2Config c; size_t *elements, n_params; } Model;
static Model model_of(const char *name, size_t ranks, size_t B, size_t n_micro) {
    Model m = {0};
    ParamLayout layout;
    Error e = {0};
    EXPECT(gpt2_config_by_name(&m.c, name, &e), "%s", e.text);
    gpt2_layout(&layout, &m.c, ranks * 64);
    m.elements = malloc(layout.n_units * sizeof *m.elements);
    for (size_t u = 0; u < layout.n_units; u++) m.elements[u] = layout.unit_begin[u + 1] - layout.unit_begin[u];
    m.n_params = layout.n_params;
    m.w = (Work){.elements = m.elements, .n_units = layout.n_units, .flops_per_token = gpt2_flops_per_token(&m.c, m.c.T), .tokens = B * m.c.T,
                 .n_micro = n_micro, .wire_bytes = 4, .weight_bytes = 2, .sharded = ranks > 1};
    gpt2_layout_free(&layout);
    return m;
}

TEST(messages_by_hand) {
    Cluster c = h100;
    EXPECT(near(predict_message(&c, 370e9), 7.0 / 8), "seven eighths of the bytes over the bus");
    c.nodes = 4;
    EXPECT(near(predict_message(&c, 200e9), 7.0 / 8 * 200 / 370 + 3.0 / 4 * 200 / 50), "and three quarters over the node's network: %g", predict_message(&c, 200e9));
    c.gpus = 1;
    EXPECT(near(predict_message(&c, 200e9), 3), "one GPU a node: the network alone");
    c.nodes = 1;
    EXPECT(predict_message(&c, 1e12) == 0, "one GPU has nobody to send to");
}

/* 124M: embedding of (50304 + 1024) x 768 = 39,419,904, 12 blocks of 7,087,872, which end on a multiple of 8 x 64 as 7,088,128, norm of 1536: together
 * 124,478,976. */
TEST(messages_of_124M_on_8) {
    Model m = model_of("gpt2", 8, 64, 1);
    Cluster c = h100;
    c.mfu = 0.381;
    Prediction p = predict_step(&c, &m.w);
    EXPECT(m.w.n_units == 14 && m.elements[0] == 39419904 && m.elements[1] == 7088128 && m.elements[13] == 1536, "units");
    EXPECT(p.reduce_bytes == 435676416.0, "7/8 of 124,478,976 float32: %.0f", p.reduce_bytes);
    EXPECT(p.gather_bytes == 217838208.0, "7/8 of as many bf16: %.0f", p.gather_bytes);
    EXPECT(near(p.reduce, 435676416.0 / 370e9) && near(p.gather, 217838208.0 / 370e9), "at 370 GB/s");
    /* 5.8 ms of backward a block, 0.067 ms of its message: what is left at the end is the first block, just final, and the embedding; these two come first in the
     * next forward, and the other blocks arrive during the first's 2.9 ms. */
    EXPECT(near(p.reduce_exposed, (39419904 + 7088128) * 3.5 / 370e9), "%.17g", p.reduce_exposed);
    EXPECT(near(p.gather_exposed, (39419904 + 7088128) * 1.75 / 370e9), "%.17g", p.gather_exposed);
    EXPECT(near(p.compute, 65536 * 803478528.0 / (0.381 * 989.5e12)), "%.17g", p.compute);
    EXPECT(near(p.step, p.compute + p.reduce_exposed + p.gather_exposed) && near(p.tokens_per_second, 524288 / p.step), "step");
    EXPECT(near(p.mfu, 65536 * 803478528.0 / p.step / 989.5e12), "MFU of the step: %g", p.mfu);
    m.w.wire_bytes = 2;
    EXPECT(predict_step(&c, &m.w).reduce_bytes == 217838208.0, "bf16 on the wire is half of it");
    m.w.wire_bytes = 4, m.w.sharded = false;
    p = predict_step(&c, &m.w);
    EXPECT(p.reduce_bytes == 2 * 435676416.0 && p.gather == 0 && p.gather_exposed == 0, "without ZeRO-1 sums come back in float32, and no weights");
    free(m.elements);
}

/* Three blocks of 10 elements, embedding 20, norm 10, by hand. 1 FLOP/s, 1 token: head 6 x 30 = 180 FLOPs, blocks 60 each: forward 20 s a block, head 60 s. */
TEST(a_queue_by_hand) {
    static const size_t elements[] = {20, 10, 10, 10, 10};
    Work w = {.elements = elements, .n_units = 5, .flops_per_token = 360, .tokens = 1, .n_micro = 2, .wire_bytes = 4, .weight_bytes = 2, .sharded = true};
    Cluster c = {.gpus = 2, .nodes = 1, .peak_flops = 1, .mfu = 1, .bus = 1, .network = 1};
    Prediction p = predict_step(&c, &w);
    EXPECT(p.compute == 720, "%g", p.compute);
    /* messages: norm 20 s, blocks 20 s, embedding 40 s; blocks are final at 160, 200, 240 s after the backward's begin: sent at 180, 220, 260, embedding 300 */
    EXPECT(p.reduce_exposed == 60 && p.reduce == 120, "%g of %g", p.reduce_exposed, p.reduce);
    /* gathered after 20, 30, 40, 50, 60 s; forward waits for embedding (20) and the first block (10) */
    EXPECT(p.gather_exposed == 30 && p.gather == 60 && p.step == 810, "%g of %g", p.gather_exposed, p.gather);
    c.bus = 0.1;
    p = predict_step(&c, &w);
    /* messages of 200 s, embedding 400: sent from 120 s on without a pause, 1200 s; the backward ends after 240 */
    EXPECT(p.reduce_exposed == 120 + 1200 - 240, "limited by messages: %g", p.reduce_exposed);
    /* 200, 300, 400, 500, 600: forward 300-320, 400-420, 500-520, head at 600: waits of 200 + 100 + 80 + 80 + 80 */
    EXPECT(p.gather_exposed == 540, "%g", p.gather_exposed);
    c.bus = 1, w.recompute = true;
    p = predict_step(&c, &w);
    EXPECT(p.compute == 2 * (360 + 60) && near(p.mfu, 2 * 360 / p.step), "recomputing costs time and is no FLOP of the model: %g", p.compute);
    c.bus = 0.1;
    EXPECT(predict_step(&c, &w).reduce_exposed == 1200 - 3 * 60, "a backward of 60 s a block hides more: %g", predict_step(&c, &w).reduce_exposed);
}

TEST(one_gpu_sends_nothing) {
    Model m = model_of("gpt2", 1, 16, 4);
    Cluster c = h100;
    c.gpus = 1;
    Prediction p = predict_step(&c, &m.w);
    EXPECT(p.reduce_bytes == 0 && p.gather_bytes == 0 && p.reduce == 0 && p.gather == 0 && p.reduce_exposed == 0 && p.gather_exposed == 0, "no communication");
    EXPECT(p.step == p.compute && near(p.mfu, 0.4), "MFU is what was assumed: %.17g", p.mfu);
    free(m.elements);
}

/* Over many clusters: what more bandwidth, GPUs, accumulation and bf16 may and may not do. */
TEST(what_holds_for_all) {
    static const char *const models[] = {"gpt2", "gpt2-xl", "gpt3-6.7b"};
    static const size_t many[] = {1, 2, 3, 8, 64};
    for (int i = 0; i < 3; i++)
        for (int g = 0; g < 5; g++)
            for (int n = 0; n < 5; n++)
                for (double speed = 1e9; speed < 1e13; speed *= 30) {
                    Model m = model_of(models[i], many[g] * many[n], 2, 1);
                    Cluster c = {.gpus = many[g], .nodes = many[n], .peak_flops = 1e15, .mfu = 0.5, .bus = 370e9, .network = speed}, faster = c;
                    double W = (double)(c.gpus * c.nodes), S = 0;
                    for (size_t u = 0; u < m.w.n_units; u++) S += (double)m.elements[u];
                    Prediction p = predict_step(&c, &m.w), q;
                    EXPECT(fabs(p.reduce_bytes - 4 * S * (W - 1) / W) <= 1e-9 * S, "(W-1)/W of the bytes");
                    EXPECT(p.reduce_exposed >= 0 && p.reduce_exposed <= p.reduce * (1 + 1e-9) && p.gather_exposed >= 0 &&
                           p.gather_exposed <= p.gather * (1 + 1e-9), "no more is waited for than is sent: %g of %g, %g of %g", p.reduce_exposed, p.reduce, p.gather_exposed, p.gather);
                    EXPECT(p.reduce_exposed >= predict_message(&c, 4.0 * (double)m.elements[0]) * (1 - 1e-9), "the last bucket is never hidden");
                    EXPECT(p.mfu <= 0.5 * (1 + 1e-12) && p.tokens_per_second <= W * 0.5e15 / m.w.flops_per_token * (1 + 1e-12), "slower than without messages");
                    faster.network *= 2, faster.bus *= 2;
                    EXPECT(predict_step(&faster, &m.w).step <= p.step, "more bandwidth");
                    m.w.n_micro = 4, q = predict_step(&c, &m.w);
                    EXPECT(q.mfu >= p.mfu * (1 - 1e-12) && near(q.compute, 4 * p.compute), "accumulation sends once");
                    m.w.n_micro = 1, m.w.wire_bytes = 2;
                    EXPECT(predict_step(&c, &m.w).step <= p.step, "bf16 on the wire");
                    free(m.elements);
                }
}

TEST(gpus_by_name) {
    char names[] = GPU_NAMES;
    int n = 0;
    for (char *name = strtok(names, "|"); name; name = strtok(NULL, "|"), n++) {
        const GpuKind *kind = gpu_by_name(name);
        EXPECT(kind && !strcmp(kind->name, name) && kind->peak_flops > 1e14 && kind->memory > 20e9 && kind->bus > 2e10, "%s", name);
    }
    EXPECT(n == 10 && !gpu_by_name("h100") && !gpu_by_name(""), "%d names", n);
    EXPECT(near(gpu_by_name("H100")->bus, 370e9) && gpu_by_name("H200")->peak_flops == 989.5e12, "an H100 as measured");
    EXPECT(gpu_by_reported("NVIDIA H100 80GB HBM3") == gpu_by_name("H100") && gpu_by_reported("NVIDIA A100 80GB PCIe")->peak_flops == 312e12, "as the driver says");
    EXPECT(!gpu_by_reported("NVIDIA GeForce RTX 4090 D") && !gpu_by_reported("NVIDIA H100 80GB HBM3 MIG 1g.10gb") && !gpu_by_reported(""), "others are not known");
}

TEST(mfu_of_others) {
    const char *whose = NULL;
    double at[5], sizes[] = {1e6, 124439808, 354823168, 1557611200, 13e9};
    for (int i = 0; i < 5; i++) at[i] = predict_mfu("H100", sizes[i], &whose);
    EXPECT(strstr(whose, "llm.c") && strstr(whose, "H100"), "%s", whose);
    EXPECT(at[0] == 0.381 && near(at[1], 0.381) && near(at[3], 0.469) && at[4] == 0.469, "the ends");
    EXPECT(fabs(at[2] - (0.381 + 0.088 * 0.41469)) < 1e-5, "between them by log N: %.17g", at[2]);
    EXPECT(predict_mfu("RTX-4090", 1e9, &whose) == predict_mfu("H100", 1e9, &whose), "no report: as H100");
    EXPECT(near(predict_mfu("A100", 124439808, &whose), 0.59) && strstr(whose, "A100"), "%s", whose);
}

/* Reported by others (FORMATS.md, PERFORMANCE.md; wall-clock times: the authors), against the prediction. The README's table has the same rows.
 * mfu 0: as predict_mfu has it, from these very runs: such a row shows that the arithmetic comes back to them, not that it foresees. The others take the rate
 * of one GPU from elsewhere: PERFORMANCE.md's floor of a program as unfused as that, 42.5 % and 47.0 %. */
TEST(published_runs) {
    static const struct { const char *model, *gpu; size_t B, n_micro; double mfu, low, high, tolerance; } runs[] = {
        {"gpt2", "H100", 64, 1, 0, 468e3, 471e3, 0.005},        /* tokens/s a GPU */
        {"gpt2", "H100", 64, 1, 0.425, 468e3, 471e3, 0.12},
        {"gpt2-xl", "H100", 16, 8, 0, 46.8e3, 47.7e3, 0.005},
        {"gpt2-xl", "H100", 16, 8, 0.470, 46.8e3, 47.7e3, 0.005},
        {"gpt2-xl", "H100", 16, 8, 0, 33.554e9 / 86400 / 8, 33.554e9 / 86400 / 8, 0.03},  /* "24 hours" for 32,000 steps */
        {"gpt2", "A100", 64, 1, 0, 9.891e9 / 5400 / 8, 9.891e9 / 5400 / 8, 0.01},         /* "90 minutes" for 18,865 */
        {"gpt2-medium", "A100", 64, 1, 0, 31.457e9 / 50400 / 8, 31.457e9 / 50400 / 8, 0.01}, /* "14 hours" for 60,000 */
    };
    for (size_t i = 0; i < sizeof runs / sizeof *runs; i++) {
        Model m = model_of(runs[i].model, 8, runs[i].B, runs[i].n_micro);
        const GpuKind *gpu = gpu_by_name(runs[i].gpu);
        const char *whose;
        m.w.wire_bytes = 2;
        Cluster c = {.gpus = 8, .nodes = 1, .peak_flops = gpu->peak_flops, .bus = gpu->bus, .network = 1};
        c.mfu = runs[i].mfu > 0 ? runs[i].mfu : predict_mfu(runs[i].gpu, (double)m.n_params, &whose);
        double rate = predict_step(&c, &m.w).tokens_per_second / 8, reported = (runs[i].low + runs[i].high) / 2;
        printf("%s on 8 %s, MFU %.3f: predicted %.1fk tokens/s a GPU, reported %.1fk: %+.1f %%\n", runs[i].model, runs[i].gpu, c.mfu, rate / 1e3, reported / 1e3,
               100 * (rate / reported - 1));
        EXPECT(fabs(rate / reported - 1) <= runs[i].tolerance, "run %zu", i);
        free(m.elements);
    }
}

int main(int argc, char **argv) {
    test_start(argc, argv);
    RUN(messages_by_hand);
    RUN(messages_of_124M_on_8);
    RUN(a_queue_by_hand);
    RUN(one_gpu_sends_nothing);
    RUN(what_holds_for_all);
    RUN(gpus_by_name);
    RUN(mfu_of_others);
    RUN(published_runs);
    return test_done();
}
