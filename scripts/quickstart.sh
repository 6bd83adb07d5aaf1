#!/usr/bin/env bash
# From nothing to a small GPT-2 that tells stories, in about two minutes of training on two cores, or on a GPU. Run again, it continues where it
# was stopped. Everything is kept in runs/quickstart. Further arguments go to train_gpt2 and win over those below
# (--steps 3000, --layers 6, ...; with another shape or schedule also --out DIR, because a run does not change these midway).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

run=runs/quickstart
text=$run/text
out=$run/model

say() { printf '\n== %s\n' "$*"; }

fresh=0
arguments=()
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) sed -n '2,4s/^# //p' scripts/quickstart.sh; echo "usage: quickstart.sh [--fresh] [train_gpt2 options]   (--fresh: forget the former run)"; exit 0 ;;
        --fresh) fresh=1 ;;
        --out=*) out=${1#--out=} ;;
        --out) [ $# -gt 1 ] || { echo "quickstart: --out needs a directory" >&2; exit 2; }; out=$2; shift ;;
        *) arguments+=("$1") ;;
    esac
    shift
done
[ "$fresh" -eq 0 ] || rm -rf "$run"

say "1. What is needed to build"
./scripts/install_deps.sh

say "2. Building"
mkdir -p "$run"
make --no-print-directory summary
if ! make --no-print-directory -j"$(nproc)" all >"$run/build.log" 2>&1; then
    tail -n 30 "$run/build.log" >&2
    echo "quickstart: the build failed; all of its output is in $run/build.log" >&2
    exit 1
fi
# On the GPU where there is one and the CUDA toolkit to build for it; else, and when that build fails, on the CPU.
train_gpt2=./train_gpt2
if [ -z "$(nvidia-smi -L 2>/dev/null | grep '^GPU' || true)" ]; then echo "no NVIDIA GPU here: training on the CPU"
elif missing=$(bash scripts/find_cuda.sh | sed -n 's/^CUDA_MISSING := //p') && [ -n "$missing" ]; then echo "there is a GPU, but training on the CPU: $missing"
elif make --no-print-directory train_gpt2cu >>"$run/build.log" 2>&1; then train_gpt2=./train_gpt2cu
else echo "there is a GPU, but the CUDA build failed (its output is in $run/build.log): training on the CPU"
fi

say "3. The training text: stories from a grammar, so that their true entropy is known"
mkdir -p "$text"
# The report is written last: where it is, the texts are whole.
[ -f "$text/report.json" ] || ./stories --bytes 10M --seed 1 --out "$text/train.txt" --val-out "$text/val.txt" --val-bytes 200k --report "$text/report.json"
if ! ./stories --score "$text/val.txt"; then
    echo "quickstart: $text was written by another version of this program; run again with --fresh to start over" >&2
    exit 1
fi
echo "one of them:"
head -n 1 "$text/train.txt" | fold -s -w 100

say "4. A tokenizer, and a GPT-2 (further runs of this script continue here)"
train=("$train_gpt2" --data "$text/train.txt" --val "$text/val.txt" --vocab-size 1024 --out "$out"
    --layers 3 --channels 128 --heads 4 --seq-len 192 --batch 4 --steps 2400 --lr 4e-3 --beta2 0.98 --warmup 150 --final-lr 0.05
    --val-every 600 --val-batches 20 --sample-every 300 --sample-tokens 100 --save-every 300 --log-every 20 ${arguments[@]+"${arguments[@]}"})
echo "+ ${train[*]}"
"${train[@]}"

say "5. What it learned"
for seed in 1 2 3; do
    "$train_gpt2" --generate --init-from "$out" --max-tokens 320 --seed "$seed" | fold -s -w 100
    echo
done
val_tokens=$((($(stat -c %s "$out/data/val.bin") - 1024) / 2))
val_loss=$("$train_gpt2" --eval-only --init-from "$out" --val "$out/data/val.bin" | sed -n 's/^val loss \([0-9.]*\)$/\1/p')
if [ -z "$val_loss" ]; then
    echo "quickstart: train_gpt2 --eval-only printed no loss" >&2
    exit 1
fi
./stories --score "$text/val.txt" --tokens "$val_tokens" --val-loss "$val_loss"
echo
echo "Run this script again to see this again; the model is in $out (a Hugging Face directory per step_*)."
