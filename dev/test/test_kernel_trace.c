/* bench_step --kernels: names, times, gaps and overlaps from records made up here, and CUPTI's way of handing them over, against a library of ours
 * (cupti_mock.c, built beside this program) where a toolkit's header is there. */
#include "dev/bench/kernel_cupti.h"
#include "test.h"
#ifdef LLMC_CUPTI_LIBRARY
#include <cupti.h>
#include <stddef.h>
#endif

static void kernel(Trace *t, const char *name, uint32_t stream, uint64_t start, uint64_t end) {
    trace_add(t, name, (TraceEvent){.kind = TRACE_KERNEL, .stream = stream, .start = start, .end = end, .grid = {1, 1, 1}, .block = {32, 1, 1}});
}
static void host_copy(Trace *t, uint64_t start, uint64_t end) { trace_add(t, "[copy]", (TraceEvent){.kind = TRACE_HOST_COPY, .stream = 99, .start = start, .end = end, .bytes = 16}); }

/* A report's own arithmetic: what rows add and what is idle make up the span; all gaps are idle time. */
static void adds_up(const TraceReport *r) {
    uint64_t own = 0, wide = 0;
    for (size_t i = 0; i < r->n_rows; i++) own += r->rows[i].own;
    for (size_t i = 0; i < r->n_pairs; i++) wide += r->pairs[i].total;
    EXPECT(r->busy + r->idle == r->span && own + r->idle - r->copying == r->span && wide == r->wide && r->wide <= r->idle, "busy %d idle %d span %d own %d copying %d", (int)r->busy,
           (int)r->idle, (int)r->span, (int)own, (int)r->copying);
}
static const TraceRow *row(const TraceReport *r, const char *name) {
    for (size_t i = 0; i < r->n_rows; i++)
        if (!strcmp(r->names[r->rows[i].first.name], name)) return &r->rows[i];
    EXPECT(0, "no row %s", name);
    static const TraceRow none;
    return &none;
}

TEST(nothing) {
    Trace t = {0};
    TraceReport r = trace_report(&t);
    EXPECT(r.n_rows == 0 && r.n_pairs == 0 && r.span == 0 && r.busy == 0 && r.gaps == 0 && r.activities == 0, "%zu rows", r.n_rows);
    adds_up(&r);
    trace_report_free(&r);
}

TEST(one_kernel) {
    Trace t = {0};
    kernel(&t, "a", 7, 1000, 4000);
    TraceReport r = trace_report(&t);
    const TraceRow *a = row(&r, "a");
    EXPECT(r.span == 3000 && r.busy == 3000 && r.idle == 0 && r.gaps == 0 && r.early == 0 && r.beside == 0, "span %d", (int)r.span);
    EXPECT(a->calls == 1 && a->total == 3000 && a->own == 3000 && a->least == 3000 && a->most == 3000, "%zu calls", a->calls);
    adds_up(&r);
    trace_report_free(&r);
    trace_clear(&t);
}

/* 2 us is not over 2 us; order of arrival does not matter; the most expensive pair comes first. */
TEST(gaps) {
    Trace t = {0};
    kernel(&t, "c", 7, 20001, 21000); /* 2.001 us after b */
    kernel(&t, "a", 7, 5000, 6000);   /* 3 us after c */
    kernel(&t, "c", 7, 1000, 2000);
    kernel(&t, "b", 7, 8000, 9000);   /* 2 us after a */
    kernel(&t, "b", 7, 9500, 18000);  /* 0.5 us */
    kernel(&t, "b", 7, 21000, 22000); /* none */
    kernel(&t, "c", 7, 24002, 25000); /* 2.002 us after b again */
    TraceReport r = trace_report(&t);
    EXPECT(r.gaps == 5 && r.wide_gaps == 3 && r.wide == 2001 + 3000 + 2002 && r.widest == 3000 && r.idle == 2000 + 500 + 2001 + 3000 + 2002, "%zu gaps, %zu wide", r.gaps, r.wide_gaps);
    EXPECT(r.n_pairs == 2, "%zu pairs", r.n_pairs);
    if (r.n_pairs == 2) {
        EXPECT(!strcmp(r.names[r.pairs[0].after], "b") && !strcmp(r.names[r.pairs[0].before], "c") && r.pairs[0].n == 2 && r.pairs[0].total == 4003 && r.pairs[0].most == 2002, "%s -> %s",
               r.names[r.pairs[0].after], r.names[r.pairs[0].before]);
        EXPECT(!strcmp(r.names[r.pairs[1].after], "c") && !strcmp(r.names[r.pairs[1].before], "a") && r.pairs[1].n == 1, "%s", r.names[r.pairs[1].after]);
    }
    EXPECT(row(&r, "b")->calls == 3 && row(&r, "b")->least == 1000 && row(&r, "b")->most == 8500, "%zu calls", row(&r, "b")->calls);
    EXPECT(r.early == 0 && r.beside == 0, "%zu early", r.early);
    adds_up(&r);
    trace_report_free(&r);
    trace_clear(&t);
}

