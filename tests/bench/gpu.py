"""What a GPU does with the code: is it right, how fast is it, and does it take the memory that was planned.

    python tests/bench/gpu.py --output gpu.json        at most 9 minutes on an H200; writes gpu.md beside

Correctness comes first, and what is wrong ends the script with exit code 1: attention over segments against a plain softmax, shared prompts
against separate texts, the streamed engine against the plain one, every storage of the optimizer against the same on the CPU. Then, for the
shapes of Pythia-1.4B, 2.8B, 6.9B and LLaMA2-7B with random weights: steps of 80 pairs by several recipes, and loading and saving. Without CUDA
the same lines run at tiny size in fp32, which checks the script and says nothing about speed.
"""

import argparse
import gc
import json
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from minimore.data.pairs import TokenPair, pack_pairs
from minimore.engine.cost import GPUS, PairShape, Workload, memory_of, step_flops
from minimore.engine.host import pinned
from minimore.engine.objective import RewardObjective, micro_batches
from minimore.engine.optim import AdamW, fused, replace_parameter
from minimore.engine.recipe import MOMENTS, PARAMETERS, Recipe
from minimore.engine.streamed import StreamedStep, open_engine
from minimore.model.attention import attend, pack
from minimore.model.recompute import RECOMPUTE
from minimore.model.tensors import Lazy, write_tensors
from minimore.model.trunk import ModelConfig, Trunk
from minimore.more import more_weights
from minimore.reward import RewardModel, fresh_head

CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
NAME, WIDTH = torch.cuda.get_device_name() if CUDA else "CPU, tiny shapes", DTYPE.itemsize
PEAK = next(
    (gpu.flops for name, gpu in GPUS.items() if name in NAME), GPUS["H200"].flops
)  # of a GPU that cost.py does not know: an H200's

NEOX = ModelConfig(
    vocabulary=50304,
    width=2048,
    blocks=24,
    heads=16,
    kv_heads=16,
    head_width=128,
    mlp_width=8192,
    activation="gelu",
    gated=False,
    norm="layer",
    norm_eps=1e-5,
    parallel_residual=True,
    qkv_bias=True,
    attention_output_bias=True,
    mlp_bias=True,
    rotary_width=32,
    rope_base=10000.0,
)
LLAMA = replace(
    NEOX,
    vocabulary=32000,
    width=4096,
    blocks=32,
    heads=32,
    kv_heads=32,
    mlp_width=11008,
    activation="silu",
    gated=True,
    norm="rms",
    parallel_residual=False,
    qkv_bias=False,
    attention_output_bias=False,
    mlp_bias=False,
    rotary_width=128,
)
SHAPES = {
    "Pythia-1.4B": NEOX,
    "Pythia-2.8B": replace(
        NEOX,
        width=2560,
        blocks=32,
        heads=32,
        kv_heads=32,
        head_width=80,
        mlp_width=10240,
        rotary_width=20,
    ),
    "Pythia-6.9B": replace(
        NEOX, vocabulary=50432, width=4096, blocks=32, heads=32, kv_heads=32, mlp_width=16384
    ),
    "LLaMA2-7B": LLAMA,
}
TINY = dict(vocabulary=300, width=64, blocks=2, heads=4, kv_heads=4, head_width=16, rotary_width=4)
LEAN, EXACT = (
    Recipe("streamed", "bfloat16", "int8", "full"),
    Recipe("streamed", "split", "float32", "full"),
)
RECIPES = {  # per shape: the fastest first
    "Pythia-1.4B": [
        Recipe(),
        Recipe("streamed", recompute="selective"),
        replace(EXACT, recompute="selective"),
        EXACT,
        LEAN,
    ],
    "Pythia-2.8B": [replace(EXACT, recompute="selective"), EXACT, LEAN],
    "Pythia-6.9B": [
        EXACT,
        replace(LEAN, recompute="selective"),
        LEAN,
        replace(EXACT, offload=("inputs", "states")),
    ],
    "LLaMA2-7B": [EXACT, LEAN],
}


