"""The stages of gpu.py that ask how fast a GPU is, and how much memory a step takes."""

import cProfile
import gc
import importlib.util
import os
import pstats
import re
import tempfile
import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from gpu_shapes import (
    CUDA,
    DEVICE,
    DTYPE,
    EXACT,
    LEAN,
    NAME,
    PEAK,
    config_of,
    home_of,
    objective,
    sources_of,
    step_pairs,
)
from models import random_model
from safetensors.torch import load_file

from minimore.engine.flops import step_flops
from minimore.engine.host import pinned
from minimore.engine.memory import memory_of
from minimore.engine.optim import AdamW
from minimore.engine.recipe import Recipe
from minimore.engine.streamed import open_engine
from minimore.engine.workload import Workload, shape_of, tokens_of
from minimore.model import fused
from minimore.model.tensors import Lazy, write_tensors

GB = 1e9
os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # so that products can be deterministic


def seconds():
    """Now, with everything done that was asked of the GPU."""
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def empty_memory():
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def per_second(amount, function, repeats=10):
    """How much of an amount a second: the mean of some calls after three that are not timed."""
    for _ in range(3):
        function()
    began = seconds()
    for _ in range(repeats):
        function()
    return amount * repeats / (seconds() - began)


# ---- facts ---------------------------------------------------------------------------------------


