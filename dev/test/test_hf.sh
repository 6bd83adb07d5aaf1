#!/usr/bin/env bash
# P28 with Hugging Face transformers itself: a directory that we export opens with from_pretrained as it is, without a word about
# missing or unexpected weights, and gives our logits.
# Skips where python3 (PYTHON names another) has no torch or transformers.
set -u
cd "$(dirname "$0")/../.." || exit 1
build=${LLMC_TEST_BUILD:-build/test} python=${PYTHON:-python3}
skip() { echo "skipped hf_export: $1"; echo "0 passed, 0 failed, 1 skipped"; exit 0; }
"$python" -c 'import torch, transformers' 2>/dev/null || skip "$python has no torch and transformers"
dir=$(mktemp -d) || exit 1
trap 'rm -rf "$dir"' EXIT
if ! "$build/test_gpt2" --export "$dir/model" "$dir/expected"; then
    echo "FAILED hf_export: test_gpt2 --export"; echo "0 passed, 1 failed, 0 skipped"; exit 1
fi
HF_HUB_OFFLINE=1 "$python" dev/reference/check_hf.py "$dir/model" "$dir/expected"
