#!/usr/bin/env bash
# What a run owes to those who share it, from outside: it stops and saves when asked (P25), at any instant and on whichever rank (P24); one dead rank ends
# all in every phase, under each launcher (P22); copies that differ end it before the next save (P18); the slow rank is named (P29).
set -u
cd "$(dirname "$0")/../.." || exit 1
# shellcheck source=dev/test/kit.sh
. dev/test/kit.sh
needs pgrep
begin() { : >"$work/log"; "$@" >"$work/log" 2>&1 & pid=$!; }  # and goes on beside the test
await() { # PATTERN: until the log says it
    for _ in $(seq 600); do says "$1" && return; sleep 0.05; done
    bad=1; echo "FAILED $name: waited for /$1/ in vain"
}
ends() { # CODE: the run that was begun
    wait "$pid"; local got=$?
    [ "$got" -eq "$1" ] || { bad=1; echo "FAILED $name: exit code $got, expected $1"; }
}
losses() { sed -nE 's/.*"kind":"(step|validation)".*"step":([0-9]+),"loss":([^,]*),.*/\1 \2 \3/p' "$1/metrics.jsonl" | sort -u; }
newest() { ls -d "$1"/step_???????? | tail -1; }
same_as() { # RUN RUN: of the same bits
    expect "losses of $2" cmp -s <(losses "$1") <(losses "$2")
    expect "tensors of $2" test "$(tensor_hash "$(newest "$1")")" = "$(tensor_hash "$(newest "$2")")"
}

prepare_tokens
small=(--data "$work/prepared/data/train.bin" --val "$work/prepared/data/val.bin" --tokenizer "$work/prepared/data/tokenizer" --layers 2 --channels 32 --heads 2 --seq-len 32
    --batch 2 --total-batch 192 --lr 3e-3 --val-batches 12)
long=(--steps 1000000 --val-every 0 --save-every 0)

# ---- P25 ----
for n in 1 3; do
    test_case "P25_SAVE_and_STOP_with_$n"
    begin "$train" "${small[@]}" "${long[@]}" --processes $n --out "$work/files $n"
    await 'step *5/'
    touch "$work/files $n/SAVE"
    await 'step [0-9]+: saved .*step_'
    expect "it goes on" kill -0 "$pid"
    for _ in $(seq 20); do [ -e "$work/files $n/SAVE" ] || break; sleep 0.05; done
    expect "SAVE is gone" test ! -e "$work/files $n/SAVE"
    touch "$work/files $n/STOP"
    ends 75
    expect "why" says 'stopped by the file STOP after step [0-9]+, saved'
    expect "two checkpoints" test "$(ls -d "$work/files $n"/step_* | wc -l)" -eq 2
    expect "STOP is gone" test ! -e "$work/files $n/STOP"
    done_case

    test_case "P25_STOP_in_a_validation_with_$n"
    LLMC_FAULT=slow@batch=0 begin "$train" "${small[@]}" --val "$work/prepared/data/train.bin" --val-batches 0 --steps 20 --processes $n --out "$work/validation $n"
    await '^ +steps'
    touch "$work/validation $n/STOP"
    ends 75
    expect "before the first step" says 'stopped by the file STOP after step 0, saved'
    done_case

    test_case "P25_max_time_with_$n"
    begin=$(date +%s%N)
    run 75 "$train" "${small[@]}" "${long[@]}" --processes $n --out "$work/time $n" --max-time 2s
    took=$((($(date +%s%N) - begin) / 1000000))
    expect "why" says 'stopped by --max-time 2s after step [1-9][0-9]*, saved'
    expect "about 2 s, found $took ms" test $took -gt 1000 -a $took -lt 3500
    done_case
done
test_case P25_a_time_that_is_none
run 2 "$train" "${small[@]}" --out "$work/x" --max-time 3d
expect "what is expected" says '^error: --max-time: found "3d", expected a time such as 3h, 45m'
done_case

# ---- P18 ----
test_case P18_a_flipped_bit_ends_the_run_before_the_next_save
replicas=("${small[@]}" --val-every 0 --save-every 10 --steps 40 --processes 4 --batch 1 --total-batch 256)
run 0 "$train" "${replicas[@]}" --zero 0 --out "$work/alike"
while read -r stage every flip found saved; do
    rm -rf "$work/flipped"
    LLMC_FAULT=flip@step=$flip,rank=2 run 9 "$train" "${replicas[@]}" --zero "$stage" --check-replicas "$every" --out "$work/flipped"
    expect "the rank, the tensor ($stage $every $flip)" says "^error: after step $found the ranks do not hold the same .*unlike the majority: rank 2 of 4, first in weights of tensor h.0.ln_1.weight"
    expect "the last good checkpoint stays" test "$(basename "$(newest "$work/flipped")")" = "step_000000$saved"
    expect "no orphans" gone
    run 0 "$train" "${replicas[@]}" --zero "$stage" --out "$work/flipped"
    same_as "$work/alike" "$work/flipped"
done <<'CASES'
0 5 17 20 10
0 100 12 20 10
CASES
LLMC_FAULT=flip@step=12,rank=2 run 0 "$train" "${replicas[@]}" --zero 0 --check-replicas 0 --out "$work/unlooked"
LLMC_FAULT=flip@step=14,rank=2 run 9 "$train" "${replicas[@]}" --zero 1 --check-replicas 5 --out "$work/sharded"
expect "sharded" says '^error: after step 15 .*: rank 2 of 4'
done_case

