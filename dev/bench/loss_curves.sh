#!/usr/bin/env bash
# Trains one model with our program and with PyTorch from the same initial weights on the same batches of real text, PyTorch several times with
# sums in another order (curve_pytorch.py), and compares the loss curves (curve_compare.py says how). Writes FOLDER/curves.tsv, curves.json, curves.svg.
#   dev/bench/loss_curves.sh --out FOLDER [options] [-- OPTIONS OF OURS ALONE]
#     --device cuda|cpu|emu   default cuda; where two defaults stand below, the first is for cuda
#     --seconds N             for everything: as many steps as fit into N; without it, all of --steps
#     --steps S               at most; 2000, 100
#     --runs N                of PyTorch; 3
#     --model OPTIONS         the shape, in options of train_gpt2; "--model 124M", "--layers 3 --channels 48 --heads 3"
#     --seq-len T --batch B --samples G --vocab-size V     G samples a step, B at a time; 1024 32 32 50257, 64 4 8 512
#     --dtype bf16|fp32       bf16; on the CPU fp32, which it has alone
#     --lr X                  6e-4; a tenth of the steps is warm-up, then a cosine to a tenth of it
#     --text FILE             again for more; the .txt files of ../shared/data and shared/data, then PyTorch's own Python files, up to 64 MB, 2 MB
# BUILD: where train_gpt2, tokenize and batches were built; build/cuda, build. PYTHON: a python3 with PyTorch.
# Options after -- make ours another run than PyTorch's, to see whether that is noticed: -- --weight-decay 0.
# Exit: 0 the curves agree, 1 they differ, 2 there is no comparison, 3 no PyTorch for that device.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
die() { echo "loss_curves: $2" >&2; exit "$1"; }
out='' device=cuda seconds='' steps='' runs=3 model='' seq_len='' batch='' samples='' vocab_size='' dtype='' lr=6e-4 texts=() each=''
while [ $# -gt 0 ]; do
    case $1 in
        --out | --device | --seconds | --steps | --runs | --model | --seq-len | --batch | --samples | --vocab-size | --dtype | --lr)
            [ $# -gt 1 ] || die 2 "$1 needs a value"
            name=${1#--}; printf -v "${name//-/_}" %s "$2"; shift 2 ;;
        --text) [ -f "${2:-}" ] || die 2 "--text needs a file"; texts+=("$2"); shift 2 ;;
        -h | --help) sed -n '2,18s/^# //p' "$0"; exit 0 ;;
        --) shift; break ;;
        *) die 2 "unknown option '$1'; --help lists them" ;;
    esac
done
[ "$out" ] || die 2 "--out FOLDER is missing"
default() { local -n variable=$1; variable=${variable:-$2}; }
case $device in
    cuda) build=${BUILD:-build/cuda} most_text=64000000
        default steps 2000; default model "--model 124M"; default seq_len 1024; default batch 32; default samples 32; default vocab_size 50257 ;;
    cpu | emu) build=${BUILD:-build} most_text=2000000
        default steps 100; default model "--layers 3 --channels 48 --heads 3"; default seq_len 64; default batch 4; default samples 8; default vocab_size 512 ;;
    *) die 2 "--device $device: expected cuda, cpu or emu" ;;
