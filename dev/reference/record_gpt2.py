#!/usr/bin/env python3
"""Records dev/test/golden/gpt2_tiny.safetensors: a tiny GPT-2 in PyTorch, written from the equations of the papers.

    python3 dev/reference/record_gpt2.py [OUT.safetensors]

Exact values come from float64; bounds from RUNS runs in float32, each with the batch, the residual channels and the hidden
units in another order (the same function; another order of summation), so that a bound is not one lucky rounding. Bounds for bf16
from as many runs of plain bf16: weights and activations in bf16, each op PyTorch's own (which computes a norm or a softmax in float32
inside), loss in float32 of bf16 logits, gradients in bf16, AdamW in float32 on float32 master weights.

The file (all float32, tensors in the file layout of GPT-2 checkpoints, matrices as (in, out)):
    config (5)               V L H C T
    adamw (5)                beta1 beta2 eps weight_decay grad_clip
    tokens, targets (B, t)   t < T; two targets are -1: ignored, the mean is over the others
    loss (1), logits (B, t, V), grad/NAME for every parameter: of that batch at the initial weights
    train_tokens (10, B, t+1), train_lr (10), train_loss (10), train_norm (10): ten AdamW steps, norm before clipping
    trained/NAME             weights after them
    bound/X, bound_bf16/X    for each compared tensor X: see golden.py
Initial weights are a formula, so that the file need not hold them: element i of the k-th parameter (order of `parameters`) is
centre + spread * u, u = (h >> 8) / 2^23 - 1, h = the 32-bit mix of MurmurHash3 applied to i + 0x9E3779B9 (k + 1), in double,
rounded once to float32. centre is 1 for norm weights, else 0; spread by kind of tensor stands in SPREAD.

Same PyTorch, BLAS and machine: the same bytes. Another BLAS: exact values to 1 unit in the last place, bounds to a factor of about 2.
Recorded with PyTorch 1.13, OpenBLAS 0.3.21.
"""
import os
import sys

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import golden

V, L, H, C, T = 130, 2, 3, 36, 24
B, t, STEPS, RUNS = 4, 19, 10, 16
# The engine takes these as float32, so the exact run takes the values that float32 holds. Gradient norms run from 1.5 to 2.4,
# so that some steps are clipped and some are not.
BETA1, BETA2, EPS, DECAY, CLIP = (float(np.float32(x)) for x in (0.9, 0.95, 1e-8, 0.1, 1.8))
LR = [float(np.float32(x)) for x in (1e-3, 2e-3, 3e-3, 3e-3, 3e-3, 2.5e-3, 2e-3, 1.5e-3, 1e-3, 5e-4)]
SPREAD = {"wte.weight": 0.25, "wpe.weight": 0.125, "ln.weight": 0.25, "bias": 0.125, "matrix": 0.25}


def parameters():
    """name -> (shape, centre, spread), in checkpoint order."""
    table = {"wte.weight": (V, C), "wpe.weight": (T, C)}
    for layer in range(L):
        for name, shape in (("ln_1.weight", (C,)), ("ln_1.bias", (C,)), ("attn.c_attn.weight", (C, 3 * C)),
                            ("attn.c_attn.bias", (3 * C,)), ("attn.c_proj.weight", (C, C)), ("attn.c_proj.bias", (C,)),
                            ("ln_2.weight", (C,)), ("ln_2.bias", (C,)), ("mlp.c_fc.weight", (C, 4 * C)),
                            ("mlp.c_fc.bias", (4 * C,)), ("mlp.c_proj.weight", (4 * C, C)), ("mlp.c_proj.bias", (C,))):
            table[f"h.{layer}.{name}"] = shape
    table.update({"ln_f.weight": (C,), "ln_f.bias": (C,)})
    result = {}
    for name, shape in table.items():
        norm = "ln_" in name and name.endswith("weight")
        kind = "ln.weight" if norm else name if name in SPREAD else "bias" if name.endswith("bias") else "matrix"
        result[name] = (shape, 1.0 if norm else 0.0, SPREAD[kind])
    return result


