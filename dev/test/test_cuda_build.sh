#!/usr/bin/env bash
# Finding CUDA (scripts/find_cuda.sh) in layouts made up here: nothing, a toolkit folder, Python wheels, parts missing, a wrong choice; and that
# everything else builds without nvcc. Compiling the kernels is `make kernel-report`, which CI runs as a part of its own.
set -u
cd "$(dirname "$0")/../.." || exit 1
passed=0 failed=0
check() { # name, command...
    local name=$1; shift
    if "$@"; then passed=$((passed + 1)); echo "ok $name"; else failed=$((failed + 1)); echo "FAILED $name: $*"; cat "$dir/out"; fi
}
dir=$(mktemp -d) || exit 1
trap 'rm -rf "$dir"' EXIT

# A PATH without nvcc and nvidia-smi, whose python3 knows the wheels of $dir/site alone.
mkdir -p "$dir/bin" "$dir/site"
for program in bash cc cat command dirname env grep head make mkdir python3 readlink sed sort tr cmp echo printf find git nproc rm; do
    path=$(command -v "$program") && [ -x "$path" ] && ln -s "$path" "$dir/bin/$program"
done
rm "$dir/bin/python3"
printf '#!%s\necho %s/site/nvidia\n' "$(command -v bash)" "$dir" >"$dir/bin/python3" && chmod +x "$dir/bin/python3"
find_cuda() { env -u NVCC -u CUDA_PATH PATH="$dir/bin" CUDA_HOME="${home:-$dir/none}" LLMC_SYSTEM_ROOT="$dir/system" "$@" >"$dir/out" 2>&1; }
says() { grep -qF -- "$1" "$dir/out"; }
# a compiler that only knows its version, in a toolkit folder
compiler() { # folder, version
    mkdir -p "$1/bin"
    printf '#!%s\ncase $1 in --version) echo "Cuda compilation tools, release %s, V%s.88" ;; --list-gpu-code) printf "sm_75\\nsm_80\\nsm_90\\nsm_120\\n" ;; esac\n' \
        "$(command -v bash)" "$2" "$2" >"$1/bin/nvcc"
    chmod +x "$1/bin/nvcc"
}
library() { # folder, header, lines, library file
    mkdir -p "$1/include" "$1/lib"
    printf '%b' "$3" >"$1/include/$2"
    : >"$1/lib/$4"
}
cublas() { library "$1" cublasLt.h '' "$2"; printf '#define CUBLAS_VER_MAJOR %s\n#define CUBLAS_VER_MINOR 1\n#define CUBLAS_VER_PATCH 0\n' "$3" >"$1/include/cublas_api.h"; }

find_cuda bash scripts/find_cuda.sh
check without_nvcc_it_says_so says 'CUDA_MISSING := no nvcc in NVCC, PATH'
find_cuda make train_gpt2cu BUILD="$dir/build"
check make_says_it_in_one_line says '*** CUDA: no nvcc in NVCC, PATH'
find_cuda make -n all BUILD="$dir/build"
check the_rest_builds_without_nvcc says "-o $dir/build/train_gpt2 "
find_cuda env NVCC="$dir/typo" bash scripts/find_cuda.sh
check a_named_nvcc_that_is_not_there says "NVCC=$dir/typo is not there"

home=$dir/toolkit
compiler "$home" 13.0
find_cuda bash scripts/find_cuda.sh
check a_toolkit_without_cublas says 'cuBLASLt is not'
cublas "$home" libcublasLt.so 12
find_cuda bash scripts/find_cuda.sh
check a_cublas_of_another_toolkit says 'nvcc is 13.0'
cublas "$home" libcublasLt.so 13
library "$home" cuda_runtime.h '' libcudart_static.a
find_cuda bash scripts/find_cuda.sh
check a_toolkit says "CUDA_FOUND := nvcc 13.0, cuBLASLt 13.1.0, no cuDNN, no NCCL, no MPI, no CUPTI, for sm_80 sm_90a"
check its_libraries says "'$home/lib/libcublasLt.so' '$home/lib/libcudart_static.a'"
check they_are_found_at_run_time says "'-Wl,-rpath,$home/lib'"
check without_cudnn_no_code_for_it test -z "$(grep LLMC_CUDNN "$dir/out")"
find_cuda bash scripts/find_cuda.sh 90 sm_120
check without_cupti_no_code_for_it test -z "$(grep LLMC_CUPTI "$dir/out")"
cupti() { # folder, library file, API version, structures of the main and of the deprecated header
    library "$1" cupti.h '' "$2"
    printf '#define CUPTI_API_VERSION %s\n' "$3" >"$1/include/cupti_version.h"
    printf '} CUpti_Activity%s;\n' $4 >"$1/include/cupti_activity.h"
    printf '} CUpti_Activity%s;\n' $5 >"$1/include/cupti_activity_deprecated.h"
}
: >"$home/include/cuda.h"
cupti "$home/extras/CUPTI" libcupti.so.13 130200 'Kernel11 Memcpy6 MemcpyPtoP4 Memset4' 'Kernel Kernel9 Kernel10 Memcpy Memcpy5 Memset3'
find_cuda bash scripts/find_cuda.sh 90a sm_120
check cupti_in_its_extra_folder says ", CUPTI API 130200, for"
check its_newest_structures says "CUPTI_FLAGS := -isystem '$home/extras/CUPTI/include' -isystem '$home/include' -DLLMC_CUPTI_LIBRARY='\"$home/extras/CUPTI/lib/libcupti.so.13\"' -DLLMC_CUPTI_KERNEL=CUpti_ActivityKernel11 -DLLMC_CUPTI_MEMCPY=CUpti_ActivityMemcpy6 -DLLMC_CUPTI_MEMSET=CUpti_ActivityMemset4"
check architectures_asked_for says "CUDA_GENCODE := -gencode arch=compute_90a,code=sm_90a -gencode arch=compute_120,code=sm_120"
find_cuda bash scripts/find_cuda.sh 33
check an_architecture_unknown_to_the_compiler says 'CUDA_MISSING := sm_33: nvcc 13.0 knows sm_75 sm_80'
printf '#!%s\necho 9.0; echo 12.0; echo 9.0\n' "$(command -v bash)" >"$dir/bin/nvidia-smi" && chmod +x "$dir/bin/nvidia-smi"
find_cuda bash scripts/find_cuda.sh
check architectures_of_the_gpus_here says ', for sm_120 sm_90a'
rm "$dir/bin/nvidia-smi"

