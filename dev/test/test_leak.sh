#!/usr/bin/env bash
# The true entropy catches a leak: a model that was trained on the validation text itself ends below the floor and is called a leak;
# the same model, trained as long on other stories, stays above it. Both are real training runs, of about 10 CPU seconds each.
set -u
cd "$(dirname "$0")/../.." || exit 1
bin=$(realpath "${LLMC_TEST_BUILD:-build/test}")
for program in stories train_gpt2; do
    [ -x "$bin/$program" ] || { echo "FAILED $bin/$program is not built"; echo "0 passed, 1 failed, 0 skipped"; exit 1; }
done
dir=$(mktemp -d) || exit 1
trap 'rm -rf "$dir"' EXIT
passed=0 failed=0
result() { # name, 0 when good, file to show when not
    if [ "$2" -eq 0 ]; then passed=$((passed + 1)); echo "ok $1"; else failed=$((failed + 1)); echo "FAILED $1"; cat "$3"; fi
}

"$bin/stories" --stories 60 --seed 1 --out "$dir/other.txt" 2>/dev/null
"$bin/stories" --stories 12 --seed 2 --out "$dir/val.txt" 2>/dev/null

# Trains on $1, prints the verdict on val.txt; exit status of the verdict.
train_and_judge() {
    local out=$dir/$2 tokens loss
    "$bin/train_gpt2" --data "$1" --val "$dir/val.txt" --vocab-size 512 --out "$out" --layers 2 --channels 64 --heads 2 --seq-len 128 \
        --batch 4 --steps 400 --lr 5e-3 --warmup 20 --weight-decay 0 --val-every 0 --save-every 0 --log-every 100 --seed 3 || return 99
    tokens=$((($(stat -c %s "$out/data/val.bin") - 1024) / 2))
    loss=$("$bin/train_gpt2" --eval-only --init-from "$out" --val "$out/data/val.bin" | sed -n 's/^val loss \([0-9.]*\)$/\1/p')
    "$bin/stories" --score "$dir/val.txt" --tokens "$tokens" --val-loss "$loss"
}

train_and_judge "$dir/val.txt" leaky >"$dir/leaky.log" 2>&1; status=$?
[ "$status" -eq 3 ] && grep -q "LEAK" "$dir/leaky.log"; result validation_text_in_training_is_called_a_leak $? "$dir/leaky.log"
train_and_judge "$dir/other.txt" honest >"$dir/honest.log" 2>&1; status=$?
[ "$status" -eq 0 ] && grep -q "above the floor" "$dir/honest.log"; result other_stories_are_no_leak $? "$dir/honest.log"

echo "$passed passed, $failed failed, 0 skipped"
[ "$failed" -eq 0 ]
