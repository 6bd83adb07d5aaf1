#!/usr/bin/env bash
# One model trained by several processes, from outside: our own launcher, mpirun where it is installed, torchrun's variables by hand; and the promises
# that only whole processes show (P8, P10, P11, P21, P22, P23, P24).
set -u
cd "$(dirname "$0")/../.." || exit 1
# shellcheck source=dev/test/kit.sh
. dev/test/kit.sh
needs pgrep
export ASAN_OPTIONS="${ASAN_OPTIONS:+$ASAN_OPTIONS:}handle_segv=0:handle_abort=0" # a crash is to be one
different() { ! cmp -s <(losses "$1") <(losses "$2"); }
close_losses() { # A B: the same steps, losses within 1e-5, gradient norms within a ten thousandth
    paste -d' ' <(losses "$1") <(losses "$2") | awk 'NF != 6 || $1 != $4 || ($2 - $5) ^ 2 > 1e-10 || ($3 - $6) ^ 2 > 1e-8 * $3 ^ 2 {bad = 1} END {exit !NR || bad}'
}

prepare_tokens
small=(--data "$work/prepared/data/train.bin" --val "$work/prepared/data/val.bin" --tokenizer "$work/prepared/data/tokenizer" --layers 2 --channels 32 --heads 2 --seq-len 32
    --total-batch 768 --val-every 10 --val-batches 4 --save-every 10 --lr 3e-3 --steps 30)

test_case one_process
run 0 "$train" "${small[@]}" --out "$work/one" --batch 4
done_case

test_case a_trace_shows_what_travels
run 0 "$train" "${small[@]}" --steps 2 --out "$work/traced" --batch 4 --processes 2 --trace "$work/trace.json"
for row in ranks "waiting for ranks"; do expect "the trace has a row '$row'" grep -q "\"cat\":\"$row\"" "$work/trace.json"; done
done_case

if has_emulator; then
test_case a_gpu_for_each_process
emulated=(--device emu --dtype fp32 "${small[@]}" --steps 3 --val-batches 1 --batch 4)
run 2 env LLMC_EMU_GPUS=2 "$train" "${emulated[@]}" --out "$work/crowd" --gpus 3
expect "both numbers" says "ranks 0 and 2 have the same GPU .*found 3 processes on this machine and 2 GPUs, expected one GPU for each; start 2 here, or give --share-gpus"
expect "said once" test "$(grep -c 'have the same GPU' "$work/log")" -eq 1
run 0 "$train" "${emulated[@]}" --out "$work/one gpu"
measured=$(grep -c '^timing the algorithms' "$work/log")
run 0 env LLMC_EMU_GPUS=2 "$train" "${emulated[@]}" --out "$work/gpus" --gpus 2
expect "one rank measures the products for all" test "$measured" -gt 0 -a "$(grep -c '^timing the algorithms' "$work/log")" -eq "$measured"
run 0 "$train" "${emulated[@]}" --out "$work/shared" --processes 2 --share-gpus
run 0 env LLMC_EMU_GPUS=2 "$train" "${emulated[@]}" --out "$work/gpus in bf16" --gpus 2 --reduce-dtype bf16
expect "over NCCL" says 'ranks +2 over nccl'
run 0 "$train" "${emulated[@]}" --out "$work/shared in bf16" --processes 2 --share-gpus --reduce-dtype bf16
expect "in bf16, between devices or by the host, the same losses" cmp -s <(losses "$work/gpus in bf16") <(losses "$work/shared in bf16")
expect "and not those of fp32" different "$work/gpus in bf16" "$work/shared"
expect "shared or not, the same losses" cmp -s <(losses "$work/gpus") <(losses "$work/shared")
run 2 "$train" "${emulated[@]}" --out "$work/contrary" --processes 2 --gpus 3
expect "a contradiction" says "gpus 3 starts one process for each, found --processes 2"
run 2 "$train" "${small[@]}" --out "$work/contrary" --batch 4 --gpus 2 --device cpu
expect "no GPU" says "gpus 2 contradicts --device cpu"
run 2 env LLMC_EMU_GPUS=0 "$train" "${emulated[@]}" --out "$work/contrary" --gpus 2
expect "none there" says "no usable NVIDIA GPU"
run 2 "$train" "${small[@]}" --out "$work/contrary" --batch 4 --gpus 2
expect "--gpus asks for CUDA" says "device cuda: (this program is built without CUDA|no usable NVIDIA GPU)"
done_case
fi

