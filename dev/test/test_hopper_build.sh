#!/usr/bin/env bash
# The compiler's word on llmc/cuda/hopper.cuh: every function compiles for sm_90a and, as a trap, for sm_80, without a warning; wgmma is not serialised,
# setmaxnreg is taken, nothing spills; the pipeline is made of Hopper's own instructions. Skipped without nvcc.
set -u
cd "$(dirname "$0")/../.." || exit 1
passed=0 failed=0
check() { # name, command...
    local name=$1; shift
    if "$@"; then passed=$((passed + 1)); echo "ok $name"; else failed=$((failed + 1)); echo "FAILED $name"; cat "$dir/log" | cut -c1-300 | head -40; fi
}
dir=$(mktemp -d) || exit 1
trap 'rm -rf "$dir"' EXIT
nvcc=$(bash scripts/find_cuda.sh | sed -n 's/^CUDA_NVCC := //p')
if [ -z "$nvcc" ]; then echo "skipped hopper: no nvcc"; echo "0 passed, 0 failed, 1 skipped"; exit 0; fi
compile() { # compute type, architecture
    "$nvcc" -std=c++17 -O3 -lineinfo -I. -gencode "arch=compute_$2,code=sm_$2" -Xptxas -v -Xcompiler -Wall,-Wextra,-Wno-unused-function,-Wno-missing-field-initializers \
        "-DLLMC_BF16=$1" -c dev/test/hopper_probe.cu -o "$dir/probe.o" >"$dir/log" 2>&1
}
quiet() { ! grep -iE 'warning|error|serialized|C75[0-9][0-9]' "$dir/log"; }
no_spills() { ! grep -E '[1-9][0-9]* bytes (stack frame|spill)' "$dir/log" && grep -q '0 bytes spill loads' "$dir/log"; }
check sm_80_compiles compile 1 80
check without_a_warning quiet
check sm_90a_compiles compile 1 90a
check without_a_warning quiet
check nothing_spills no_spills
if PATH=$PATH:$(dirname "$nvcc") command -v cuobjdump >/dev/null; then
    PATH=$PATH:$(dirname "$nvcc") cuobjdump -sass "$dir/probe.o" | awk '/Function :/ {on = /gemm_kernel/} on' >"$dir/sass"
    for word in HGMMA.64x64x16 UTMALDG.2D.MULTICAST UTMASTG WARPGROUP.DEPBAR USETMAXREG SYNCS UCGABAR; do check "the_pipeline_has_$word" grep -q "$word" "$dir/sass"; done
fi
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
