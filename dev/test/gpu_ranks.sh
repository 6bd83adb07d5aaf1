#!/usr/bin/env bash
# Several processes on one GPU, staged through the host: their losses are those of one process, and how much of what travels is hidden by computing.
#   gpu_ranks.sh PROGRAM [DEVICE]     PROGRAM: train_gpt2 of a build for DEVICE, default cuda. Prints "ranks: ..." lines and the count of checks.
set -u
program=$1 device=${2:-cuda} passed=0 failed=0
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
check() { # name, command...
    local name=$1; shift
    if "$@"; then passed=$((passed + 1)); echo "ok $name"; else failed=$((failed + 1)); echo "FAILED $name"; tail -n 5 "$work/out"; fi
}
seq 1 4000 | awk '{print "the sum of", $1 % 7, "and", $1 % 11, "is", $1 % 7 + $1 % 11 "."}' >"$work/text"
"$program" --device cpu --data "$work/text" --out "$work/prepared" --layers 1 --channels 32 --heads 2 --seq-len 32 --vocab-size 300 --steps 1 >"$work/out" 2>&1
shape=(--layers 12 --channels 768 --heads 12 --seq-len 256 --total-batch 8192 --steps 8)
[ "$device" = cuda ] || shape=(--layers 2 --channels 32 --heads 2 --seq-len 16 --total-batch 128 --steps 3)
train() { # ranks, more options...
    local n=$1; shift
    "$program" --device "$device" --data "$work/prepared/data/train.bin" --val "$work/prepared/data/val.bin" --tokenizer "$work/prepared/data/tokenizer" "${shape[@]}" \
        --batch 2 --val-every 0 --save-every 0 --val-batches 1 --seed 3 --processes "$n" --share-gpus --plan-file "$work/plans" --out "$work/$n" "$@" >"$work/out" 2>&1
}
losses() { sed -nE 's/.*"kind":"step".*"step":([0-9]+),"loss":([^,]*),.*/\1 \2/p' "$work/$1/metrics.jsonl"; }
# Step by step within a hundredth: weights of bf16, gradients rounded in another order.
close() { paste -d' ' <(losses 1) <(losses "$1") | awk 'NF != 4 || $1 != $3 || ($2 - $4) ^ 2 > 1e-4 {bad = 1} END {exit !NR || bad}'; }

check one_process train 1
for n in 2 4; do
    check "processes_$n" train "$n" --trace "$work/trace.json"
    check "losses_of_one_with_$n" close "$n"
    tr '{' '\n' <"$work/trace.json" | awk -F'"dur":' -v n="$n" '/"cat":"ranks"/ {split($2, x, ","); sent += x[1]} /"cat":"waiting for ranks"/ {split($2, x, ","); waited += x[1]}
        END {printf "ranks: %d share the device: messages under way for %.1f ms in the traced steps, waited for during %.1f\n", n, sent / 1e3, waited / 1e3}'
done
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
