#!/usr/bin/env bash
# The program from outside, as a user runs it: text in, training, stopping, resuming, evaluating, generating; and the promises
# that only whole processes show (P6, P8, P12, P15, P20). Uses a tiny model on text that it writes itself.
set -u
cd "$(dirname "$0")/../.." || exit 1
# shellcheck source=dev/test/kit.sh
. dev/test/kit.sh
tokenize=$build/tokenize
export OMP_NUM_THREADS=2
run() { run_command "$1" "$train" "${@:2}"; } # CODE ARGS...
losses() { sed -nE 's/.*"kind":"step".*"step":([0-9]+),"loss":([^,]*),.*"norm":([^,]*),.*/\1 \2 \3/p' "$1/metrics.jsonl"; }

write_text 6000 >"$work/text.txt"
small=(--layers 2 --channels 32 --heads 2 --seq-len 32 --batch 4 --vocab-size 300 --val-every 10 --val-batches 4 --save-every 10 --lr 3e-3)

test_case text_to_model
run 0 --data "$work/text.txt" --out "$work/a" "${small[@]}" --steps 40 --sample-every 20 --sample-tokens 8
expect "a step line" says 'step 40/40 \| loss [0-9.]+ .*norm .*lr .*ms .*tok/s \| ETA'
expect "validation" says 'validation loss [0-9]+\.[0-9]{6}'
expect "sample" says 'sample at step 40'
expect "memory table" says 'memory .*weights'
expect "checkpoint" test -f "$work/a/step_00000040/model.safetensors"
expect "tokenizer files beside the weights" test -f "$work/a/step_00000040/vocab.json"
expect "configuration" grep -q '^steps = 40' "$work/a/config.txt"
expect "start record" grep -q '"kind":"start".*"build":' "$work/a/metrics.jsonl"
expect "40 step records" test "$(grep -c '"kind":"step"' "$work/a/metrics.jsonl")" -eq 40
first=$(losses "$work/a" | head -1 | cut -d' ' -f2) last=$(losses "$work/a" | tail -1 | cut -d' ' -f2)
expect "it learns ($first -> $last)" awk "BEGIN { exit !($last < $first - 1) }"
done_case

test_case finished_run_says_so
run 0 --data "$work/text.txt" --out "$work/a" "${small[@]}" --steps 40 --sample-every 20 --sample-tokens 8
expect "done" says '^done: 40 steps'
done_case

test_case P20_same_bits_twice
run 0 --data "$work/text.txt" --out "$work/b" "${small[@]}" --steps 40
expect "same losses and norms" cmp -s <(losses "$work/a") <(losses "$work/b")
expect "same tensors" test "$(tensor_hash "$work/a/step_00000040")" = "$(tensor_hash "$work/b/step_00000040")"
done_case

# With limits on, each result is read before the next step is issued; without, one step late. The limits here are never reached.
test_case results_read_late_are_the_same
run 0 --data "$work/text.txt" --out "$work/late" "${small[@]}" --steps 40 --skip-loss-z 1e6
expect "same losses and norms" cmp -s <(losses "$work/a") <(losses "$work/late")
expect "same tensors" test "$(tensor_hash "$work/a/step_00000040")" = "$(tensor_hash "$work/late/step_00000040")"
steps_in() { sed -nE 's/.*"kind":"(step|validation)".*"step":([0-9]+).*/\1 \2/p' "$1/metrics.jsonl"; }
expect "same order of records" cmp -s <(steps_in "$work/a") <(steps_in "$work/late")
expect "each step takes time" test "$(grep -cE '"kind":"step".*"ms":0(\.0|,)' "$work/a/metrics.jsonl")" -le 4
done_case

test_case validation_and_samples_leave_training_alone
run 0 --data "$work/text.txt" --out "$work/c" "${small[@]}" --steps 40 --val-every 0
expect "same losses and norms" cmp -s <(losses "$work/a") <(losses "$work/c")
done_case

test_case recompute_gives_the_same_bits
for how in gelu block; do
    run 0 --data "$work/text.txt" --out "$work/r_$how" "${small[@]}" --steps 40 --recompute $how
    expect "same losses with --recompute $how" cmp -s <(losses "$work/a") <(losses "$work/r_$how")
done
done_case

