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
rule data_knows_no_model '(cpu|cuda|emu|dist|wrap)/|ops\.h|gpt2\.h|train\.h' llmc/data/*.[ch]
rule a_run_knows_no_backend_inside '(cpu|cuda|emu)/' llmc/run/*.[ch]
# The rule can fail: it finds what is known to be there.
if grep -qE '^#include ".*(base)/' llmc/gpt2.c; then passed=$((passed + 1)); echo "ok the_pattern_finds_includes"; else failed=$((failed + 1)); echo "FAILED the_pattern_finds_includes"; fi

total=0
for folder in llmc llmc/base llmc/cpu llmc/data llmc/run llmc/wrap; do
    lines=$(cat "$folder"/*.[ch] 2>/dev/null | wc -l); total=$((total + lines))
    echo "lines: $lines in $folder"
done
total=$((total + $(wc -l <train_gpt2.cu)))
if [ "$total" -lt 12000 ]; then passed=$((passed + 1)); echo "ok engine_under_12000_lines ($total)"; else failed=$((failed + 1)); echo "FAILED engine_under_12000_lines: $total lines"; fi
long=$(find llmc dev ./*.cu \( -name '*.[ch]' -o -name '*.cu' \) -exec wc -l {} + | awk '$2 != "total" && $1 > 800')
if [ -z "$long" ]; then passed=$((passed + 1)); echo "ok files_under_800_lines"; else failed=$((failed + 1)); echo "FAILED files_under_800_lines: $long"; fi
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
