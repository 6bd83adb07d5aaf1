#!/usr/bin/env python3
"""Encodes the same documents as bench_tokenizer with Hugging Face tokenizers on one thread.
Usage: tokenizer_peer.py TOKENIZER_DIR TEXT DOCUMENT_BYTES. Prints: version, MB per second of CPU time (best of 3), tokens, hash of the ids."""
import os
import sys
import time
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["RAYON_NUM_THREADS"] = "1"
try:
    import tokenizers
    from tokenizers import Tokenizer, models, pre_tokenizers
except ImportError:
    sys.exit(1)

folder, path, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
data = open(path, "rb").read()
documents, at = [], 0
while at < len(data):
    end = data.find(b"\n", min(at + size, len(data))) + 1 or len(data)
    documents.append(data[at:end].decode())
    at = end
t = Tokenizer(models.BPE.from_file(f"{folder}/vocab.json", f"{folder}/merges.txt"))
t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
best = float("inf")
for _ in range(3):
    started = time.process_time()
    encodings = t.encode_batch_fast(documents, add_special_tokens=False)
    best = min(best, time.process_time() - started)
h, n = 0xCBF29CE484222325, 0
for e in encodings:
    n += len(e.ids)
    for i in e.ids:
        h = ((h ^ i) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
print(tokenizers.__version__, len(data) / best / 1e6, n, f"{h:016x}")