esac
if [ "$device" = cpu ]; then default dtype fp32; else default dtype bf16; fi
python=${PYTHON:-python3} torch_device=cpu
if [ "$device" = cuda ]; then torch_device=cuda; fi
# In bf16 PyTorch 1, whose attention is composed of ops, rounds its scores to bf16, which ours and PyTorch 2 do not: a difference that is seen.
torch=$("$python" -c 'import os, sys, torch
assert sys.argv[1] == "cpu" or torch.cuda.is_available()
assert sys.argv[2] == "fp32" or hasattr(torch.nn.functional, "scaled_dot_product_attention")
print(os.path.dirname(torch.__file__))' "$torch_device" "$dtype" 2>/dev/null) || die 3 "no PyTorch for $torch_device and $dtype in $python"
for program in train_gpt2 tokenize batches; do [ -x "$build/$program" ] || die 2 "no $build/$program; make BUILD=$build $build/$program builds it"; done
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
left() { awk -v n="$seconds" -v used=$SECONDS 'BEGIN {print n - used}'; }

# ---- text, tokens
words=()
if [ ${#texts[@]} -gt 0 ]; then words=("${texts[@]##*/}")
else
    for f in ../shared/data/*.txt shared/data/*.txt; do if [ -f "$f" ] && [[ $f != *merges.txt ]]; then texts+=("$f") words+=("${f##*/}"); fi; done
    room=$((most_text - $(cat /dev/null "${texts[@]}" | wc -c)))
    mapfile -t files < <(find "$torch" -name '*.py' -printf '%s %p\n' | LC_ALL=C sort -k 2 | awk -v room=$room '(sum += $1) <= room {sub(/^[0-9]+ /, ""); print}')
    if [ ${#files[@]} -gt 0 ]; then texts+=("${files[@]}") words+=("${#files[@]} Python files of PyTorch"); fi
fi
tokenizer=$work/tokenizer
for folder in ../shared/data shared/data; do
    if [ "$vocab_size" -ge 50257 ] && [ -f $folder/gpt2_merges.txt ] && [ ! -d "$tokenizer" ]; then
        mkdir "$tokenizer"; cp $folder/gpt2_vocab.json "$tokenizer/vocab.json"; cp $folder/gpt2_merges.txt "$tokenizer/merges.txt"
    fi
done
[ -d "$tokenizer" ] || "$build/tokenize" train --quiet --vocab-size "$((vocab_size < 16384 ? vocab_size : 16384))" --out "$tokenizer" "${texts[@]}"
"$build/tokenize" encode --quiet --tokenizer "$tokenizer" --out "$work/text.bin" "${texts[@]}"

# ---- initial weights, by steps that change nothing; their speed says how many fit
shared=(--device "$device" --dtype "$dtype" --data "$work/text.bin" --seq-len "$seq_len" --batch "$batch" --total-batch $((samples * seq_len)) --val-every 0 --save-every 0 --plan-file "$work/plans")
read -ra shape <<<"$model"
ours() { # what for, options: a run in $work/WHAT
    local status=0
    "$build/train_gpt2" "${shared[@]}" --out "$work/$1" "${@:2}" >"$work/$1.log" 2>&1 || status=$?
    [ "$status" -eq 0 ] || [ "$status" -eq 5 ] || { tail -n 20 "$work/$1.log" >&2; die 2 "train_gpt2 ended with $status"; } # 5: non-finite, which the curve shows
}
ours initial "${shape[@]}" --vocab-size "$vocab_size" --steps 10 --lr 0
if [ "$seconds" ]; then # PyTorch is taken to be half as slow again; a run of it that is slower yet ends before
    each=$(sed -nE 's/.*"kind":"step".*"ms":([0-9.e+-]+),.*/\1/p' "$work/initial/metrics.jsonl" | tail -n 5 | sort -n | sed -n 3p)
    steps=$(awk -v left="$(left)" -v ms="$each" -v runs="$runs" -v most="$steps" 'BEGIN {n = int(0.85 * left / (ms / 1000 * (1 + 1.5 * runs))); print n < most ? n : most}')
fi
[ "$steps" -ge 40 ] || die 2 "$steps steps${each:+ at $each ms each} are too few to compare; the least is 40"

# ---- both, and the comparison
schedule=(--steps "$steps" --lr "$lr" --warmup $((steps / 10)))
ours run --init-from "$work/initial" --final-lr 0.1 "${schedule[@]}" "$@"
sed -nE 's/.*"kind":"step".*"step":([0-9]+),"loss":([^,]*),.*"norm":([^,]*),.*/\1\t\2\t\3/p' "$work/run/metrics.jsonl" >"$work/ours.tsv"
"$build/batches" --data "$work/text.bin" --seq-len "$seq_len" --samples "$samples" --steps "$steps" --vocab-size "$vocab_size" --out "$work/batches" | tee "$work/epochs"
limit=()
if [ "$seconds" ]; then limit=(--seconds "$(awk -v left="$(left)" -v runs="$runs" 'BEGIN {print 0.95 * left / runs}')"); fi
"$python" dev/bench/curve_pytorch.py --init "$work"/initial/step_* --batches "$work/batches" --samples "$samples" --batch "$batch" --seq-len "$seq_len" "${schedule[@]}" --final-lr 0.1 \
    --device "$torch_device" --dtype "$dtype" --runs "$runs" --threads "${OMP_NUM_THREADS:-0}" --out "$work/pytorch" "${limit[@]}" | tee "$work/pytorch.log" || die 2 "PyTorch's runs failed"
curves=()
for ((k = 0; k < runs; k++)); do curves+=("$work/pytorch-$k.tsv"); done
"$python" dev/bench/curve_compare.py --out "$out" --title "$model, $dtype, $samples x $seq_len tokens a step of $steps, $device; $(sed -n 's/^curve_pytorch: \([^,]*\),.*/\1/p' "$work/pytorch.log"); $(IFS=,; echo "${words[*]}")" \
    "$work/ours.tsv" "${curves[@]}"
