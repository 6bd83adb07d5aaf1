#!/usr/bin/env bash
# What of CUDA is on this machine, as make variables for the Makefile: the compiler, architectures, headers and libraries, and a line of words.
# Looks where they usually are: NVCC, PATH, CUDA_HOME, /usr/local/cuda*, Debian's packages, the nvidia/ folders of Python wheels.
#   find_cuda.sh [ARCH...]    sm_80, 90a ...; none: the GPUs present, else sm_80 and sm_90a.   Exit: 0, also when CUDA_MISSING says what is missing
set -euo pipefail
system=${LLMC_SYSTEM_ROOT:-} # before the fixed places: a test's own
missing() { echo "CUDA_MISSING := $*"; exit 0; }

# The folders nvidia/X of Python's packages: each with include/ and lib/ of one library, or of all (cu13).
wheels=()
for folder in $(python3 -c 'import sys; print("\n".join(p + "/nvidia" for p in sys.path if p))' 2>/dev/null | tr ' ' '?'); do
    for f in $folder/*/; do [ ! -d "$f" ] || wheels+=("${f%/}"); done
done

nvcc=
if [ -n "${NVCC:-}" ] && ! command -v "$NVCC" >/dev/null; then missing "NVCC=$NVCC is not there"; fi
for try in "${NVCC:-}" "$(command -v nvcc || true)" {"${CUDA_HOME:-}","${CUDA_PATH:-}","$system/usr/local/cuda"}/bin/nvcc \
    $(printf '%s\n' "$system"/usr/local/cuda-*/bin/nvcc | sort -rV) "$system"/opt/cuda/bin/nvcc "$system"/usr/lib/nvidia-cuda-toolkit/bin/nvcc ${wheels[@]+"${wheels[@]/%//bin/nvcc}"}; do
    if [ -n "$try" ] && command -v "$try" >/dev/null; then nvcc=$(command -v "$try"); break; fi
done
[ -n "$nvcc" ] || missing "no nvcc in NVCC, PATH, CUDA_HOME, /usr/local/cuda*, nor a Python package; install the CUDA toolkit (Debian: nvidia-cuda-toolkit) or name it: make NVCC=/path/to/nvcc"
version=$("$nvcc" --version | sed -n 's/.*release \([0-9.]*\),.*/\1/p')
toolkit=$(dirname "$(dirname "$(readlink -f "$nvcc")")")

# origin NAME HEADER LIBRARY...: the first place that has both, as include=, library=
multiarch=$(cc -print-multiarch 2>/dev/null || echo x86_64-linux-gnu)
origin() {
    local header=$1 root inc lib name; shift
    for root in "$toolkit" "$toolkit/extras/CUPTI" "${CUDA_HOME:-$system/usr/local/cuda}" "$system/usr" ${wheels[@]+"${wheels[@]}"} "$system/usr/local"; do
        for inc in "$root/include" "$root/include/$multiarch" "$root/targets/x86_64-linux/include" "$root/targets/sbsa-linux/include"; do
            [ -f "$inc/$header" ] || continue
            for lib in "$root/lib64" "$root/lib/$multiarch" "$root/lib" "$root/targets/x86_64-linux/lib" "$root/targets/sbsa-linux/lib"; do
                for name in "$@"; do
                    for library in "$lib/$name" "$lib/$name".*; do
                        if [ -f "$library" ]; then include=$inc; return; fi
                    done
                done
            done
        done
    done
    include='' library=''
    return 1
}
flags='' libs='' rpath=''
use() { # after origin: takes its header folder and library
    case " $flags " in *"'-I$include'"*) ;; *) [ "$include" = /usr/include ] || [ "$include" = "$toolkit/include" ] || flags+=" '-I$include'" ;; esac
    libs+=" '$library'"
    local run_path="'-Wl,-rpath,${library%/*}'"
    case $library in *.a | /usr/lib/*) ;; *) case $rpath in *"$run_path"*) ;; *) rpath+=" $run_path" ;; esac ;; esac
}
number() { sed -n "s/^#define *$1 *\([0-9][0-9]*\).*/\1/p" "$include/$2" | head -n 1; } # macro, header

