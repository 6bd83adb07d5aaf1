#!/usr/bin/env bash
# Fuzzes every reader of outside input for SECONDS each (libFuzzer with AddressSanitizer and UBSan), from seeds made of the goldens.
# run.sh SECONDS. A finding stays in build/fuzz/ as crash-..., leak-..., timeout-... and is shown with the command that repeats it.
set -u
cd "$(dirname "$0")/../.." || exit 1
seconds=${1:-10}
skip() { echo "skipped fuzz: $1"; echo "0 passed, 0 failed, 1 skipped"; exit 0; }
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
command -v clang >/dev/null || skip "clang is not installed"
echo 'int LLVMFuzzerTestOneInput(const char *d, unsigned long n); int LLVMFuzzerTestOneInput(const char *d, unsigned long n) { return (void)d, (int)(n & 0); }' |
    clang -x c - -fsanitize=fuzzer,address,undefined -o "$work/probe" 2>/dev/null || skip "clang's sanitizer runtime is not installed (Debian: libclang-rt-dev)"

flags=(BUILD=build/fuzz CC=clang OPT=-O1 SAN=fuzzer-no-link,address,undefined OMP=0 BLAS=0)
make --no-print-directory -j"$(nproc)" "${flags[@]}" fuzz-programs >"$work/build" 2>&1 ||
    { tail -20 "$work/build"; echo "FAILED fuzz: the build failed"; echo "0 passed, 1 failed"; exit 1; }

# seed FUZZER CHOICE FILE: a file behind the byte that chooses its reader ("": no such byte)
seed() {
    mkdir -p "$work/$1"
    { [ -z "$2" ] || printf "\\x$2"; cat "$3"; } >"$work/$1/$2-$(basename "$3")"
}
golden=dev/test/golden checkpoint=dev/test/golden/checkpoint_v1/step_00000014
seed safetensors 00 $checkpoint/model.safetensors
# The header alone, behind the size of the data in two bytes.
length=$(od -An -tu8 -N8 $checkpoint/model.safetensors | tr -d ' ')
zeros=$(($(wc -c <$checkpoint/model.safetensors) - 8 - length))
{ printf "\\x$(printf %02x $((zeros % 256)))\\x$(printf %02x $((zeros / 256)))"; tail -c +9 $checkpoint/model.safetensors | head -c "$length"; } >"$work/header"
seed safetensors 01 "$work/header"
seed import 03 "$work/header"
seed import 00 $checkpoint/config.json
seed import 00 $golden/hf_tiny/config.json
seed import 01 $checkpoint/model.safetensors
{ printf '\x66\x5b\x35\x01\x03\0\0\0\x04\0\0\0\x05\0\0\0\x01\0\0\0\x02\0\0\0\x04\0\0\0\x08\0\0\0'; head -c 2000 /dev/zero; } >"$work/weights" && seed import 02 "$work/weights"
i=0
for file in manifest.json training_state.json config.json model.safetensors optimizer-0000-of-0001.safetensors manifest.json; do
    seed checkpoint 0$i $checkpoint/$file; i=$((i + 1))
done
{ printf '\x98\xf7\x34\x01\x01\0\0\0\x10\0\0\0'; head -c 1012 /dev/zero; printf 'a\0b\0c\0d\0e\0f\0g\0h\0a\0b\0c\0d\0e\0f\0g\0h\0'; } >"$work/shard16" && seed shards "" "$work/shard16"
{ printf '\xb1\xf8\x34\x01\x07\0\0\0\x08\0\0\0'; head -c 1012 /dev/zero; printf 'a\0\0\0b\0\0\0c\0\0\0d\0\0\0e\0\0\0f\0\0\0g\0\0\0h\0\0\0'; } >"$work/shard32" && seed shards "" "$work/shard32"
printf 'a\0b\0c\0d\0e\0f\0g\0h\0' >"$work/bare" && seed shards "" "$work/bare"
seed tokenizer 00 $golden/tokenizer_hf/vocab.json
seed tokenizer 01 $golden/tokenizer_hf/merges.txt
seed tokenizer 02 $golden/tokenizer_hf/tokenizer.json
head -c 3000 $golden/tokenizer_hf/text.txt >"$work/text" && seed tokenizer 03 "$work/text"
printf '# comment\nlr = 3e-4\nbatch = 8\nsteps = 10k\nmodel = gpt2\nlr-schedule = wsd\nout = runs/x\n' >"$work/conf" && seed options 00 "$work/conf"
printf -- '--lr=1e-3\n--steps\n10k\n--no-generate\n--lr-schedule=cosine\n--total-batch=1M' >"$work/words" && seed options 01 "$work/words"

passed=0 failed=0
for program in build/fuzz/fuzz_*; do
    [ -x "$program" ] && [ -f "$program" ] || continue
    name=$(basename "$program"); corpus=$work/${name#fuzz_}
    mkdir -p "$corpus"
    if TMPDIR=$work "$program" "$corpus" -max_total_time="$seconds" -max_len=40000 -timeout=20 -rss_limit_mb=3000 -print_final_stats=1 \
        -dict=dev/fuzz/words.dict -artifact_prefix=build/fuzz/ >"$work/out" 2>&1 && runs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$work/out") && [ "${runs:-0}" -gt 8 ]; then
        echo "ok $name: $runs inputs, $(grep -o 'cov: [0-9]*' "$work/out" | tail -1)"; passed=$((passed + 1))
    else
        failed=$((failed + 1))
        grep -E 'ERROR|runtime error|internal error|SUMMARY|#[0-9]+ 0x.* in .*(llmc|fuzz_)' "$work/out" | head -12
        tail -3 "$work/out"
        echo "FAILED $name: repeat it with: $program $(sed -n 's/.*Test unit written to //p' "$work/out" | tail -1)"
    fi
done
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