test_case P10_ranks_of_our_own_launcher
for n in 2 3 4 8; do
    run 0 "$train" "${small[@]}" --out "$work/by $n" --batch $((n == 8 ? 3 : 2)) --processes $n
    expect "$n: losses of one process" close_losses "$work/one" "$work/by $n"
    expect "$n: one process speaks" test "$(grep -c 'step 30/30' "$work/log")" -eq 1
    expect "$n: the table says so" says "ranks +$n over tcp, AdamW's state in parts \(ZeRO-1\)"
    expect "$n: files of all ranks" test "$(ls "$work/by $n"/step_00000030/optimizer-*-of-000$n.safetensors | wc -l)" -eq $n
done
done_case

test_case zero_0_has_the_same_bits
run 0 "$train" "${small[@]}" --out "$work/whole" --batch 2 --processes 4 --zero 0
expect "losses" cmp -s <(losses "$work/by 4") <(losses "$work/whole")
expect "weights" cmp -s "$work/by 4/step_00000030/vocab.json" "$work/whole/step_00000030/vocab.json"
expect "one optimizer file" test -f "$work/whole/step_00000030/optimizer-0000-of-0001.safetensors"
done_case

test_case text_is_prepared_once
run 0 "$train" --data "$work/text.txt" --out "$work/text" --layers 1 --channels 32 --heads 2 --seq-len 32 --vocab-size 300 --steps 2 --processes 3 --batch auto --total-batch 1152 --sample-every 2 \
    --sample-tokens 4 --recompute block --rank-logs "$work/logs"
expect "a sample" says 'sample at step 2'
expect "logs of the others" test -s "$work/logs/rank-0002.log"
expect "they hold what rank 0 says" grep -q 'step 2/2' "$work/logs/rank-0002.log"
done_case

# Whichever rank dies, and how: all end, the launcher names it last, and the same command goes on to the bit.
test_case P22_P8_a_dead_rank_ends_all_and_the_run_goes_on
while read -r fault code words; do
    rm -rf "$work/killed"
    LLMC_FAULT=$fault run "$code" "$train" "${small[@]}" --out "$work/killed" --batch 2 --processes 4
    expect "$fault: the cause is said last (/$words/)" grep -qE "$words" <(tail -1 "$work/log")
    expect "$fault: no orphans" gone
    run 0 "$train" "${small[@]}" --out "$work/killed" --batch 2 --processes 4
    expect "$fault: same losses" cmp -s <(losses "$work/by 4") <(losses "$work/killed")
    expect "$fault: same tensors" test "$(tensor_hash "$work/by 4/step_00000030")" = "$(tensor_hash "$work/killed/step_00000030")"
done <<'CASES'
kill@step=17,rank=2 137 rank 2 .*SIGKILL
segv@step=13,rank=0 139 rank 0 .*SIGSEGV
abort@micro=1,rank=3 134 rank 3 .*SIGABRT
kill@io=6,rank=1 137 rank 1 .*SIGKILL
CASES
done_case

test_case P21_a_stuck_rank_is_named
LLMC_FAULT=stop@step=12,rank=1 run 6 "$train" "${small[@]}" --out "$work/stuck" --batch 2 --processes 3 --timeout 2
expect "who waits, for whom, where" says 'rank [02]: no progress .* in (reduce_scatter|all_reduce|all_gather) .* during training, step 12; I wait for rank 1'
expect "no orphans" gone
done_case

