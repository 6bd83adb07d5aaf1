#!/usr/bin/env bash
# --dry-run --gpus from outside: what is printed, by hand where it is simple, and every wrong use. test_predict.c has the numbers' own tests.
set -u
cd "$(dirname "$0")/../.." || exit 1
# shellcheck source=dev/test/kit.sh
. dev/test/kit.sh
run() { run_command "$1" "$train" "${@:2}"; } # CODE ARGS...
value() { sed -nE "s/.*$1.*/\1/p" "$work/log"; }
less() { awk -v a="$1" -v b="$2" 'BEGIN { exit !(a + 0 < b + 0 && a != "" && b != "") }'; }
plan=(--dry-run --model gpt2 --batch 64 --total-batch 524288)
xl=(--dry-run --model gpt2-xl --total-batch 1048576 --steps 32000)

test_case published_124M
run 0 "${plan[@]}" --gpus 8 --reduce-dtype bf16 --steps 18865
expect "whose MFU" says 'MFU 38.1 % of 989.5 TFLOP/s bf16, as llm.c reported for .* 8 H100'
expect "65536 x 803478528 / (0.381 x 989.5e12)" says 'compute +139.7 ms a step, 1 micro-batch of 65536 tokens'
expect "7/8 of 124478976 x 2 bytes at 370 GB/s" says 'reduce-scatter +217.8 MB sent by a GPU in 0.59 ms: the step waits for 0.22, 0.37 are hidden'
expect "the weights likewise" says 'all-gather +217.8 MB sent by a GPU in 0.59 ms: the step waits for 0.22, 0.37 are hidden'
expect "step" says 'step +140.1 ms, 512 samples, MFU 38.0 %'
expect "speed" says 'speed .*\(467[0-9]{3} a GPU\)'
expect "memory" says 'memory of a GPU +21.7 GiB, and 7.0 for scratch .* of 79.6 GiB: fits'
done_case

test_case published_1558M_time_and_cost
run 0 "${xl[@]}" --batch 16 --gpus 8 --reduce-dtype bf16 --gpu-price 3.5
expect "speed" says 'speed .*\(472[0-9]{2} a GPU\)'
expect "33.554e9 tokens at 378k tokens/s, 3.50 an hour" says '33.6B tokens +1.03 days \(24.7 hours\), 197.3 GPU-hours, cost 690'
run 0 "${xl[@]}" --batch 16 --gpus 8
expect "no price, no cost" test -z "$(value '(cost)')"
done_case

test_case memory_is_that_of_as_many_processes
table() { grep -E '^  memory  .* (MiB|GiB)  ' "$work/log"; }
run 0 --dry-run --model gpt2 --batch 64 --processes 16 --dtype bf16
expect "a plan without GPUs predicts nothing" test -z "$(value '(prediction|TFLOP)')"
want=$(table)
run 0 --dry-run --model gpt2 --batch 64 --gpus 8 --nodes 2 --processes 16
expect "the same table" test "$(wc -l <<<"$want")" -ge 5 -a "$(table)" = "$want"
done_case

test_case what_fits
run 0 "${xl[@]}" --batch 32 --gpus 8
expect "88.9 GiB do not" says 'of 79.6 GiB: DOES NOT FIT' && expect "what does" says 'largest --batch that fits and divides --total-batch is 16$'
run 0 --dry-run --model gpt2-xl --batch 26 --gpus 8
expect "nor 74.3 GiB with scratch" says 'memory of a GPU +74.3 GiB.*DOES NOT FIT'
run 0 "${xl[@]}" --batch 32 --gpus 8 --gpu-name H200
expect "in an H200 they do" says 'of 140.4 GiB: fits'
run 0 "${xl[@]}" --batch 1 --gpus 1 --gpu-name RTX-4090
expect "nothing fits" says 'no --batch fits; take .*--recompute block' && expect "said so" says 'DOES NOT FIT'
run 0 "${xl[@]}" --batch auto --gpus 8
expect "auto takes it" says 'micro-batch 16 x 1024' && expect "and fits" says ': fits'
done_case