origin cublasLt.h libcublasLt.so || missing "nvcc $version is there ($nvcc), cuBLASLt is not: cublasLt.h and libcublasLt.so of the toolkit, or the Python package nvidia-cublas"
use
cublas=$(number CUBLAS_VER_MAJOR cublas_api.h).$(number CUBLAS_VER_MINOR cublas_api.h).$(number CUBLAS_VER_PATCH cublas_api.h)
[ "${cublas%%.*}" = "${version%%.*}" ] || missing "nvcc is $version ($nvcc), but the cuBLASLt found is $cublas ($library)"
found="nvcc $version, cuBLASLt $cublas"
# cuDNN's graph API in C: version 9 and, with the same header, late versions 8.
if origin cudnn_backend.h libcudnn.so && [ -f "$include/cudnn_version.h" ]; then
    use
    flags+=" -DLLMC_CUDNN"
    found+=", cuDNN $(number CUDNN_MAJOR cudnn_version.h).$(number CUDNN_MINOR cudnn_version.h).$(number CUDNN_PATCHLEVEL cudnn_version.h)"
else found+=", no cuDNN"; fi
origin cuda_runtime.h libcudart_static.a libcudart.so || missing "nvcc $version is there ($nvcc), the CUDA runtime is not: cuda_runtime.h and libcudart"
use
runtime=$include
# For training on several GPUs: loaded at run time, from here where the loader knows of none.
nccl=''
if origin nccl.h libnccl.so; then nccl=" -DLLMC_NCCL_LIBRARY='\"$library\"'" found+=", NCCL $(number NCCL_MAJOR nccl.h).$(number NCCL_MINOR nccl.h).$(number NCCL_PATCH nccl.h)"; else found+=", no NCCL"; fi
if command -v mpicc >/dev/null; then found+=", MPI"; else found+=", no MPI"; fi
# For the benchmarks' file that loads CUPTI by itself: headers, where the library is, and the newest structure of each record that it reads.
cupti=''
newest() { grep -ho "} CUpti_Activity$1[0-9]*;" "$include"/cupti_activity*.h | tr -d '}; ' | sort -rV | head -n 1; } # record
if origin cupti.h libcupti.so && [ -f "$runtime/cuda.h" ]; then
    cupti=" -isystem '$include' -isystem '$runtime' -DLLMC_CUPTI_LIBRARY='\"$library\"'"
    for record in Kernel Memcpy Memset; do cupti+=" -DLLMC_CUPTI_${record^^}=$(newest $record)"; done
    found+=", CUPTI API $(number CUPTI_API_VERSION cupti_version.h)"
else found+=", no CUPTI"; fi

# Architectures: asked for; of the GPUs present; else A100 and Hopper, with portable code for what is newer. Hopper is sm_90a: plain sm_90 lacks its own instructions.
known=$("$nvcc" --list-gpu-code 2>/dev/null | tr '\n' ' ')
archs=() asked=("$@")
for arch in "$@"; do arch=sm_${arch#sm_} archs+=("${arch/%sm_90/sm_90a}"); done
if [ $# -eq 0 ]; then
    for capability in $(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | tr -d . | sort -u | grep -E '^[0-9]+$' || true); do
        case " $known " in *" sm_$capability "*) archs+=("sm_${capability/%90/90a}") ;; esac
    done
    [ ${#archs[@]} -gt 0 ] || asked=(default) archs=(sm_80 sm_90a)
fi
gencode=
for arch in "${archs[@]}"; do
    # The toolkit's list holds no sm_90a before 12.0, and none of the "a" in some later ones: ask the compiler's word for the number alone.
    case " $known " in *" $arch "* | *" ${arch%a} "*) ;; *) missing "$arch: nvcc $version knows $known" ;; esac
    gencode+=" -gencode arch=compute_${arch#sm_},code=$arch"
done
[ "${asked[*]-}" != default ] || gencode+=" -gencode arch=compute_80,code=compute_80"
static=
case "$libs" in *libcudart_static.a*) static=" -ldl -lrt" ;; esac
cat <<MAKE
CUDA_NVCC := $nvcc
CUDA_FOUND := $found, for ${archs[*]}
CUDA_FLAGS :=$flags
CUDA_GENCODE :=$gencode
CUDA_LIBS :=$libs$static$rpath
CUPTI_FLAGS :=$cupti
NCCL_FLAGS :=$nccl
MAKE