# A signal to one rank, at any moment: all save the same step.
test_case P24_a_signal_to_one_rank_stops_all
for at in step=5 step=20; do
    rm -rf "$work/stopped"
    LLMC_FAULT=term@$at,rank=2 run 75 "$train" "${small[@]}" --out "$work/stopped" --batch 2 --processes 4
    expect "$at: it is saved" says 'stopped by a signal to another rank after step [0-9]+, saved'
    run 0 "$train" "${small[@]}" --out "$work/stopped" --batch 2 --processes 4
    expect "$at: same losses" cmp -s <(losses "$work/by 4") <(losses "$work/stopped")
    expect "$at: same tensors" test "$(tensor_hash "$work/by 4/step_00000030")" = "$(tensor_hash "$work/stopped/step_00000030")"
done
done_case

test_case a_signal_to_the_launcher_stops_all
"$train" "${small[@]}" --out "$work/signalled" --batch 2 --processes 3 --steps 100000 >"$work/log" 2>&1 &
pid=$!
for _ in $(seq 300); do grep -q 'step *12/' "$work/log" && break; sleep 0.1; done
kill -TERM "$pid"; wait "$pid"; code=$?
expect "exit code 75, found $code" test "$code" -eq 75
expect "saved" says 'stopped by signal 15 after step'
expect "no orphans" gone
done_case

test_case P11_another_number_of_processes_goes_on
for n in 1 3; do
    rm -rf "$work/other"; mkdir "$work/other"; cp -r "$work/by 4/step_00000010" "$work/other/"
    run 0 "$train" "${small[@]}" --out "$work/other" --batch 2 --processes $n
    expect "$n: losses" awk 'NR == FNR {a[$1] = $2; next} ($2 - a[$1]) ^ 2 > 1e-10 {bad = 1} END {exit !FNR || bad}' <(losses "$work/by 4") <(losses "$work/other")
    expect "$n: resumed" says 'resuming from .*step_00000010'
done
done_case

test_case an_error_is_said_once
run 2 "$train" "${small[@]}" --out "$work/x" --batch 5 --processes 4
expect "once" test "$(grep -c '^error: --total-batch' "$work/log")" -eq 1
expect "and which rank ended first" grep -q '^error: rank [0-3] of 4 ended with exit code 2' <(tail -1 "$work/log")
expect "the processes are in the sum" says '4 processes'
run 2 "$train" "${small[@]}" --out "$work/one" --batch 2 --processes 4 --resume never
expect "once, of a run that is there" test "$(grep -c 'already holds a run' "$work/log")" -eq 1
run 2 "$train" --generate --init-from "$work/one" --processes 2
expect "no generation by several" says 'runs in one process'
cp "$work/prepared/data/train.bin" "$work/bad.bin"
printf '\377\377' | dd of="$work/bad.bin" bs=1 seek=40000 conv=notrunc status=none
run 3 "$train" "${small[@]}" --data "$work/bad.bin" --out "$work/bad" --batch 2 --processes 4 --epochs 3 --steps 0
expect "the rank, the file, the offset" says '^error: (rank [123]: )?.*bad.bin: byte 40000'
done_case

test_case a_broken_disk_costs_no_checkpoint
LLMC_FAULT='errno=ENOSPC@io=8,rank=2' run 8 "$train" "${small[@]}" --out "$work/full" --batch 2 --processes 3
expect "which rank" says 'rank 2'
expect "what" says 'No space left'
run 0 "$train" "${small[@]}" --out "$work/full" --batch 2 --processes 3
expect "same losses" cmp -s <(losses "$work/by 3") <(losses "$work/full")
done_case

# torchrun's variables, each rank started by hand.
test_case ranks_by_torchruns_variables
port=$(free_port)
for r in 1 0; do
    RANK=$r WORLD_SIZE=2 LOCAL_RANK=$r LOCAL_WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=$port timeout 60 "$train" "${small[@]}" --out "$work/torch" --batch 2 >"$work/log$r" 2>&1 & pids[r]=$!
done
for r in 0 1; do wait "${pids[r]}"; expect "rank $r ends well" test $? -eq 0; done
expect "same losses" cmp -s <(losses "$work/by 2") <(losses "$work/torch")
expect "rank 1 is silent" test ! -s "$work/log1"
done_case

