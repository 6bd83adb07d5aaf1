#!/usr/bin/env bash
# Training steps of ours and of PyTorch eager, turn by turn on one machine, so that its other load hits both alike. Prints each
# turn, the medians, and the ratio of each turn with its spread.
#   dev/bench/compare_step.sh [--turns 7] [--threads 2] [--batch 4] [--seq-len 64] [--cpu-time 0]      (gpt2 124M)
# BUILD: where bench_step was built (default build; `make build/bench_step`). PYTHON: a python3 with PyTorch.
# --cpu-time 1 compares processor time instead of elapsed time: for a machine with other load, with --threads 1 (waiting threads spin).
# PEER: a further command that prints its steps as "took X ms"; it runs once a turn, its first step is left out.
set -euo pipefail
cd "$(dirname "$0")/../.."
turns=7 threads=2 batch=4 seq=64 cpu=0
while [ $# -gt 0 ]; do
    case $1 in
    --turns) turns=$2 ;; --threads) threads=$2 ;; --batch) batch=$2 ;; --seq-len) seq=$2 ;; --cpu-time) cpu=$2 ;;
    *) echo "unknown option $1; known are --turns --threads --batch --seq-len --cpu-time" >&2; exit 2 ;;
    esac
    shift 2
done
dir=$(mktemp -d)
trap 'exec 3>&- 4>&- 5<&- 6<&-; wait; rm -rf "$dir"' EXIT
mkfifo "$dir"/{ours,torch}.{in,out}
OMP_NUM_THREADS=$threads "${BUILD:-build}/bench_step" --model gpt2 --batch "$batch" --seq-len "$seq" --wait <"$dir/ours.in" >"$dir/ours.out" &
"${PYTHON:-python3}" dev/bench/peer_pytorch.py --model gpt2 --batch "$batch" --seq-len "$seq" --threads "$threads" --wait <"$dir/torch.in" >"$dir/torch.out" &
exec 3>"$dir/ours.in" 5<"$dir/ours.out" 4>"$dir/torch.in" 6<"$dir/torch.out"
until_ready() { while IFS= read -r line <&"$1"; do [ "$line" = ready ] && return; echo "$line"; done; echo "it ended before its first step" >&2; exit 1; }
until_ready 5; until_ready 6
step() { echo >&"$1"; read -r _ wall used <&"$2"; if [ "$cpu" = 1 ]; then echo "$used"; else echo "$wall"; fi; }
for ((i = 1; i <= turns; i++)); do
    a=$(step 3 5) b=$(step 4 6) c=
    [ -n "${PEER:-}" ] && c=$(OMP_NUM_THREADS=$threads bash -c "$PEER" | sed -n 's/.*took \([0-9.]*\) ms.*/\1/p' | tail -n +2 | sort -n | awk '{v[NR] = $1} END {print v[int((NR + 1) / 2)]}')
    echo "turn $i: ours $a ms, PyTorch $b ms${c:+, peer $c ms}"
    echo "$a $b $c" >>"$dir/times"
done
summary() { # column, name
    awk -v k="$1" '$k {print $1, $k, $k / $1}' "$dir/times" | sort -n -k3 | awk -v name="$2" '
        function median(v, n,    i, j, x) { for (i = 2; i <= n; i++) for (j = i; j > 1 && v[j-1] > v[j]; j--) { x = v[j]; v[j] = v[j-1]; v[j-1] = x }; return v[int((n + 1) / 2)] }
        {a[NR] = $1; b[NR] = $2; r[NR] = $3} END {if (NR) printf "%s / ours: median %.2f (%.2f to %.2f over %d turns); medians %.0f ms and %.0f ms\n", name, r[int((NR + 1) / 2)], r[1], r[NR], NR, median(b, NR), median(a, NR)}'
}
summary 2 PyTorch
summary 3 peer