def seconds():
    """Now, with everything done that was asked of the GPU."""
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def emptied():
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def verdict(kind, name, error, allowed):
    """A finding of the first part."""
    passed = bool(error <= allowed)
    print(
        f"{kind:10} {name:58} {error:.1e} (allowed {allowed:.0e})  {'ok' if passed else 'WRONG'}",
        flush=True,
    )
    return {"kind": kind, "name": name, "error": error, "allowed": allowed, "passed": passed}


# ---- is it right -------------------------------------------------------------------------------------------------------


def plain_attention(q, k, v, stream):
    """Softmax per segment in float64: the definition. Queries are the last of the keys (bottom-right alignment)."""
    out = torch.empty_like(q)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    for r in stream.segments:
        keys = torch.cat([k[r.prefix : r.prefix_end], k[r.start : r.end]])
        values = torch.cat([v[r.prefix : r.prefix_end], v[r.start : r.end]])
        scores = torch.einsum("qhc,khc->hqk", q[r.start : r.end], keys) / q.shape[-1] ** 0.5
        hidden = torch.ones(r.queries, r.keys, dtype=torch.bool, device=q.device).triu(
            r.keys - r.queries + 1
        )
        out[r.start : r.end] = torch.einsum(
            "hqk,khc->qhc", scores.masked_fill(hidden, -torch.inf).softmax(-1), values
        )
    return out


def check_attention(name, heads, kv_heads, width, items, dtype=DTYPE):
    """Output and gradients of `attend` against the definition; the allowance is a few roundings."""
    torch.manual_seed(0)
    stream = pack(items).to(DEVICE)
    q, k, v = (
        torch.randn(len(stream.tokens), h, width, device=DEVICE, dtype=dtype, requires_grad=True)
        for h in (heads, kv_heads, kv_heads)
    )
    upstream = torch.randn(len(stream.tokens), heads, width, device=DEVICE, dtype=dtype)
    ours = attend(q, k, v, stream)
    gradients = torch.autograd.grad(ours, (q, k, v), upstream)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    plain = plain_attention(*wide, stream)
    expected = torch.autograd.grad(plain, wide, upstream.double())
    error = max(relative(ours, plain), *(relative(a, b) for a, b in zip(gradients, expected)))
    return verdict(
        "attention",
        f"{name}, {str(dtype)[6:]}",
        error,
        2e-2 if dtype == torch.bfloat16 else 1e-4 if CUDA else 1e-5,
    )