# ---- P29 ----
test_case P29_the_slow_rank_is_named
LLMC_FAULT=slow@step=30,rank=1 run 0 "$train" "${small[@]}" --val-every 0 --processes 3 --steps 130 --out "$work/slow"
expect "on the console" says '^step [0-9]+: rank 1 \(host .+\) computes [0-9]+ % slower than the median'
expect "in the metrics" grep -q '"kind":"slow_rank".*"rank":1,' "$work/slow/metrics.jsonl"
expect "once" test "$(grep -c 'rank 1 .*slower than' "$work/log")" -eq 1
if has_emulator; then # where devices wait for each other, not their hosts
    LLMC_EMU_GPUS=2 LLMC_FAULT=slow=60@step=5,rank=1 run 0 "$train" "${small[@]}" --device emu --dtype fp32 --layers 1 --batch 1 --total-batch 64 --val-every 0 --gpus 2 --steps 90 \
        --out "$work/slow gpu"
    expect "over NCCL" says 'ranks +2 over nccl'
    expect "between devices" says '^step [0-9]+: rank 1 \(host .+\) computes [0-9]+ % slower than the median'
fi
done_case

# ---- P24: a signal to one rank at a random instant, start and end included ----
often=("${small[@]}" --processes 3 --steps 60 --val-every 4 --sample-every 5 --sample-tokens 8 --save-every 7 --total-batch 384)
test_case P24_at_random_instants
begin=$(date +%s%N)
run 0 "$train" "${often[@]}" --out "$work/whole"
length=$((($(date +%s%N) - begin) / 1000000))
seed=${LLMC_TEST_SEED:-$(date +%s)}; RANDOM=$seed
stops=0 chain=0 started=$SECONDS
most=${LLMC_TEST_STOPS:-12}
while [ $stops -lt "$most" ] && [ $((SECONDS - started)) -lt $((5 * most)) ] && [ $bad -eq 0 ]; do
    out="$work/chain $chain"
    begin "$train" "${often[@]}" --out "$out"
    ranks=
    while kill -0 "$pid" 2>/dev/null; do mapfile -t ranks < <(pgrep -P "$pid"); [ ${#ranks[@]} -eq 3 ] && break; sleep 0.005; done
    ms=$((RANDOM % (length > 60 ? length / 2 : 30))) rank=$((RANDOM % 3)) signal=$([ $((RANDOM % 2)) -eq 0 ] && echo TERM || echo USR1)
    sleep "$(printf '%d.%03d' $((ms / 1000)) $((ms % 1000)))"
    kill "-$signal" "${ranks[rank]:-$pid}" 2>/dev/null
    wait "$pid"; code=$?
    expect "SIG$signal to rank $rank after $ms ms (seed $seed, stop $stops): exit code $code" test $code -eq 75 -o $code -eq 0
    expect "saved by all" test "$(ls "$(newest "$out")"/optimizer-*-of-0003.safetensors | wc -l)" -eq 3
    stops=$((stops + (code == 75)))
    [ $code -eq 0 ] && { same_as "$work/whole" "$out"; chain=$((chain + 1)); }
done
[ $code -ne 75 ] || { run 0 "$train" "${often[@]}" --out "$out"; same_as "$work/whole" "$out"; }
echo "$stops stops in $((chain + 1)) chains of a run of $length ms"
done_case

# In each phase, where a signal is least expected.
test_case P24_in_each_phase
for fault in term@start=0,rank=0 usr1@start=0,rank=2 term@validation=8,rank=1 usr1@batch=1,rank=2 term@sample=10,rank=0 term@sample=10,rank=1 usr1@saving=14,rank=0 term@saving=14,rank=2; do
    rm -rf "$work/phase"
    LLMC_FAULT=$fault run 75 "$train" "${often[@]}" --out "$work/phase"
    expect "$fault: it says so" says 'stopped by (signal 1[05]|a signal to another rank) after step'
    run 0 "$train" "${often[@]}" --out "$work/phase"
    same_as "$work/whole" "$work/phase"
done
rm -rf "$work/phase"
LLMC_FAULT=term@saving=60,rank=1 run 0 "$train" "${often[@]}" --out "$work/phase"
same_as "$work/whole" "$work/phase"
done_case

test_case a_second_signal_leaves_at_once
LLMC_FAULT=slow=4000@step=6 begin "$train" "${small[@]}" "${long[@]}" --out "$work/twice"
await 'step *5/'
sleep 0.3; kill -TERM "$pid"; kill -TERM "$pid"; sleep 1.2 # twice within a second is once
expect "it finishes its step" kill -0 "$pid"
kill -TERM "$pid"
ends 143
expect "without a checkpoint of it" test ! -e "$work/twice/step_00000007"
done_case

# ---- P22 in each phase, under each launcher ----
launchers=("ours")
command -v mpirun >/dev/null && launchers+=("mpirun") || skip "P22_under_mpirun: mpirun is not installed"
for launcher in "${launchers[@]}"; do
    test_case "P22_in_each_phase_under_$launcher"
    if [ "$launcher" = ours ]; then command=("$train" --processes 3); else command=(mpirun --allow-run-as-root --oversubscribe -n 3 "$train"); fi
    for fault in kill@start=0,rank=1 kill@start=0,rank=0 kill@validation=8,rank=2 kill@batch=1,rank=0 kill@sample=10,rank=0 kill@sample=10,rank=1 kill@saving=14,rank=0 kill@saving=14,rank=2 kill@io=9,rank=1; do
        rm -rf "$work/dead"
        begin=$(date +%s%N)
        LLMC_FAULT=$fault timeout 60 "${command[@]}" "${often[@]}" --processes 3 --out "$work/dead" >"$work/log" 2>&1; code=$?
        took=$((($(date +%s%N) - begin) / 1000000))
        expect "$fault: exit code $code" test $code -eq 137
        expect "$fault: within ten seconds, found $took ms" test $took -lt 10000
        expect "$fault: no orphans" gone
    done
    done_case
done

totals
