#!/usr/bin/env bash
# The whole suite: builds the test programs, runs each program and script in dev/test, adds up what they report.
# run.sh [NAME...]: these tests alone, named as in dev/test (test_gemm test_train.sh). Under `make test CC=clang SAN=...` the build
# below gets the same variables; LLMC_TEST_BUILD is where it goes; LLMC_TEST_SKIP names tests to leave out.
# Each prints its own "N passed, N failed[, N skipped]" line; one that dies without it counts as one failure.
# Two at a time: beside the others, in their order, those that do nothing but compute, in one process each.
set -u
cd "$(dirname "$0")/../.." || exit 1
build=${LLMC_TEST_BUILD:-build/test}
beside=" test_contract test_cpu_ops test_device_ops test_device_step test_emu test_emu_hopper test_gemm test_gpt2 test_matmul test_matmul_hopper test_model_bits
 test_planted test_predict test_swizzle test_wrap test_emu_schedules.sh "
passed=0 failed=0 skipped=0
report() { # name, output file, exit status
    local line
    line=$(grep -E '^[0-9]+ passed, [0-9]+ failed' "$2" | tail -1)
    if [[ $line =~ ^([0-9]+)\ passed,\ ([0-9]+)\ failed(,\ ([0-9]+)\ skipped)? ]]; then
        passed=$((passed + BASH_REMATCH[1])) failed=$((failed + BASH_REMATCH[2])) skipped=$((skipped + ${BASH_REMATCH[4]:-0}))
        [ "$3" -ne 0 ] && [ "${BASH_REMATCH[2]}" -eq 0 ] && { failed=$((failed + 1)); echo "FAILED $1: exit status $3"; }
    else
        failed=$((failed + 1)); echo "FAILED $1: exit status $3 without a result line"; tail -20 "$2"
    fi
}
work=$(mktemp -d) || exit 1
lane=
end() { # what still runs beside ends too
    # shellcheck disable=SC2046
    [ -z "$lane" ] || kill "$lane" $(pgrep -P "$lane") 2>/dev/null
    rm -rf "$work"
}
trap end EXIT
if ! make --no-print-directory -j"$(nproc)" BUILD="$build" FAULT=1 EMU=1 summary test-programs >"$work/build" 2>&1; then
    tail -40 "$work/build"; echo "the build failed"; echo "0 passed, 1 failed"; exit 1
fi
grep '^build:' "$work/build"
export LLMC_TEST_BUILD=$build
# Threads that wait for each other sleep instead of spinning: the suite may share its cores with other work.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
TIMEFORMAT='%R s, CPU %U + %S s'
run_test() { # program or script; what it says, how long it took and its exit status go to files
    local name cmd=("$1")
    name=$(basename "$1")
    case $1 in *.sh) cmd=(bash "$1") ;; esac
    { time "${cmd[@]}" >"$work/$name" 2>&1; } 2>"$work/$name.time"
    echo $? >"$work/$name.status"
}
show_test() {
    local name out status
    name=$(basename "$1") out=$work/$(basename "$1") status=$(cat "$work/$(basename "$1").status")
    grep -E '^(FAILED|skipped) ' "$out"
    [ "$status" -ne 0 ] && grep -vE '^(ok|FAILED|skipped) ' "$out" | tail -30
    echo "$name: $(grep -E '^[0-9]+ passed' "$out" | tail -1) ($(cat "$out.time"))"
    report "$name" "$out" "$status"
}
first=() second=()
for t in "$build"/test_* dev/test/test_*.sh; do
    case $t in *.o|*.d|*.c) continue ;; esac
    [ -f "$t" ] || continue
    name=$(basename "$t")
    [ $# -eq 0 ] || [[ " $* " == *" $name "* ]] || continue
    [[ " ${LLMC_TEST_SKIP:-} " != *" $name "* ]] || continue
    if [[ ${beside//$'\n'/} == *" $name "* ]]; then second+=("$t"); else first+=("$t"); fi
done
for t in "${second[@]}"; do run_test "$t"; done &
lane=$!
# Each in a shell of its own, lest the CPU time of those beside counts as its.
for t in "${first[@]}"; do (run_test "$t"); show_test "$t"; done
wait "$lane"
lane=
for t in "${second[@]}"; do show_test "$t"; done
echo "skipped: $skipped"
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