test_case P23_ranks_that_differ_do_not_start
port=$(free_port)
for r in 0 1; do
    RANK=$r WORLD_SIZE=2 LOCAL_RANK=$r LOCAL_WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=$port timeout 60 "$train" "${small[@]}" --out "$work/differ" --batch 2 --lr 1e-${r} >"$work/log$r" 2>&1 & pids[r]=$!
done
for r in 0 1; do wait "${pids[r]}"; expect "rank $r: exit code 2" test $? -eq 2; done
cat "$work/log0" "$work/log1" >"$work/log"
expect "which option" says 'lr'
done_case

if command -v mpirun >/dev/null; then
    test_case ranks_by_mpirun
    run 0 mpirun --allow-run-as-root --oversubscribe -n 3 "$train" "${small[@]}" --out "$work/mpi" --batch 2
    expect "same losses" cmp -s <(losses "$work/by 3") <(losses "$work/mpi")
    expect "one process speaks" test "$(grep -c 'step 30/30' "$work/log")" -eq 1
    expect "the meeting file is gone" test -z "$(find "$work/mpi" -name 'meeting*')"
    done_case

    mpi=(env "ASAN_OPTIONS=$ASAN_OPTIONS:detect_leaks=0" mpirun --allow-run-as-root --oversubscribe) # Open MPI's libraries leave memory behind
    "$train" "${small[@]}" --out "$work/none" --batch 2 --processes 2 --transport mpi >"$work/log" 2>&1
    if says 'built without MPI'; then skip "ranks_joined_by_mpi: the build has no MPI"
    else
        test_case ranks_joined_by_mpi
        expect "our own launcher is none of MPI's" says 'expected ranks that mpirun or srun has started'
        run 0 "${mpi[@]}" -n 3 "$train" "${small[@]}" --out "$work/by mpi" --batch 2 --transport mpi
        expect "it says so" says 'ranks +3 over mpi'
        expect "same losses" cmp -s <(losses "$work/by 3") <(losses "$work/by mpi")
        run 0 "${mpi[@]}" -n 1 "$train" "${small[@]}" --out "$work/by one mpi" --batch 2 --transport mpi
        LLMC_FAULT=kill@step=17,rank=2 run 137 "${mpi[@]}" -n 3 "$train" "${small[@]}" --out "$work/killed mpi" --batch 2 --transport mpi
        expect "no orphans" gone
        run 0 "${mpi[@]}" -n 3 "$train" "${small[@]}" --out "$work/killed mpi" --batch 2 --transport mpi
        expect "same tensors" test "$(tensor_hash "$work/by 3/step_00000030")" = "$(tensor_hash "$work/killed mpi/step_00000030")"
        LLMC_FAULT=term@step=5,rank=1 run 75 "${mpi[@]}" -n 3 "$train" "${small[@]}" --out "$work/stopped mpi" --batch 2 --transport mpi
        LLMC_FAULT=stop@step=12,rank=1 run 6 "${mpi[@]}" -n 3 "$train" "${small[@]}" --out "$work/stuck mpi" --batch 2 --transport mpi --timeout 2
        expect "who waits, for whom" says 'I wait for rank 1'
        expect "no orphans after a stuck one" gone
        run 3 "${mpi[@]}" -n 3 "$train" "${small[@]}" --data "$work/bad.bin" --out "$work/bad mpi" --batch 2 --epochs 3 --steps 0 --transport mpi
        expect "the file, the offset" says 'bad.bin: byte 40000'
        run 2 "${mpi[@]}" -n 1 "$train" "${small[@]}" --out "$work/differ mpi" --batch 2 --transport mpi : -n 1 "$train" "${small[@]}" --out "$work/differ mpi" --batch 2 --transport mpi --lr 1
        expect "which option" says 'lr is'
        done_case
    fi
else skip "ranks_by_mpirun: mpirun is not installed"; fi

totals
