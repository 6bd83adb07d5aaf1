#!/usr/bin/env bash
# The whole suite: builds the test programs, runs each program and script in dev/test, adds up what they report.
# run.sh [NAME...]: these tests alone, named as in dev/test (test_gemm test_train.sh). Under `make test CC=clang SAN=...` the build
# below gets the same variables; LLMC_TEST_BUILD is where it goes; LLMC_TEST_SKIP names tests to leave out.
# Each prints its own "N passed, N failed[, N skipped]" line; one that dies without it counts as one failure.
set -u
cd "$(dirname "$0")/../.." || exit 1
build=${LLMC_TEST_BUILD:-build/test}
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
out=$(mktemp) || exit 1
trap 'rm -f "$out" "$out.time"' EXIT
if ! make --no-print-directory -j"$(nproc)" BUILD="$build" FAULT=1 EMU=1 summary test-programs >"$out" 2>&1; then
    tail -40 "$out"; echo "the build failed"; echo "0 passed, 1 failed"; exit 1
fi
grep '^build:' "$out"
export LLMC_TEST_BUILD=$build
# Threads that wait for each other sleep instead of spinning: the suite may share its cores with other work.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
TIMEFORMAT='%R s, CPU %U + %S s'
for t in "$build"/test_* dev/test/test_*.sh; do
    case $t in *.sh) cmd=(bash "$t") ;; *.o|*.d|*.c) continue ;; *) cmd=("$t") ;; esac
    [ -f "$t" ] || continue
    name=$(basename "$t")
    [ $# -eq 0 ] || [[ " $* " == *" $name "* ]] || continue
    [[ " ${LLMC_TEST_SKIP:-} " != *" $name "* ]] || continue
    { time "${cmd[@]}" >"$out" 2>&1; } 2>"$out.time"; status=$?
    grep -E '^(FAILED|skipped) ' "$out"
    [ "$status" -ne 0 ] && grep -vE '^(ok|FAILED|skipped) ' "$out" | tail -30
    echo "$name: $(grep -E '^[0-9]+ passed' "$out" | tail -1) ($(cat "$out.time"))"
    report "$name" "$out" "$status"
done
echo "skipped: $skipped"
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
