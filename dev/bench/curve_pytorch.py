#!/usr/bin/env python3
"""Trains the GPT-2 of peer_pytorch.py from weights that train_gpt2 wrote, on the batches that it trains on: the loss curves that
dev/bench/loss_curves.sh compares ours with.

    python3 dev/bench/curve_pytorch.py --init DIRECTORY --batches FILE --samples G --batch B --seq-len T --steps S --out PREFIX
                                       [--runs 2] [--device cpu|cuda] [--dtype fp32|bf16] [--seconds N] [--threads N] [--lr X] ...

DIRECTORY: a checkpoint, of which model.safetensors and config.json are read. FILE: as dev/bench/batches.c writes it. Schedule,
AdamW and clipping are written from their definitions, not from ours; S is the length of the schedule, --seconds may end a run before.
bf16: weights are float32 masters rounded to nearest for each step, activations bf16, loss, clipping and AdamW float32.
Run k writes PREFIX-k.tsv, a line a step: step (from 1), loss, gradient norm before clipping.

Run 0 computes as written. Every other run computes the same function in another order of summation: residual channels, heads, channels
in a head and hidden units are renumbered, and the samples of each step shuffled. So runs differ in rounding alone, and in all of it:
every dot product, norm and sum over the batch is added up differently, and in bf16 what differs in the last place of a sum is rounded
elsewhere from then on.
"""
import argparse
import json
import math
import os
import sys
import time

import torch
import torch.nn.functional as F
from peer_pytorch import GPT2


def read_safetensors(path):
    """name -> float32 tensor."""
    raw = torch.from_file(path, size=os.path.getsize(path), dtype=torch.uint8)
    n = int.from_bytes(bytes(raw[:8].tolist()), "little")
    result = {}
    for name, t in json.loads(bytes(raw[8 : 8 + n].tolist())).items():
        if name == "__metadata__":
            continue
        if t["dtype"] != "F32":
            sys.exit(f"curve_pytorch: {path}: {name} is {t['dtype']}, expected F32")
        begin, end = t["data_offsets"]
        result[name] = raw[8 + n + begin : 8 + n + end].clone().view(torch.float32).view(t["shape"])
    return result


def padded(vocabulary):
    """Rows of zeros for the matrix products' sake; their logits are left out of the loss, so they stay zero."""
    return (vocabulary + 127) // 128 * 128


def weights_in_order(file, layers, channels, heads, order):
    """State dict of peer_pytorch.GPT2, renumbered by `order` (0: not)."""
    generator = torch.Generator().manual_seed(order)
    size = channels // heads

    def numbers(n):
        return torch.randperm(n, generator=generator) if order else torch.arange(n)

    residual = numbers(channels)
    state = {n: file[n][:, residual] for n in ("wte.weight", "wpe.weight")}
    state["wte.weight"] = F.pad(state["wte.weight"], (0, 0, 0, padded(len(state["wte.weight"])) - len(state["wte.weight"])))
    state.update({"lnf." + part: file["ln_f." + part][residual] for part in ("weight", "bias")})
    for layer in range(layers):
        f = {n[len(f"h.{layer}.") :]: w for n, w in file.items() if n.startswith(f"h.{layer}.")}
        head, hidden, everything = numbers(heads) * size, numbers(4 * channels), slice(None)
        qk, v = ((head[:, None] + numbers(size)).flatten() for _ in range(2))
        qkv = torch.cat([qk, channels + qk, 2 * channels + v])
        # ours, theirs, which outputs, which inputs; the file's matrices are (in, out)
        rows = (("ln_1", "ln1", residual, None), ("attn.c_attn", "qkv", qkv, residual), ("attn.c_proj", "proj", residual, v),
                ("ln_2", "ln2", residual, None), ("mlp.c_fc", "fc", hidden, residual), ("mlp.c_proj", "fcproj", residual, hidden))
        for theirs, name, outputs, inputs in rows:
            w = f[theirs + ".weight"]
            state[f"blocks.{layer}.{name}.weight"] = w[outputs] if inputs is None else w.T[outputs][:, inputs]
            state[f"blocks.{layer}.{name}.bias"] = f[theirs + ".bias"][outputs]
    return state


def learning_rate(o, step):
    """Linear warm-up, then a cosine whose ends are o.lr at step `warmup` and o.final_lr * o.lr at the last."""
    if step < o.warmup:
        return o.lr * (step + 1) / o.warmup
    part = (step - o.warmup) / max(1, o.steps - 1 - o.warmup)
    return o.lr * (o.final_lr + (1 - o.final_lr) * (1 + math.cos(math.pi * part)) / 2)


