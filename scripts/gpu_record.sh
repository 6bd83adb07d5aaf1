#!/usr/bin/env bash
# One command on a machine with an NVIDIA GPU, under nine minutes: builds, tests, checks memory, measures ceilings, ops and whole steps, and writes
# a record: dev/bench/records/GPU-DATE/record.json and README.md. A figure without its record does not exist.
#   scripts/gpu_record.sh [--out FOLDER] [--seconds N] [--only PART[,PART...]] [--peer NAME COMMAND]...
# FOLDER: instead of dev/bench/records/GPU-DATE; N: the time for all of it, default 530; a peer is measured in the same run: what its command prints as
# "step: ..." stands beside our steps, as dev/bench/peer_pytorch.py --device cuda prints it.
# --only: the build and these parts, into dev/bench/records/GPU-DATE-PARTS; what a part would wait for a test of is then taken to be right. The part
# curves (PyTorch's loss curve against ours, dev/bench/loss_curves.sh) then gets all the time that is left, else two minutes.
# LLMC_COMMIT: what to call the sources where this is no git checkout.
# LLMC_RECORD_DEVICE=emu: the same on the emulator with tiny shapes, to test this script; its figures mean nothing.
# Exit: 0 all parts done, 1 a part failed (the record says which; there is none where programs do not build), 2 usage, 3 no GPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
device=${LLMC_RECORD_DEVICE:-cuda} out='' budget=530 peers=() only=''
known=$(sed -nE 's/^ *(if .*)?part ([a-zA-Z0-9-]+) [0-9$].*/\2/p' scripts/gpu_record.sh | sort -u | tr '\n' ' ') # the parts that stand below
while [ $# -gt 0 ]; do
    case $1 in
        --out) out=${2:?--out needs a folder}; shift 2 ;;
        --seconds) budget=${2:?--seconds needs a number}; shift 2 ;;
        --peer)
            if [ $# -lt 3 ] || ! [[ $2 =~ ^[A-Za-z0-9.-]+$ ]]; then echo "gpu_record: --peer needs a name (letters, digits, dots, dashes) and a command" >&2; exit 2; fi
            peers+=("$2" "$3"); shift 3 ;;
        --only) only=${2:?--only needs the names of parts}; shift 2 ;;
        -h | --help) sed -n '2,12s/^# //p' "$0"; echo "parts: $known"; exit 0 ;;
        *) echo "gpu_record: unknown option '$1'" >&2; exit 2 ;;
    esac