# Kills at chosen and at random moments; after each the same command goes on; the end equals the uninterrupted run.
test_case P8_kill_anywhere_and_resume_is_bitwise
exec 3>&2 2>/dev/null # without the shell's own words about killed children
for fault in kill@step=3 kill@micro=1 kill@step=10 kill@io=4 kill@step=17 kill@io=11 kill@step=25 kill@io=23 kill@step=39; do
    LLMC_FAULT=$fault "$train" --data "$work/text.txt" --out "$work/k" "${small[@]}" --steps 40 --total-batch 256 >"$work/log" 2>&1
    code=$?
    expect "killed by $fault or finished (exit $code)" test "$code" -eq 137 -o "$code" -eq 0
done
for wait in 0.05 0.12 0.3; do
    "$train" --data "$work/text.txt" --out "$work/k" "${small[@]}" --steps 40 --total-batch 256 >"$work/log" 2>&1 &
    child=$!; sleep $wait; kill -9 $child 2>/dev/null; wait $child 2>/dev/null
done
exec 2>&3
run 0 --data "$work/text.txt" --out "$work/k" "${small[@]}" --steps 40 --total-batch 256
run 0 --data "$work/text.txt" --out "$work/u" "${small[@]}" --steps 40 --total-batch 256
expect "same tensors as the uninterrupted run" test "$(tensor_hash "$work/k/step_00000040")" = "$(tensor_hash "$work/u/step_00000040")"
expect "same last loss" test "$(losses "$work/k" | tail -1)" = "$(losses "$work/u" | tail -1)"
expect "every metrics line is whole" test "$(grep -vcE '^\{"kind":.*\}$' "$work/k/metrics.jsonl")" -le 12
done_case

# Two uneven shards so small that an epoch is a few steps: the kills fall on both sides of shard and epoch ends, and inside warm-up.
test_case P8_across_shard_and_epoch_ends
head -n 40 "$work/text.txt" >"$work/e0.txt"; tail -n 70 "$work/text.txt" >"$work/e1.txt"
for i in 0 1; do "$tokenize" encode --tokenizer "$work/a/data/tokenizer" --out "$work/epoch_$i.bin" "$work/e$i.txt" >"$work/log" 2>&1 || bad=1; done
epochs=(--data "$work/epoch_*.bin" --tokenizer "$work/a/data/tokenizer" --layers 2 --channels 32 --heads 2 --seq-len 32 --batch 4 --total-batch 256 --epochs 5
    --warmup 6 --save-every 2 --val-every 0 --lr 3e-3)
run 0 "${epochs[@]}" --out "$work/eu"
steps=$(sed -nE 's/^done: ([0-9]+) steps.*/\1/p' "$work/log")
expect "several steps an epoch, and not a whole number of them ($steps steps)" test "${steps:-0}" -gt 15
exec 3>&2 2>/dev/null
for ((k = 1; k < ${steps:-0}; k += 2)); do
    LLMC_FAULT="kill@step=$k" "$train" "${epochs[@]}" --out "$work/ek" >"$work/log" 2>&1
    expect "killed at step $k" test $? -eq 137
done
exec 2>&3
run 0 "${epochs[@]}" --out "$work/ek"
last=$(printf 'step_%08d' "${steps:-0}")
expect "same tensors as the uninterrupted run" test "$(tensor_hash "$work/ek/$last")" = "$(tensor_hash "$work/eu/$last")"
done_case

test_case signal_saves_and_exits_75
"$train" --data "$work/text.txt" --out "$work/s" "${small[@]}" --steps 4000 --val-every 0 >"$work/log" 2>&1 &
child=$!
for _ in $(seq 100); do grep -q 'step   *[0-9]*/4000' "$work/log" && break; sleep 0.05; done
kill -TERM $child; wait $child; code=$?
expect "exit 75, got $code" test "$code" -eq 75
expect "says that it saved" says 'stopped by signal 15 after step [0-9]+, saved'
done_case

# A stop during a long validation is heard at once; the resumed run makes up for that validation.
test_case P24_signal_during_validation
for out in v1 v2; do
    long=(--data "$work/text.txt" --out "$work/$out" --layers 2 --channels 64 --heads 2 --seq-len 64 --batch 4 --vocab-size 300 --val-fraction 0.3 --val-every 2 --steps 4)
    if [ $out = v1 ]; then
        LLMC_FAULT=term@batch=1 run 75 "${long[@]}"
        expect "not only after it" test "$(grep -c "step 0: validation" "$work/log")" -eq 0
        expect "stopped in the first validation" test -d "$work/v1/step_00000000"
    fi
    run 0 "${long[@]}"
done
validations() { sed -nE 's/.*"kind":"validation".*("step":.*)/\1/p' "$1/metrics.jsonl"; }
expect "the same three validations" test "$(validations "$work/v1" | wc -l)" -eq 3 -a "$(validations "$work/v1")" = "$(validations "$work/v2")"
expect "same tensors" test "$(tensor_hash "$work/v1/step_00000004")" = "$(tensor_hash "$work/v2/step_00000004")"
done_case