def attention_checks():
    scale = 1 if CUDA else 16
    prompt, chosen, rejected = ([1] * (n // scale) for n in (300, 180, 96))
    shared = [(prompt, [chosen, rejected])] * 4
    found = [
        check_attention(
            "lone texts", 16, 16, 128, [([], [prompt]), ([], [chosen]), ([], [rejected])]
        ),
        check_attention("shared prompt, queries < keys", 16, 16, 128, shared),
        check_attention("shared prompt, grouped heads", 16, 4, 128, shared),
        check_attention("shared prompt, head width 80", 32, 32, 80, shared),
        check_attention("one-token responses", 16, 16, 64, [(prompt, [[1], [2]]), ([], [[3]])]),
    ]
    return found + (
        [check_attention("shared prompt, tiles", 16, 4, 128, shared, torch.float32)] if CUDA else []
    )


def small_model(c, seed=0, dtype=torch.float32):
    """Weights of order one, in which an error shows; the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    model = RewardModel(Trunk(c), torch.randn(c.width, generator=generator) / c.width**0.5)
    with torch.no_grad():
        for name, p in model.trunk.named_parameters():
            p.copy_(
                torch.randn(p.shape, generator=generator)
                * (p.shape[1] ** -0.5 if p.ndim > 1 else 0.2)
                + name.endswith("norm.weight")
            )
    model.trunk.compute_dtype = dtype
    return model.to(DEVICE)


def random_pairs(count, vocabulary, unique=342, seed=0):
    """Pairs of `unique` tokens on the mean, of which 41% are shared, as spread as preference data are (log-normal lengths)."""
    random, pairs = np.random.default_rng(seed), []
    lengths = np.exp(random.normal(0, 0.5, (count, 3))) * np.array([0.41, 0.295, 0.295])
    lengths = np.maximum(1, lengths * unique * count / lengths.sum()).astype(int)
    for prompt, a, b in lengths:
        ids = [random.integers(2, vocabulary, n).astype(np.int32) for n in (prompt, a, b)]
        pairs.append(
            TokenPair(
                np.concatenate([ids[0], ids[1]]), np.concatenate([ids[0], ids[2]]), int(prompt), 0
            )
        )
    return pairs


def weighing(sources=5):
    return RewardObjective(sources, partial(more_weights, state={}))


def gradients_of(model, pairs, recompute, tokens):
    """All gradients of a streamed step, as one vector."""
    batches = micro_batches(pairs, [i % 5 for i in range(len(pairs))], tokens)
    step = StreamedStep(model, batches, weighing(), recompute)
    step.forward()
    parts = list(step.backward())
    return torch.cat(
        [part[name].flatten().double().cpu() for part in parts for name in sorted(part)]
    )


def model_checks():
    """Sharing, batches, recomputation, chunks: rewards and gradients of a small model."""
    found, c = [], replace(NEOX, **TINY, mlp_width=256)
    for family, c in (("gpt_neox", c), ("llama", replace(LLAMA, **TINY, mlp_width=172))):
        pairs = random_pairs(20, c.vocabulary, 60)
        for dtype in dict.fromkeys((torch.float32, DTYPE)):
            model, allowed = small_model(c, dtype=dtype), 2e-2 if dtype == torch.bfloat16 else 1e-4
            with torch.no_grad():
                together, apart = (
                    torch.cat(model.features(pack_pairs(pairs, share=share)))
                    for share in (True, False)
                )
            found.append(
                verdict(
                    "sharing", f"{family}, {str(dtype)[6:]}", relative(together, apart), allowed
                )
            )
            expected = gradients_of(model, pairs, "none", 10**9)
            for recompute in RECOMPUTE:
                found.append(
                    verdict(
                        "gradient",
                        f"{family}, {str(dtype)[6:]}, streamed {recompute} in chunks of 200",
                        relative(gradients_of(model, pairs, recompute, 200), expected),
                        allowed,
                    )
                )
    return found


def engine_checks():
    """Streamed steps against plain ones in fp32; states and inputs on the host against none there, to the bit."""
    c, found = replace(NEOX, **TINY, mlp_width=256), []
    pairs = random_pairs(20, c.vocabulary, 60)

    def after(recipe, dtype=torch.float32):
        model, optimizer = small_model(c, dtype=dtype), AdamW(recipe.parameters, recipe.moments)
        for name, p in list(model.named_parameters()):
            replace_parameter(
                model,
                name,
                optimizer.adopt(
                    name, p.detach(), pinned if "states" in recipe.offload else lambda t: t
                ),
            )
        engine, optimizer.learning_rate = open_engine(model, optimizer, recipe), 1e-3
        for _ in range(3):
            engine.step(pairs, [i % 5 for i in range(20)], weighing())
        engine.settle()
        return torch.cat(
            [optimizer.value(name, p).flatten().cpu() for name, p in model.named_parameters()]
        )

    before = torch.cat([p.detach().flatten().cpu() for p in small_model(c).parameters()])
    plain = after(Recipe())
    for recompute in RECOMPUTE:
        moved = after(Recipe("streamed", recompute=recompute, micro_tokens=300)) - before
        found.append(
            verdict(
                "steps",
                f"streamed {recompute}, 3 AdamW steps (noise of zero gradients included)",
                relative(moved, plain - before),
                0.2,
            )
        )
    for recipe in (EXACT, LEAN):
        here, away = (
            after(replace(recipe, micro_tokens=300, offload=offload), DTYPE)
            for offload in ((), ("inputs", "states"))
        )
        found.append(
            verdict(
                "host",
                f"{recipe.parameters}, {recipe.moments}: states and inputs on the host",
                relative(away - before, here - before),
                1e-2 if CUDA else 0,
            )
        )
    return found


def storage_checks():
    """One tensor, ten updates by every storage, against the same on the CPU; what is exact to rounding, what rounds to its own grain."""
    torch.manual_seed(0)
    value, gradients, found = torch.randn(300, 1000), torch.randn(10, 300, 1000), []
    for parameters in PARAMETERS:
        for moments in MOMENTS:
            results = []
            for device in ("cpu", DEVICE):
                optimizer = AdamW(parameters, moments)
                p, optimizer.learning_rate = optimizer.adopt("p", value.to(device, copy=True)), 1e-3
                for g in gradients.to(device):
                    optimizer.update("p", p, g)
                    optimizer.steps += 1
                results.append(optimizer.value("p", p).cpu() - value)
            exact = parameters != "bfloat16" and moments == "float32"
            found.append(
                verdict(
                    "storage",
                    f"{parameters}, {moments}{', compiled' if CUDA and fused(parameters, moments) else ''}",
                    relative(*results[::-1]),
                    1e-4 if exact else 0.1,
                )
            )
    return found


# ---- how fast is it ----------------------------------------------------------------------------------------------------


def random_model(c, optimizer, home):
    """Random weights made on the device, each adopted at once."""
    with torch.device("meta"):
        model = RewardModel(Trunk(c), torch.empty(c.width))
    generator = torch.Generator(DEVICE).manual_seed(0)
    for name, p in list(model.named_parameters()):
        value = torch.empty(p.shape, device=DEVICE)
        value.normal_(0, 0.02, generator=generator) if p.ndim > 1 else value.fill_(
            float(name.endswith("norm.weight"))
        )
        value = fresh_head(c.width, 0).to(DEVICE) if name == "head" else value
        replace_parameter(model, name, optimizer.adopt(name, value, home))
        del value
    model.trunk.compute_dtype = DTYPE
    return model


def run_steps(name, c, recipe, pairs, steps=3):
    """Seconds, shares of the peak, and memory against the plan, of steps of all pairs."""
    emptied()
    work = Workload(
        tuple(
            PairShape(p.shared, len(p.chosen) - p.shared, len(p.rejected) - p.shared) for p in pairs
        ),
        1,
        sum(p.tokens for p in pairs),
    )
    planned = memory_of(c, work, recipe, WIDTH, CUDA)
    began = seconds()
    optimizer = AdamW(recipe.parameters, recipe.moments)
    model = random_model(c, optimizer, pinned if "states" in recipe.offload else lambda t: t)
    engine, optimizer.learning_rate, times = open_engine(model, optimizer, recipe), 1e-6, []
    setup, source = seconds() - began, [i % 5 for i in range(len(pairs))]
    states = torch.cuda.memory_allocated() if CUDA else 0
    for _ in range(steps):
        began = seconds()
        *_, loss = engine.step(pairs, source, weighing())
        times.append(seconds() - began)
    peak, best, (useful, executed) = (
        torch.cuda.max_memory_allocated() if CUDA else 0,
        min(times[1:]),
        step_flops(c, work, recipe),
    )
    result = {
        "shape": name,
        "recipe": str(recipe),
        "parameters": sum(p.numel() for p in model.parameters()),
        "pairs": len(pairs),
        "tokens": work.tokens,
        "setup": setup,
        "seconds": times,
        "pairs_per_second": len(pairs) / best,
        "tokens_per_second": work.tokens / best,
        "executed_share": executed / best / PEAK,
        "useful_share": useful / best / PEAK,
        "allocated_gb": states / 1e9,
        "peak_gb": peak / 1e9,
        "planned_gb": planned.peak / 1e9,
        "phase": planned.phase,
        "host_gb": sum(planned.host.values()) / 1e9,
        "loss": loss.item(),
    }
    print(
        f"step       {name}, {recipe}: {best:.3f} s, {result['pairs_per_second']:.1f} pairs/s, {result['tokens_per_second']:,.0f} tokens/s, executed {result['executed_share']:.0%}, "
        f"useful {result['useful_share']:.0%} of peak; {peak / 1e9:.1f} GB at the peak, planned {planned.peak / 1e9:.1f}",
        flush=True,
    )
    return result


def load_and_save(c):
    """GB/s of writing a checkpoint with its states, and of reading it again, on this machine's disk."""
    emptied()
    optimizer = AdamW("split", "int8")
    model = random_model(c, optimizer, lambda t: t)
    with tempfile.TemporaryDirectory() as folder:
        path, began = Path(folder) / "x.safetensors", seconds()
        tensors = {
            name: Lazy(tuple(p.shape), torch.float32, partial(optimizer.value, name, p))
            for name, p in model.named_parameters()
        }
        write_tensors(
            path,
            tensors
            | {
                f"{kind}.{name}": t
                for name, state in optimizer.state.items()
                for kind, t in state.items()
                if kind != "low"
            },
        )
        written, size = seconds() - began, path.stat().st_size
        began = seconds()
        for tensor in load_file(path).values():
            tensor.to(DEVICE)
        read = seconds() - began
    result = {
        "gigabytes": size / 1e9,
        "write_gb_per_second": size / 1e9 / written,
        "read_gb_per_second": size / 1e9 / read,
    }
    print(
        f"disk       {size / 1e9:.2f} GB: written at {result['write_gb_per_second']:.2f} GB/s, read at {result['read_gb_per_second']:.2f} GB/s",
        flush=True,
    )
    return result


def markdown(report):
    """The report as README wants it."""
    lines = [
        f"{report['device']}, torch {report['torch']}, {report['date']}, `python tests/bench/gpu.py`; {sum(c['passed'] for c in report['checks'])} of {len(report['checks'])} checks passed.",
        "",
        "| shape | recipe | pairs/s | tokens/s | executed, useful share of peak | peak GB: measured, planned | host GB |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in report["steps"]:
        if "skipped" in r:
            lines.append(f"| {r['shape']} | `{r['recipe']}` | {r['skipped']} | | | | |")
            continue
        lines.append(
            f"| {r['shape']} | `{r['recipe']}` | {r['pairs_per_second']:.1f} | {r['tokens_per_second']:,.0f} | {r['executed_share']:.1%}, {r['useful_share']:.1%} | "
            f"{r['peak_gb']:.1f}, {r['planned_gb']:.1f} | {r['host_gb']:.1f} |"
        )
    if "disk" in report:
        lines += [
            "",
            f"Disk: {report['disk']['write_gb_per_second']:.2f} GB/s written, {report['disk']['read_gb_per_second']:.2f} GB/s read.",
        ]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output",
        default="gpu.json",
        help="write the results here as JSON, and beside it as Markdown",
    )
    parser.add_argument(
        "--seconds", type=float, default=520, help="start no further part after so many seconds"
    )
    parser.add_argument("--shape", action="append", choices=tuple(SHAPES), help="only these shapes")
    given = parser.parse_args()
    began, output = time.monotonic(), Path(given.output)
    report = {
        "device": NAME,
        "torch": torch.__version__,
        "date": time.strftime("%-d %B %Y"),
        "checks": [],
        "steps": [],
    }
    print(f"{report['device']}, torch {torch.__version__}, {DTYPE}", flush=True)

    def save():  # after every part: a run that is cut short has what it has
        report["elapsed"] = time.monotonic() - began
        output.write_text(json.dumps(report, indent=2))
        output.with_suffix(".md").write_text(markdown(report))

    for checks in (attention_checks, model_checks, storage_checks, engine_checks):
        report["checks"] += checks()
        save()
    if not all(c["passed"] for c in report["checks"]):
        sys.exit("something is wrong on this device: no speed was measured")
    for name in given.shape or SHAPES:
        c = SHAPES[name] if CUDA else replace(SHAPES[name], **TINY, mlp_width=256)
        pairs = random_pairs(80, c.vocabulary) if CUDA else random_pairs(10, c.vocabulary, 30)
        for recipe in RECIPES[name]:
            if time.monotonic() - began > given.seconds:
                report["steps"].append(
                    {"shape": name, "recipe": str(recipe), "skipped": "not run: out of time"}
                )
                continue
            try:
                report["steps"].append(run_steps(name, c, recipe, pairs))
            except torch.OutOfMemoryError as error:
                report["steps"].append(
                    {"shape": name, "recipe": str(recipe), "skipped": "out of memory"}
                )
                print(
                    f"step       {name}, {recipe}: out of memory ({str(error)[:100]})", flush=True
                )
            save()
    if time.monotonic() - began < given.seconds:
        report["disk"] = load_and_save(NEOX if CUDA else replace(NEOX, **TINY, mlp_width=256))
    save()
    print(
        f"\n{markdown(report)}\n{report['elapsed']:.0f} s; {output} and {output.with_suffix('.md')}"
    )


if __name__ == "__main__":
    main()