/* Early launch: b begins in a, c begins and ends in b. Their time counts once. After such a kernel the gap begins at the latest end. */
TEST(overlaps) {
    Trace t = {0};
    kernel(&t, "a", 7, 1000, 3000);
    kernel(&t, "b", 7, 2500, 9000);
    kernel(&t, "c", 7, 4000, 5000);
    kernel(&t, "d", 7, 12000, 13000);
    TraceReport r = trace_report(&t);
    EXPECT(r.early == 2 && r.early_time == 500 + 1000 && r.beside == 0, "%zu, %d ns", r.early, (int)r.early_time);
    EXPECT(r.gaps == 1 && r.widest == 3000 && r.busy == 9000, "%zu gaps, busy %d", r.gaps, (int)r.busy);
    EXPECT(r.n_pairs == 1 && !strcmp(r.names[r.pairs[0].after], "b"), "after %s", r.n_pairs ? r.names[r.pairs[0].after] : "nothing");
    EXPECT(row(&r, "b")->total == 6500 && row(&r, "b")->own == 6000 && row(&r, "c")->total == 1000 && row(&r, "c")->own == 0, "own %d", (int)row(&r, "b")->own);
    adds_up(&r);
    trace_report_free(&r);
    trace_clear(&t);
}

/* What is no gap on one stream, because another one works, is none; and two streams at once are no early launch. */
TEST(streams) {
    Trace t = {0};
    kernel(&t, "a", 7, 1000, 2000);
    kernel(&t, "side", 8, 1500, 9000);
    kernel(&t, "b", 7, 8000, 10000);
    kernel(&t, "c", 8, 15000, 16000);
    TraceReport r = trace_report(&t);
    EXPECT(r.gaps == 1 && r.widest == 5000 && r.busy == 10000, "%zu gaps", r.gaps);
    EXPECT(r.early == 0 && r.beside == 2 && r.beside_time == 500 + 1000, "%zu early, %zu beside, %d ns", r.early, r.beside, (int)r.beside_time);
    EXPECT(r.n_pairs == 1 && !strcmp(r.names[r.pairs[0].after], "b") && !strcmp(r.names[r.pairs[0].before], "c"), "%zu pairs", r.n_pairs);
    adds_up(&r);
    trace_report_free(&r);
    trace_clear(&t);
}

/* Copies to and from the host do not fill a gap, but are named in it; a moment with two counts once, what lies under kernels not at all. */
TEST(copies_of_the_host) {
    Trace t = {0};
    host_copy(&t, 100, 500);          /* before the first kernel */
    kernel(&t, "a", 7, 1000, 2000);
    host_copy(&t, 1800, 3000);        /* 1 us in the gap */
    host_copy(&t, 2500, 4000);        /* 1 more */
    host_copy(&t, 5500, 7000);        /* 0.5 more */
    kernel(&t, "b", 7, 6000, 9000);
    TraceReport r = trace_report(&t);
    EXPECT(r.gaps == 1 && r.idle == 4000 && r.copying == 2500 && r.span == 8000 && r.activities == 2, "idle %d, copying %d", (int)r.idle, (int)r.copying);
    EXPECT(r.n_pairs == 1 && r.pairs[0].copying == 2500, "%zu pairs", r.n_pairs);
    EXPECT(row(&r, "[copy]")->calls == 4 && row(&r, "[copy]")->own == 2500 && row(&r, "[copy]")->bytes == 64, "%zu copies", row(&r, "[copy]")->calls);
    adds_up(&r);
    trace_report_free(&r);
    trace_clear(&t);
}

TEST(records_without_times_are_counted) {
    Trace t = {0};
    kernel(&t, "a", 7, 0, 0);
    kernel(&t, "a", 7, 3000, 2000);
    kernel(&t, "a", 7, 3000, 3000); /* shorter than the clock's tick */
    EXPECT(t.untimed == 2 && t.n == 1, "%zu untimed", t.untimed);
    trace_clear(&t);
}

