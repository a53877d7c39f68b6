"""What a GPU does with the code: attention over segments against a plain softmax, then one 1.4B-shaped training step.

    python tests/bench/gpu.py [--output FILE.json] [--micro-tokens 16384]

First version. Correctness comes first: a wrong kernel ends the script with exit code 1. On a machine without CUDA the same
lines run the fallback at tiny size in fp32, which checks the script and says nothing about speed.
"""

import argparse
import json
import sys
import time

import numpy as np
import torch

from minimore.attention import attend, pack
from minimore.model import ModelConfig, Trunk
from minimore.more import more_weights
from minimore.pairs import TokenPair, pack_pairs, split_by_tokens
from minimore.reward import RewardModel, fresh_head
from minimore.engine import step

CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)


def plain_attention(q, k, v, stream):
    """Softmax per run in float64: the definition. Queries are the last of the keys (bottom-right alignment)."""
    out = torch.empty_like(q)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    for r in stream.segments:
        keys = torch.cat([k[r.prefix:r.prefix_end], k[r.start:r.end]])
        values = torch.cat([v[r.prefix:r.prefix_end], v[r.start:r.end]])
        scores = torch.einsum("qhc,khc->hqk", q[r.start:r.end], keys) / q.shape[-1] ** 0.5
        hidden = torch.ones(r.queries, r.keys, dtype=torch.bool, device=q.device).triu(r.keys - r.queries + 1)
        out[r.start:r.end] = torch.einsum("hqk,khc->qhc", scores.masked_fill(hidden, -torch.inf).softmax(-1), values)
    return out


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def check_attention(name, heads, kv_heads, width, items):
    """Output and gradients of `attend` against the definition; the allowance is a few bf16 (fp32 on CPU) roundings."""
    torch.manual_seed(0)
    stream = pack(items).to(DEVICE)
    N, allowed = len(stream.tokens), 0.02 if CUDA else 1e-5
    q, k, v = (torch.randn(N, h, width, device=DEVICE, dtype=DTYPE, requires_grad=True) for h in (heads, kv_heads, kv_heads))
    upstream = torch.randn(N, heads, width, device=DEVICE, dtype=DTYPE)
    ours = attend(q, k, v, stream)
    grads = torch.autograd.grad(ours, (q, k, v), upstream)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    plain = plain_attention(*wide, stream)
    expected = torch.autograd.grad(plain, wide, upstream.double())
    errors = [relative(ours, plain), *(relative(a, b) for a, b in zip(grads, expected))]
    passed = max(errors) < allowed
    print(f"attention {name:28} relative error: output {errors[0]:.1e}, dq {errors[1]:.1e}, dk {errors[2]:.1e}, dv {errors[3]:.1e}  {'ok' if passed else 'WRONG'}", flush=True)
    return {"name": name, "errors": errors, "passed": passed}


def training_step(micro_tokens):
    """Seconds, tokens and peak memory of a MORE step of 80 pairs on a Pythia-1.4B shape: fp32 AdamW, bf16 compute, recomputation."""
    D, blocks, heads, V, pairs_count, length = (2048, 24, 16, 50304, 80, 187) if CUDA else (64, 2, 4, 512, 10, 20)
    c = ModelConfig(vocabulary=V, width=D, blocks=blocks, heads=heads, kv_heads=heads, head_width=D // heads, mlp_width=4 * D,
                    activation="gelu", gated=False, norm="layer", norm_eps=1e-5, parallel_residual=True, qkv_bias=True,
                    attention_output_bias=True, mlp_bias=True, rotary_width=D // heads // 4, rope_base=10000.0)
    torch.manual_seed(0)
    with torch.device(DEVICE):
        trunk = Trunk(c)
    with torch.no_grad():
        for name, p in trunk.named_parameters():
            p.normal_(0, 0.02) if p.ndim == 2 else p.fill_(float(name.endswith("norm.weight")))
    trunk.compute_dtype, trunk.recompute = DTYPE, "full"
    model = RewardModel(trunk, fresh_head(D, 0).to(DEVICE))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0, fused=True)
    random, pairs = np.random.default_rng(0), []
    for i in range(pairs_count):
        prompt, a, b = (random.integers(2, V, n).astype(np.int32) for n in (length // 2 + i, length // 2 + 1, length // 2))
        pairs.append(TokenPair(np.concatenate([prompt, a]), np.concatenate([prompt, b]), len(prompt), 0))
    tokens = [p.tokens for p in pairs]
    batches = [pack_pairs([pairs[i] for i in part], [i % 5 for i in part]) for part in split_by_tokens(tokens, micro_tokens)]
    weigh = lambda losses, gradients, count: more_weights(losses, gradients, count, {})
    seconds = []
    for _ in range(4 if CUDA else 2):
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        began = time.perf_counter()
        _, _, weights, loss = step(model, batches, 5, weigh)
        optimizer.step()
        optimizer.zero_grad()
        if CUDA:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    best = min(seconds[1:])
    result = {"parameters": sum(p.numel() for p in model.parameters()), "pairs": pairs_count, "micro_batches": len(batches),
              "unique_tokens": sum(tokens), "seconds": seconds, "pairs_per_second": pairs_count / best, "tokens_per_second": sum(tokens) / best,
              "loss": loss.item(), "weights": weights.tolist(), "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if CUDA else None}
    peak = f"{result['peak_gb']:.1f} GB peak" if CUDA else "no peak on a CPU"
    print(f"step: {result['parameters'] / 1e9:.3f} billion parameters, {pairs_count} pairs, {sum(tokens)} unique tokens in {len(batches)} "
          f"micro-batches: {best:.3f} s, {pairs_count / best:.1f} pairs/s, {sum(tokens) / best:.0f} tokens/s, {peak}", flush=True)
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", help="write the results here as JSON")
    parser.add_argument("--micro-tokens", type=int, default=16384 if CUDA else 200)
    given = parser.parse_args()
    print(f"{torch.cuda.get_device_name() if CUDA else 'CPU'}, torch {torch.__version__}, {DTYPE}")
    scale = 1 if CUDA else 16
    prompt, chosen, rejected = ([1] * (n // scale) for n in (300, 180, 96))
    shared = [(prompt, [chosen, rejected])] * 4
    checks = [
        check_attention("lone texts", 16, 16, 128, [([], [prompt]), ([], [chosen]), ([], [rejected])]),
        check_attention("shared prompt, queries < keys", 16, 16, 128, shared),
        check_attention("shared prompt, grouped heads", 16, 4, 128, shared),
        check_attention("shared prompt, head width 80", 32, 32, 80, shared),
        check_attention("one-token responses", 16, 16, 64, [(prompt, [[1], [2]]), ([], [[3]])]),
    ]
    result = {"device": torch.cuda.get_device_name() if CUDA else "cpu", "torch": torch.__version__, "attention": checks}
    if not all(c["passed"] for c in checks):
        sys.exit("attention is wrong on this device: nothing else was run")
    result["step"] = training_step(given.micro_tokens)
    if given.output:
        with open(given.output, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=2)


if __name__ == "__main__":
    main()