def mean_loss(model, samples, mask, vocabulary):
    """In float32, whatever the model computes in."""
    logits = model.logits(samples[:, :-1].contiguous(), mask)[..., :vocabulary]
    return F.cross_entropy(logits.flatten(0, 1).float(), samples[:, 1:].flatten())


def train(model, masters, batches, order, vocabulary, o):
    """(loss, norm) of each step. model computes in o.dtype; masters are its parameters in float32, or the same tensors."""
    params = list(model.parameters())
    apart = params[0] is not masters[0]
    groups = [{"params": [w for w in masters if w.dim() == dim], "weight_decay": decay} for dim, decay in ((2, o.weight_decay), (1, 0.0))]
    fused = {"fused": True} if o.device == "cuda" else {}  # PyTorch 1 has no such argument
    optimizer = torch.optim.AdamW(groups, lr=o.lr, betas=(o.beta1, o.beta2), eps=o.eps, **fused)
    mask = torch.full((o.seq_len, o.seq_len), float("-inf"), device=o.device, dtype=params[0].dtype).triu(1)
    generator = torch.Generator().manual_seed(order)
    started = time.monotonic()
    for step in range(o.steps):
        samples = batches[step][torch.randperm(o.samples, generator=generator)] if order else batches[step]
        samples = samples.to(o.device, torch.int64)
        if apart:
            with torch.no_grad():
                for p, w in zip(params, masters):
                    p.copy_(w)
        sums, loss = [torch.zeros_like(w) for w in masters], torch.zeros((), device=o.device)
        for micro in samples.split(o.batch):
            part = mean_loss(model, micro, mask, vocabulary) * (len(micro) / o.samples)
            torch._foreach_add_(sums, list(torch.autograd.grad(part, params)))
            loss += part.detach()
        # In float64: many squares added up in float32 come out too small, in every order alike.
        norm = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float64) for g in sums]).norm().item()
        torch._foreach_mul_(sums, min(1.0, o.grad_clip / norm))
        for w, g in zip(masters, sums):
            w.grad = g
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(o, step)
        optimizer.step()
        yield loss.item(), norm
        if o.seconds and time.monotonic() - started > o.seconds:
            return


def main():
    parser = argparse.ArgumentParser()
    for name in ("init", "batches", "out"):
        parser.add_argument("--" + name, required=True)
    for name in ("samples", "batch", "seq-len", "steps"):
        parser.add_argument("--" + name, type=int, required=True)
    for name, default in (("runs", 2), ("warmup", 0), ("threads", 0)):
        parser.add_argument("--" + name, type=int, default=default)
    for name, default in (("lr", 6e-4), ("final-lr", 0.1), ("weight-decay", 0.1), ("beta1", 0.9), ("beta2", 0.95), ("eps", 1e-8),
                          ("grad-clip", 1.0), ("seconds", 0.0)):
        parser.add_argument("--" + name, type=float, default=default)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
    o = parser.parse_args()
    if o.device == "cuda" and not torch.cuda.is_available():
        sys.exit("curve_pytorch: PyTorch sees no GPU here")
    if o.device == "cuda":
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False  # sums in float32, as ours
    if o.threads:
        torch.set_num_threads(o.threads)
    with open(os.path.join(o.init, "config.json"), encoding="utf-8") as f:
        c = json.load(f)
    layers, channels, heads, vocabulary = c["n_layer"], c["n_embd"], c["n_head"], c["vocab_size"]
    file = read_safetensors(os.path.join(o.init, "model.safetensors"))
    shape = (o.steps, o.samples, o.seq_len + 1)
    batches = torch.from_file(o.batches, size=math.prod(shape), dtype=torch.int32).view(shape)
    print(f"curve_pytorch: PyTorch {torch.__version__}, {o.dtype}, {torch.cuda.get_device_name() if o.device == 'cuda' else 'CPU'}", flush=True)
    for order in range(o.runs):
        model = GPT2(layers, channels, heads, padded(vocabulary), c["n_positions"])
        model.load_state_dict(weights_in_order(file, layers, channels, heads, order))
        masters = list(model.to(o.device).parameters())
        if o.dtype == "bf16":
            masters = [w.detach().clone() for w in masters]
            model.to(torch.bfloat16)
        started, steps = time.monotonic(), 0
        with open(f"{o.out}-{order}.tsv", "w", encoding="utf-8") as out:
            for loss, norm in train(model, masters, batches, order, vocabulary, o):
                steps += 1
                print(steps, f"{loss:.9g}", f"{norm:.9g}", sep="\t", file=out, flush=True)
        seconds = time.monotonic() - started
        print(f"run {order}: {steps} of {o.steps} steps in {seconds:.1f} s, last loss {loss:.4f}", flush=True)


if __name__ == "__main__":
    main()