TEST(another_shape_is_another_row) {
    Trace t = {0};
    TraceEvent e = {.kind = TRACE_KERNEL, .start = 1000, .end = 2000, .grid = {4, 1, 1}};
    trace_add(&t, "product", e);
    e.grid[0] = 5;
    trace_add(&t, "product", e);
    TraceReport r = trace_report(&t);
    EXPECT(r.n_rows == 2 && t.n_names == 1, "%zu rows, %d names", r.n_rows, t.n_names);
    trace_report_free(&r);
    trace_clear(&t);
}

TEST(names) {
    static const char *const cases[][2] = {
        {"adamw_kernel", "adamw_kernel"},
        {"void cuda_bf16::gelu_kernel<true>(float*, float const*, unsigned long)", "gelu_kernel<true>"},
        {"void cuda_bf16::(anonymous namespace)::attention_kernel<64, (bool)1, (anonymous namespace)::Mask>(float*)", "attention_kernel<64, 1, Mask>"},
        {"void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, (cublasLt::Op)2>(cublasLt::Params<float>, void (*)(int))",
         "splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, 2>"},
        {"void cutlass::Kernel2<cutlass_80_tensorop_bf16_256x128_32x3_nn_align8>(cutlass::Params)", "Kernel2<cutlass_80_tensorop_bf16_256x128_32x3_nn_align8>"},
        {"void cutlass::device_kernel<flash::Forward<flash::Loop<2, cute::tuple<cute::C<1> > >, int>, 3>(flash::P)", "device_kernel<Forward<..>, 3>"},
        {"std::enable_if<(true), void>::type a::b<c::d<int>::e, -1>(float)", "b<e, -1>"},
        {"nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_TNT", "nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_TNT"},
        {"[fill]", "[fill]"},
        {"", ""},
        {"<<>>::(((", "<((("},
    };
    char name[200], small[8];
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        trace_short_name(name, sizeof name, cases[i][0]);
        EXPECT(!strcmp(name, cases[i][1]), "'%s', expected '%s'", name, cases[i][1]);
    }
    trace_short_name(small, sizeof small, "a_long_kernel");
    EXPECT(!strcmp(small, "a_lo..."), "'%s'", small);
}

TEST(no_two_names_alike) {
    Trace t = {0};
    kernel(&t, "void k<a<1> >()", 7, 1000, 2000);
    kernel(&t, "void k<a<2> >()", 7, 2000, 3000);
    kernel(&t, "void k<a<3> >()", 7, 3000, 4000);
    kernel(&t, "void k<a>()", 7, 4000, 5000);
    TraceReport r = trace_report(&t);
    EXPECT(!strcmp(r.names[0], "k<a<..>>") && !strcmp(r.names[1], "k<a<..>> #2") && !strcmp(r.names[2], "k<a<..>> #3") && !strcmp(r.names[3], "k<a>"), "%s, %s", r.names[1], r.names[2]);
    trace_report_free(&r);
    trace_clear(&t);
}

/* What is printed and written of it. */
static bool prints(const char *text, const Trace *t, const TraceReport *r, void (*print)(FILE *, const Trace *, const TraceReport *, TraceSteps)) {
    char *all = NULL;
    size_t size = 0;
    FILE *f = open_memstream(&all, &size);
    print(f, t, r, (TraceSteps){.steps = 2, .traced = 12e-6, .untraced = 11e-6});
    fclose(f);
    bool found = strstr(all, text) != NULL;
    if (!found) printf("%s", all);
    free(all);
    return found;
}

