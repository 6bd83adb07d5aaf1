#!/usr/bin/env bash
# Who may include whom (llmc/README.md), and how large the engine is.
set -u
cd "$(dirname "$0")/../.." || exit 1
passed=0 failed=0
# rule NAME FORBIDDEN-PATTERN FILES...: no #include line of the files matches
rule() {
    local name=$1 pattern=$2 found; shift 2
    found=$(grep -nE "^#include \".*($pattern)" "$@" /dev/null)
    if [ -z "$found" ]; then passed=$((passed + 1)); echo "ok $name"; else failed=$((failed + 1)); echo "FAILED $name: $found"; fi
}
rule the_model_knows_no_device '(cpu|cuda|emu|dist|run|data|wrap)/' llmc/gpt2.[ch] llmc/train.[ch] llmc/ops.[ch]
rule base_stands_alone '(cpu|cuda|emu|dist|run|data|wrap)/|ops\.h|gpt2\.h|train\.h' llmc/base/*.[ch]
rule a_backend_sees_ops_and_base_alone '(run|data|wrap|dist)/|gpt2\.h|train\.h' llmc/cpu/*.[ch] llmc/wrap/*.[ch]
rule cuda_sees_ops_and_base_alone '(run|data|wrap|dist|cpu)/|gpt2\.h|train\.h' llmc/cuda/*.{c,h,cu,cuh}
rule data_knows_no_model '(cpu|cuda|emu|dist|wrap)/|ops\.h|gpt2\.h|train\.h' llmc/data/*.[ch]
rule dist_sees_base_alone '(cpu|cuda|emu|data|run|wrap)/|ops\.h|gpt2\.h|train\.h' llmc/dist/[!z]*.[ch]
rule zero_sees_the_model_and_wrappers_alone '(cpu|cuda|emu|data|run)/|train\.h' llmc/dist/zero.[ch]
# The emulator: in the headers that stand for CUDA's, under LLMC_EMU.
emu_includes() { awk '/^#if/ {emu = /ifdef LLMC_EMU/} /^#(else|endif|elif)/ {emu = 0} /^#include "(\.\.\/)*dev\// && !emu {print FILENAME ": " $0}' llmc/cuda/*.{c,h,cu,cuh}; }
found=$(emu_includes)
if [ -z "$found" ]; then passed=$((passed + 1)); echo "ok the_emulator_stands_under_LLMC_EMU"; else failed=$((failed + 1)); echo "FAILED the_emulator_stands_under_LLMC_EMU: $found"; fi
# What the emulator cannot see, or would not report.
words_only_in() { # name, pattern, where it may stand, files
    local name=$1 pattern=$2 home=$3 found; shift 3
    found=$(grep -nE "$pattern" "$@" | grep -vE "^($home):" | grep -vE ':[0-9]+: *(/?\*|//)')
    if [ -z "$found" ]; then passed=$((passed + 1)); echo "ok $name"; else failed=$((failed + 1)); echo "FAILED $name: $found"; fi
}
words_only_in inline_ptx_in_two_headers '\basm( volatile)?[ (]' 'llmc/cuda/(ptx|hopper).cuh' llmc/cuda/*.{cu,cuh}
words_only_in shared_memory_is_dynamic '__shared__' 'llmc/cuda/kernel.cuh' llmc/cuda/*.{cu,cuh}
words_only_in launches_go_through_LAUNCH '<<<[^(]|cudaLaunchKernel' 'llmc/cuda/(kernel.cuh|backend.cu)' llmc/cuda/*.{cu,cuh}
words_only_in no_pointer_is_restrict '__restrict__|__ldg' 'none' llmc/cuda/*.{cu,cuh}
rule a_run_knows_no_backend_inside '(cpu|cuda|emu)/' llmc/run/*.[ch]
# The rule can fail: it finds what is known to be there.
if grep -qE '^#include ".*(base)/' llmc/gpt2.c; then passed=$((passed + 1)); echo "ok the_pattern_finds_includes"; else failed=$((failed + 1)); echo "FAILED the_pattern_finds_includes"; fi

# The engine without its backends and its way to other machines, which are counted apart.
total=0
for folder in llmc llmc/base llmc/data llmc/run llmc/wrap llmc/dist llmc/cpu llmc/cuda; do
    lines=$(cat "$folder"/*.{c,h,cu,cuh} 2>/dev/null | wc -l)
    case $folder in llmc/cpu | llmc/cuda | llmc/dist) echo "lines: $lines in $folder (apart)" ;; *) total=$((total + lines)); echo "lines: $lines in $folder" ;; esac
done
total=$((total + $(wc -l <train_gpt2.cu)))
if [ "$total" -lt 12000 ]; then passed=$((passed + 1)); echo "ok engine_under_12000_lines ($total)"; else failed=$((failed + 1)); echo "FAILED engine_under_12000_lines: $total lines"; fi
long=$(find llmc dev ./*.cu \( -name '*.[ch]' -o -name '*.cu' -o -name '*.cuh' -o -name '*.cpp' \) -exec wc -l {} + | awk '$2 != "total" && $1 > 800')
if [ -z "$long" ]; then passed=$((passed + 1)); echo "ok files_under_800_lines"; else failed=$((failed + 1)); echo "FAILED files_under_800_lines: $long"; fi
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