# Python wheels: a folder a library, file names with the version alone.
home=$dir/none
compiler "$dir/site/nvidia/cuda_nvcc" 12.9
cublas "$dir/site/nvidia/cublas" libcublasLt.so.12 12
library "$dir/site/nvidia/cuda_runtime" cuda_runtime.h '' libcudart.so.12
cupti "$dir/site/nvidia/cuda_cupti" libcupti.so.12 24 'Kernel8 Kernel9 Memcpy5 Memset4' ''
: >"$dir/site/nvidia/cuda_runtime/include/cuda.h"
library "$dir/site/nvidia/cudnn" cudnn_backend.h '' libcudnn.so.9
printf '#define CUDNN_MAJOR 9\n#define CUDNN_MINOR 13\n#define CUDNN_PATCHLEVEL 2\n' >"$dir/site/nvidia/cudnn/include/cudnn_version.h"
library "$dir/site/nvidia/nccl" nccl.h '#define NCCL_MAJOR 2\n#define NCCL_MINOR 28\n#define NCCL_PATCH 9\n' libnccl.so.2
find_cuda bash scripts/find_cuda.sh
check python_wheels says "CUDA_FOUND := nvcc 12.9, cuBLASLt 12.1.0, cuDNN 9.13.2, NCCL 2.28.9, no MPI, CUPTI API 24, "
check their_headers says "'-I$dir/site/nvidia/cublas/include' '-I$dir/site/nvidia/cudnn/include' -DLLMC_CUDNN '-I$dir/site/nvidia/cuda_runtime/include'"
check their_libraries says "'$dir/site/nvidia/cudnn/lib/libcudnn.so.9' '$dir/site/nvidia/cuda_runtime/lib/libcudart.so.12'"

# The report of kernels: two of the compiler's words on one, one with a spill.
function_words() { # name, stack, spill
    echo "ptxas info    : Compiling entry function '$1' for 'sm_90a'"
    echo "ptxas info    : Function properties for $1"
    echo "    $2 bytes stack frame, $3 bytes spill stores, $3 bytes spill loads"
    echo "ptxas info    : Used 30 registers, used 1 barriers, 64 bytes smem, 376 bytes cmem[0]"
}
function_words _ZN9cuda_bf1611gelu_kernelILb1EEEvPfPKfm 0 0 >"$dir/good.log"
function_words _ZN9cuda_fp3216attention_kernelEPf 8 12 >"$dir/spill.log"
bash dev/bench/kernel_report.sh --json "$dir/kernels.json" "$dir/good.log" "$dir/spill.log" >"$dir/out" 2>&1; status=$?
check a_row_a_kernel grep -qE '^(gelu_kernel<true>|_ZN9cuda_bf1611gelu_kernel[^ ]*) +.* 30 +64 +0 +0$' "$dir/out"
check a_hot_kernel_without_spills says "ok hot kernels 'gelu'"
check a_hot_kernel_that_spills grep -q "FAILED hot kernels 'attention': .*stack 8, spills 24" "$dir/out"
check a_spill_fails_the_report test "$status" -ne 0
echo "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to" >"$dir/serial.log"
bash dev/bench/kernel_report.sh "$dir/good.log" "$dir/serial.log" >"$dir/out" 2>&1
check a_serialised_wgmma_fails_it_too grep -q '^FAILED wgmma: (C7510)' "$dir/out"
check a_report_for_programs grep -q '"registers": 30, "static_shared_bytes": 64, "stack_bytes": 8' "$dir/kernels.json"

echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
