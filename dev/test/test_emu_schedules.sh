#!/usr/bin/env bash
# Every op of the emulated backend under other orders of warps and blocks than the default's (test_device_ops and test_contract run in that), with
# asynchronous copies at once instead of late, and with blocks that see nothing of each other. dev/emu/emu.h says what each schedule is.
set -u
cd "$(dirname "$0")/../.." || exit 1
build=${LLMC_TEST_BUILD:-build/test}
passed=0 failed=0 skipped=0
out=$(mktemp) || exit 1
trap 'rm -f "$out"' EXIT
for schedule in reversed ahead:1 ahead:0,early behind:0 in-turn,early apart; do
    started=$SECONDS
    if LLMC_EMU_SCHEDULE=$schedule timeout 600 "$build/test_device_ops" >"$out" 2>&1; then status=0; else status=$?; fi
    line=$(grep -E '^[0-9]+ passed' "$out" | tail -1)
    if [[ $line == "0 passed, 0 failed"* ]]; then
        skipped=$((skipped + 1)); echo "skipped $schedule: $(sed -n 's/^skipped [^:]*: //p' "$out" | head -1)"
    elif [ "$status" -eq 0 ] && [[ $line == *" 0 failed"* ]]; then
        passed=$((passed + 1)); echo "ok $schedule: $line, $((SECONDS - started)) s"
    else
        failed=$((failed + 1)); echo "FAILED $schedule: exit status $status: $line"; grep -E '^FAILED|^emulator' "$out" | head -5
    fi
done
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ]
