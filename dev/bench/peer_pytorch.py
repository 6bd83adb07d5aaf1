#!/usr/bin/env python3
"""The same training step in PyTorch, as fused as PyTorch offers: linear with bias, layer_norm, tanh GELU, attention,
cross_entropy are one call each, clip_grad_norm_, AdamW. On a CPU eager in float32; on a GPU under torch.compile with
bf16 autocast (float32 weights), TF32 for what is left in float32, AdamW(fused=True), vocabulary padded to 50304.

    python3 dev/bench/peer_pytorch.py [--model gpt2] [--batch 4] [--seq-len 64] [--steps 5] [--threads 2] [--wait]
                                      [--device cpu|cuda] [--compile 0|1]

--wait: one step per line read from stdin, each answered by "ms WALL CPU" (dev/bench/compare_step.sh).
"""
import argparse
import sys
import time

import torch
import torch.nn.functional as F

SHAPES = {"gpt2": (12, 768, 12), "gpt2-medium": (24, 1024, 16), "gpt2-large": (36, 1280, 20), "gpt2-xl": (48, 1600, 25), "tiny": (4, 128, 4)}


class Block(torch.nn.Module):
    def __init__(self, channels, heads):
        super().__init__()
        self.heads = heads
        self.ln1, self.ln2 = torch.nn.LayerNorm(channels), torch.nn.LayerNorm(channels)
        self.qkv, self.proj = torch.nn.Linear(channels, 3 * channels), torch.nn.Linear(channels, channels)
        self.fc, self.fcproj = torch.nn.Linear(channels, 4 * channels), torch.nn.Linear(4 * channels, channels)

    def attention(self, x, mask):
        batch, length, channels = x.shape
        q, k, v = (m.view(batch, length, self.heads, -1).transpose(1, 2) for m in self.qkv(x).split(channels, dim=2))
        if hasattr(F, "scaled_dot_product_attention"):  # PyTorch 2
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            out = torch.softmax(q @ k.transpose(2, 3) * q.shape[3] ** -0.5 + mask, dim=-1) @ v
        return self.proj(out.transpose(1, 2).reshape(batch, length, channels))

    def forward(self, x, mask):
        x = x + self.attention(self.ln1(x), mask)
        return x + self.fcproj(F.gelu(self.fc(self.ln2(x)), approximate="tanh"))


class GPT2(torch.nn.Module):
    def __init__(self, layers, channels, heads, vocabulary, positions):
        super().__init__()
        self.wte, self.wpe = torch.nn.Embedding(vocabulary, channels), torch.nn.Embedding(positions, channels)
        self.blocks = torch.nn.ModuleList(Block(channels, heads) for _ in range(layers))
        self.lnf = torch.nn.LayerNorm(channels)

    def logits(self, tokens, mask):
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, mask)
        return F.linear(self.lnf(x), self.wte.weight)

    def loss(self, tokens, targets, mask):
        return F.cross_entropy(self.logits(tokens, mask).flatten(0, 1), targets.flatten())


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="gpt2", choices=SHAPES)
    parser.add_argument("--vocab-size", type=int, default=0, help="0: 50257 on a CPU, 50304 on a GPU")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--compile", type=int, default=-1, help="-1: on a GPU")
    for name, default in (("batch", 4), ("seq-len", 64), ("steps", 5), ("threads", 2)):
        parser.add_argument("--" + name, type=int, default=default)
    parser.add_argument("--wait", action="store_true")
    o = parser.parse_args()
    gpu = o.device == "cuda"
    if gpu and not torch.cuda.is_available():
        sys.exit("peer_pytorch: PyTorch sees no GPU here")
    o.vocab_size = o.vocab_size or (50304 if gpu else 50257)
    torch.set_num_threads(o.threads)
    if gpu:
        torch.set_float32_matmul_precision("high")
    torch.manual_seed(1)
    model = GPT2(*SHAPES[o.model], o.vocab_size, max(1024, o.seq_len)).to(o.device)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.normal_(0, 0.02)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
                                  lr=1e-4, betas=(0.9, 0.95), eps=1e-8, **({"fused": True} if gpu else {"foreach": True}))
    ids = torch.randint(0, o.vocab_size, (o.batch, o.seq_len + 1), device=o.device)
    mask = torch.full((o.seq_len, o.seq_len), float("-inf")).triu(1)
    loss_of = torch.compile(model.loss) if (gpu if o.compile < 0 else o.compile) else model.loss

    def timed_step():
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(o.device, dtype=torch.bfloat16, enabled=gpu):
            loss = loss_of(ids[:, :-1], ids[:, 1:].contiguous(), mask)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss.item(), norm.item()  # the device is done
        return 1e3 * (time.perf_counter() - start)

    where = torch.cuda.get_device_name() if gpu else f"{o.threads} threads"
    print(f"peer_pytorch: PyTorch {torch.__version__}, {o.model} B {o.batch} T {o.seq_len}, {where}")
    for _ in range(3 if gpu else 1):
        timed_step()
    if o.wait:
        print("ready", flush=True)
        for _ in sys.stdin:
            cpu_start = time.process_time()
            print(f"ms {timed_step():.3f} {1e3 * (time.process_time() - cpu_start):.3f}", flush=True)
    else:
        times = sorted(timed_step() for _ in range(o.steps))
        median = times[len(times) // 2]
        print(f"step: median {median:.1f} ms, fastest {times[0]:.1f}, slowest {times[-1]:.1f} of {o.steps}; {1e3 * o.batch * o.seq_len / median:.0f} tokens/s")


if __name__ == "__main__":
    main()
