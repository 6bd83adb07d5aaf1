#!/usr/bin/env bash
# The scripts: free of what shellcheck finds (where it is installed), parsable, executable, and the install script's own promises that
# can be shown without installing anything.
set -u
cd "$(dirname "$0")/../.." || exit 1
passed=0 failed=0 skipped=0
check() { # name, condition as a command
    local name=$1; shift
    if "$@"; then passed=$((passed + 1)); echo "ok $name"; else failed=$((failed + 1)); echo "FAILED $name: $*"; fi
}
dir=$(mktemp -d) || exit 1
trap 'rm -rf "$dir"' EXIT
scripts=(scripts/*.sh scripts/*.sbatch .ci/run dev/test/*.sh dev/bench/*.sh)

for script in "${scripts[@]}"; do check "parses_$script" bash -n "$script"; done
for script in scripts/*.sh scripts/*.sbatch .ci/run; do
    check "executable_$script" test -x "$script"
    check "strict_$script" grep -q '^set -euo pipefail$' "$script"
done
if command -v shellcheck >/dev/null; then check shellcheck shellcheck -x -S warning "${scripts[@]}"
else skipped=$((skipped + 1)); echo "skipped shellcheck: it is not installed"; fi

# A folder with links to all programs but the compiler, sudo and apt-get stands for a system without them.
bare=$dir/bin
mkdir "$bare"
for program in bash env cat id sleep rm mktemp; do ln -s "$(command -v "$program")" "$bare/"; done
install_in_bare() { PATH=$bare "$bare/bash" scripts/install_deps.sh "$@" >"$dir/out" 2>&1; }
install_in_bare; status=$?
check without_apt_it_names_what_is_needed test "$status" -eq 1 -a -n "$(grep 'PCRE2 (8 bit), xxHash' "$dir/out")"
install_in_bare --check; status=$?
check check_names_all_packages test "$status" -eq 1 -a -n "$(grep 'missing make gcc g++ libc6-dev libjansson-dev libpcre2-dev libxxhash-dev' "$dir/out")"
install_in_bare --tests --check; status=$?
check tests_need_mpirun_too test "$status" -eq 1 -a -n "$(grep 'missing .* openmpi-bin' "$dir/out")"
install_in_bare --nonsense; status=$?
check unknown_option_is_refused test "$status" -eq 2
printf '#!%s\necho "apt-get $*" >>"%s/apt.log"\nexit 1\n' "$bare/bash" "$dir" >"$bare/apt-get"
printf '#!%s\nexit 0\n' "$bare/bash" >"$bare/sleep.new"
rm "$bare/sleep"; mv "$bare/sleep.new" "$bare/sleep"
printf '#!%s\nexec "$@"\n' "$bare/bash" >"$bare/sudo"
chmod +x "$bare/apt-get" "$bare/sleep" "$bare/sudo"
install_in_bare; status=$?
check failing_apt_is_tried_three_times test "$status" -eq 1 -a "$(grep -c ' install ' "$dir/apt.log")" -eq 3
check failing_apt_is_reported grep -q 'could not install: make gcc' "$dir/out"
if ./scripts/install_deps.sh --check >/dev/null 2>&1; then
    check does_nothing_when_all_is_there test "$(./scripts/install_deps.sh)" = "dependencies: all there"
else skipped=$((skipped + 1)); echo "skipped does_nothing_when_all_is_there: something is missing here"; fi

echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ]
