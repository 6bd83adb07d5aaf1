/* The choice of an algorithm for every new product: each candidate runs on random operands, is compared with an independent sum, and is timed.
 * Times are of repeated runs on the same buffers after a warm-up, medians of a few: operands that fit the L2 are found there, which favours
 * small products a little; rotating through memory would make the start of a run several times longer. */
#include "matmul_lt.cuh"
#include "../base/timer.h"

namespace LLMC_NS {

enum { FINALISTS = 4, AT_LEAST = 8, MOST_SAMPLES = 9 };
static const double SHAPE_SECONDS = 0.3;  /* after which only the heuristic's first AT_LEAST are still tried: 40 shapes take 12 s */
static const double ONE_TIMING = 100e-6;  /* what is shorter is repeated inside one pair of events */
static const double LAUNCH_SECONDS = 2e-6; /* what a pass costs beside its bytes */
#ifdef LLMC_EMU
enum { COPY_BYTES = 64 << 10 };
static const double WARM_UP_SECONDS = 0;
#else
enum { COPY_BYTES = 128 << 20 };
static const double WARM_UP_SECONDS = 0.1;
#endif

struct Bench {
    CudaBackend *cuda;
    cudaEvent_t begin, end;
    char *arena;              /* memory of the measurement's own */
    size_t arena_bytes;
    Operands o;               /* of the product being measured, in the arena */
    size_t c_bytes, aux_bytes;
    ProductSample *samples;
};

/* Puts the operands of a product into the arena; returns the bytes that takes. With arena NULL only the latter. */
static size_t place(Bench *b, const Product *p) {
    size_t at = 0;
    auto take = [&](size_t bytes) {
        char *start = b->arena ? b->arena + at : NULL;
        at += round_up(bytes, (size_t)256);
        return (void *)start;
    };
    const bool aux = p->epilogue == EPI_BIAS_GELU || p->epilogue == EPI_DGELU;
    b->c_bytes = p->M * p->c_row * (p->c_float ? sizeof(float) : sizeof(elem));
    b->aux_bytes = aux ? p->M * p->c_row * sizeof(elem) : 0;
    b->o.a = (const elem *)take((p->a_transposed ? p->K : p->M) * p->a_row * sizeof(elem));
    b->o.b = (const elem *)take((p->b_transposed ? p->N : p->K) * p->b_row * sizeof(elem));
    b->o.c = take(b->c_bytes);
    b->o.bias = (const elem *)take(p->N * sizeof(elem));
    b->o.aux = (elem *)take(b->aux_bytes);
    b->o.bias_grad = (float *)take(p->M * sizeof(float));
    b->samples = (ProductSample *)take(PRODUCT_SAMPLES * sizeof(ProductSample));
    return at;
}

/* Random operands with which the sums are about 1, whatever K: no zeros, since the power that a GPU draws, and its clock, depend on them. */
static void fill(Bench *b, const Product *p) {
    random_elements(b->cuda, (elem *)b->o.a, (p->a_transposed ? p->K : p->M) * p->a_row, 1, 1);
    random_elements(b->cuda, (elem *)b->o.b, (p->b_transposed ? p->N : p->K) * p->b_row, sqrtf(3.0f / (float)p->K), 2);
    random_elements(b->cuda, (elem *)b->o.bias, p->N, 1, 3);
    random_elements(b->cuda, b->o.aux, b->aux_bytes / sizeof(elem), 2, 4);
}

static void wait(Bench *b) { cuda_check(cudaStreamSynchronize(b->cuda->stream), "measuring matrix products"); }

static void clear(Bench *b, void *p, int byte, size_t bytes) {
    if (bytes) cuda_check(cudaMemsetAsync(p, byte, bytes, b->cuda->stream), "measuring matrix products");
}

static bool issue(Bench *b, const Plan *plan, const Candidate *candidate) {
    return candidate->workspace <= b->cuda->scratch_bytes && candidate_issue(b->cuda, plan, candidate, &b->o, b->cuda->scratch) == CUBLAS_STATUS_SUCCESS;
}

/* Runs a candidate over outputs that hold NaN (zeros where it adds) and looks at its samples; false: it does not run. */
static bool run_checked(Bench *b, const Plan *plan, const Candidate *candidate, ProductSample samples[PRODUCT_SAMPLES], float *worst) {
    const Product *p = &plan->product;
    clear(b, b->o.c, p->add ? 0 : 0xFF, b->c_bytes);
    clear(b, b->o.bias_grad, 0xFF, p->M * sizeof(float));
    if (p->epilogue == EPI_BIAS_GELU) clear(b, b->o.aux, 0xFF, b->aux_bytes);
    if (!issue(b, plan, candidate)) return false;
    matmul_check(b->cuda, p, &b->o, b->samples);
    cuda_check(cudaMemcpyAsync(samples, b->samples, PRODUCT_SAMPLES * sizeof *samples, cudaMemcpyDeviceToHost, b->cuda->stream), "measuring matrix products");
    wait(b);
    *worst = 0;
    for (int i = 0; i < PRODUCT_SAMPLES; i++) *worst = fmaxf(*worst, samples[i].error);
    return true;
}

static const char *candidate_name(const Plan *plan, int i, char name[48]) {
    const OwnChoice own = plan->candidates[i].own;
    if (own.tile) snprintf(name, 48, "our candidate %s, %d part%s", own_tile(own.tile), own.splits, own.splits == 1 ? "" : "s");
    else snprintf(name, 48, "cuBLASLt candidate %d", i);
    return name;
}

static bool is_right(Bench *b, const Plan *plan, int i) {
    ProductSample samples[PRODUCT_SAMPLES];
    char text[PRODUCT_TEXT], name[48];
    float worst;
    if (!run_checked(b, plan, &plan->candidates[i], samples, &worst)) return false;
    if (worst <= 1) return true;
    fprintf(stderr, "warning: %s of product %s is off by %.3g times its rounding; not used\n", candidate_name(plan, i, name), product_text(&plan->product, text),
            (double)worst);
    return false;
}

/* Two runs, the same bits: a run that is resumed, or repeated, depends on it. */
static bool repeats(Bench *b, const Plan *plan, int i) {
    ProductSample first[PRODUCT_SAMPLES], second[PRODUCT_SAMPLES];
    char text[PRODUCT_TEXT], name[48];
    float worst;
    if (!run_checked(b, plan, &plan->candidates[i], first, &worst) || !run_checked(b, plan, &plan->candidates[i], second, &worst)) return false;
    if (!memcmp(first, second, sizeof first)) return true;
    fprintf(stderr, "warning: %s of product %s gives other bits the second time; not used\n", candidate_name(plan, i, name), product_text(&plan->product, text));
    return false;
}

static double time_once(Bench *b, const Plan *plan, const Candidate *candidate, int runs) {
    float milliseconds = 0;
    cuda_check(cudaEventRecord(b->begin, b->cuda->stream), "measuring matrix products");
    for (int i = 0; i < runs; i++)
        if (!issue(b, plan, candidate)) return INFINITY;
    cuda_check(cudaEventRecord(b->end, b->cuda->stream), "measuring matrix products");
    cuda_check(cudaEventSynchronize(b->end), "measuring matrix products");
    cuda_check(cudaEventElapsedTime(&milliseconds, b->begin, b->end), "measuring matrix products");
    return fmax(1e-3 * (double)milliseconds / runs, 1e-9);
}

static double median(double *x, int n) {
    for (int i = 1; i < n; i++)
        for (int j = i; j > 0 && x[j] < x[j - 1]; j--) {
            double t = x[j];
            x[j] = x[j - 1], x[j - 1] = t;
        }
    return x[n / 2];
}

static double time_candidate(Bench *b, const Plan *plan, int i, int samples) {
    double seconds[MOST_SAMPLES], once = time_once(b, plan, &plan->candidates[i], 1);
    if (!isfinite(once)) return INFINITY;
    const int runs = (int)fmin(fmax(ONE_TIMING / once, 1), 20);
    for (int s = 0; s < samples; s++) seconds[s] = time_once(b, plan, &plan->candidates[i], runs);
    return median(seconds, samples);
}

/* Every candidate shortly, then the best few at length. */
static void measure(Bench *b, Plan *plan) {
    double seconds[MOST_CANDIDATES + OWN_TILES], least[2] = {INFINITY, INFINITY}; /* of the library's and ours */
    const double begin = seconds_now();
    int best = -1;
    place(b, &plan->product);
    fill(b, &plan->product);
    for (int i = 0; i < plan->n_candidates; i++) {
        const bool own = plan->candidates[i].own.tile != 0, late = !own && i >= AT_LEAST && seconds_now() - begin > SHAPE_SECONDS;
        seconds[i] = !late && is_right(b, plan, i) ? time_candidate(b, plan, i, 3) : INFINITY;
        least[own] = fmin(least[own], seconds[i]);
    }
    for (int round = 0; round < FINALISTS; round++) {
        int fastest = 0;
        for (int i = 1; i < plan->n_candidates; i++)
            if (seconds[i] < seconds[fastest]) fastest = i;
        if (!plan->n_candidates || !isfinite(seconds[fastest])) break;
        seconds[fastest] = INFINITY;
        if (!repeats(b, plan, fastest)) continue;
        const double carefully = time_candidate(b, plan, fastest, MOST_SAMPLES);
        if (best < 0 || carefully < plan->seconds) best = fastest, plan->seconds = carefully;
    }
    plan->state = best >= 0 ? PLAN_CHOSEN : PLAN_PLAIN;
    if (best >= 0) plan->chosen = plan->candidates[best], least[plan->chosen.own.tile != 0] = plan->seconds;
    for (int own = 0; own < 2 && isfinite(least[0]) && isfinite(least[1]); own++) plan->best[own] = least[own];
}

static void measure_copy(Bench *b, Matmul *m) {
    double seconds[5];
    for (double &s : seconds) {
        float milliseconds = 0;
        cuda_check(cudaEventRecord(b->begin, b->cuda->stream), "measuring a copy");
        cuda_check(cudaMemcpyAsync(b->arena + COPY_BYTES, b->arena, COPY_BYTES, cudaMemcpyDeviceToDevice, b->cuda->stream), "measuring a copy");
        cuda_check(cudaEventRecord(b->end, b->cuda->stream), "measuring a copy");
        cuda_check(cudaEventSynchronize(b->end), "measuring a copy");
        cuda_check(cudaEventElapsedTime(&milliseconds, b->begin, b->end), "measuring a copy");
        s = fmax(1e-3 * (double)milliseconds, 1e-9);
    }
    m->copy_rate = 2.0 * COPY_BYTES / median(seconds, 5);
    keep_copy_rate(m);
}

/* A GPU that has idled needs some time to reach its clocks. */
static void warm_up(Bench *b) {
    for (const double begin = seconds_now(); seconds_now() - begin < WARM_UP_SECONDS; wait(b))
        random_elements(b->cuda, (elem *)b->arena, min(b->arena_bytes, (size_t)COPY_BYTES) / sizeof(elem), 1, 1);
}

static bool make_room(Bench *b, size_t bytes, const char *instead) {
    if (bytes <= b->arena_bytes) return true;
    cuda_check(cudaFree(b->arena), "measuring matrix products");
    b->arena = NULL, b->arena_bytes = 0;
    const cudaError_t status = cudaMalloc((void **)&b->arena, bytes);
    if (status != cudaSuccess) {
        if (status != cudaErrorMemoryAllocation) cuda_check(status, "measuring matrix products");
        cudaGetLastError();
        fprintf(stderr, "warning: %.0f MiB to time matrix products in are not to be had; %s\n", (double)bytes / 1048576, instead);
        return false;
    }
    b->arena_bytes = bytes;
    if (!b->cuda->matmul->warm) warm_up(b);
    b->cuda->matmul->warm = true;
    return true;
}

/* Measured and kept; or, without memory for it, the heuristic's first choice, unchecked, and not kept for other runs; of epilogues the bias
 * alone, which leaves nothing open. */
static void choose(Bench *b, Matmul *m, Plan *plan) {
    Bench sizes = {};
    if (make_room(b, place(&sizes, &plan->product), "the library's first choice is used, with no epilogue but a bias")) {
        measure(b, plan);
        keep_plan(m, plan);
    } else {
        const Epilogue epilogue = plan->product.epilogue;
        const bool library = (epilogue == EPI_NONE || epilogue == EPI_BIAS) && plan->n_candidates && !plan->candidates[0].own.tile && plan->candidates[0].workspace <= b->cuda->scratch_bytes;
        plan->state = library ? PLAN_CHOSEN : PLAN_PLAIN;
        plan->chosen = plan->candidates[0];
    }
    free(plan->candidates);
    plan->candidates = NULL;
    plan->n_candidates = 0;
    plan->workspace = plan->state == PLAN_CHOSEN ? plan->chosen.workspace : 0;
}

static void measure_all(CudaBackend *cuda, int n, bool copy) {
    Matmul *m = cuda->matmul;
    Bench b = {};
    const double begin = seconds_now();
    b.cuda = cuda;
    cuda_check(cudaEventCreate(&b.begin), "measuring matrix products");
    cuda_check(cudaEventCreate(&b.end), "measuring matrix products");
    if (n > 3) fprintf(stderr, "timing the algorithms of %d matrix products\n", n);
    for (size_t i = 0; i < m->n_plans; i++)
        if (m->plans[i].state == PLAN_NEW) choose(&b, m, &m->plans[i]);
    if (copy && make_room(&b, (size_t)2 * COPY_BYTES, "fused products are not compared with composed ones")) measure_copy(&b, m);
    m->copy_tried = m->copy_tried || copy;
    wait(&b);
    cuda_check(cudaEventDestroy(b.begin), "measuring matrix products");
    cuda_check(cudaEventDestroy(b.end), "measuring matrix products");
    cuda_check(cudaFree(b.arena), "measuring matrix products");
    if (n > 3) fprintf(stderr, "timed in %.1f s\n", seconds_now() - begin);
}

/* Fused where that is no slower than the plain product and a pass at the speed of a copy. What was not timed is fused. */
static void decide(Matmul *m) {
    for (size_t i = 0; i < m->n_plans; i++) {
        Plan *plan = &m->plans[i];
        if (!plan->asked) continue;
        const Plan *plain = &m->plans[plan->plain];
        const bool timed = plan->seconds > 0 && plain->seconds > 0 && m->copy_rate > 0;
        plan->fuse = plan->state == PLAN_CHOSEN && (!timed || plan->seconds <= plain->seconds + (double)plan->bytes / m->copy_rate + LAUNCH_SECONDS);
    }
}

void matmul_measure(CudaBackend *cuda) {
    Matmul *m = cuda->matmul;
    int n = 0;
    if (m->copy_rate == 0) recall_copy_rate(m);
    bool copy = false; /* needed once, with the first comparison of a fused product that was timed */
    for (size_t i = 0; i < m->n_plans; i++) {
        n += m->plans[i].state == PLAN_NEW;
        copy = copy || (m->plans[i].asked && m->copy_rate == 0 && !m->copy_tried && (m->plans[i].state == PLAN_NEW || m->plans[i].seconds > 0));
    }
    if (n || copy) measure_all(cuda, n, copy);
    decide(m);
    plan_file_save(&m->file);
}

} /* namespace */
