#!/usr/bin/env bash
# Installs what building needs, on Debian and Ubuntu: compiler, make, and the libraries that the Makefile links; with --tests also mpirun, which starts
# runs of several processes in the tests (where it cannot be had, they skip that).
# Does nothing when all is there. As root, or with sudo. Exit: 0 all there, 1 could not install, 2 unknown option.
set -euo pipefail

usage() { echo "usage: install_deps.sh [--tests] [--check]   (--tests: also what only tests use; --check: only say what is missing, exit 1 when something is)"; }
check_only=0 for_tests=0
for option; do
    case $option in
        --check) check_only=1 ;;
        --tests) for_tests=1 ;;
        -h | --help) usage; exit 0 ;;
        *) echo "install_deps: unknown option '$option'" >&2; usage >&2; exit 2 ;;
    esac
done

# True when a program with this header and library compiles and links; asks the compiler, not the package manager, so that
# libraries installed by other means count.
compiles() { # header, flags...
    local header=$1; shift
    printf '#include <%s>\nint main(void) { return 0; }\n' "$header" | cc -x c - -o /dev/null "$@" 2>/dev/null
}

missing=()
find_missing() {
    missing=()
    command -v make >/dev/null || missing+=(make)
    [ "$for_tests" -eq 0 ] || command -v pgrep >/dev/null || missing+=(procps)
    if ! command -v cc >/dev/null; then
        missing+=(gcc g++ libc6-dev libjansson-dev libpcre2-dev libxxhash-dev libopenblas-openmp-dev)
        return
    fi
    compiles stdio.h || missing+=(libc6-dev)
    # The tests run the CUDA backend on the CPU, which takes a C++ compiler.
    echo 'int main() { return 0; }' | c++ -x c++ -std=c++17 - -o /dev/null 2>/dev/null || missing+=(g++)
    compiles jansson.h -ljansson || missing+=(libjansson-dev)
    compiles pcre2.h -DPCRE2_CODE_UNIT_WIDTH=8 -lpcre2-8 || missing+=(libpcre2-dev)
    compiles xxhash.h -lxxhash || missing+=(libxxhash-dev)
    compiles stdio.h -lopenblas || missing+=(libopenblas-openmp-dev)
}

useful=()
if [ "$for_tests" -eq 1 ] && ! command -v mpirun >/dev/null; then useful+=(openmpi-bin); fi
if [ "$for_tests" -eq 1 ] && ! command -v mpicc >/dev/null; then useful+=(libopenmpi-dev); fi
enough() { # what must be there is: what else is missing costs tests alone
    [ ${#missing[@]} -eq 0 ] || return 0
    echo "dependencies: all there but ${useful[*]}; the tests that use it are skipped"
    exit 0
}
find_missing
if [ ${#missing[@]} -eq 0 ] && [ ${#useful[@]} -eq 0 ]; then
    echo "dependencies: all there"
    exit 0
fi
echo "dependencies: missing ${missing[*]}${useful[*]:+ ${useful[*]}}"
[ "$check_only" -eq 0 ] || exit 1

if ! command -v apt-get >/dev/null; then
    enough
    cat >&2 <<'END'
install_deps: this system has no apt-get; please install with its own package manager:
  make, a C11 compiler callable as cc (gcc or clang), for the tests a C++17 compiler callable as c++, and the libraries with their headers:
  jansson, PCRE2 (8 bit), xxHash, and, for speed, OpenBLAS (optional: without it, own matrix products are used)
END
    exit 1
fi

as_root=()
if [ "$(id -u)" -ne 0 ]; then
    if ! command -v sudo >/dev/null; then
        enough
        echo "install_deps: not root, and sudo is not installed; run as root: apt-get install ${missing[*]}" >&2
        exit 1
    fi
    as_root=(sudo)
fi

# apt, without questions, waiting for another apt to finish, three times in all.
apt() {
    local try
    for try in 1 2 3; do
        echo "+ ${as_root[*]:+sudo }apt-get $*"
        "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=300 -o Acquire::Retries=3 "$@" </dev/null && return
        [ "$try" -eq 3 ] || { echo "apt-get failed; again in $((5 * try)) s"; sleep $((5 * try)); }
    done
    return 1
}

install() { apt install --no-install-recommends "$@"; }
if ! apt update; then echo "install_deps: the package lists could not be fetched completely; going on with what is there" >&2; fi
if [ ${#missing[@]} -ne 0 ] && ! install "${missing[@]}"; then
    echo "install_deps: apt-get could not install: ${missing[*]} (its messages are above)" >&2
    exit 1
fi

find_missing
if [ ${#missing[@]} -ne 0 ]; then
    echo "install_deps: installed, but the compiler still does not find: ${missing[*]}" >&2
    exit 1
fi
if [ ${#useful[@]} -ne 0 ] && ! install "${useful[@]}"; then enough; fi
echo "dependencies: all there now"
