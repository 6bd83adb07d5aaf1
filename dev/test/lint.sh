#!/usr/bin/env bash
# Static checks: clang-tidy (its list, with reasons, in .clang-tidy) and cppcheck over the engine and its programs. A finding fails.
# Last line: N passed, N failed, N skipped, counted in files for clang-tidy, and one for cppcheck.
set -u
cd "$(dirname "$0")/../.." || exit 1
passed=0 failed=0 skipped=0
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
flags=(-std=c11 -D_GNU_SOURCE -DLLMC_OPENBLAS -march=native -I.)

if command -v clang-tidy >/dev/null; then
    cat >"$work/one" <<END
clang-tidy --quiet "\$1" -- ${flags[*]} -x c >"\$2/\${1//\\//:}" 2>&1 && echo ok >>"\$2/good" || { echo "FAILED \$1"; grep -A3 -E '(error|warning):' "\$2/\${1//\\//:}"; }
END
    mapfile -t files < <(git ls-files 'llmc/*.c' 'dev/data/*.c' 'dev/fuzz/*.c' ':(glob)*.cu')
    touch "$work/good"
    printf '%s\0' "${files[@]}" | xargs -0 -P"$(nproc)" -I{} bash "$work/one" {} "$work"
    good=$(wc -l <"$work/good") passed=$(wc -l <"$work/good") failed=$((${#files[@]} - good))
    echo "clang-tidy: $good of ${#files[@]} files without a finding"
else skipped=$((skipped + 1)); echo "skipped clang-tidy: it is not installed"; fi

if command -v cppcheck >/dev/null; then
    # missingInclude*: cppcheck is not given the system's headers. internalAstError: its parser takes the braces of (Act){NULL} within
    # ?: for an error. legacyUninitvar: a struct passed by value is initialised. invalidPointerCast: an arena holds floats and doubles.
    # returnDanglingLifetime: a backend that is created through a function pointer copies its options.
    if cppcheck --enable=warning,performance,portability --std=c11 --language=c --inline-suppr --error-exitcode=1 -q -j"$(nproc)" \
        --suppress=missingInclude --suppress=missingIncludeSystem --suppress=internalAstError:llmc/gpt2.c \
        --suppress=legacyUninitvar:dev/data/stories/unique.c --suppress=invalidPointerCast:llmc/cpu/attention.c \
        --suppress=returnDanglingLifetime:llmc/run/device.c --suppress=unmatchedSuppression -D_GNU_SOURCE -DLLMC_OPENBLAS -I. llmc dev/data ./*.cu; then
        passed=$((passed + 1)); echo "ok cppcheck"
    else failed=$((failed + 1)); echo "FAILED cppcheck"; fi
else skipped=$((skipped + 1)); echo "skipped cppcheck: it is not installed"; fi

echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ]
