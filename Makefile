# llmc: `make help` lists the targets and variables.
CC      ?= cc
BUILD   ?= build
OPT     ?= -O3 -march=native
SAN     ?=
FAULT   ?= 0
EMU     ?= 0
CXX     ?= c++
CUDA    ?= 0
NVCC    ?=
ARCH    ?=
BLAS    ?= auto
MPI     ?= auto
OMP     ?= auto

# What is on this machine; each may be absent. The build summary says what is on.
try        = $(shell echo '$(1)' | $(CC) -x c - $(2) -o /dev/null 2>/dev/null && echo 1 || echo 0)
HAVE_OMP  := $(if $(filter auto,$(OMP)),$(call try,int main(void){return 0;},-fopenmp),$(OMP))
HAVE_BLAS := $(if $(filter auto,$(BLAS)),$(call try,int openblas_get_num_threads(void); int main(void){return !openblas_get_num_threads();},-lopenblas),$(BLAS))

FLAGS   := -std=c11 -D_GNU_SOURCE $(OPT) -g -Wall -Wextra -Wshadow -Wstrict-prototypes -fno-math-errno -fno-trapping-math -I. -MMD -MP
LIBS    := -ljansson -lpcre2-8 -lxxhash -lm -lpthread -ldl
ifeq ($(HAVE_OMP),1)
FLAGS   += -fopenmp
else
FLAGS   += -Wno-unknown-pragmas
endif
ifeq ($(HAVE_BLAS),1)
FLAGS   += -DLLMC_OPENBLAS
LIBS    += -lopenblas
endif
# MPI (Open MPI's mpicc says how): for programs that ask for it alone.
HAVE_MPI := $(if $(filter auto,$(MPI)),$(shell mpicc --showme:compile >/dev/null 2>&1 && echo 1 || echo 0),$(MPI))
ifeq ($(HAVE_MPI),1)
MPI_FLAGS := -DLLMC_MPI $(shell mpicc --showme:compile)
LIBS    += -Wl,--as-needed $(shell mpicc --showme:link) -Wl,--no-as-needed
endif
ifneq ($(SAN),)
FLAGS   += -fsanitize=$(SAN) -fno-omit-frame-pointer -fno-sanitize-recover=undefined
endif
ifeq ($(FAULT),1)
FLAGS   += -DLLMC_FAULT_INJECTION
endif