test_case P16_skipped_steps_survive_a_resume
skipping() { run "$1" --data "$work/text.txt" --out "$2" --layers 1 --channels 16 --heads 2 --seq-len 16 --batch 1 --vocab-size 300 --steps 260 \
    --val-every 0 --save-every 20 --lr 0 --skip-loss-z 0.3 --max-skipped 2 --log-every 1; }
skipping 0 "$work/z1"
expect "skipped" says 'update skipped: loss above its window'
expect "applied after two in a row" says 'applied without limits'
LLMC_FAULT=kill@step=151 skipping 137 "$work/z2" 2>/dev/null
LLMC_FAULT=kill@step=207 skipping 137 "$work/z2" 2>/dev/null
skipping 0 "$work/z2"
skips() { sed -nE 's/.*"kind":"step".*"step":([0-9]+),"loss":([^,]*),"loss_z":([^,]*),.*"skipped":(.*)/\1 \2 \3 \4/p' "$1/metrics.jsonl" | sort -nu; }
expect "the same steps are skipped" cmp -s <(skips "$work/z1") <(skips "$work/z2")
expect "never three in a row" awk '{ n = /window/ ? n + 1 : 0; if (n > 2) exit 1 }' <(skips "$work/z1")
done_case

test_case P6_used_directory_is_refused_or_resumed
run 2 --data "$work/text.txt" --out "$work/a" "${small[@]}" --steps 40 --resume never
expect "names the checkpoint" says 'already holds a run'
done_case

test_case P12_changes_are_refused_unless_allowed
run 2 --data "$work/text.txt" --out "$work/a" "${small[@]}" --steps 50
expect "names class and values" says 'steps.*40.*50|schedule'
run 2 --data "$work/text.txt" --out "$work/a" "${small[@]}" --steps 40 --layers 3
expect "another shape is not offered" says 'another shape cannot be continued'
run 2 --data "$work/text.txt" --out "$work/a" "${small[@]}" --steps 40 --seed 5
run 2 --data "$work/text.txt" --out "$work/a" "${small[@]}" --steps 40 --total-batch 256
(cat "$work/text.txt"; echo changed) >"$work/other.txt"
run 2 --data "$work/other.txt" --out "$work/a" "${small[@]}" --steps 40
cp -r "$work/a" "$work/longer"
run 0 --data "$work/text.txt" --out "$work/longer" "${small[@]}" --steps 50 --allow-change schedule
expect "went on to 50" test -d "$work/longer/step_00000050"
run 2 --data "$work/text.txt" --out "$work/longer" "${small[@]}" --steps 60 --allow-change sedule
expect "an unknown class is named" says 'found "sedule"'
run 0 --data "$work/text.txt" --out "$work/longer" "${small[@]}" --steps 51 --seed 5 --allow-change schedule,seed
expect "the new seed is the one in use" grep -q '"seed": "5"' "$work/longer/step_00000051/training_state.json"
run 0 --data "$work/other.txt" --out "$work/longer" "${small[@]}" --steps 52 --seed 5 --allow-change schedule,data
rm -r "$work/longer/data"
run 0 --data "$work/other.txt" --out "$work/longer" "${small[@]}" --steps 53 --seed 5 --allow-change schedule
expect "token files made again with the run's tokenizer" says 'resuming from .*step 52 of 53'
run 2 --data "$work/other.txt" --out "$work/longer" "${small[@]}" --steps 20 --seed 5 --allow-change schedule
expect "a shorter run than what is done" says 'beyond the 20 steps'
done_case

