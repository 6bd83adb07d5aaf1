#!/usr/bin/env bash
# Builds everything with each compiler (C and C++), with and without OpenBLAS and OpenMP, without a warning, and runs the tests that depend on it;
# then without -march=native in a copy whose path holds spaces, called from another directory.
# matrix.sh --pairs: fewer, such that every two settings still meet (gcc with OpenBLAS and OpenMP is the suite itself, and the copy).
set -u
cd "$(dirname "$0")/../.." || exit 1
unset MAKEFLAGS MFLAGS LLMC_TEST_BUILD
tests=(test_gemm test_cpu_ops test_device_ops test_nvml test_kernel_trace test_gpt2 test_wrap test_loader test_io test_encode_files)
declare -A cxx=([gcc]=g++ [clang]=clang++) # for the emulated CUDA backend
passed=0 failed=0 skipped=0
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
# combination NAME COMMAND...: runs the command, whose output ends like run.sh's, and adds up
combination() {
    local name=$1 line; shift
    "$@" >"$work/out" 2>&1
    line=$(grep -E '^[0-9]+ passed, [0-9]+ failed' "$work/out" | tail -1)
    if [[ $line =~ ^([0-9]+)\ passed,\ ([0-9]+)\ failed ]]; then
        passed=$((passed + BASH_REMATCH[1])) failed=$((failed + BASH_REMATCH[2]))
        [ "${BASH_REMATCH[2]}" -eq 0 ] || cat "$work/out"
    else
        failed=$((failed + 1)) line="no result"; cat "$work/out"
    fi
    echo "$name: $line ($(grep '^build:' "$work/out" | head -1))"
}
works() { echo 'int main(void) { return 0; }' | "$1" -x c - "${@:2}" -o "$work/probe" 2>/dev/null; }
skip() { skipped=$((skipped + 1)); echo "skipped $1: $2"; }

for cc in gcc clang; do
    works "$cc" || { skip "$cc" "it is not installed"; continue; }
    for blas in 0 1; do
        for omp in 0 1; do
            name="$cc, OpenBLAS $blas, OpenMP $omp"
            [ "${1:-}" != --pairs ] || case $cc$blas$omp in gcc00 | clang01 | clang10) ;; *) continue ;; esac
            [ "$blas" -eq 0 ] || works "$cc" -lopenblas || { skip "$name" "OpenBLAS is not installed"; continue; }
            [ "$omp" -eq 0 ] || works "$cc" -fopenmp || { skip "$name" "$cc has no OpenMP here"; continue; }
            export LLMC_TEST_BUILD=build/matrix/$cc-blas$blas-omp$omp
            combination "$name" make --no-print-directory test TESTS_RUN="${tests[*]}" CC="$cc" CXX="${cxx[$cc]}" BLAS="$blas" OMP="$omp" OPT='-O3 -march=native -Werror'
        done
    done
done

copy="$work/a path with  spaces/llmc's copy"
mkdir -p "$copy"
git ls-files -z | xargs -0 cp -a --parents -t "$copy"
unset LLMC_TEST_BUILD
cd / || exit 1
combination "path with spaces, another current directory, no -march" make -C "$copy" --no-print-directory test \
    TESTS_RUN="${tests[*]} test_train.sh test_tokenizer.sh test_stories.sh" OPT='-O3 -Werror'
combination "the programs there" bash -c "make -C \"\$1\" -j2 && cd \"\$1\" && ./train_gpt2 --version && ./tokenize --help >/dev/null && ./stories --stories 2 && echo '1 passed, 0 failed'" - "$copy"

echo "skipped: $skipped"
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