# The CUDA backend on a CPU (dev/emu), for tests: the same sources, by a C++ compiler, once per compute type.
HAVE_EMU := $(if $(filter 1,$(EMU)),$(shell echo 'int main(){return 0;}' | $(CXX) -x c++ -std=c++17 - -o /dev/null 2>/dev/null && echo 1 || echo 0),0)
EMUFLAGS := -std=c++17 -O2 -g -Wall -Wextra -fno-strict-aliasing -Wno-unknown-pragmas -Wno-psabi -DLLMC_EMU -I. -MMD -MP $(if $(SAN),-fsanitize=$(SAN) -fno-omit-frame-pointer -fno-sanitize-recover=undefined)
ifeq ($(HAVE_EMU),1)
FLAGS   += -DLLMC_EMU
LIBS    += -lstdc++
# CUPTI's headers, where there is a toolkit: its reader is tested with a library of ours.
ifneq ($(CUDA),1)
$(shell mkdir -p $(BUILD); NVCC='$(NVCC)' bash scripts/find_cuda.sh | grep '^CUPTI_' >$(BUILD)/cupti.mk)
include $(BUILD)/cupti.mk
endif
EMU_OBJ := $(BUILD)/emu/emu.o $(BUILD)/emu/emu_hopper.o $(BUILD)/emu/runtime.o $(BUILD)/emu/cublaslt_twin.o $(BUILD)/emu/nccl_twin.o $(BUILD)/emu/create.o $(foreach t,0 1,$(BUILD)/emu/$t/absent.o \
           $(patsubst llmc/cuda/%.cu,$(BUILD)/emu/$t/%.o,$(filter-out llmc/cuda/create.cu,$(wildcard llmc/cuda/*.cu))))
endif

# The CUDA backend (CUDA=1: `make cuda` calls make so, with a build folder of its own). scripts/find_cuda.sh says what is there.
ifeq ($(CUDA),1)
$(shell mkdir -p $(BUILD); NVCC='$(NVCC)' bash scripts/find_cuda.sh $(ARCH) >$(BUILD)/found.mk)
include $(BUILD)/found.mk
ifneq ($(CUDA_MISSING),)
$(error CUDA: $(CUDA_MISSING))
endif
comma     := ,
NVCCFLAGS := -std=c++17 -O3 -lineinfo -I. $(CUDA_FLAGS) $(CUDA_GENCODE) -MMD -MP -Xptxas -v -Xcompiler -Wall,-Wextra,-Wno-unused-function,-Wno-missing-field-initializers$(if $(filter 1,$(HAVE_OMP)),$(comma)-fopenmp)
FLAGS     += -DLLMC_CUDA
LIBS      += $(CUDA_LIBS) -lstdc++
CUDA_OBJ  := $(BUILD)/gpu/create.o $(foreach t,1 0,$(patsubst llmc/cuda/%.cu,$(BUILD)/gpu/$t/%.o,$(filter-out llmc/cuda/create.cu,$(wildcard llmc/cuda/*.cu))))
# The compiler's word on each kernel (registers, spills) stays beside the object; dev/bench/kernel_report.sh reads it.
define RUN_NVCC
@mkdir -p $(@D); echo "nvcc $(DTYPE) $< -> $@"
@$(CUDA_NVCC) $(NVCCFLAGS) $(DTYPE) -c $< -o $@ >$@.log 2>&1 || { echo '$(subst ','\'',$(CUDA_NVCC) $(NVCCFLAGS) $(DTYPE))'; cat $@.log; rm -f $@; exit 1; }
@grep -vE '^ptxas info *: [^(]|bytes stack frame' $@.log >&2 || true
endef
endif

LIB      := $(BUILD)/libllmc.a
LIB_OBJ  := $(patsubst %.c,$(BUILD)/%.o,$(wildcard llmc/*.c llmc/*/*.c dev/data/*/*.c)) $(EMU_OBJ) $(CUDA_OBJ)
PROGRAMS := $(patsubst dev/data/%.c,%,$(wildcard dev/data/*.c)) $(patsubst %.cu,%,$(wildcard train_gpt2.cu))
TESTS    := $(patsubst dev/test/%.c,%,$(wildcard dev/test/test_*.c)) $(patsubst dev/test/%.cu,%,$(wildcard dev/test/test_*.cu)) $(patsubst %.cu,%,$(wildcard test_gpt2.cu))
FUZZERS  := $(patsubst dev/fuzz/%.c,%,$(wildcard dev/fuzz/fuzz_*.c))
TRACE_OBJ := $(BUILD)/dev/bench/kernel_trace.o $(BUILD)/dev/bench/kernel_cupti.o
BENCH_OBJ := $(BUILD)/dev/bench/device.o $(TRACE_OBJ) $(if $(CUDA_OBJ),$(BUILD)/dev/bench/device_clock.o)
BENCHES  := $(patsubst dev/bench/%.c,%,$(wildcard dev/bench/bench_*.c))

.PHONY: all cuda train_gpt2cu test_gpt2cu cuda-programs cuda-check kernels kernel-report sanitize gpu-record test test-programs quickstart check-asan matrix lint fuzz fuzz-programs bench summary clean help FORCE
.SECONDARY:
all: summary $(PROGRAMS) ## build the programs: train_gpt2, tokenize, stories

summary:
	@echo "build: $(CC) $(OPT), OpenMP $(if $(filter 1,$(HAVE_OMP)),on,off), OpenBLAS $(if $(filter 1,$(HAVE_BLAS)),on,off (own matrix products)), MPI $(if $(filter 1,$(HAVE_MPI)),on,off), CUDA $(or $(CUDA_FOUND),off (make cuda builds with it))"

# The programs stand at the top of the tree; everything else stays in $(BUILD).
$(PROGRAMS): %: $(BUILD)/%
	@cp $< $@

# The same with the CUDA backend, in $(BUILD)/cuda, on all cores unless -j says otherwise.
CUDA_MAKE = $(MAKE) --no-print-directory $(if $(filter -j%,$(MAKEFLAGS)),,-j$(shell nproc)) BUILD=$(BUILD)/cuda CUDA=1
cuda: ## build train_gpt2cu and test_gpt2cu
	@$(CUDA_MAKE) summary $(BUILD)/cuda/train_gpt2 $(BUILD)/cuda/test_gpt2
	@cp $(BUILD)/cuda/train_gpt2 train_gpt2cu; cp $(BUILD)/cuda/test_gpt2 test_gpt2cu
train_gpt2cu test_gpt2cu:
	@$(CUDA_MAKE) summary $(BUILD)/cuda/$(@:cu=)
	@cp $(BUILD)/cuda/$(@:cu=) $@
cuda-programs:
	@$(CUDA_MAKE) summary $(addprefix $(BUILD)/cuda/,train_gpt2 test_gpt2 test_contract test_device_ops test_device_step test_emu_hopper test_nccl bench_ops bench_step tokenize batches)
# train_gpt2cu is whole: it links and starts, and says what is missing where there is no GPU.
cuda-check: cuda
	@if ./train_gpt2cu --version && ./train_gpt2cu --device cuda --dry-run --model gpt2 >/dev/null; then echo "1 passed, 0 failed"; else echo "0 passed, 1 failed"; fi
sanitize: cuda-programs ## compute-sanitizer (memcheck, racecheck, synccheck, initcheck) over the op tests on a GPU
	@bash dev/test/sanitize.sh
gpu-record: ## on a GPU machine, under nine minutes: build, test, measure, and write dev/bench/records/GPU-DATE
	@bash scripts/gpu_record.sh
kernels: $(CUDA_OBJ)
kernel-report: ## registers, shared memory and spills of every kernel; fails where a hot one spills
	@$(CUDA_MAKE) kernels && bash dev/bench/kernel_report.sh --json $(BUILD)/cuda/kernels.json $(BUILD)/cuda/gpu/[01]/*.log

$(BUILD)/%.o: %.c $(BUILD)/flags
	@mkdir -p $(@D)
	$(CC) $(FLAGS) $(FLAGS_ID) -c $< -o $@
ifeq ($(CUDA),1)
$(BUILD)/%.o: %.cu $(BUILD)/flags
	$(RUN_NVCC)
else
$(BUILD)/%.o: %.cu $(BUILD)/flags
	@mkdir -p $(@D)
	$(CC) $(FLAGS) -x c -c $< -o $@
endif
$(BUILD)/gpu/0/%.o: DTYPE := -DLLMC_BF16=0
$(BUILD)/gpu/1/%.o $(BUILD)/dev/bench/device_clock.o $(BUILD)/dev/test/test_emu_hopper.o: DTYPE := -DLLMC_BF16=1
$(BUILD)/gpu/create.o: llmc/cuda/create.cu $(BUILD)/flags
	$(RUN_NVCC)
$(BUILD)/gpu/0/%.o: llmc/cuda/%.cu $(BUILD)/flags
	$(RUN_NVCC)
$(BUILD)/gpu/1/%.o: llmc/cuda/%.cu $(BUILD)/flags
	$(RUN_NVCC)
ifeq ($(HAVE_EMU),1) # else C takes them, and they skip their tests
$(BUILD)/dev/test/%.o: dev/test/%.cu $(BUILD)/flags
	@mkdir -p $(@D)
	$(CXX) $(EMUFLAGS) -DLLMC_BF16=1 -x c++ -c $< -o $@
endif
$(BUILD)/emu/%.o: dev/emu/%.cpp $(BUILD)/flags
	@mkdir -p $(@D)
	$(CXX) $(EMUFLAGS) -c $< -o $@
$(BUILD)/emu/create.o: llmc/cuda/create.cu $(BUILD)/flags
	@mkdir -p $(@D)
	$(CXX) $(EMUFLAGS) -x c++ -c $< -o $@
$(BUILD)/emu/0/%.o: llmc/cuda/%.cu $(BUILD)/flags
	@mkdir -p $(@D)
	$(CXX) $(EMUFLAGS) -DLLMC_BF16=0 -x c++ -c $< -o $@
$(BUILD)/emu/1/%.o: llmc/cuda/%.cu $(BUILD)/flags
	@mkdir -p $(@D)
	$(CXX) $(EMUFLAGS) -DLLMC_BF16=1 -x c++ -c $< -o $@
$(BUILD)/emu/0/%.o: dev/emu/%.cpp $(BUILD)/flags
	@mkdir -p $(@D)
	$(CXX) $(EMUFLAGS) -DLLMC_BF16=0 -c $< -o $@
$(BUILD)/emu/1/%.o: dev/emu/%.cpp $(BUILD)/flags
	@mkdir -p $(@D)
	$(CXX) $(EMUFLAGS) -DLLMC_BF16=1 -c $< -o $@
$(LIB): $(LIB_OBJ)
	@rm -f $@; ar rcs $@ $^
LINK = $(CC) $(FLAGS) -o $@ $(filter %.o,$^) $(LIB) $(LDFLAGS) $(LIBS)
$(BUILD)/train_gpt2: $(BUILD)/train_gpt2.o $(LIB)
	$(LINK)
$(BUILD)/test_gpt2: $(BUILD)/test_gpt2.o $(LIB)
	$(LINK)
$(BUILD)/test_%: $(BUILD)/dev/test/test_%.o $(LIB)
	$(LINK)
$(BUILD)/test_nvml: $(BUILD)/nvml_mock.so
$(BUILD)/test_kernel_trace: $(TRACE_OBJ) $(BUILD)/cupti_mock.so
$(BUILD)/%.so: dev/test/%.c $(BUILD)/flags
	$(CC) -shared -fPIC -std=c11 -D_GNU_SOURCE -Wall -Wextra $(FLAGS_ID) $< -o $@
$(BUILD)/fuzz_%: $(BUILD)/dev/fuzz/fuzz_%.o $(LIB)
	$(LINK) -fsanitize=fuzzer
$(BUILD)/bench_%: $(BUILD)/dev/bench/bench_%.o $(BENCH_OBJ) $(LIB)
	$(LINK)
$(BUILD)/batches: $(BUILD)/dev/bench/batches.o $(LIB)
	$(LINK)
$(BUILD)/%: $(BUILD)/dev/data/%.o $(LIB)
	$(LINK)

$(BUILD)/llmc/dist/mpi_wire.o: FLAGS_ID = $(MPI_FLAGS)
$(BUILD)/llmc/dist/nccl.o: FLAGS_ID = $(NCCL_FLAGS)
$(BUILD)/dev/bench/kernel_cupti.o $(BUILD)/dev/test/test_kernel_trace.o $(BUILD)/cupti_mock.so: FLAGS_ID = $(CUPTI_FLAGS)

# Rebuild when compiler or flags change.
ALL_FLAGS = $(subst ','\'',$(CC) $(FLAGS) $(MPI_FLAGS) $(CUPTI_FLAGS) $(NCCL_FLAGS) $(EMUFLAGS) $(CUDA_NVCC) $(NVCCFLAGS))
$(BUILD)/flags: FORCE
	@mkdir -p $(BUILD); echo '$(ALL_FLAGS)' | cmp -s - $@ || echo '$(ALL_FLAGS)' > $@

# The build's name goes into the one file that asks for it.
BUILD_ID := $(shell git describe --always --dirty 2>/dev/null || echo unversioned)
$(BUILD)/build_id: FORCE
	@mkdir -p $(BUILD); echo '$(BUILD_ID)' | cmp -s - $@ || echo '$(BUILD_ID)' > $@
$(BUILD)/llmc/base/version.o: $(BUILD)/build_id
$(BUILD)/llmc/base/version.o: FLAGS_ID := -DLLMC_BUILD_ID='"$(BUILD_ID)"'

test-programs: $(TESTS:%=$(BUILD)/%) $(PROGRAMS:%=$(BUILD)/%) $(BUILD)/batches
test: ## build and run the test suite, or TESTS_RUN="test_gemm ..." of it (last line: N passed, N failed)
	@bash dev/test/run.sh $(TESTS_RUN)

# The variables reach the build through make itself. Left out: fuzzers (their build has the sanitizers), texts and scripts, and
# test_leak.sh and test_emu_schedules.sh, which take minutes here and are about statistics and about the order of warps.
check-asan: ## the suite under AddressSanitizer and UBSan
	@LLMC_TEST_BUILD=build/asan LLMC_TEST_SKIP='test_fuzz.sh test_emu_schedules.sh test_leak.sh test_readme.sh test_record.sh test_cuda_build.sh test_rooms.sh test_scripts.sh test_recipes.sh' \
	$(MAKE) --no-print-directory test SAN=address,undefined OPT='-O1 -march=native'

matrix: ## chosen tests with gcc and clang, with and without OpenBLAS and OpenMP, in a path with spaces; warnings are errors
	@bash dev/test/matrix.sh

lint: ## clang-tidy and cppcheck
	@bash dev/test/lint.sh

fuzz-programs: $(FUZZERS:%=$(BUILD)/%)
fuzz: ## fuzz the readers of files and options, SECONDS=10 each (needs clang)
	@bash dev/fuzz/run.sh $(or $(SECONDS),10)

bench: $(BENCHES:%=$(BUILD)/%) ## build and run the benchmarks
	@for b in $^; do $$b || exit 1; done

quickstart: ## install what is missing, build, train a small GPT-2 and watch it learn
	@bash scripts/quickstart.sh

clean: ## remove what was built
	rm -rf build $(PROGRAMS) train_gpt2cu test_gpt2cu

help: ## this list
	@echo "targets:"; sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1|\2/p' Makefile | column -t -s '|'
	@echo "variables: CC=$(CC) OPT='$(OPT)' BUILD=$(BUILD) BLAS=auto|0|1 OMP=auto|0|1 MPI=auto|0|1 SAN=address,undefined FAULT=0|1 ARCH='80 90a' NVCC=/path/to/nvcc"

-include $(shell find $(BUILD) -name '*.d' 2>/dev/null)
