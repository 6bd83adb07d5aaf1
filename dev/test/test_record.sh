#!/usr/bin/env bash
# scripts/gpu_record.sh from end to end on the emulator with tiny shapes, and the table that the README takes from the newest record.
set -u
cd "$(dirname "$0")/../.." || exit 1
passed=0 failed=0 skipped=0
check() { # name, command...
    local name=$1; shift
    if "$@"; then passed=$((passed + 1)); echo "ok $name"; else failed=$((failed + 1)); echo "FAILED $name: $*"; fi
}
dir=$(mktemp -d) || exit 1
trap 'rm -rf "$dir"' EXIT
done_with() { echo "$passed passed, $failed failed, $skipped skipped"; [ "$failed" -eq 0 ]; exit; }

bash scripts/record_table.sh >"$dir/table"
check the_readme_has_the_newest_records_table diff "$dir/table" <(sed -n '/^<!-- gpu record -->$/,/^<!-- end of gpu record -->$/p' README.md | sed '1d;$d')
scripts/gpu_record.sh --nonsense >/dev/null 2>&1; check unknown_option_is_refused test $? -eq 2
scripts/gpu_record.sh --only test-ops,nonsense >"$dir/out" 2>&1; check an_unknown_part_is_refused test $? -eq 2 -a -n "$(grep "no part 'nonsense'; there are build .*step-1558M" "$dir/out")"
scripts/gpu_record.sh --peer nameless >/dev/null 2>&1; check a_peer_without_a_command_is_refused test $? -eq 2
if [ -z "$(nvidia-smi -L 2>/dev/null)" ]; then scripts/gpu_record.sh --out "$dir/none" >"$dir/out" 2>&1; check without_a_gpu_it_says_so test $? -eq 3 -a -n "$(grep 'no GPU here' "$dir/out")"; fi

if ! echo 'int main() {}' | c++ -x c++ - -o "$dir/probe" 2>/dev/null; then skipped=$((skipped + 1)); echo "skipped record: no C++ compiler for the emulator"; done_with; fi
mock=${LLMC_TEST_BUILD:-build/test}/cupti_mock.so # of test_kernel_trace.c; plays kernels
LLMC_CUPTI=$mock LLMC_RECORD_DEVICE=emu scripts/gpu_record.sh --out "$dir/record" --peer another 'echo "step: median 7.0 ms"' >"$dir/out" 2>&1
status=$?
[ "$status" -eq 0 ] || cat "$dir/out"
check the_record_is_made test "$status" -eq 0
has() { grep -qE -- "$2" "$dir/record/$1"; }
check a_part_that_tests has record.json '"part": "test-ops", "status": 0, .*"note": "[0-9]+ passed, 0 failed'
check the_loss_curves_or_why_not has record.json '"part": "curves", "status": 0, .*"note": "curves: (agree over 40 steps|left out, no PyTorch)'
check a_part_with_several_ranks has record.json '"part": "ranks", "status": 0, .*"note": "[0-9]+ passed, 0 failed'
check a_peer_of_the_same_run has record.json '"part": "peer-another", "status": 0, .*"note": "step: median 7.0 ms"'
check ceilings_and_ops has record.json '"copy_bytes_per_s": [0-9.e+]+, .*"product_flops_per_s"'
check an_op_beside_its_floor has record.json '"op": "attention_backward", .*"median_s": [0-9.e+-]+, .*"floor_s": [0-9.e+-]+'
check a_step_with_its_figures has record.json '"tokens_per_s": [0-9.]+, .*"mfu": null'
check a_step_by_op has record.json '"op": "between ops"'
if grep -q LLMC_CUPTI_LIBRARY "${LLMC_TEST_BUILD:-build/test}/flags" && [ -f "$mock" ]; then
    check a_step_by_kernel has record.json '"kernel": "matmul_kernel<64>", "kind": "kernel", "calls": 2,'
    check kernels_have_their_section test "$(sed -n '/^## Steps by kernel/,$p' "$dir/record/README.md" | grep -c -E '^bench_step: |^by kernel: 3 steps|  matmul_kernel<64>$')" -eq 3
    check and_are_not_with_the_ops test -z "$(sed -n '/^## Steps by op/,/^## Steps by kernel/p' "$dir/record/README.md" | grep -E '^by kernel|matmul_kernel')"
