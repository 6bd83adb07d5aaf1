# llmc: `make help` lists the targets and variables.
CC      ?= cc
BUILD   ?= build
OPT     ?= -O3 -march=native
SAN     ?=
FAULT   ?= 0
BLAS    ?= auto
OMP     ?= auto

# What is on this machine; each may be absent. The build summary says what is on.
try        = $(shell echo '$(1)' | $(CC) -x c - $(2) -o /dev/null 2>/dev/null && echo 1 || echo 0)
HAVE_OMP  := $(if $(filter auto,$(OMP)),$(call try,int main(void){return 0;},-fopenmp),$(OMP))
HAVE_BLAS := $(if $(filter auto,$(BLAS)),$(call try,int openblas_get_num_threads(void); int main(void){return !openblas_get_num_threads();},-lopenblas),$(BLAS))

FLAGS   := -std=c11 -D_GNU_SOURCE $(OPT) -g -Wall -Wextra -Wshadow -Wstrict-prototypes -fno-math-errno -fno-trapping-math -I. -MMD -MP
LIBS    := -ljansson -lpcre2-8 -lxxhash -lm -lpthread
ifeq ($(HAVE_OMP),1)
FLAGS   += -fopenmp
else
FLAGS   += -Wno-unknown-pragmas
endif
ifeq ($(HAVE_BLAS),1)
FLAGS   += -DLLMC_OPENBLAS
LIBS    += -lopenblas
endif
ifneq ($(SAN),)
FLAGS   += -fsanitize=$(SAN) -fno-omit-frame-pointer -fno-sanitize-recover=undefined
endif
ifeq ($(FAULT),1)
FLAGS   += -DLLMC_FAULT_INJECTION
endif

LIB      := $(BUILD)/libllmc.a
LIB_OBJ  := $(patsubst %.c,$(BUILD)/%.o,$(wildcard llmc/*.c llmc/*/*.c dev/data/*/*.c))
PROGRAMS := $(patsubst dev/data/%.c,%,$(wildcard dev/data/*.c)) $(patsubst %.cu,%,$(wildcard train_gpt2.cu))
TESTS    := $(patsubst dev/test/%.c,%,$(wildcard dev/test/test_*.c)) $(patsubst %.cu,%,$(wildcard test_gpt2.cu))
FUZZERS  := $(patsubst dev/fuzz/%.c,%,$(wildcard dev/fuzz/fuzz_*.c))
BENCHES  := $(patsubst dev/bench/%.c,%,$(wildcard dev/bench/bench_*.c))

.PHONY: all test test-programs quickstart check-asan matrix lint fuzz fuzz-programs bench summary clean help FORCE
.SECONDARY:
all: summary $(PROGRAMS) ## build the programs: train_gpt2, tokenize, stories

summary:
	@echo "build: $(CC) $(OPT), OpenMP $(if $(filter 1,$(HAVE_OMP)),on,off), OpenBLAS $(if $(filter 1,$(HAVE_BLAS)),on,off (own matrix products)), CUDA off (CPU backend only)"

# The programs stand at the top of the tree; everything else stays in $(BUILD).
$(PROGRAMS): %: $(BUILD)/%
	@cp $< $@

$(BUILD)/%.o: %.c $(BUILD)/flags
	@mkdir -p $(@D)
	$(CC) $(FLAGS) $(FLAGS_ID) -c $< -o $@
$(BUILD)/%.o: %.cu $(BUILD)/flags
	@mkdir -p $(@D)
	$(CC) $(FLAGS) -x c -c $< -o $@
$(LIB): $(LIB_OBJ)
	@rm -f $@; ar rcs $@ $^
LINK = $(CC) $(FLAGS) -o $@ $< $(LIB) $(LDFLAGS) $(LIBS)
$(BUILD)/train_gpt2: $(BUILD)/train_gpt2.o $(LIB)
	$(LINK)
$(BUILD)/test_gpt2: $(BUILD)/test_gpt2.o $(LIB)
	$(LINK)
$(BUILD)/test_%: $(BUILD)/dev/test/test_%.o $(LIB)
	$(LINK)
$(BUILD)/fuzz_%: $(BUILD)/dev/fuzz/fuzz_%.o $(LIB)
	$(LINK) -fsanitize=fuzzer
$(BUILD)/bench_%: $(BUILD)/dev/bench/bench_%.o $(LIB)
	$(LINK)
$(BUILD)/%: $(BUILD)/dev/data/%.o $(LIB)
	$(LINK)

# Rebuild when compiler or flags change.
$(BUILD)/flags: FORCE
	@mkdir -p $(BUILD); echo '$(CC) $(subst ','\'',$(FLAGS))' | cmp -s - $@ || echo '$(CC) $(subst ','\'',$(FLAGS))' > $@

# The build's name goes into the one file that asks for it.
BUILD_ID := $(shell git describe --always --dirty 2>/dev/null || echo unversioned)
$(BUILD)/build_id: FORCE
	@mkdir -p $(BUILD); echo '$(BUILD_ID)' | cmp -s - $@ || echo '$(BUILD_ID)' > $@
$(BUILD)/llmc/base/version.o: $(BUILD)/build_id
$(BUILD)/llmc/base/version.o: FLAGS_ID := -DLLMC_BUILD_ID='"$(BUILD_ID)"'

test-programs: $(TESTS:%=$(BUILD)/%) $(PROGRAMS:%=$(BUILD)/%)
test: ## build and run the test suite, or TESTS_RUN="test_gemm ..." of it (last line: N passed, N failed)
	@bash dev/test/run.sh $(TESTS_RUN)

# The variables reach the build through make itself. Left out: fuzzers (their build has the sanitizers), texts and scripts, and
# test_leak.sh, which is about statistics and takes minutes of training here.
check-asan: ## the suite under AddressSanitizer and UBSan
	@LLMC_TEST_BUILD=build/asan LLMC_TEST_SKIP='test_fuzz.sh test_leak.sh test_readme.sh test_rooms.sh test_scripts.sh' \
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
	rm -rf build $(PROGRAMS)

help: ## this list
	@echo "targets:"; sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1|\2/p' Makefile | column -t -s '|'
	@echo "variables: CC=$(CC) OPT='$(OPT)' BUILD=$(BUILD) BLAS=auto|0|1 OMP=auto|0|1 SAN=address,undefined FAULT=0|1"

-include $(shell find $(BUILD) -name '*.d' 2>/dev/null)
