#!/usr/bin/env python3
"""Records what Hugging Face transformers' own GPT2LMHeadModel makes of a tiny random model:
    dev/test/golden/hf_tiny/                   save_pretrained(): model.safetensors, config.json
    dev/test/golden/gpt2_hf.safetensors        tokens (B, T), logits (B, T, V), loss (1), bound/X (see golden.py)

    python3 dev/reference/record_hf.py [OUT_DIR]     needs transformers (recorded with 4.33.3, PyTorch 1.13)

A HF model computes in float32: the exact values come from the same model in float64, the bounds from the float32 one, those for
bf16 from the same model in bf16 (loss in float32 of its logits), its channels and hidden units in RUNS orders.
Seeded; the same PyTorch gives the same weights.
"""
import os
import sys

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import golden
from record_gpt2 import RUNS, permute


def tiny_model():
    torch.manual_seed(20240612)
    config = GPT2Config(vocab_size=130, n_positions=20, n_embd=24, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0,
                        attn_pdrop=0.0, bos_token_id=129, eos_token_id=129)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, w in model.named_parameters():  # as at no initialisation: every bias and norm matters
            w.copy_(float("ln_" in name and name.endswith("weight")) + 0.15 * torch.randn(w.shape))
    return model


def logits_and_loss(model, tokens):
    with torch.no_grad():
        out = model(tokens, labels=tokens)  # the model shifts the labels itself
    return {"logits": out.logits.double().numpy(), "loss": out.loss.double().numpy()[None]}


def bf16_run(model, tokens, order_seed):
    rng = np.random.RandomState(order_seed)
    batch, channels, hidden = (rng.permutation(n) if order_seed else np.arange(n) for n in (4, 24, 96))
    prefix = "transformer."
    weights = {n[len(prefix):]: w for n, w in model.state_dict().items() if n.startswith(prefix) and not n.endswith((".attn.bias", ".masked_bias"))}
    other = GPT2LMHeadModel(model.config).eval()
    permuted = {prefix + n: w for n, w in permute(weights, channels, hidden).items()}
    assert not [n for n in other.load_state_dict(permuted, strict=False).missing_keys if not n.endswith((".attn.bias", "lm_head.weight", "masked_bias"))]
    other.tie_weights()
    with torch.no_grad():
        logits = other.bfloat16()(tokens[batch]).logits.float()
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), tokens[batch][:, 1:].reshape(-1))
    return {"logits": logits[np.argsort(batch)].double().numpy(), "loss": loss.double().numpy()[None]}


def main():
    out = sys.argv[1] if len(sys.argv) > 1 else "dev/test/golden"
    torch.set_num_threads(1)
    model = tiny_model()
    model.save_pretrained(os.path.join(out, "hf_tiny"), safe_serialization=True)
    os.remove(os.path.join(out, "hf_tiny", "generation_config.json"))
    os.chmod(os.path.join(out, "hf_tiny", "model.safetensors"), 0o644)
    tokens = torch.randint(0, 130, (4, 20), generator=torch.Generator().manual_seed(7))
    # float32 errors of this batch and of the same sequences one by one and reversed: other shapes, other orders of summation
    plain = [logits_and_loss(model, tokens)]
    plain.append({"logits": np.concatenate([logits_and_loss(model, s[None])["logits"] for s in tokens]), "loss": plain[0]["loss"]})
    plain.append({"logits": plain[0]["logits"], "loss": logits_and_loss(model, tokens.flip(0))["loss"]})
    bf16 = [bf16_run(model, tokens, seed) for seed in range(RUNS)]
    exact = logits_and_loss(model.double(), tokens)
    tensors = {"tokens": tokens.numpy().astype(np.float32)}
    tensors.update(golden.with_bounds(exact, plain, {}, bf16))
    golden.write_safetensors(os.path.join(out, "gpt2_hf.safetensors"), tensors)
    print("loss", exact["loss"], *(f"bound {n} {tensors['bound/' + n]} bf16 {tensors['bound_bf16/' + n]}" for n in exact))


if __name__ == "__main__":
    main()