done
for ((p = 0; p < ${#peers[@]}; p += 2)); do known+="peer-${peers[p]} "; done
for name in ${only//,/ }; do [[ " $known" == *" $name "* ]] || { echo "gpu_record: no part '$name'; there are $known" >&2; exit 2; }; done
started=$SECONDS today=$(date -u +%Y-%m-%d)
work=$(mktemp -d)
sampler=
trap '[ -z "$sampler" ] || kill "$sampler" 2>/dev/null || true; rm -rf "$work"' EXIT

json() { local s=${1//\\/\\\\}; s=${s//\"/\\\"}; printf '"%s"' "${s//$'\n'/ }"; }

# ---- the machine
ask() { nvidia-smi --query-gpu="$1" --format=csv,noheader -i 0 2>/dev/null | head -n 1 || true; }
if [ "$device" = cuda ]; then
    gpu=$(nvidia-smi -L 2>/dev/null | grep '^GPU' || true) # without a GPU the query below is answered in words
    [ -z "$gpu" ] || gpu=$(ask name)
    [ -n "$gpu" ] || { echo "gpu_record: no GPU here (nvidia-smi names none)" >&2; exit 3; }
    build=build/cuda
else
    gpu="emulated GPU"
    build=${LLMC_TEST_BUILD:-build/test}
fi
short=$(echo "${gpu#NVIDIA }" | tr 'A-Z ' 'a-z-' | tr -cd 'a-z0-9-')
out=${out:-dev/bench/records/$short-$today${only:+-${only//,/-}}}
commit=${LLMC_COMMIT:-$(git describe --always --dirty 2>/dev/null || echo unversioned)}
facts() {
    printf 'GPU|%s\n' "$gpu"
    if [ "$device" = cuda ]; then
        printf 'driver|%s\nmemory|%s\npower limit|%s\nhighest SM clock|%s\nhighest memory clock|%s\nECC errors, uncorrected|%s\n' "$(ask driver_version)" \
            "$(ask memory.total)" "$(ask power.limit)" "$(ask clocks.max.sm)" "$(ask clocks.max.memory)" "$(ask ecc.errors.uncorrected.volatile.total)"
        bash scripts/find_cuda.sh | sed -n 's/^CUDA_FOUND := /built with|/p'
    fi
    printf 'processor|%s, %s threads\nkernel|%s\ncommit|%s\ndate|%s\n' "$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1)" "$(nproc)" "$(uname -sr)" "$commit" \
        "$(date -u '+%Y-%m-%d %H:%M UTC')"
}
facts >"$work/facts"

# ---- parts: each has a time limit, none stops the others
failed=0
: >"$work/parts"
part() { # name, seconds at most, command...
    local name=$1 limit=$2 left=$((budget - SECONDS + started)) begin=$SECONDS status=0 note; shift 2
    [ -z "$only" ] || [ "$name" = build ] || [[ ,$only, == *,$name,* ]] || return 0
    [ "$limit" -le "$left" ] || limit=$left
    echo "== $name"
    if [ "$limit" -lt 5 ]; then status=124 note="left out: no time"; : >"$work/$name.log"
    else
        timeout -k 5 "$limit" "$@" >"$work/$name.log" 2>&1 || status=$?
        note=$(grep -E '^[0-9]+ passed, [0-9]+ failed|^step: |^ranks: |^curves: |ERROR SUMMARY' "$work/$name.log" | tail -n 1 || true)
        [ "$status" -ne 124 ] || note="stopped after $limit s"
    fi
    if [ "$status" -ne 0 ]; then failed=$((failed + 1)); tail -n 25 "$work/$name.log"; fi
    echo "== $name: status $status, $((SECONDS - begin)) s${note:+; $note}"
    printf '%s|%s|%s|%s\n' "$name" "$status" "$((SECONDS - begin))" "$note" >>"$work/parts"
    return "$status"
}

# A benchmark whose figures of cuDNN are cuDNN's: where it declines a shape ours takes its place, and says so.
with_cudnn() {
    "$@" 2>&1 | tee "$work/bench"
    local status=${PIPESTATUS[0]}
    if [ "$status" -eq 0 ] && grep -q 'cuDNN does not take' "$work/bench"; then echo "cuDNN did not compute what is measured as its"; return 1; fi
    return "$status"
}
# A whole step of a model: the first batch and recomputation that fit.
step() { # name, model options, attention, then BATCH:RECOMPUTE...
    local name=$1 options=$2 attention=$3 try status; shift 3
    for try in "$@"; do
        status=0
        # shellcheck disable=SC2086
        with_cudnn "$build/bench_step" --device "$device" $options --batch "${try%:*}" --recompute "${try#*:}" --attention "$attention" --plan-file "$work/plans" \
            --json "$work/step-$name.json" || status=$?
        # Steps were measured, their kernels could not be traced: the figure stands, and the record says why it has no kernels.
        if [ "$status" -eq 9 ] && grep -q 'by kernel: not traced' "$work/bench"; then status=0; fi
        [ "$status" -ne 1 ] || rm -f "$work/step-$name.json"
        [ "$status" -eq 3 ] || return "$status"
    done
    return "$status"
}
# A test program that must not have left the GPU out.
gpu_tests() {
    "$@" | tee "$work/tests" || return
    if grep -E '^skipped cuda|^0 passed' "$work/tests"; then echo "the tests of the GPU did not run"; return 1; fi
}
memcheck() {
    local filter sanitizer
    sanitizer=$(bash dev/test/sanitize.sh --find) || { echo "no compute-sanitizer here"; return 1; }
    for filter in "$@"; do gpu_tests "$sanitizer" --tool memcheck --error-exitcode 1 "$build/test_device_ops" "$filter" || return 1; done
}
# Loss curves of ours and of PyTorch, where there is one.
curves() { # options
    local status=0
    BUILD=$build dev/bench/loss_curves.sh --device "$device" --out "$work" "$@" || status=$?
    [ "$status" -ne 3 ] || { echo "curves: left out, no PyTorch for this device"; return 0; }
    return "$status"
}
peers() { for ((p = 0; p < ${#peers[@]}; p += 2)); do part "peer-${peers[p]}" 120 bash -c "${peers[p + 1]}" || true; done; }
# With the time of each kernel, where the build has CUPTI: options ending in $(kernels).
kernels() { if grep -q LLMC_CUPTI_LIBRARY "$build/flags"; then echo --kernels; fi; }
export -f with_cudnn step gpu_tests memcheck curves kernels
export build device work

if [ "$device" = cuda ]; then
    part build 240 env -u MAKEFLAGS make cuda-programs || { echo "gpu_record: without programs nothing can be measured; scripts/install_deps.sh installs what a build needs" >&2; exit 1; } # on all cores, whatever make called this
    reasons=clocks_event_reasons.active # its name from driver 535 on
    nvidia-smi --query-gpu=$reasons --format=csv -i 0 >/dev/null 2>&1 || reasons=clocks_throttle_reasons.active
    (trap - EXIT; exec nvidia-smi --query-gpu=clocks.sm,clocks.mem,power.draw,temperature.gpu,$reasons --format=csv,noheader,nounits -i 0 -l 1) >"$work/samples" 2>/dev/null &
    sampler=$!
    part test-model 100 bash -o pipefail -c "gpu_tests $build/test_gpt2" || true
    part test-ops 60 bash -o pipefail -c "LLMC_TEST_HOPPER=0 gpu_tests $build/test_device_ops && gpu_tests $build/test_device_step" || true
    part test-contract 60 bash -o pipefail -c "gpu_tests $build/test_contract" || true
    part test-nccl 40 bash -o pipefail -c "gpu_tests $build/test_nccl" || true
    part ranks 60 bash dev/test/gpu_ranks.sh "$build/train_gpt2" || true
    cudnn='' # whose figure is worth something where it computes what ours does
    if part test-cudnn 60 bash -o pipefail -c "gpu_tests $build/test_device_ops cudnn"; then cudnn=1; fi
    hopper='' own='' attention=ours all='--early-launch 1' # what is for Hopper alone, and not the default, is measured where it can run and is right
    if [ "$(ask compute_cap)" = 9.0 ]; then
        part test-instructions 40 bash -o pipefail -c "gpu_tests $build/test_emu_hopper" || true # first each instruction alone, in whole numbers
        if part test-hopper 60 bash -o pipefail -c "gpu_tests $build/test_device_ops hopper"; then hopper=--hopper attention=hopper; fi
        if part test-own-products 60 bash -o pipefail -c "gpu_tests $build/test_device_ops 'own products'"; then own=1 all+=' --own-products on'; fi
    fi
    part ops-124M 90 bash -c "with_cudnn $build/bench_ops --device cuda $hopper --shape 124M --seconds 0.1 --plan-file $work/plans --json $work/ops-124M.json" || true
    part step-124M 60 bash -c 'step 124M "--model 124M --seq-len 1024 --steps 20 $(kernels)" ours 64:none 32:none 16:gelu 4:block' || true
    if [ -n "$cudnn" ]; then part step-124M-cudnn 60 bash -c 'step 124M-cudnn "--model 124M --seq-len 1024 --steps 20" cudnn 64:none 32:none 16:gelu' || true; fi
    if [ -n "$hopper" ]; then part step-124M-hopper 45 bash -c 'step 124M-hopper "--model 124M --seq-len 1024 --steps 20 $(kernels)" hopper 64:none 32:none 16:gelu' || true; fi
    if [ -n "$own" ]; then part own-products 100 bash -c "$build/bench_ops --device cuda --shape 124M --own-products --print-plans --seconds 0.05 --plan-file $work/plans-own" || true; fi
    part step-124M-early 45 bash -c 'step 124M-early "--model 124M --seq-len 1024 --steps 20 --early-launch 1 $(kernels)" ours 64:none 32:none' || true
    # All of it at once, in steps of half a million tokens as runs have them: what the goals are measured by.
    part step-124M-all 75 bash -c "step 124M-all '--model 124M --seq-len 1024 --micro-batches 8 --steps 5 $all $(kernels)' $attention 64:none 32:none" || true
    peers
    part step-1558M 90 bash -c 'step 1558M "--model 1558M --seq-len 1024 --steps 8" ours 16:none 16:gelu 8:gelu 4:block' || true
    part step-1558M-all 90 bash -c "step 1558M-all '--model 1558M --seq-len 1024 --micro-batches 8 --steps 3 $all' $attention 16:none 16:gelu 8:gelu" || true
    part ops-1558M 90 bash -c "with_cudnn $build/bench_ops --device cuda $hopper --shape 1558M --seconds 0.1 --plan-file $work/plans --json $work/ops-1558M.json" || true
    part memcheck 60 bash -o pipefail -c 'memcheck "bf16 attention_forward" "bf16 attention_backward" "bf16 add_norm_backward" "bf16 head_loss" "bf16 adamw"' || true
    seconds=$((budget - SECONDS + started - 10))
    [ "$only" ] || [ $seconds -lt 120 ] || seconds=120
    part curves $((seconds < 60 ? 0 : seconds + 10)) bash -c "curves --seconds $seconds" || true
    kill "$sampler" 2>/dev/null || true
    sampler=
else
    part build 300 make BUILD="$build" FAULT=1 EMU=1 "$build/test_device_ops" "$build/train_gpt2" "$build/bench_ops" "$build/bench_step" "$build/tokenize" "$build/batches" || true
    part test-ops 60 "$build/test_device_ops" "bf16 gelu" || true
    part ranks 60 bash dev/test/gpu_ranks.sh "$build/train_gpt2" emu || true
    part ops-tiny 60 "$build/bench_ops" --device "$device" --hopper --shape tiny --seconds 0.01 --json "$work/ops-tiny.json" || true
    part step-tiny 60 bash -c 'step tiny "--layers 2 --channels 64 --heads 2 --vocab-size 130 --seq-len 24 --steps 3 $(kernels)" ours 2:none' || true
    peers
    part curves 300 bash -c 'curves --steps 40 --runs 2 --model "--layers 1 --channels 32 --heads 2" --samples 4' || true
fi
for name in ${only//,/ }; do grep -q "^$name|" "$work/parts" || printf '%s|0|0|left out: not for this device\n' "$name" >>"$work/parts"; done

# ---- the record
# Lowest, middle and highest of each sampled figure, second by second through the measurements.
spread() { # column
    if [ -s "$work/samples" ]; then cut -d, -f"$1" "$work/samples" | sort -n | awk '{v[NR] = $1 + 0} END {printf "%g to %g, median %g", v[1], v[NR], v[int((NR + 1) / 2)]}'
    else echo "not sampled"; fi
}
# Which of NVML's bits were ever set but idle (1): clocks held below what the work would get.
throttling() {
    if [ -s "$work/samples" ]; then cut -d, -f5 "$work/samples" | tr -d ' ' | sort | uniq -c | awk '$2 !~ /^0x0*[01]$/ {printf "%s%s in %d of the seconds", n++ ? ", " : "", $2, $1} END {if (!n) printf "none"}'
    else echo "not sampled"; fi
}
mkdir -p "$out"
rm -f "$out"/curves.*
for f in "$work"/curves.{json,tsv,svg}; do [ ! -f "$f" ] || cp "$f" "$out/"; done
{
    printf '{"format": 1, "device": %s, "backend": %s, "commit": %s, "date": %s, "seconds": %d, "parts_failed": %d, "only": %s,\n"machine": {' "$(json "$gpu")" "$(json "$device")" "$(json "$commit")" \
        "$(json "$today")" $((SECONDS - started)) "$failed" "$(if [ "$only" ]; then json "$only"; else echo null; fi)"
    while IFS='|' read -r key value; do printf '%s: %s, ' "$(json "$key")" "$(json "$value")"; done <"$work/facts"
    printf '"SM MHz": %s, "memory MHz": %s, "watts": %s, "celsius": %s, "throttling": %s},\n"parts": [' "$(json "$(spread 1)")" "$(json "$(spread 2)")" "$(json "$(spread 3)")" "$(json "$(spread 4)")" \
        "$(json "$(throttling)")"
    comma=
    while IFS='|' read -r name status seconds note; do
        printf '%s\n  {"part": %s, "status": %d, "seconds": %d, "note": %s}' "$comma" "$(json "$name")" "$status" "$seconds" "$(json "$note")"; comma=,
    done <"$work/parts"
    for kind in steps ops; do
        printf '],\n"%s": [' "$kind"
        comma=
        for f in "$work/${kind%s}"*-*.json; do
            [ "$(tail -n 1 "$f" 2>/dev/null)" = ']}' ] || continue # a part that was stopped
            printf '%s\n' "$comma"; cat "$f"; comma=,
        done
    done
    printf ']}\n'
} >"$out/record.json"
{
    printf '# %s, %s\n\nWritten by scripts/gpu_record.sh; record.json beside this page holds the same figures and more.\n' "$gpu" "$today"
    [ "$device" = cuda ] || printf '\n**An emulator run that tests the script: no figure here says anything about a GPU.**\n'
    [ -z "$only" ] || printf '\n**Chosen parts alone (--only %s).**\n' "$only"
    [ "$failed" -eq 0 ] || printf '\n**%d parts failed: %s.**\n' "$failed" "$(awk -F'|' '$2 != 0 {printf "%s%s", n++ ? ", " : "", $1}' "$work/parts")"
    printf '\n## Whole steps\n'; bash scripts/record_table.sh --record "$out/record.json"
    if [ -f "$out/curves.json" ]; then
        printf '\n## Loss curves\nOurs against PyTorch from the same weights on the same batches, and PyTorch against itself with sums in another order (dev/bench/curve_compare.py).\n\n'
        printf '%s; each step in [curves.tsv](curves.tsv), figures in [curves.json](curves.json).\n\n![loss curves](curves.svg)\n' "$(grep '^curves: ' "$work/curves.log" | tail -n 1)"
    fi
    printf '\n## Machine\n| | |\n|---|---|\n'; sed 's/|/ | /; s/.*/| & |/' "$work/facts"
    printf '| SM clock during the run, MHz | %s |\n| memory clock, MHz | %s |\n| power, W | %s |\n| temperature, C | %s |\n| throttling (NVML bits) | %s |\n' "$(spread 1)" "$(spread 2)" "$(spread 3)" "$(spread 4)" \
        "$(throttling)"
    printf '\n## Parts\n| part | exit status | seconds | |\n|---|---|---|---|\n'; sed 's/|/ | /g; s/.*/| & |/' "$work/parts"
    printf '\n## Ops\nMedian between the 10th and 90th percentile of many calls, random data, operands rotated past the L2. Floor: the larger of bytes (each operand once) over the\ncopy rate and FLOPs over the product rate, both measured in the same run. Hopper, library: time over that of --attention hopper and of cuDNN'"'"'s attention.\n'
    for f in "$work"/ops-*.log; do if [ -s "$f" ]; then printf '```text\n%s\n```\n' "$(cat "$f")"; fi; done
    printf '\n## Steps by op\n'
    for f in "$work"/step-*.log; do if [ -s "$f" ]; then printf '```text\n%s\n```\n' "$(sed '/^by kernel: [0-9]/,$d' "$f")"; fi; done
    if grep -qs '^by kernel: [0-9]' "$work"/step-*.log; then
        printf '\n## Steps by kernel\nA few steps more of the same run under CUPTI, which takes time of its own and widens gaps: compare gaps with each other, and with those of another step.\n'
        for f in "$work"/step-*.log; do
            if grep -q '^by kernel: [0-9]' "$f"; then printf '```text\n%s\n```\n' "$(sed -n '/^bench_step: /p; /^by kernel: [0-9]/,$p' "$f")"; fi
        done
    fi
} >"$out/README.md"
echo "record: $out ($((SECONDS - started)) s, $failed parts failed)"
[ "$failed" -eq 0 ]
