#!/usr/bin/env python3
"""Opens a directory written by export_model with transformers and compares logits, and one written by `tokenize train` and compares
ids; used by dev/test/test_hf.sh.

    python3 dev/reference/check_hf.py MODEL_DIR EXPECTED TOKENIZER_DIR TEXT SHARD

EXPECTED: as test_gpt2 --export writes it. SHARD: TEXT as `tokenize encode --no-separator` writes it.

Tolerance: |ours - exact| <= 2 |transformers in float32 - exact| + rounding; exact is transformers in float64.
"""
import sys

import numpy as np
import torch
from transformers import AutoConfig, AutoTokenizer, GPT2LMHeadModel, GPT2TokenizerFast


def read_expected(path):
    raw = open(path, "rb").read()
    batch, length, vocabulary = np.frombuffer(raw, "<i4", 3)
    tokens = np.frombuffer(raw, "<i4", batch * length, 12).reshape(batch, length)
    logits = np.frombuffer(raw, "<f4", batch * length * vocabulary, 12 + 4 * batch * length)
    return torch.tensor(tokens.astype(np.int64)), logits.reshape(batch, length, vocabulary).astype(np.float64)


def logits_of(model, tokens):
    with torch.no_grad():
        return model(tokens).logits.double().numpy()


def check(directory, expected):
    """name -> None when it holds, else what was found."""
    model, loading = GPT2LMHeadModel.from_pretrained(directory, output_loading_info=True)
    model.eval()
    found = {kind: keys for kind, keys in loading.items() if keys}
    tokens, ours = read_expected(expected)
    plain = [logits_of(model, tokens), np.concatenate([logits_of(model, t[None]) for t in tokens])]
    exact = logits_of(model.double(), tokens)
    bound = max(np.abs(p - exact).max() for p in plain)
    error, limit = np.abs(ours - exact), 2 * bound + 2.0**-24 * np.abs(exact)
    print(f"  logits: largest error {error.max():.3e}, largest limit {limit.max():.3e}, largest logit {np.abs(exact).max():.3f}")
    config = AutoConfig.from_pretrained(directory)
    dropouts = [config.resid_pdrop, config.embd_pdrop, config.attn_pdrop]
    wrong = ours.copy()
    wrong[0, 0, 0] += 0.05 * np.abs(exact).max()
    return {
        "hf_loads_every_weight_and_no_other": f"{found}" if found else None,
        "hf_logits": None if (error <= limit).all() else f"{(~(error <= limit)).sum()} logits beyond their limit, error {error.max()}",
        "hf_logits_test_sees_one_wrong_value": None if (~(np.abs(wrong - exact) <= limit)).sum() == 1 else "it does not",
        "hf_config": None if dropouts == [0, 0, 0] and config.tie_word_embeddings else f"dropouts {dropouts}, tied {config.tie_word_embeddings}",
    }


def check_tokenizer(directory, text_path, shard):
    ids = np.fromfile(shard, "<u2")[512:].tolist()
    text = open(text_path, encoding="utf-8", newline="").read()
    results = {}
    for kind in (AutoTokenizer, GPT2TokenizerFast):
        tokenizer = kind.from_pretrained(directory)
        theirs = tokenizer.encode(text)
        same = theirs == ids and tokenizer.decode(ids) == text and tokenizer.eos_token_id == len(tokenizer) - 1
        results[f"hf_tokenizer_{kind.__name__}"] = None if same else f"{len(ids)} ids of ours, {len(theirs)} of theirs, eos {tokenizer.eos_token_id}"
    return results


def main():
    results = {**check(*sys.argv[1:3]), **check_tokenizer(*sys.argv[3:6])}
    for name, problem in results.items():
        print(f"FAILED {name}: {problem}" if problem else f"ok {name}")
    failed = sum(problem is not None for problem in results.values())
    print(f"{len(results) - failed} passed, {failed} failed, 0 skipped")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
