#!/usr/bin/env bash
# Every op of the emulated backend under other orders of warps and blocks than the default's, with asynchronous copies at once instead of late, and with
# blocks that see nothing of each other: the same bits as in the default, whose results are checked. dev/emu/emu.h says what each schedule is.
set -u
cd "$(dirname "$0")/../.." || exit 1
build=${LLMC_TEST_BUILD:-build/test}
passed=0 failed=0 skipped=0
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
# As many at a time as there are cores, two at least: "apart" takes as long as four others.
others=("reversed,newest" ahead:1 "ahead:0,early" "behind:0,newest" "in-turn,early")
processes=$(($(nproc) > 6 ? 5 : $(nproc) > 2 ? $(nproc) - 1 : 1))
groups=(apart)
for i in "${!others[@]}"; do groups[1 + i % processes]+="${groups[1 + i % processes]:+ }${others[i]}"; done
group() { # number: runs it; its exit status and seconds go to a file
    local started=$SECONDS
    LLMC_TEST_SCHEDULES=${groups[$1]} timeout 600 "$build/test_device_ops" >"$work/$1" 2>&1
    echo "$? $((SECONDS - started))" >"$work/$1.end"
}
for i in "${!groups[@]}"; do group "$i" & done
wait
for i in "${!groups[@]}"; do
    read -r status seconds <"$work/$i.end"
    line=$(grep -E '^[0-9]+ passed' "$work/$i" | tail -1)
    if [[ $line == "0 passed, 0 failed"* ]]; then
        skipped=$((skipped + 1)); echo "skipped ${groups[i]}: $(sed -n 's/^skipped [^:]*: //p' "$work/$i" | head -1)"
    elif [ "$status" -eq 0 ] && [[ $line == *" 0 failed"* ]]; then
        passed=$((passed + 1)); echo "ok ${groups[i]}: $line, $seconds s"
    else
        failed=$((failed + 1)); echo "FAILED ${groups[i]}: exit status $status: $line"; grep -E '^FAILED|^emulator' "$work/$i" | head -5
    fi
done
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ]
