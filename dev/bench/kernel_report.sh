#!/usr/bin/env bash
# Registers, shared memory, stack and spills of every kernel, per compute type and architecture, from what the compiler said of it (the .log
# files beside the objects of a CUDA build); checks the kernels of dev/bench/hot_kernels.txt. Dynamic shared memory is not in it: a launch
# states that (LLMC_SYNC=1 prints it).
#   kernel_report.sh [--json FILE] LOG...      Last line: N passed, N failed, counted in patterns of hot kernels, and one for wgmma.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
json=
if [ "${1:-}" = --json ]; then json=$2; shift 2; fi
[ $# -gt 0 ] || { echo "kernel_report: no build logs; make kernel-report calls this" >&2; exit 2; }
names() { if command -v c++filt >/dev/null; then c++filt; else cat; fi; }

# Lines of: kernel, arch, registers, static shared memory, stack, spill stores, spill loads; the name as people read it, without arguments.
rows=$(awk '
    function number_before(words,    n) { if (match($0, "[0-9]+ (bytes )?" words)) { n = substr($0, RSTART, RLENGTH); sub(/ .*/, "", n); return n } return 0 }
    /Compiling entry function/ { split($0, part, "\x27"); name = part[2]; arch = part[4]; stack = stores = loads = 0 }
    /bytes stack frame/ { if (name != "") { stack = number_before("stack frame"); stores = number_before("spill stores"); loads = number_before("spill loads") } }
    /: Used [0-9]+ registers/ && name != "" {
        match($0, /Used [0-9]+/); registers = substr($0, RSTART + 5, RLENGTH - 5)
        printf "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", name, arch, registers, number_before("smem"), stack, stores, loads
        name = ""
    }' "$@" | names | sed -E 's/^void //; s/\(anonymous namespace\):://; s/^([^\t]*[^(\t])\([^\t]*\)\t/\1\t/; s/^(cuda_)?(bf16|fp32)::([^\t]*)/\3\t\2/' | sort -u)
[ -n "$rows" ] || { echo "kernel_report: no kernel in: $*" >&2; exit 1; }

echo "$rows" | awk -F'\t' '
    BEGIN { printf "%-58s %-5s %-8s %9s %7s %7s %7s\n", "kernel", "type", "arch", "registers", "static", "stack", "spills" }
    { printf "%-58s %-5s %-8s %9d %7d %7d %7d%s\n", $1, $2, $3, $4, $5, $6, $7 + $8, $6 + $7 + $8 ? "   <-- local memory" : "" }'
if [ -n "$json" ]; then
    echo "$rows" | awk -F'\t' '
        BEGIN { printf "[" }
        { printf "%s\n  {\"kernel\": \"%s\", \"type\": \"%s\", \"arch\": \"%s\", \"registers\": %d, \"static_shared_bytes\": %d, \"stack_bytes\": %d, \"spill_store_bytes\": %d, \"spill_load_bytes\": %d}",
              (NR > 1 ? "," : ""), $1, $2, $3, $4, $5, $6, $7, $8 }
        END { print "\n]" }' >"$json"
    echo "kernel report: $json"
fi

passed=0 failed=0
while IFS= read -r pattern; do
    case $pattern in '' | '#'*) continue ;; esac
    found=$(echo "$rows" | awk -F'\t' -v p="$pattern" '$1 ~ p {print $1}' | sort -u | wc -l)
    bad=$(echo "$rows" | awk -F'\t' -v p="$pattern" '$1 ~ p && $6 + $7 + $8 > 0 {printf "%s %s %s: stack %d, spills %d; ", $1, $2, $3, $6, $7 + $8}')
    if [ "$found" -eq 0 ]; then failed=$((failed + 1)); echo "FAILED hot kernels '$pattern': no kernel has such a name"
    elif [ -n "$bad" ]; then failed=$((failed + 1)); echo "FAILED hot kernels '$pattern': $bad"
    else passed=$((passed + 1)); echo "ok hot kernels '$pattern': $found without local memory"; fi
done <dev/bench/hot_kernels.txt
# A wgmma that the compiler lets wait for the one before, or that registers hold up, costs most of its speed (ptxas advisories C7500 to C7599).
serialised=$(cat "$@" | grep -oE '\(C75[0-9][0-9]\).*' | sort -u | head -3 || true)
if [ -n "$serialised" ]; then failed=$((failed + 1)); echo "FAILED wgmma: $serialised"; else passed=$((passed + 1)); echo "ok no wgmma is serialised"; fi
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
