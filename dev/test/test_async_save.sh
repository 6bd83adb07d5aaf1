#!/usr/bin/env bash
# Saves apart from training, from outside: what ends a run while a rank's disk is slow to take its file (P7, P8, P24).
set -u
cd "$(dirname "$0")/../.." || exit 1
# shellcheck source=dev/test/kit.sh
. dev/test/kit.sh
line_of() { grep -nE -m1 -- "$1" "$work/log" | cut -d: -f1; }
run() { # CODE OUT OPTIONS...: its output in $work/log. The directory is there, so that a rank's first counted call is of its first save
    mkdir -p "$work/$2"
    run_command "$1" "$train" "${small[@]}" --out "$work/$2" "${@:3}"
}
same_tensors() { expect "$1: same tensors as ${2:-whole}" test "$(tensor_hash "$work/$1/step_00000030")" = "$(tensor_hash "$work/${2:-whole}/step_00000030")"; }

write_text 3000 >"$work/text.txt"
small=(--data "$work/text.txt" --layers 1 --channels 32 --heads 2 --seq-len 32 --vocab-size 300 --batch 2 --total-batch 768 --val-every 0 --save-every 10 --lr 3e-3 --steps 30 --processes 3)

test_case waiting_for_saves_gives_the_same
run 0 whole --save-async off
expect "no memory for copies is planned" test "$(grep -c 'save-async' "$work/log")" -eq 0
run 0 on
expect "the memory is in the table" says 'memory .*of the host, by the first rank'
same_tensors on
done_case

# The first write of a rank comes late.
test_case P7_training_goes_on_beside_a_slow_writer
LLMC_FAULT='slow=300@io=1,rank=1' run 0 slow --steps 500 --save-every 300
expect "steps meanwhile" test "$(line_of '^step 304/500')" -lt "$(line_of '^step 300: saved')"
expect "training waited for less than the writer did" says '^step 300: saved .*\((0\.[3-9]|[1-9]).* s, 1?[0-9]{1,2} ms of them'
LLMC_FAULT='slow=1000@io=1,rank=1' run 0 slower
expect "the next save waits for it" test "$(line_of '^step 10: saved')" -lt "$(line_of '^step 2[1-9]/30')"
same_tensors slower
done_case

test_case P8_killed_in_the_window
for at in 'kill@step=12,rank=0' 'kill@step=12,rank=1' 'kill@io=2,rank=2'; do
    LLMC_FAULT="slow=500@io=1,rank=1;$at" run 137 killed
    expect "$at: no checkpoint yet" test ! -e "$work/killed/step_00000010"
    run 0 killed
    expect "$at: from the beginning" test "$(grep -c 'resuming' "$work/log")" -eq 0
    same_tensors killed
    rm -r "$work/killed"
done
done_case

test_case P24_stopped_in_the_window
LLMC_FAULT='slow=500@io=1,rank=1;term@step=12,rank=2' run 75 stopped
expect "first the save under way, then the last" test "$(line_of '^step 10: saved')" -lt "$(line_of '^step 1[2-5]: saved')"
run 0 stopped
expect "from the last" says 'resuming from .*step 1[2-5] of 30'
same_tensors stopped
done_case

test_case P4_disk_full_in_the_window
LLMC_FAULT='errno=ENOSPC@io=3,rank=1' run 8 full
expect "who and what" says 'error: rank 1: the checkpoint of step 20 was not saved \(earlier ones are untouched\): .*No space left'
expect "nothing hidden is left" test -z "$(find "$work/full" -name '.*step*')"
run 0 full
expect "from the earlier one" says 'resuming from .*step 10 of 30'
same_tensors full
done_case

test_case P15_bad_steps_end_the_run_after_the_save_under_way
run 5 bad --lr 1e3 --grad-clip 0 --weight-decay 0 --max-nonfinite 2 --eps 1e-20 --beta2 0 --save-every 1
newest=$(cd "$work/bad" && printf '%s\n' step_* | tail -1)
expect "the newest is named, $newest" says "newest checkpoint is of step $((10#${newest#step_}));"
expect "nothing hidden is left" test -z "$(find "$work/bad" -name '.*step*')"
done_case

test_case one_process
small+=(--processes 1)
run 0 whole1 --save-async off
LLMC_FAULT='slow=300@io=30;slow=200@io=60' run 0 one
same_tensors one whole1
done_case

totals