test_case data_that_cannot_be_used
head -c 300 "$work/text.txt" >"$work/short.txt"
: >"$work/empty.txt"
mkdir "$work/folder"; mkfifo "$work/pipe"
run 3 --data "$work/empty.txt" --out "$work/q1" "${small[@]}"
expect "empty" says 'the file is empty'
run 3 --data "$work/folder" --out "$work/q1" "${small[@]}"
expect "folder" says 'found a directory'
run 3 --data "$work/pipe" --out "$work/q1" "${small[@]}"
expect "pipe" says 'found a pipe'
run 3 --data "$work/short.txt" --out "$work/q1" "${small[@]}"
expect "short" says 'validation split of .*too short for one sample'
run 0 --data "$work/text.txt" --out "$work/q1" "${small[@]}" --steps 1
expect "a directory without checkpoints takes other text" test -d "$work/q1/step_00000001"
head -c 8000 /dev/zero | tr '\0' '\377' >"$work/ids.bin" # headerless shard, each id 65535
run 3 --data "$work/ids.bin" --out "$work/q2" "${small[@]}"
expect "the very first batch has a bad id" says 'found token id 65535'
{ head -c 7000 /dev/zero; printf '\377\377%.0s' 1 2 3; head -c 993 /dev/zero; printf '\0'; } >"$work/ids.bin"
run 3 --data "$work/ids.bin" --out "$work/q3" "${small[@]}" --steps 1000 --save-every 0 --log-every 100
expect "what was trained before the bad id is saved" says 'step [0-9]+: saved'
run 3 --data "$work/ids.bin" --out "$work/q5" "${small[@]}" --steps 1000 --save-every 0 --log-every 100 --total-batch 1024
expect "also when the bad id is in a later micro-batch of a step" says 'step [0-9]+: saved'
mkdir "$work/bare"; cp "$work/a/step_00000040/model.safetensors" "$work/a/step_00000040/config.json" "$work/bare"
run 2 --data "$work/text.txt" --out "$work/q4" --init-from "$work/bare" --batch 4
expect "no new tokenizer for old weights" says 'would not fit its weights'
done_case

test_case two_processes_do_not_share_a_run
( flock 9; run 2 --data "$work/text.txt" --out "$work/a" "${small[@]}" --steps 40; says 'in use by another process'; exit $((bad + $?)) ) 9>"$work/a/lock"
expect "refused with a message" test $? -eq 0
done_case

test_case evaluate_and_generate
run 0 --eval-only --init-from "$work/a" --val "$work/text.txt" --batch 3
expect "one line of loss" test "$(grep -cE '^val loss [0-9]+\.[0-9]{6}$' "$work/log")" -eq 1
expect "bits per byte" says '^bits per byte'
loss=$(sed -nE 's/^val loss //p' "$work/log")
run 0 --eval-only --init-from "$work/a/step_00000040" --val "$work/text.txt" --batch 8
expect "independent of the batch" awk "BEGIN { d = $loss - $(sed -nE 's/^val loss //p' "$work/log"); exit !(d < 2e-6 && d > -2e-6) }"
run 0 --generate --init-from "$work/a" --prompt "the cat" --max-tokens 20 --seed 3
cp "$work/log" "$work/one"
expect "continues the prompt" says '^the cat'
run 0 --generate --init-from "$work/a" --prompt "the cat" --max-tokens 20 --seed 3
expect "the same seed writes the same" cmp -s "$work/log" "$work/one"
run 0 --generate --init-from "$work/a" --prompt "the cat" --max-tokens 5 --temperature 0
done_case

test_case token_shards_and_init_from
mkdir "$work/shards"
"$tokenize" encode --tokenizer "$work/a/data/tokenizer" --out "$work/shards/train_0.bin" "$work/text.txt" >"$work/log" 2>&1 || bad=1
"$tokenize" encode --tokenizer "$work/a/data/tokenizer" --out "$work/shards/train_1.bin" "$work/other.txt" >"$work/log" 2>&1 || bad=1
"$tokenize" encode --tokenizer "$work/a/data/tokenizer" --out "$work/shards/val_0.bin" "$work/text.txt" >"$work/log" 2>&1 || bad=1
run 0 --data "$work/shards/train_*.bin" --val "$work/shards/val_*.bin" --out "$work/sh" "${small[@]}" --steps 5
expect "two files" says 'training data.* in 2 files'
run 0 --data "$work/text.txt" --out "$work/i" --init-from "$work/a" --batch 4 --steps 3 --val-every 0 --lr 1e-4
expect "starts where the other ended" awk "BEGIN { exit !($(losses "$work/i" | head -1 | cut -d' ' -f2) < $first - 0.8) }"
done_case

test_case a_tokenizer_without_end_of_text
mkdir "$work/plain"; cp "$work/a/data/tokenizer/merges.txt" "$work/plain"
sed -E 's/, *"<\|endoftext\|>": *[0-9]+//' "$work/a/data/tokenizer/vocab.json" >"$work/plain/vocab.json"
run 0 --data "$work/text.txt" --tokenizer "$work/plain" --out "$work/pl" --layers 2 --channels 32 --heads 2 --seq-len 32 --batch 4 --steps 3 --sample-every 3 --sample-tokens 8
expect "it is said" says 'has no <.endoftext.>'
run 0 --generate --init-from "$work/pl" --max-tokens 5
done_case