def mix(x):
    x = x.astype(np.uint32)
    x ^= x >> np.uint32(16)
    x *= np.uint32(0x85EBCA6B)
    x ^= x >> np.uint32(13)
    x *= np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


def uniform_bits(k, n):
    return mix((np.arange(n, dtype=np.uint64) + 0x9E3779B9 * (k + 1)) & 0xFFFFFFFF)


def initial_weights():
    weights = {}
    for k, (name, (shape, centre, spread)) in enumerate(parameters().items()):
        u = (uniform_bits(k, int(np.prod(shape))) >> np.uint32(8)).astype(np.float64) / 2.0**23 - 1.0
        weights[name] = (centre + spread * u).astype(np.float32).reshape(shape)
    return weights


def layer_norm(x, gamma, beta):
    if x.dtype == torch.bfloat16:
        return F.layer_norm(x, x.shape[-1:], gamma, beta, 1e-5)
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + 1e-5) * gamma + beta


def gelu(x):
    if x.dtype == torch.bfloat16:
        return F.gelu(x, approximate="tanh")
    return 0.5 * x * (1 + torch.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def attention(x, p):
    batch, length, _ = x.shape
    q, k, v = (m.view(batch, length, H, C // H).transpose(1, 2)
               for m in (x @ p["attn.c_attn.weight"] + p["attn.c_attn.bias"]).split(C, dim=2))
    scores = q @ k.transpose(2, 3) / np.sqrt(C // H)
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    out = torch.softmax(scores.masked_fill(future, float("-inf")), dim=-1) @ v
    return out.transpose(1, 2).reshape(batch, length, C) @ p["attn.c_proj.weight"] + p["attn.c_proj.bias"]


def forward(p, tokens):
    """Logits (B, t, V): pre-LN GPT-2 (Radford et al. 2019), head tied to the token embedding."""
    x = p["wte.weight"][tokens] + p["wpe.weight"][: tokens.shape[1]]
    for layer in range(L):
        block = {n[len(f"h.{layer}."):]: v for n, v in p.items() if n.startswith(f"h.{layer}.")}
        x = x + attention(layer_norm(x, block["ln_1.weight"], block["ln_1.bias"]), block)
        hidden = gelu(layer_norm(x, block["ln_2.weight"], block["ln_2.bias"]) @ block["mlp.c_fc.weight"] + block["mlp.c_fc.bias"])
        x = x + hidden @ block["mlp.c_proj.weight"] + block["mlp.c_proj.bias"]
    return layer_norm(x, p["ln_f.weight"], p["ln_f.bias"]) @ p["wte.weight"].T


def mean_loss(logits, targets):
    keep = targets >= 0
    picked = logits[keep].gather(1, targets[keep][:, None])[:, 0]
    return (torch.logsumexp(logits[keep], -1) - picked).sum() / keep.sum()


def adamw(p, grads, m, v, step):
    """Loshchilov and Hutter 2019, after clipping to a global norm of CLIP. Returns the norm before clipping."""
    norm = torch.sqrt(sum((g**2).sum() for g in grads.values()))
    scale = min(1.0, CLIP / norm.item())
    for name in p:
        g = grads[name] * scale
        m[name] = BETA1 * m[name] + (1 - BETA1) * g
        v[name] = BETA2 * v[name] + (1 - BETA2) * g * g
        mhat, vhat = m[name] / (1 - BETA1 ** (step + 1)), v[name] / (1 - BETA2 ** (step + 1))
        decay = DECAY if p[name].dim() == 2 else 0.0
        p[name] = p[name] - LR[step] * (mhat / (torch.sqrt(vhat) + EPS) + decay * p[name])
    return norm


def gradients(master, tokens, targets, dtype):
    p = {n: w.detach().to(dtype).requires_grad_() for n, w in master.items()}
    logits = forward(p, tokens)
    if logits.dtype == torch.bfloat16:
        logits = logits.float()
    loss = mean_loss(logits, targets)
    grads = torch.autograd.grad(loss, list(p.values()))
    return logits.detach(), loss.detach(), {n: g.to(w.dtype) for (n, w), g in zip(master.items(), grads)}


def permute(p, channels, hidden, back=False):
    """Renames the residual channels and each block's hidden units: the same function of the tokens."""
    if back:
        channels, hidden = np.argsort(channels), np.argsort(hidden)
    result = {}
    for name, w in p.items():
        rows = hidden if name.endswith("mlp.c_proj.weight") else channels if name.endswith(("c_attn.weight", "c_fc.weight")) else None
        columns = hidden if "c_fc" in name else None if "c_attn" in name else channels
        w = w if rows is None else w[torch.as_tensor(rows)]
        result[name] = w if columns is None else w[..., torch.as_tensor(columns)]
    return result


def run(dtype, data, order_seed):
    """Everything recorded, computed in one dtype (bf16: over float32 master weights); order_seed 0: as written, else in another
    order of summation."""
    master = torch.float32 if dtype == torch.bfloat16 else dtype
    rng = np.random.RandomState(order_seed)
    batch, channels, hidden = (rng.permutation(n) if order_seed else np.arange(n) for n in (B, C, 4 * C))
    p = permute({n: torch.tensor(w).to(master) for n, w in initial_weights().items()}, channels, hidden)
    result = {}
    logits, loss, grads = gradients(p, data["tokens"][batch], data["targets"][batch], dtype)
    result["logits"], result["loss"] = logits[np.argsort(batch)], loss[None]
    result.update({"grad/" + n: g for n, g in permute(grads, channels, hidden, back=True).items()})
    m, v = ({n: torch.zeros_like(w) for n, w in p.items()} for _ in range(2))
    losses, norms = [], []
    for step, tokens in enumerate(data["train_tokens"][:, batch]):
        _, loss, grads = gradients(p, tokens[:, :-1], tokens[:, 1:], dtype)
        norms.append(adamw(p, grads, m, v, step))
        losses.append(loss)
    result["train_loss"], result["train_norm"] = torch.stack(losses), torch.stack(norms)
    result.update({"trained/" + n: w for n, w in permute(p, channels, hidden, back=True).items()})
    return {n: x.double().numpy() for n, x in result.items()}


def main():
    out = sys.argv[1] if len(sys.argv) > 1 else "dev/test/golden/gpt2_tiny.safetensors"
    torch.set_num_threads(1)
    ids = torch.tensor((uniform_bits(1000, (STEPS + 1) * B * (t + 1)) % V).astype(np.int64)).view(STEPS + 1, B, t + 1)
    data = {"tokens": ids[0, :, :-1], "targets": ids[0, :, 1:].clone(), "train_tokens": ids[1:]}
    data["targets"][0, 0] = data["targets"][2, t - 1] = -1
    exact = run(torch.float64, data, 0)
    plain = [run(torch.float32, data, seed) for seed in range(RUNS)]
    bf16 = [run(torch.bfloat16, data, seed) for seed in range(RUNS)]
    head = {"config": [V, L, H, C, T], "adamw": [BETA1, BETA2, EPS, DECAY, CLIP], "train_lr": LR}
    tensors = {n: np.array(x, np.float32) for n, x in head.items()}
    tensors.update({n: x.numpy().astype(np.float32) for n, x in data.items()})
    # The gradient of the key third of the attention bias is zero in exact arithmetic: rounding noise that AdamW blows up. Its own bound.
    parts = {f"{kind}/h.{layer}.attn.c_attn.bias": 3 for kind in ("grad", "trained") for layer in range(L)}
    parts.update({"train_loss": STEPS, "train_norm": STEPS})
    tensors.update(golden.with_bounds(exact, plain, parts, bf16))
    golden.write_safetensors(out, tensors)
    print("loss", exact["loss"], "train loss", exact["train_loss"], "norm", exact["train_norm"])
    for name in exact:
        print(f"{name:38s} largest {np.abs(exact[name]).max():9.3e}  bound", *(f"{x:.1e}" for x in tensors["bound/" + name]),
              " bf16", *(f"{x:.1e}" for x in tensors["bound_bf16/" + name]))


if __name__ == "__main__":
    main()