else skipped=$((skipped + 1)); echo "skipped a_step_by_kernel: no CUPTI headers"; fi
check a_page_for_people has README.md '^\| gpt2 \| bf16, ours \| 1 x 2 x 24 \| '
check the_page_warns_of_an_emulator has README.md 'no figure here says anything about a GPU'
if command -v python3 >/dev/null; then check the_record_is_json python3 -c 'import json, sys; r = json.load(open(sys.argv[1])); assert r["steps"] and r["ops"] and r["parts"]' "$dir/record/record.json"
else skipped=$((skipped + 1)); echo "skipped the_record_is_json: no python3"; fi

bench_step=${LLMC_TEST_BUILD:-build/test}/bench_step
"$bench_step" --kernels >"$dir/out" 2>&1; check kernels_of_a_cpu_are_refused test $? -eq 2 -a "$(cat "$dir/out")" = 'error: --kernels: there are no GPU kernels with --device cpu'
"$bench_step" --device emu --kernels --wait </dev/null >"$dir/out" 2>&1; check kernels_and_turns_are_refused test $? -eq 2 -a "$(wc -l <"$dir/out")" -eq 1

# CUPTI that fails leaves the step its figure.
if grep -q LLMC_CUPTI_LIBRARY "${LLMC_TEST_BUILD:-build/test}/flags"; then
    LLMC_CUPTI=/nowhere/libcupti.so LLMC_RECORD_DEVICE=emu scripts/gpu_record.sh --out "$dir/record" --only step-tiny >"$dir/out" 2>&1
    check a_step_without_kernels_stands test $? -eq 0 -a -n "$(grep '"part": "step-tiny", "status": 0' "$dir/record/record.json")" -a -n "$(grep '"tokens_per_s"' "$dir/record/record.json")"
    check and_says_why has README.md '^error: by kernel: not traced: /nowhere/libcupti.so'
fi
# Chosen parts: these and the build, and in the table of the README no record of them. PyTorch is left out where there is none.
PYTHON=/bin/false LLMC_RECORD_DEVICE=emu scripts/gpu_record.sh --out "$dir/record" --only test-ops,curves,step-1558M >"$dir/out" 2>&1; check chosen_parts_are_made test $? -eq 0
check no_other_part test "$(grep -o '"part": "[^"]*"' "$dir/record/record.json" | cut -d'"' -f4 | tr '\n' ' ')" = "build test-ops curves step-1558M "
check it_says_which has record.json '"only": "test-ops,curves,step-1558M"'
check a_part_of_another_device has record.json '"part": "step-1558M", "status": 0, .*"note": "left out: not for this device"'
check no_pytorch_no_curves test -n "$(grep 'curves: left out, no PyTorch' "$dir/record/README.md")" -a ! -e "$dir/record/curves.json"
mkdir -p "$dir/tree/scripts" "$dir/tree/dev/bench/records/"{full,chosen}
cp scripts/record_table.sh "$dir/tree/scripts"
printf '{"device": "X", "commit": "of all", "date": "2026-01-01", "only": null,\n' >"$dir/tree/dev/bench/records/full/record.json"
printf '{"device": "X", "commit": "of one", "date": "2026-01-02", "only": "ranks",\n' >"$dir/tree/dev/bench/records/chosen/record.json"
check the_table_is_of_a_record_of_all_parts test -n "$(bash "$dir/tree/scripts/record_table.sh" | grep 'commit of all')"

# A part that fails is in the record, and the others are made. A time of nothing leaves parts out.
LLMC_RECORD_DEVICE=emu scripts/gpu_record.sh --out "$dir/record" --seconds 1 >"$dir/out" 2>&1
check without_time_parts_are_left_out test $? -eq 1 -a -n "$(grep 'left out: no time' "$dir/record/README.md")" -a -n "$(grep 'parts failed' "$dir/record/README.md")"
done_with
