#!/usr/bin/env bash
# P28 with Hugging Face transformers itself: a directory that we export opens with from_pretrained as it is, without a word about
# missing or unexpected weights, and gives our logits; its tokenizers
# open a directory of ours and give our ids.
# Skips where no python3 (PYTHON names one) has torch and transformers. One that has: python3 -m venv --system-site-packages V;
# V/bin/pip install transformers==4.33.3 (one that takes Debian 12's PyTorch 1.13); PYTHON=V/bin/python3.
set -u
cd "$(dirname "$0")/../.." || exit 1
build=${LLMC_TEST_BUILD:-build/test} python=
skip() { echo "skipped hf_export: $1"; echo "0 passed, 0 failed, 1 skipped"; exit 0; }
for p in ${PYTHON:-python3 /usr/bin/python3}; do
    "$p" -c 'import torch, transformers' 2>/dev/null && { python=$p; break; }
done
[ "$python" ] || skip "no torch and transformers in ${PYTHON:-python3}"
dir=$(mktemp -d) || exit 1
trap 'rm -rf "$dir"' EXIT
if ! { "$build/test_gpt2" --export "$dir/model" "$dir/expected" && "$build/tokenize" train --vocab-size 400 --out "$dir/tokenizer" LICENSE &&
       "$build/tokenize" encode --tokenizer "$dir/tokenizer" --no-separator --out "$dir/ids.bin" LICENSE; } 2>"$dir/log"; then
    cat "$dir/log"; echo "FAILED hf_export: test_gpt2 --export or tokenize"; echo "0 passed, 1 failed, 0 skipped"; exit 1
fi
HF_HUB_OFFLINE=1 "$python" dev/reference/check_hf.py "$dir/model" "$dir/expected" "$dir/tokenizer" LICENSE "$dir/ids.bin"
