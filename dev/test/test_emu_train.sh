#!/usr/bin/env bash
# The program on the emulated GPU, as a user runs it: trains, is killed and resumed to the same bits, writes text, refuses what it should, and
# says what does not fit. A model whose heads take the tensor-core attention (D = 64) at a length that is no multiple of a tile.
set -u
cd "$(dirname "$0")/../.." || exit 1
program=$PWD/${LLMC_TEST_BUILD:-build/test}/train_gpt2
passed=0 failed=0
check() { # name, condition as a command
    local name=$1; shift
    if "$@" >/dev/null; then passed=$((passed + 1)); echo "ok $name"; else failed=$((failed + 1)); echo "FAILED $name: $*"; tail -n 5 "$work/out"; fi
}
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
if ! "$program" --device emu --dry-run --model gpt2 >/dev/null 2>&1; then
    echo "skipped test_emu_train: this build has no emulator (no C++ compiler)"; echo "0 passed, 0 failed, 1 skipped"; exit 0
fi
for i in $(seq 60); do echo "The $i. fox said to the crow number $((i * i % 97)): what a fine piece of cheese that is, and how well you sing today."; done >"$work/text"
small=(--data "$work/text" --vocab-size 280 --layers 1 --channels 128 --heads 2 --seq-len 70 --batch 1 --total-batch 140 --steps 6 --save-every 2 --val-batches 1 --lr 2e-3)
train() { # name, options...
    local out=$1; shift
    { "$program" --device emu "${small[@]}" --out "$work/$out" "$@"; } >"$work/out" 2>&1
}
# The tensors' bytes of a checkpoint as one hash, without the files' headers, which hold the run id.
tensor_hash() {
    local f header
    for f in "$work/$1/step_00000006"/*.safetensors; do
        header=$(od -An -t u8 -N 8 "$f" | tr -d ' ')
        tail -c "+$((header + 9))" "$f"
    done | sha256sum
}
same_tensors() { [ -f "$work/$1/step_00000006/model.safetensors" ] && [ "$(tensor_hash "$1")" = "$(tensor_hash "$2")" ]; }
differ() { ! same_tensors "$@"; }
losses() { sed -n 's/.*"kind":"step".*"step":\([0-9]*\).*"loss":\([0-9.]*\).*/\1 \2/p' "$work/$1/metrics.jsonl"; }

train bf16; check trains_in_bf16 test $? -eq 0
check says_what_it_runs_on grep -q 'backend *emu (emulated GPU), bf16' "$work/out"
check mfu_of_an_unknown_gpu_is_not_made_up grep -q 'MFU n/a' "$work/out"
check learns awk 'NR == 1 {first = $2} {last = $2} END {exit !(last < first - 0.3)}' <(losses bf16)
check a_record_a_step test "$(losses bf16 | wc -l)" -eq 6

# P8 on this backend: killed at a step, between the micro-batches of the first step, in the second save.
for fault in kill@step=3 kill@micro=1 kill@io=40; do
    LLMC_FAULT=$fault train "$fault"
    check "killed_by_$fault" test $? -eq 137
    train "$fault"
    check "P8_resumed_after_${fault}_same_bits" same_tensors bf16 "$fault"
done
train nographs --graphs off; check recorded_and_issued_same_bits same_tensors bf16 nographs
train block --recompute block; check recomputation_same_bits same_tensors bf16 block

train hopper --attention hopper; check trains_with_attention_for_hopper test $? -eq 0
check and_is_near_the_other awk '{d = $2 - $4; if (d < 0) d = -d; if (d > 0.03) bad = 1} END {exit bad || NR != 6}' <(paste -d' ' <(losses bf16) <(losses hopper))
check but_has_its_own_order_of_sums differ bf16 hopper
train hopper2 --attention hopper --graphs off; check attention_for_hopper_same_bits_twice same_tensors hopper hopper2

train stochastic --rounding stochastic; check trains_with_stochastic_rounding test $? -eq 0
check stochastic_rounding_differs differ bf16 stochastic
LLMC_FAULT=kill@step=5 train stochastic2 --rounding stochastic
train stochastic2 --rounding stochastic; check P8_stochastic_rounding_resumed_same_bits same_tensors stochastic stochastic2

train fp32 --dtype fp32; check trains_in_fp32 test $? -eq 0
"$program" --device cpu "${small[@]}" --out "$work/cpu" >"$work/out" 2>&1
check fp32_as_the_cpu awk '{d = $2 - $4; if (d < 0) d = -d; if (d > 2e-4) bad = 1} END {exit bad || NR != 6}' <(paste -d' ' <(losses fp32) <(losses cpu))
check bf16_near_the_cpu awk '{d = $2 - $4; if (d < 0) d = -d; if (d > 0.03) bad = 1} END {exit bad || NR != 6}' <(paste -d' ' <(losses bf16) <(losses cpu))

train bf16 --dtype fp32; check P12_another_number_format_is_refused test $? -eq 2
check and_says_how_to_allow_it grep -q -- '--allow-change device' "$work/out"
train bf16 --steps 7 --dtype fp32 --allow-change device,schedule; check and_goes_on_when_allowed test $? -eq 0

"$program" --device emu --generate --init-from "$work/fp32" --max-tokens 90 --temperature 0 >"$work/text.emu" 2>"$work/out"
"$program" --device cpu --generate --init-from "$work/fp32" --max-tokens 90 --temperature 0 >"$work/text.cpu" 2>>"$work/out"
"$program" --device emu --dtype fp32 --generate --init-from "$work/fp32" --max-tokens 90 --temperature 0 >"$work/text.fp32" 2>>"$work/out"
check writes_text_beyond_the_context test "$(wc -c <"$work/text.emu")" -gt 90
check the_same_text_as_the_cpu cmp -s "$work/text.cpu" "$work/text.fp32"
"$program" --device emu --eval-only --init-from "$work/fp32" --val "$work/text" >"$work/out" 2>&1; check evaluates grep -q '^val loss' "$work/out"

LLMC_EMU_MEMORY=11000000 train small_gpu; check out_of_memory_is_one_message test $? -eq 3
check and_names_the_row grep -qE 'error: out of memory on the GPU \(emulated GPU\): .* \(.*\) needs' "$work/out"
LLMC_EMU_MEMORY=60000000 train auto --batch auto --total-batch 560 --steps 1 --save-every 0; check batch_auto_fits test $? -eq 0
check and_says_what_it_chose grep -qE 'batch.*micro-batch [1248] x 70' "$work/out"
train hopper32 --attention hopper --dtype fp32 --steps 1; check attention_for_hopper_is_for_bf16 test $? -eq 2
LLMC_EMU_CAPABILITY=8.0 train ampere --attention hopper --steps 1; check and_for_hopper test $? -eq 2
check and_says_why grep -q 'compute capability 8.0; its kernels are for 9.0' "$work/out"
LLMC_EMU_MATMUL=own-fast train own --own-products on --print-plans --save-every 0; check trains_with_own_products test $? -eq 0
check all_of_them_own test "$(grep -c ' | own 128x' "$work/out")" -ge 8 -a "$(grep -c ' us, own ' "$work/out")" -eq "$(grep -c ' | own 128x' "$work/out")"
check own_products_near_the_librarys awk '{d = $2 - $4; if (d < 0) d = -d; if (d > 0.01) bad = 1} END {exit bad || NR != 6}' <(paste -d' ' <(losses own) <(losses bf16 | head -6))
train own_fp32 --own-products on --dtype fp32; check own_products_in_fp32_are_refused test $? -eq 2
"$program" --device cpu --own-products on "${small[@]}" --out "$work/own_cpu" >"$work/out" 2>&1; check and_on_the_cpu test $? -eq 2
train noattention --attention cudnn; check without_cudnn_it_says_so test $? -eq 2
"$program" --device emu --gpu 3 "${small[@]}" --out "$work/gpu3" >"$work/out" 2>&1; check a_gpu_that_is_not_there_is_refused test $? -eq 2
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
