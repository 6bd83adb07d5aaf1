/* Does the emulator catch what it is for? Each kernel in planted/ comes right and with a bug planted; under every schedule the right one must
 * be right, and the bug must be caught where the table here says: by a fault (F) or a wrong result (R). planted/README.md has it in words. */
#include "dev/test/emu_kit.h"
#ifdef LLMC_EMU
#include "llmc/cuda/hopper.cuh"
#include "llmc/base/rng.h"
#include <sys/wait.h>
#include <unistd.h>

#if defined(__SANITIZE_ADDRESS__)
#define ASAN true
#elif defined(__has_feature)
#define ASAN __has_feature(address_sanitizer)
#else
#define ASAN false
#endif

namespace LLMC_NS {

struct Outcome {
    int wrong, faults;
    char why[1100];           /* the first of either */
};

static void fill(float *x, int n, uint32_t tensor) {
    for (int i = 0; i < n; i++) x[i] = (float)(2 * rng_uniform(7, tensor, 0, (uint64_t)i) - 1);
}
static void compare(Outcome *o, float found, double want, double bound) {
    if (fabs((double)found - want) <= bound) return;
    if (o->wrong++ == 0 && !o->faults) snprintf(o->why, sizeof o->why, "a result of %g instead of %g", (double)found, want);
}
template <class... P, class... A> static void launch(Outcome *o, dim3 grid, unsigned threads, size_t shared_bytes, void (*kernel)(P...), A... args) {
    faults.n = 0;
    launch_named(test_name, kernel, 0, grid, dim3(threads), shared_bytes, stream, args...);
    cudaStreamSynchronize(stream);
    o->faults = faults.n;
    if (faults.n) snprintf(o->why, sizeof o->why, "a fault: %s", faults.text);
}

#include "planted/rows.cuh"
#include "planted/columns.cuh"
#include "planted/attention.cuh"
#include "planted/hopper.cuh"

static const char *const schedules[] = {"ascending", "reversed", "ahead:0", "ahead:2,newest", "behind:0", "behind:3,newest", "in-turn",
                                             "ahead:0,early",  "in-turn,early", "apart"};
enum { N_SCHEDULES = sizeof schedules / sizeof *schedules };

static const struct Planted {
    const char *name;
    void (*right)(Outcome *), (*wrong)(Outcome *);
    const char *caught;       /* a letter a schedule; "" only AddressSanitizer */
    bool memory;              /* AddressSanitizer ends the process first */
} planted[] = {
#define ROWS(name, run, BUG, caught) {name, rows::run<rows::NONE>, rows::run<rows::BUG>, caught, false}
#define HOPPER(name, run, BUG, caught) {name, hopper::run<hopper::NONE>, hopper::run<hopper::BUG>, caught, false}
#define COLUMNS(name, run, BUG, caught, memory) {name, columns::run<columns::NONE>, columns::run<columns::BUG>, caught, memory}
#define ATTENTION(name, BUG, caught) {name, attention::run_attention<attention::NONE>, attention::run_attention<attention::BUG>, caught, false}
    ROWS("missing_barrier_before_read", norm, NO_BARRIER, "RRRRRRRRRR"),
    ROWS("missing_barrier_before_reuse", norm, NO_SECOND_BARRIER, "RRRRRR.R.R"),
    ROWS("tail_left_out", norm, TAIL, "RRRRRRRRRR"),
    ROWS("uninitialised_shared", norm, POISON, "RRRRRRRRRR"),
    ROWS("wrong_row_statistic", norm, STATISTIC, "RRRRRRRRRR"),
    ROWS("divergent_barrier", maximum, DIVERGENT, "FFFFFFFFFF"),
    ROWS("thread_leaves_before_barrier", maximum, LEAVES, "FFFFFFFFFF"),
    ROWS("half_mask_collective", maximum, HALF_MASK, "FFFFFFFFFF"),
    ROWS("collective_in_ragged_loop", maximum, RAGGED_LOOP, "FFFFFFFFFF"),
    {"read_beyond_the_end", rows::scale<rows::NONE>, rows::scale<rows::READ_BEYOND>, "", true},
    COLUMNS("missing_add", sums, NOT_ADDED, "RRRRRRRRRR", false),
    COLUMNS("double_add", sums, ADDED_TWICE, "RRRRRRRRRR", false),
    COLUMNS("race_between_warps", sums, WARP_RACE, "RRRRRRRRRR", false),
    COLUMNS("race_between_blocks", scatter, BLOCK_RACE, ".........F", false),
    COLUMNS("write_beyond_the_end", sums, WRITE_BEYOND, "FFFFFFFFFF", true),
    COLUMNS("write_beyond_shared", sums, SHARED_BEYOND, "FFFFFFFFFF", true),
    COLUMNS("stride_of_the_last_tile", transpose, STRIDE, "RRRRRRRRRR", false),
    COLUMNS("missing_barrier_in_transpose", transpose, NO_BARRIER, "RRRRRRRRRR", false),
    ATTENTION("swapped_mma_fragment", SWAPPED_FRAGMENT, "RRRRRRRRRR"),
    ATTENTION("diagonal_not_masked", DIAGONAL, "RRRRRRRRRR"),
    ATTENTION("keys_beyond_t_not_masked", LAST_TILE, "RRRRRRRRRR"),
    ATTENTION("output_not_rescaled", NO_RESCALE, "RRRRRRRRRR"),
    ATTENTION("missing_cp_async_wait", NO_WAIT, "RRRRRRR..R"),
    ATTENTION("stage_loaded_while_it_is_read", NO_REUSE_BARRIER, ".......R.."),
    HOPPER("hopper_buffer_released_too_soon", gemm1, EARLY_RELEASE, "RRR.R.RFRR"),
    HOPPER("hopper_buffer_of_a_cluster_released_too_soon", gemm2, EARLY_RELEASE, "RRR.R.RFRR"),
    HOPPER("hopper_wrong_parity", gemm1, PARITY, "FFFFFFFFFF"),
    HOPPER("hopper_missing_full_wait", gemm1, NO_FULL_WAIT, "FFFFFFFRRF"),
    HOPPER("hopper_missing_wgmma_wait", gemm1, NO_WAIT, "RRRRRRRFRR"),
    HOPPER("hopper_missing_wgmma_fence", gemm1, NO_FENCE, "FFFFFFFFFF"),
    HOPPER("hopper_fewer_bytes_expected", gemm1, FEWER_BYTES, "FFFFFFFFFF"),
    HOPPER("hopper_more_bytes_expected", gemm2, MORE_BYTES, "FFFFFFFFFF"),
    HOPPER("hopper_wrong_descriptor_stride", gemm1, STRIDE, "RRRRRRRRRR"),
    HOPPER("hopper_missing_proxy_fence", gemm1, NO_PROXY_FENCE, "FFFFFFFFFF"),
    HOPPER("hopper_missing_read_wait", gemm1, NO_READ_WAIT, "FFFFFFFFFF"),
    HOPPER("hopper_buffer_written_while_it_is_stored", relay, WRITTEN_OVER, "FFFFFFFFFF"),
    HOPPER("hopper_buffer_loaded_while_it_is_stored", relay, LOADED_OVER, "FFFFFFFFFF"),
    HOPPER("hopper_read_wait_of_another_thread", relay, OTHER_THREAD, "FFFFFFFFFF"),
    HOPPER("hopper_read_wait_after_the_release", relay, LATE_WAIT, "FFFFFFF..F"),
    HOPPER("hopper_fragment_written_while_it_is_multiplied", fragments, FRAGMENT, "FFFFFFFFFF"),
    HOPPER("hopper_stage_left_out_and_not_waited_for", gemm1, LEFT_OUT, "...F.F...."),
    HOPPER("hopper_too_many_registers", gemm1, REGISTERS, "FFFFFFFFFF"),
    HOPPER("hopper_consumer_that_never_arrives", gemm2, ONE_WARPGROUP_LESS, "FFFFFFFFFF"),
    HOPPER("hopper_missing_cluster_barrier", cluster_sum, NO_MAP_SYNC, "FFFFFFFFFF"),
    HOPPER("hopper_missing_second_cluster_barrier", cluster_sum, NO_SECOND_SYNC, "RRRRRRRRRR"),
    HOPPER("hopper_launched_early_without_begin", gemm2, NO_BEGIN, "FFFFFFFFFF"),
    HOPPER("hopper_loads_before_begin", gemm1, COPIES_BEFORE, "FFFFFFFFFF"),
    HOPPER("hopper_stores_without_begin", gemm1, STORES_BEFORE, "FFFFFFFFFF"),
    HOPPER("hopper_reads_before_begin", cluster_sum, READS_BEFORE, "RRRRRRRRRR"),
    HOPPER("hopper_block_ends_while_it_is_read", cluster_sum, LEAVES, "FFFFFFFFFF"),
#undef ROWS
#undef COLUMNS
#undef ATTENTION
#undef HOPPER
};

/* Whether AddressSanitizer ends a process that runs it. */
static bool sanitizer_catches(void (*run)(Outcome *)) {
    int ends[2], status = 0;
    char text[8000] = "", piece[1000];
    size_t at = 0;
    fflush(stdout);
    CHECK(pipe(ends) == 0, "pipe");
    pid_t child = fork();
    if (child == 0) {
        Outcome o = {};
        dup2(ends[1], 2);
        run(&o);
        _exit(0);
    }
    close(ends[1]);
    for (ssize_t n; (n = read(ends[0], piece, sizeof piece)) > 0;) {
        size_t keep = at + (size_t)n < sizeof text ? (size_t)n : sizeof text - 1 - at;
        memcpy(text + at, piece, keep);
        at += keep;
    }
    close(ends[0]);
    waitpid(child, &status, 0);
    const char *what = strstr(text, "AddressSanitizer: ");
    printf("%s: AddressSanitizer: %.*s\n", test_name, what ? (int)strcspn(what + 18, " ") : 0, what ? what + 18 : "");
    return what && !(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

static const Planted *bug;

static void check_right() {
    for (int i = 0; i < N_SCHEDULES; i++) {
        Outcome o = {};
        schedule_parse(schedules[i], &emu::schedule);
        bug->right(&o);
        EXPECT(!o.wrong && !o.faults, "without the bug, %s: %s", schedules[i], o.why);
    }
}

static void check_planted() {
    char found[N_SCHEDULES + 1] = "", first[1200] = "";
    check_right();
    schedule_parse("", &emu::schedule);
    if (ASAN && bug->memory) {
        EXPECT(sanitizer_catches(bug->wrong), "not caught");
        return;
    }
    for (int i = 0; i < N_SCHEDULES; i++) {
        Outcome o = {};
        schedule_parse(schedules[i], &emu::schedule);
        bug->wrong(&o);
        found[i] = o.faults ? 'F' : o.wrong ? 'R' : '.';
        if (found[i] != '.' && !*first) snprintf(first, sizeof first, "%s: %s", schedules[i], o.why);
    }
    if (!*bug->caught && !*first) SKIP("only AddressSanitizer sees it");
    EXPECT(!strcmp(found, bug->caught), "caught where \"%s\", expected \"%s\"", found, bug->caught);
    printf("%s: \"%s\", first under %s\n", bug->name, found, first);
}

static void run_all() {
    for (const Planted &p : planted) {
        bug = &p;
        test_run(p.name, check_planted);
    }
}

} /* namespace */
#endif
