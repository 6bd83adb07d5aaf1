#!/usr/bin/env bash
# compute-sanitizer's four tools over the op tests on a GPU: memcheck, racecheck, synccheck, initcheck. Says in one line when it or a GPU is absent.
#   sanitize.sh [TOOL...]    after `make cuda`-like builds of the tests (make sanitize does both);  --find: prints where compute-sanitizer is
# Last line: N passed, N failed, N skipped, counted in tools x test programs.
set -u
cd "$(dirname "$0")/../.." || exit 1
sanitizer=
nvcc=$(sed -n 's/^CUDA_NVCC := //p' build/cuda/found.mk 2>/dev/null)
for try in "$(command -v compute-sanitizer)" "${CUDA_HOME:-/usr/local/cuda}"/bin/compute-sanitizer "${nvcc%/*}/compute-sanitizer" /usr/local/cuda*/bin/compute-sanitizer \
    /usr/local/cuda*/compute-sanitizer/compute-sanitizer /opt/nvidia/*/compute-sanitizer; do
    if [ -x "$try" ] && [ ! -d "$try" ]; then sanitizer=$try; break; fi
done
if [ "${1:-}" = --find ]; then [ -n "$sanitizer" ] && echo "$sanitizer"; exit; fi
skip() { echo "skipped sanitize: $1"; echo "0 passed, 0 failed, 1 skipped"; exit 0; }
[ -n "$sanitizer" ] || skip "compute-sanitizer is not here (it comes with the CUDA toolkit)"
nvidia-smi -L 2>/dev/null | grep -q '^GPU' || skip "no NVIDIA GPU here"
passed=0 failed=0
log=$(mktemp) || exit 1
trap 'rm -f "$log"' EXIT
if [ $# -eq 0 ]; then set -- memcheck racecheck synccheck initcheck; fi
for tool in "$@"; do
    for test in test_device_ops test_device_step test_contract; do
        if "$sanitizer" --tool "$tool" --error-exitcode 1 "build/cuda/$test" >"$log" 2>&1 && ! grep -qE '^skipped cuda|^0 passed' "$log"; then passed=$((passed + 1)); echo "ok $tool $test: $(tail -n 1 "$log")"
        else failed=$((failed + 1)); echo "FAILED $tool $test"; grep '^skipped cuda' "$log"; grep -A12 '^=========' "$log" | head -n 60; tail -n 3 "$log"; fi
    done
done
echo "$passed passed, $failed failed, 0 skipped"
[ "$failed" -eq 0 ]
