#!/usr/bin/env bash
# Trains a GPT-2 or GPT-3 from nothing by the recipe of its size: pretrain.sh MODEL [train_gpt2 options], where an option given here wins over
# the recipe's. MODEL is gpt2_124M, gpt2_350M, gpt2_774M, gpt2_1558M or gpt3_125M. One process; with --gpus 8, eight. Under mpirun, srun or
# torchrun it is one rank of the run. Stopped at any moment, the same command continues. Exit codes are train_gpt2's: 75 says "run again".
# LLMC_TRAIN names the program, else it is ./train_gpt2cu where that is built, else ./train_gpt2.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
local_rank=${LOCAL_RANK:-${OMPI_COMM_WORLD_LOCAL_RANK:-${SLURM_LOCALID:-0}}}
stop() { # CODE LINE...: said once on each machine
    local code=$1; shift
    [ "$local_rank" != 0 ] || printf '%s\n' "$@" >&2
    exit "$code"
}

# All: AdamW 0.9, 0.95, 1e-8, decay 0.1, clip 1, 700 steps of warm-up, cosine. batch: micro-batch of a GPU of 80 GB; save: steps between checkpoints.
#           model         batch  T     tokens a step  lr      final  steps   save  training and validation shards in dev/data
recipes='
gpt2_124M   gpt2          64     1024  524288         6e-4    0      18865   500   fineweb10B/fineweb
gpt2_350M   gpt2-medium   64     1024  524288         3e-4    0      60000   250   edu_fineweb100B/edu_fineweb
gpt2_774M   gpt2-large    32     1024  524288         2.5e-4  0      286102  250   edu_fineweb100B/edu_fineweb
gpt2_1558M  gpt2-xl       16     1024  1048576        6e-4    0.1    32000   100   edu_fineweb100B/edu_fineweb
gpt3_125M   gpt3-125m     32     2048  524288         6e-4    0.1    572204  500   edu_fineweb100B/edu_fineweb'

name=${1:-}
recipe=$(awk -v name="$name" '$1 == name' <<<"$recipes")
if [ -z "$recipe" ]; then
    stop 2 "pretrain: found MODEL \"$name\", expected one of:$(awk 'NF {printf " %s", $1}' <<<"$recipes")" "usage: pretrain.sh MODEL [train_gpt2 options]"
fi
shift
read -r _ model batch T total_batch lr final_lr steps save_every shards <<<"$recipe"

given() { # NAME [ARGUMENT...]: the option is among them; its last value is in $value
    local name=$1 before="" found=1; shift
    for argument; do
        case $argument in
            "--$name") found=0 ;;
            "--$name="*) found=0 value=${argument#*=} ;;
            *) [ "$before" != "--$name" ] || value=$argument ;;
        esac
        before=$argument
    done
    return $found
}

train=${LLMC_TRAIN:-./train_gpt2cu}
[ -n "${LLMC_TRAIN:-}" ] || [ -x "$train" ] || train=./train_gpt2
command -v "$train" >/dev/null || stop 2 "pretrain: $train is not there; build it: make train_gpt2cu (with a GPU and the CUDA toolkit), or make train_gpt2"
[[ $train == *cu ]] || batch=4   # a CPU has no use for more
value=$batch
given batch "$@" || true
[[ $value == auto ]] || batch=$value

data=()
if ! given dry-run "$@" && ! given help "$@"; then
    data=(--out "runs/$name" --save-every "$save_every")
    if ! given data "$@"; then
        data+=(--data "dev/data/${shards}_train_*.bin" --val "dev/data/${shards}_val_*.bin")
        case $shards in
            fineweb10B/*) source="kjj0/fineweb10B-gpt2 (103 files of 100M tokens and one for validation, 21 GB)" ;;
            *) source="karpathy/fineweb-edu-100B-gpt2-token-shards (100B tokens, 200 GB)" ;;
        esac
        if ! compgen -G "dev/data/${shards}_train_*.bin" >/dev/null || ! compgen -G "dev/data/${shards}_val_*.bin" >/dev/null; then stop 3 \
            "pretrain: no token shards: found no dev/data/${shards}_train_*.bin, or no dev/data/${shards}_val_*.bin. Nothing is downloaded by itself:" \
            "  - ready-made ones are on the Hugging Face hub, dataset $source: put them, or a link, into dev/data/${shards%/*}" \
            "  - or make some of your own text: ./tokenize encode --tokenizer DIR --out train.bin corpus.txt" \
            "  - and say where others are: --data 'path/train_*.bin' --val 'path/val_*.bin'"
        fi
    fi
fi

# Validation is on the first 10,485,760 tokens, as in the runs that these recipes come from.
[[ $batch =~ ^[1-9][0-9]*$ ]] || stop 2 "pretrain: --batch: found \"$batch\", expected a number or auto"
val_batches=$((10485760 / (batch * T)))
exec "$train" --model "$model" --batch "$batch" --total-batch "$total_batch" --steps "$steps" --lr "$lr" --final-lr "$final_lr" --lr-schedule cosine --warmup 700 \
    --beta1 0.9 --beta2 0.95 --eps 1e-8 --weight-decay 0.1 --grad-clip 1 --val-every 250 --val-batches $((val_batches > 0 ? val_batches : 1)) ${data[@]+"${data[@]}"} "$@"