test_case one_gpu_and_many_nodes
run 0 "${plan[@]}" --gpus 1
expect "MFU is what was assumed" says 'step +1117.[0-9] ms, 512 samples, MFU 38.1 %' && expect "no messages" test -z "$(value '(sent by)')"
run 0 "${plan[@]}" --gpus 8 --nodes 1 --assume-mfu 0.5
expect "as told" says 'MFU 50.0 % of .*--assume-mfu' && expect "no network in one node" test -z "$(value '(to the others)')"
run 0 "${xl[@]}" --batch 8 --gpus 8 --nodes 4
expect "names what it assumed" says '370 GB/s inside a node, 50 from it to the others \(no --network'
slow=$(value '^  step +([0-9.]+) ms')
run 0 "${xl[@]}" --batch 8 --gpus 8 --nodes 4 --network 400
expect "a faster network" less "$(value '^  step +([0-9.]+) ms')" "$slow"
run 0 "${xl[@]}" --batch 8 --gpus 8 --nodes 4 --network 1
expect "a slow one is waited for" less 1000 "$(value '^  step +([0-9.]+) ms')"
run 0 "${plan[@]}" --gpus 8 --bus 10
expect "a slow bus" says 'reduce-scatter +435.7 MB sent by a GPU in 43.57 ms' && expect "said" says ' 10 GB/s inside a node'
run 0 "${plan[@]}" --gpus 8 --zero 0
expect "without ZeRO-1" says 'all-reduce +871.4 MB' && expect "no weights are sent" test -z "$(value '(all-gather)')"
run 0 "${plan[@]}" --batch 8 --gpus 8
expect "small micro-batches" says 'micro-batches this small reach less'
done_case

test_case bad_usage_is_one_clear_message
while IFS='|' read -r pattern args; do
    eval "run 2 $args"
    expect "message /$pattern/ for: $args" says "$pattern"
    expect "one line for: $args" test "$(wc -l <"$work/log")" -eq 1
done <<'CASES'
--processes 4 contradicts --gpus 8 x --nodes 1 = 8|--dry-run --model gpt2 --gpus 8 --processes 4
--processes 8 contradicts --gpus 8 x --nodes 2 = 16|--dry-run --model gpt2 --gpus 8 --nodes 2 --processes 8
--nodes is for a plan of GPUs: give --gpus|--dry-run --model gpt2 --nodes 2
--network is for a plan of GPUs|--dry-run --model gpt2 --network 2
--bus is for a plan of GPUs|--dry-run --model gpt2 --bus 2
--assume-mfu is for a plan of GPUs|--dry-run --model gpt2 --assume-mfu 0.4
--gpu-price is for a plan of GPUs|--dry-run --model gpt2 --gpu-price 2
--gpu-name is for a plan of GPUs|--dry-run --model gpt2 --gpu-name H100
--nodes is for a plan: give --dry-run|--data x --out y --nodes 8
H100.*RTX-4090|--dry-run --model gpt2 --gpus 8 --gpu-name "GTX 1080"
from 1 to 1024|--dry-run --model gpt2 --gpus 0
from 1 to 1024|--dry-run --model gpt2 --gpus 8 --nodes 0
from 0.001 to 1|--dry-run --model gpt2 --gpus 8 --assume-mfu 38
from 0.001|--dry-run --model gpt2 --gpus 8 --nodes 2 --network 0
from 0.001|--dry-run --model gpt2 --gpus 8 --bus 0
--gpu-price|--dry-run --model gpt2 --gpus 8 --gpu-price -1
contradicts --device cpu|--dry-run --model gpt2 --gpus 8 --device cpu
found --dtype fp32|--dry-run --model gpt2 --gpus 8 --dtype fp32
give a number, or --gpus|--dry-run --model gpt2 --batch auto
less than one micro-batch|--dry-run --model gpt2 --gpus 8 --nodes 100 --batch 64 --total-batch 524288
CASES
done_case

totals