def facts():
    """The device, and what it reaches with nothing of ours."""

    def fact(name, value):
        return {"kind": "fact", "name": name, "value": value}

    yield fact("device", NAME)
    yield fact("torch", torch.__version__)
    if CUDA:
        memory = torch.cuda.get_device_properties(0).total_memory
        yield fact("memory, GB", round(memory / GB, 1))
    n = 8192 if CUDA else 256
    a, b = (torch.randn(n, n, device=DEVICE, dtype=DTYPE) for _ in range(2))
    reached = per_second(2 * n**3, lambda: a @ b) / 1e12
    yield fact(f"product of two {n} x {n}, TFLOP/s", round(reached, 3))
    x = torch.randn(10**9 if CUDA else 10**6, device=DEVICE)
    y = torch.empty_like(x)
    yield fact(
        "copy, GB/s read and written", round(per_second(2 * x.nbytes, lambda: y.copy_(x)) / GB)
    )
    x = x[: 10**9 // 4]
    home = pinned(x)

    def to_host():
        home.copy_(x, non_blocking=True)

    def to_device():
        x.copy_(home, non_blocking=True)

    yield fact("to the host, GB/s", round(per_second(x.nbytes, to_host, 5) / GB, 1))
    yield fact("from the host, GB/s", round(per_second(x.nbytes, to_device, 5) / GB, 1))


# ---- steps ---------------------------------------------------------------------------------------


@contextmanager
def uncompiled():
    """Blocks as PyTorch's own operations, one after the other, in autograd's threads, too."""
    devices, fused.DEVICES = fused.DEVICES, set()
    try:
        yield
    finally:
        fused.DEVICES = devices


@contextmanager
def deterministic():
    """Algorithms that give the same bits every time."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def run_steps(shape, recipe, words="", share=True, steps=3):
    """Seconds, shares of the peak, and memory against the plan, of steps of 80 pairs."""
    config = config_of(shape)
    pairs = step_pairs(config.vocabulary)
    unique = tokens_of(shape_of(pair) for pair in pairs)
    if not share:
        pairs = [pair._replace(shared=0) for pair in pairs]
    shapes = tuple(shape_of(pair) for pair in pairs)
    work = Workload(shapes, 1, tokens_of(shapes))
    planned = memory_of(config, work, recipe, DTYPE.itemsize, CUDA)
    empty_memory()
    began = seconds()
    engine = engine_of(config, recipe)
    setup, times = seconds() - began, []
    for _ in range(steps):
        began = seconds()
        result = engine.step(pairs, sources_of(pairs), objective())
        times.append(seconds() - began)
    peak = torch.cuda.max_memory_allocated() if CUDA else 0
    best = min(times[1:])  # the first one compiles
    useful, executed = step_flops(config, work, recipe)
    return {
        "kind": "step",
        "shape": shape,
        "recipe": f"`{recipe}` {words}".strip(),
        "pairs": len(pairs),
        "tokens": work.tokens,
        "setup": setup,
        "seconds": times,
        "first": times[0],
        "best": best,
        "pairs_per_second": len(pairs) / best,
        "tokens_per_second": unique / best,
        "executed_share": executed / best / PEAK,
        "useful_share": useful * unique / work.tokens / best / PEAK,
        "peak_gb": peak / GB,
        "planned_gb": planned.peak / GB,
        "phase": planned.phase,
        "host_gb": planned.offloaded / GB,
        "loss": result.loss.item(),
    }


def engine_of(config, recipe):
    """An engine over a model with random weights."""
    optimizer = AdamW(recipe.parameters, recipe.moments)
    model = random_model(config, optimizer, DEVICE, home_of(recipe))
    model.trunk.compute_dtype = DTYPE
    optimizer.learning_rate = 1e-6
    return open_engine(model, optimizer, recipe)


def try_steps(shape, recipe, words="", **how):
    """The figures of a recipe, or why there are none."""
    try:
        return run_steps(shape, recipe, words, **how)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        why = f"{type(error).__name__}: {str(error)[:300]}"
        return {"kind": "step", "shape": shape, "recipe": f"`{recipe}` {words}", "skipped": why}


def pythia_1_4b():
    """What sharing and compiling are worth, and then recipe after recipe."""
    shape = "Pythia-1.4B"
    with uncompiled():
        yield try_steps(shape, EXACT, "uncompiled, prompts not shared", share=False)
        yield try_steps(shape, EXACT, "uncompiled")
    yield try_steps(shape, EXACT)
    with deterministic():
        yield try_steps(shape, EXACT, "deterministic")
    for micro_tokens in (16384, 32768):
        yield try_steps(shape, replace(EXACT, micro_tokens=micro_tokens))
    for recompute in ("selective", "none"):
        yield try_steps(shape, replace(EXACT, recompute=recompute))
    yield try_steps(shape, Recipe("streamed", recompute="full"))
    yield try_steps(shape, Recipe(recompute="full"))
    yield try_steps(shape, Recipe())
    yield from lean()


def lean():
    """Parameters of bfloat16 and moments of int8, whose update is compiled on a GPU."""
    yield try_steps("Pythia-1.4B", LEAN)


def pythia_2_8b():
    for recompute in ("full", "selective"):
        yield try_steps("Pythia-2.8B", replace(EXACT, recompute=recompute))


def pythia_6_9b():
    """As much as an H200 allows, then as an 80 GB GPU would."""
    shape = "Pythia-6.9B"
    yield try_steps(shape, replace(EXACT, micro_tokens=16384))
    with at_most(80 * GB):
        yield try_steps(shape, replace(EXACT, moments="int8", micro_tokens=16384), "within 80 GB")


def within_24_gb():
    """Pythia-6.9B as a 24 GB GPU would train it: everything that can be is on the host."""
    recipe = Recipe("streamed", "split", "int8", "full", ("inputs", "states"), 4096)
    with at_most(24 * GB):
        yield try_steps("Pythia-6.9B", recipe, "within 24 GB", steps=2)


@contextmanager
def at_most(limit):
    """As if the GPU had so many bytes."""
    if CUDA:
        empty_memory()
        share = limit / torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, share))
    try:
        yield
    finally:
        if CUDA:
            torch.cuda.set_per_process_memory_fraction(1.0)


def llama_7b():
    yield try_steps("LLaMA2-7B", EXACT)


# ---- a peer --------------------------------------------------------------------------------------


def peer():
    """transformers' own reward model, as trainers drive it, on the same 80 pairs.

    fp32 weights, bf16 autocast, gradient checkpointing, SDPA, fused AdamW; 8 pairs at a time,
    padded to the longest of them or to 512 tokens.
    """
    if importlib.util.find_spec("transformers") is None:
        yield {"kind": "fact", "name": "transformers", "value": "not installed"}
        return
    from transformers import GPTNeoXConfig, GPTNeoXForSequenceClassification

    c = config_of("Pythia-1.4B")
    config = GPTNeoXConfig(
        vocab_size=c.vocabulary,
        hidden_size=c.width,
        num_hidden_layers=c.blocks,
        num_attention_heads=c.heads,
        intermediate_size=c.mlp_width,
        num_labels=1,
        pad_token_id=0,
        use_cache=False,
    )
    with torch.device(DEVICE):
        model = GPTNeoXForSequenceClassification(config)
    model.gradient_checkpointing_enable(dict(use_reentrant=False))
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=CUDA)
    pairs = step_pairs(c.vocabulary)
    for longest in (None, 512 if CUDA else 64):
        times = [peer_step(model, optimizer, pairs, longest) for _ in range(3)]
        padded = f"padded to {longest or 'the longest'}"
        speed = f"{len(pairs) / min(times[1:]):.1f} pairs/s"
        peak = torch.cuda.max_memory_allocated() / GB if CUDA else 0
        name = f"transformers, Pythia-1.4B, 8 pairs at a time, {padded}"
        yield {"kind": "fact", "name": name, "value": f"{speed}, {peak:.1f} GB"}


def peer_step(model, optimizer, pairs, longest):
    """Seconds of one step over all pairs."""
    began = seconds()
    for first in range(0, len(pairs), 8):
        part = pairs[first : first + 8]
        texts = [torch.tensor(side[:512]) for pair in part for side in (pair.chosen, pair.rejected)]
        width = longest or max(len(text) for text in texts)
        ids = torch.zeros(len(texts), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(texts):
            ids[row, : len(text)] = text
            mask[row, : len(text)] = 1
        with torch.autocast(DEVICE, torch.bfloat16):
            rewards = model(input_ids=ids.to(DEVICE), attention_mask=mask.to(DEVICE)).logits[:, 0]
        margins = rewards[0::2].float() - rewards[1::2].float()
        loss = -torch.nn.functional.logsigmoid(margins).sum() / len(pairs)
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return seconds() - began


# ---- where the time goes -------------------------------------------------------------------------

KINDS = {  # the first pattern that a kernel's name matches
    "attention": r"flash|fmha",
    "matrix products": r"gemm|nvjet|cutlass|splitK|gemv",
    "compiled": r"^triton",
    "gathers": r"index|gather|scatter",
    "copies and casts": r"copy|Memcpy|Memset|direct_copy|cat",
    "sums": r"reduce",
    "other element-wise": r"elementwise|vectorized",
}


def profile():
    """Kernels of one step of Pythia-1.4B, by kind, and the thirty longest by name."""
    yield from profile_of(EXACT)


def profile_lean():
    """The same for the leanest recipe."""
    yield from profile_of(LEAN)


def profile_of(recipe):
    config = config_of("Pythia-1.4B")
    pairs = step_pairs(config.vocabulary)
    engine = engine_of(config, recipe)
    for _ in range(2):
        engine.step(pairs, sources_of(pairs), objective())
    activity = torch.profiler.ProfilerActivity
    kinds = [activity.CUDA, activity.CPU] if CUDA else [activity.CPU]
    with torch.profiler.profile(activities=kinds) as profiler:
        began = seconds()
        engine.step(pairs, sources_of(pairs), objective())
        whole = seconds() - began
    events = profiler.key_averages()
    device_time = "self_device_time_total" if CUDA else "self_cpu_time_total"
    times = {
        event.key: getattr(event, device_time) / 1e3
        for event in events
        if not CUDA or event.device_type == torch.autograd.DeviceType.CUDA
    }
    total = sum(times.values())
    by_kind = dict.fromkeys([*KINDS, "other"], 0.0)
    for name, ms in times.items():
        matching = [kind for kind, pattern in KINDS.items() if re.search(pattern, name)]
        by_kind[matching[0] if matching else "other"] += ms
    yield {"kind": "profile", "name": "the whole step", "ms": whole * 1e3, "share": 1.0}
    yield {"kind": "profile", "name": "busy", "ms": total, "share": total / whole / 1e3}
    for name, ms in by_kind.items():
        yield {"kind": "profile", "name": f"**{name}**", "ms": ms, "share": ms / total}
    for name, ms in sorted(times.items(), key=lambda row: -row[1])[:30]:
        yield {"kind": "profile", "name": f"`{name[:90]}`", "ms": ms, "share": ms / total}
    for event in sorted(events, key=lambda event: -event.self_cpu_time_total)[:30]:
        ms, name = event.self_cpu_time_total / 1e3, f"CPU: `{event.key[:70]}`, {event.count} calls"
        yield {"kind": "profile", "name": name, "ms": ms, "share": ms / whole / 1e3}


def launches():
    """What the CPU does during a step of Pythia-1.4B, compiled and not, and how steps vary."""
    config = config_of("Pythia-1.4B")
    pairs = step_pairs(config.vocabulary)
    for words in ("compiled", "uncompiled", "compiled again"):
        with uncompiled() if words == "uncompiled" else nullcontext():
            empty_memory()
            engine = engine_of(config, EXACT)
            step = partial(engine.step, pairs, sources_of(pairs), objective())
            milliseconds = " ".join(f"{1e3 * timed(step):.0f}" for _ in range(6))
            yield {"kind": "fact", "name": f"six steps, {words}, ms", "value": milliseconds}
            yield from by_function(step, words)
        del engine, step


def timed(function):
    """Seconds of one call."""
    began = seconds()
    function()
    return seconds() - began


def by_function(function, words, most=25):
    """The functions of Python in which the CPU spends most of one call, their calls left out."""
    profiler = cProfile.Profile()
    profiler.runcall(function)
    stats = pstats.Stats(profiler).stats  # (file, line, name) -> calls, ..., own time, ...
    own = sorted(((entry[2], entry[1], name) for name, entry in stats.items()), reverse=True)
    total = sum(taken for taken, _, _ in own)
    for taken, calls, (file, line, name) in own[:most]:
        where = f"{words}: {Path(file).name}:{line} {name}, {calls} calls"
        yield {"kind": "profile", "name": where, "ms": 1e3 * taken, "share": taken / total}


# ---- the disk ------------------------------------------------------------------------------------


def disk():
    """GB/s of writing a checkpoint with its states, and of reading it, on this machine's disk."""
    optimizer = AdamW("split", "int8")
    model = random_model(config_of("Pythia-1.4B"), optimizer, DEVICE)
    tensors = {
        name: Lazy(tuple(p.shape), torch.float32, partial(optimizer.value, name, p))
        for name, p in model.named_parameters()
    }
    for name, state in optimizer.state.items():
        tensors |= {f"{kind}.{name}": t for kind, t in state.items() if kind != "low"}
    with tempfile.TemporaryDirectory() as folder:
        path, began = Path(folder) / "x.safetensors", seconds()
        write_tensors(path, tensors)
        writing, size = seconds() - began, path.stat().st_size
        began = seconds()
        for tensor in load_file(path).values():
            tensor.to(DEVICE)
        reading = seconds() - began
    value = f"{size / writing / GB:.2f} GB/s written, {size / reading / GB:.2f} GB/s read"
    yield {"kind": "fact", "name": f"a checkpoint of {size / GB:.2f} GB", "value": value}