test_case P15_nonfinite_stops_with_5_weights_unharmed
run 5 --data "$work/text.txt" --out "$work/n" "${small[@]}" --steps 40 --lr 1e3 --grad-clip 0 --weight-decay 0 --max-nonfinite 2 --eps 1e-20 --beta2 0
expect "says why" says 'steps in a row had a non-finite'
done_case

test_case config_file
printf '# a comment\nlayers = 2\nchannels = 32\nheads = 2\nseq-len = 32\nbatch = 4\nvocab-size = 300\nsteps = 3\nval-every = 0\n' >"$work/c.cfg"
run 0 --config "$work/c.cfg" --data "$work/text.txt" --out "$work/cfg" --steps 2
expect "the command line wins" test -d "$work/cfg/step_00000002"
done_case

test_case trace_and_dry_run
run 0 --data "$work/text.txt" --out "$work/t" "${small[@]}" --steps 3 --val-every 0 --trace "$work/trace.json"
for op in linear_forward attention_backward adamw; do expect "the trace holds $op" grep -q "\"$op\"" "$work/trace.json"; done
memory_of() { grep -E '^  memory .*(weights|gradients|optimizer|activations)$' "$work/log"; }
planned=$(memory_of)
run 0 --dry-run --data "$work/text.txt" "${small[@]}" --steps 3
expect "the plan's memory is the run's" test -n "$planned" -a "$(memory_of)" = "$planned"
run 2 --dry-run --model gpt2 --processes 64 --batch 16 --total-batch 32768
expect "ranks count in the total batch" says '64 processes = 1048576'
run 0 --dry-run --model gpt2-xl --batch 16 --total-batch 1048576 --processes 64 --tokens 32G
expect "parameters" says '1557611200'
expect "FLOPs" says '9817977600'
run 0 --dry-run --model gpt2 --batch 4 --dtype bf16 --steps 10
expect "weights of 2 bytes, float32 master weights" says '237.42 MiB  weights' && expect "master" says '474.85 MiB  master'
done_case

# As many samples at a time as memory holds: here all, so the largest number that divides the step's samples, which are all of them.
test_case batch_auto
run 0 --data "$work/text.txt" --out "$work/auto" "${small[@]}" --batch auto --total-batch 4096 --steps 2 --val-every 0
expect "says what and why" says '^batch: 128 \(the largest that fits and divides'
expect "uses it" says 'micro-batch 128 x 32 tokens, 1 accumulated'
expect "what is left" says 'memory .* free beside them'
expect "kept as it was asked for" grep -q '^batch = auto' "$work/auto/config.txt"
run 0 --eval-only --init-from "$work/auto" --val "$work/auto/data/val.bin" --tokenizer "$work/auto/data/tokenizer" --batch auto
done_case

test_case rounding_is_a_fact_of_the_run
run 0 --data "$work/text.txt" --out "$work/sr" "${small[@]}" --steps 4 --rounding stochastic
run 2 --data "$work/text.txt" --out "$work/sr" "${small[@]}" --steps 4
expect "names it" says 'rounding \(class optimizer\): recorded "stochastic", now "nearest"'
run 0 --data "$work/text.txt" --out "$work/sr" "${small[@]}" --steps 4 --allow-change optimizer
expect "nothing on the CPU about its speed" test "$(grep -c mfu "$work/sr/metrics.jsonl")" -eq 0
done_case

test_case bad_usage_is_one_clear_message
while IFS='|' read -r code pattern args; do
    eval "run $code $args"
    expect "message /$pattern/ for: $args" says "$pattern"
    expect "one line for: $args" test "$(wc -l <"$work/log")" -eq 1
done <<'CASES'
2|--channels|--data x --out y --chanels 5
2|heads|--data "$work/text.txt" --out "$work/zz" --channels 30 --heads 4
2|exclude|--data x --out y --steps 5 --epochs 2
2|from 1 to|--data x --out y --batch 0
2|no training data|--out y
2|no run directory|--data x
2|--init-from|--generate
3|no such file|--data /nonexistent/file --out "$work/zz2"
2|known|--dry-run --model gpt9
2|bf16|--data x --out y --dtype bf16
2|cudnn|--data x --out y --attention cudnn
2|attention hopper|--data x --out y --attention hopper
2|built without CUDA; use|--data x --out y --device cuda
2|or auto|--data x --out y --batch no
2|give a number|--dry-run --batch auto
3|one sample of|--data "$work/a/data/train.bin" --vocab-size 300 --tokenizer "$work/a/data/tokenizer" --out "$work/zz3" --model gpt3-13b --batch auto
CASES
done_case

totals