TEST(in_words_and_as_json) {
    Trace t = {.dropped = 3};
    kernel(&t, "a", 7, 1000, 5000);
    kernel(&t, "b", 7, 8000, 13000);
    kernel(&t, "a", 7, 13000, 18000);
    kernel(&t, "quo\"te", 7, 18000, 21000);
    TraceReport r = trace_report(&t);
    EXPECT(prints("2 steps under CUPTI take 0.012 ms each, 0.011 without it: tracing adds 1.0 us, 0.50 for each of 2 kernels", &t, &r, trace_print), "the head");
    EXPECT(prints("INCOMPLETE: CUPTI lost 3 records, 0 more have no times", &t, &r, trace_print), "lost records");
    EXPECT(prints("      4.50   45.0      1      4.50     4.50     4.00     5.00    0       0  1,1,1 x 32,1,1", &t, &r, trace_print), "a row");
    EXPECT(prints("      1.50   15.0", &t, &r, trace_print), "nothing ran");
    EXPECT(prints("something ran in 8.50 us of a step, nothing in 1.50 (15.00 %); the step without tracing is 2.50 us longer than what ran", &t, &r, trace_print), "the device");
    EXPECT(prints("gaps: 0.5 a step; over 2 us 0.5, 1.50 us together, the longest 3.00", &t, &r, trace_print), "gaps");
    EXPECT(prints("      1.50    0.5      3.00      0.00  a -> b", &t, &r, trace_print), "a pair");
    EXPECT(prints("\"steps\": 2, \"step_s\": 1.2e-05, \"untraced_step_s\": 1.1e-05, \"dropped\": 3,", &t, &r, trace_json), "JSON of the steps");
    EXPECT(prints("{\"kernel\": \"quo\\\"te\", \"kind\": \"kernel\", \"calls\": 0.5, \"seconds\": 1.5e-06,", &t, &r, trace_json), "JSON of a row");
    EXPECT(prints("{\"after\": \"a\", \"before\": \"b\", \"gaps\": 0.5, \"seconds\": 1.5e-06, \"max_s\": 3e-06, \"copying_s\": 0}\n]", &t, &r, trace_json), "JSON of a pair");
    trace_report_free(&r);
    trace_clear(&t);
}

/* ---- CUPTI ------------------------------------------------------------------------------------------------------------------------- */

#ifdef LLMC_CUPTI_LIBRARY
static void refused(const char *words) {
    Trace t = {0};
    Error e = {0};
    bool begun = cupti_begin(&t, &e);
    EXPECT(!begun && e.code == EXIT_DEVICE && strstr(e.text, words), "%d: %s", begun, e.text);
    if (begun) cupti_end(NULL);
    trace_clear(&t);
}

/* In this order: a library, once loaded, stays. */
TEST(without_the_library_it_says_so) {
    setenv("LLMC_CUPTI", "/nowhere/libcupti.so", 1);
    refused("/nowhere/libcupti.so");
    setenv("LLMC_CUPTI", "libm.so.6", 1);
    refused("libcupti has no cuptiActivityRegisterCallbacks");
}

/* Warm-up that is thrown away, then steps. */
static bool traced(Trace *t, Error *e) { return cupti_begin(t, e) && cupti_discard(e) && cupti_end(e); }

TEST(a_library_that_refuses) {
    setenv("MOCK_REFUSES", "register", 1);
    refused("registering for records: CUPTI_ERROR_NOT_INITIALIZED (15)");
    setenv("MOCK_REFUSES", "enable", 1);
    refused("switching records on: CUPTI_ERROR_NOT_INITIALIZED (15)");
    for (int i = 0; i < 2; i++) {
        Trace t = {0};
        Error e = {0};
        setenv("MOCK_REFUSES", i ? "disable" : "flush", 1);
        EXPECT(cupti_begin(&t, &e) && !cupti_end(&e) && e.code == EXIT_DEVICE, "%s", e.text);
        trace_clear(&t);
    }
    unsetenv("MOCK_REFUSES");
}

TEST(records_arrive) {
    Trace t = {0};
    Error e = {0};
    bool ok = traced(&t, &e);
    EXPECT(ok, "%s", e.text);
    EXPECT(t.n == 3 * 8 && t.dropped == 0 && t.untimed == 0, "%zu events, %zu dropped", t.n, t.dropped);
    TraceReport r = trace_report(&t);
    const TraceRow *product = row(&r, "matmul_kernel<64>"), *attention = row(&r, "attention_forward_kernel<64, true>"), *fill = row(&r, "[fill]");
    EXPECT(r.span == 3 * 100000 - 2000 && r.early == 3 && r.early_time == 3 * 2000 && r.beside == 0, "span %d", (int)r.span);
    EXPECT(product->calls == 6 && product->total == 3 * 82000 && product->own == 3 * 80000 && product->first.registers == 240 && product->first.shared == 1040 &&
           product->first.grid[0] == 66 && product->first.grid[1] == 2 && product->first.block[0] == 128, "%zu calls", product->calls);
    EXPECT(attention->calls == 3 && attention->first.stream == 8 && fill->bytes == 3 * 64, "%zu calls", attention->calls);
    EXPECT(row(&r, "[copy]")->first.kind == TRACE_COPY && row(&r, "[copy to the host]")->own == 3 * 3000 && row(&r, "[copy from the host]")->own == 0, "copies");
    EXPECT(r.wide_gaps == 3 && r.n_pairs == 1 && r.widest == 4000 && r.pairs[0].copying == 3 * 3000, "%zu wide gaps", r.wide_gaps);
    adds_up(&r);
    trace_report_free(&r);
    trace_clear(&t);
}

