#!/usr/bin/env bash
# The README against the code: its list of options is what --help prints, and the files and targets it names exist.
set -u
cd "$(dirname "$0")/../.." || exit 1
build=${LLMC_TEST_BUILD:-build/test}
passed=0 failed=0
check() { # name, command...
    local name=$1; shift
    if "$@"; then passed=$((passed + 1)); echo "ok $name"; else failed=$((failed + 1)); echo "FAILED $name"; fi
}
help_in_readme() { diff <("$build/train_gpt2" --help) <(sed -n '/^<!-- train_gpt2 --help -->$/,/^<!-- end -->$/p' README.md | grep -vE '^(<!--|```)'); }
named_files_exist() {
    local f bad=0
    for f in $(grep -oE '\]\(([A-Za-z0-9_./-]+)\)' README.md llmc/README.md scripts/README.md 2>/dev/null | sed -E 's/.*\((.*)\)/\1/'); do
        [ -e "$f" ] || { echo "README names $f, which does not exist"; bad=1; }
    done
    return $bad
}
options_in_examples_exist() {
    local o bad=0
    for o in $(grep -E '^\./train_gpt2|^ +--' README.md | grep -oE -- '--[a-z][a-z0-9-]+' | sort -u); do
        "$build/train_gpt2" --help | grep -qE -- "^  $o\b" || { echo "the README uses $o, which does not exist"; bad=1; }
    done
    return $bad
}
check options_are_what_help_prints help_in_readme
check named_files_exist named_files_exist
check options_in_examples_exist options_in_examples_exist
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