TEST(many_buffers) {
    Trace t = {0};
    Error e = {0};
    setenv("MOCK_STEPS", "4000", 1); /* about 5 MiB of records */
    EXPECT(traced(&t, &e) && t.n == 4000 * 8 && t.dropped == 0, "%zu events; %s", t.n, e.text);
    unsetenv("MOCK_STEPS");
    trace_clear(&t);
}

TEST(what_is_lost_is_said) {
    Trace t = {0};
    Error e = {0};
    setenv("MOCK_DROPS", "5", 1);
    setenv("MOCK_UNTIMED", "adamw_kernel", 1);
    EXPECT(traced(&t, &e) && t.dropped == 5 && t.untimed == 3 && t.n == 3 * 7, "%zu dropped, %zu untimed", t.dropped, t.untimed);
    trace_clear(&t);
    unsetenv("MOCK_DROPS");
    unsetenv("MOCK_UNTIMED");
    setenv("MOCK_BREAKS", "1", 1);
    EXPECT(traced(&t, &e) && t.dropped == 1 && t.n == 3 * 8, "%zu dropped", t.dropped);
    trace_clear(&t);
    unsetenv("MOCK_BREAKS");
    setenv("MOCK_STEPS", "0", 1);
    EXPECT(!traced(&t, &e) && strstr(e.text, "no record with times"), "%s", e.text);
    trace_clear(&t);
    unsetenv("MOCK_STEPS");
}

/* kernel_cupti.c reads a library's records by the header's newest structures: where versions differ, these fields stand in the same place. */
TEST(structures_keep_their_fields) {
#define SAME(A, B, field) EXPECT(offsetof(A, field) == offsetof(B, field) && sizeof((A){0}.field) == sizeof((B){0}.field), #field " moved")
    typedef LLMC_CUPTI_KERNEL K;
    typedef LLMC_CUPTI_MEMCPY C;
    typedef LLMC_CUPTI_MEMSET S;
    SAME(K, CUpti_ActivityKernel4, start); SAME(K, CUpti_ActivityKernel4, end); SAME(K, CUpti_ActivityKernel4, streamId); SAME(K, CUpti_ActivityKernel4, name);
    SAME(K, CUpti_ActivityKernel4, gridX); SAME(K, CUpti_ActivityKernel4, gridZ); SAME(K, CUpti_ActivityKernel4, blockX); SAME(K, CUpti_ActivityKernel4, blockZ);
    SAME(K, CUpti_ActivityKernel4, registersPerThread); SAME(K, CUpti_ActivityKernel4, staticSharedMemory); SAME(K, CUpti_ActivityKernel4, dynamicSharedMemory);
    SAME(C, CUpti_ActivityMemcpy, copyKind); SAME(C, CUpti_ActivityMemcpy, bytes); SAME(C, CUpti_ActivityMemcpy, start); SAME(C, CUpti_ActivityMemcpy, end);
    SAME(C, CUpti_ActivityMemcpy, streamId);
    SAME(S, CUpti_ActivityMemset, bytes); SAME(S, CUpti_ActivityMemset, start); SAME(S, CUpti_ActivityMemset, end); SAME(S, CUpti_ActivityMemset, streamId);
#undef SAME
}
#else
TEST(without_the_header_it_says_so) {
    Error e = {0};
    EXPECT(!cupti_built(&e) && e.code == EXIT_USAGE && strstr(e.text, "without CUPTI"), "%s", e.text);
}
TEST(records_arrive) { SKIP("no cupti.h here"); }
#endif

int main(int argc, char **argv) {
    test_start(argc, argv);
    RUN(nothing);
    RUN(one_kernel);
    RUN(gaps);
    RUN(overlaps);
    RUN(streams);
    RUN(copies_of_the_host);
    RUN(records_without_times_are_counted);
    RUN(another_shape_is_another_row);
    RUN(names);
    RUN(no_two_names_alike);
    RUN(in_words_and_as_json);
#ifdef LLMC_CUPTI_LIBRARY
    RUN(without_the_library_it_says_so);
    use_beside("LLMC_CUPTI", "cupti_mock.so");
    RUN(a_library_that_refuses);
    RUN(records_arrive);
    RUN(many_buffers);
    RUN(what_is_lost_is_said);
    RUN(structures_keep_their_fields);
#else
    RUN(without_the_header_it_says_so);
    RUN(records_arrive);
#endif
    return test_done();
}
