"""What a GPU does with the code: is it right, how fast is it, and does it take what was planned.

    python tests/bench/gpu.py --output gpu.json

takes at most 9 minutes on an H200, and writes gpu.md beside gpu.json. Correctness comes first.
What is wrong ends the script with exit code 1: attention over segments against a plain softmax,
shared prompts against separate texts, the streamed engine against the plain one, every storage of
the optimizer against the same on the CPU.

Then it takes steps of 80 pairs by several recipes, and loads and saves, with random weights in the
shapes of Pythia-1.4B, 2.8B, 6.9B and LLaMA2-7B. Without CUDA the same lines run at tiny size in
fp32, which checks the script and says nothing about speed.
"""

import argparse
import gc
import json
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
from models import random_model
from safetensors.torch import load_file

from minimore.data.pairs import TokenPair, pack_pairs
from minimore.engine.cost import GPUS, memory_of, step_flops
from minimore.engine.host import pinned
from minimore.engine.objective import RewardObjective, micro_batches
from minimore.engine.optim import AdamW, fused, replace_parameter, where_it_is
from minimore.engine.recipe import MOMENTS, OFFLOADS, PARAMETERS, Recipe
from minimore.engine.streamed import StreamedStep, open_engine
from minimore.engine.workload import Workload, shape_of, tokens_of
from minimore.model.attention import attend, pack
from minimore.model.recompute import RECOMPUTE
from minimore.model.tensors import Lazy, write_tensors
from minimore.model.trunk import ModelConfig, Trunk
from minimore.more import more_weights
from minimore.reward import RewardModel
from minimore.tables import MarkdownTable

CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
NAME = torch.cuda.get_device_name() if CUDA else "CPU, tiny shapes"
# The peak of a GPU that cost.py does not know is taken to be an H200's.
PEAK = next((gpu.flops for name, gpu in GPUS.items() if name in NAME), GPUS["H200"].flops)
SOURCES = 5

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


def empty_memory():
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


def check(kind, name, error, allowed):
    """One finding of the first part, printed at once."""
    passed = bool(error <= allowed)
    word = "ok" if passed else "WRONG"
    print(f"{kind:10} {name:58} {error:.1e} (allowed {allowed:.0e})  {word}", flush=True)
    return {"kind": kind, "name": name, "error": error, "allowed": allowed, "passed": passed}


def home_of(recipe):
    """Where a recipe keeps the optimizer's states."""
    return pinned if "states" in recipe.offload else where_it_is


def objective():
    return RewardObjective(SOURCES, partial(more_weights, state={}))


def sources_of(pairs):
    return [i % SOURCES for i in range(len(pairs))]


# ---- is it right: attention ----------------------------------------------------------------------


def plain_attention(q, k, v, stream):
    """The definition: a softmax per segment in float64; the queries are the last of the keys."""
    out = torch.empty_like(q)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    for segment in stream.segments:
        own = slice(segment.start, segment.end)
        prefix = slice(segment.prefix, segment.prefix_end)
        keys, values = torch.cat([k[prefix], k[own]]), torch.cat([v[prefix], v[own]])
        scores = torch.einsum("qhc,khc->hqk", q[own], keys) / q.shape[-1] ** 0.5
        visible = torch.ones(segment.queries, segment.keys, dtype=torch.bool, device=q.device)
        hidden = visible.triu(segment.keys - segment.queries + 1)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        out[own] = torch.einsum("hqk,khc->qhc", weights, values)
    return out


def allowed_in_attention(dtype):
    """A few roundings."""
    if dtype == torch.bfloat16:
        return 2e-2
    return 1e-4 if CUDA else 1e-5


def check_attention(name, heads, kv_heads, head_width, items, dtype=DTYPE):
    """Output and gradients of `attend` against the definition."""
    torch.manual_seed(0)
    stream = pack(items).to(DEVICE)
    N = len(stream.tokens)
    q, k, v = (
        torch.randn(N, h, head_width, device=DEVICE, dtype=dtype, requires_grad=True)
        for h in (heads, kv_heads, kv_heads)
    )
    upstream = torch.randn(N, heads, head_width, device=DEVICE, dtype=dtype)
    ours = attend(q, k, v, stream)
    gradients = torch.autograd.grad(ours, (q, k, v), upstream)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    plain = plain_attention(*wide, stream)
    expected = torch.autograd.grad(plain, wide, upstream.double())
    errors = [relative(a, b) for a, b in zip((ours, *gradients), (plain, *expected))]
    title = f"{name}, {name_of(dtype)}"
    return check("attention", title, max(errors), allowed_in_attention(dtype))


def attention_checks():
    scale = 1 if CUDA else 16
    prompt, chosen, rejected = ([1] * (n // scale) for n in (300, 180, 96))
    lone = [([], [prompt]), ([], [chosen]), ([], [rejected])]
    shared = [(prompt, [chosen, rejected])] * 4
    short = [(prompt, [[1], [2]]), ([], [[3]])]
    checks = [
        check_attention("lone texts", 16, 16, 128, lone),
        check_attention("shared prompt, queries < keys", 16, 16, 128, shared),
        check_attention("shared prompt, grouped heads", 16, 4, 128, shared),
        check_attention("shared prompt, head width 80", 32, 32, 80, shared),
        check_attention("one-token responses", 16, 16, 64, short),
    ]
    if CUDA:
        checks.append(check_attention("shared prompt, tiles", 16, 4, 128, shared, torch.float32))
    return checks


# ---- is it right: models and engines -------------------------------------------------------------


def small_model(config, dtype=torch.float32):
    """Weights of order one, in which an error shows; the same on every device."""
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(config.width, generator=generator) / config.width**0.5
    model = RewardModel(Trunk(config), head)
    with torch.no_grad():
        for name, p in model.trunk.named_parameters():
            scale = p.shape[1] ** -0.5 if p.ndim > 1 else 0.2
            centre = float(name.endswith("norm.weight"))
            p.copy_(torch.randn(p.shape, generator=generator) * scale + centre)
    model.trunk.compute_dtype = dtype
    return model.to(DEVICE)


def random_pairs(count, vocabulary, unique=342):
    """Pairs of `unique` tokens on the mean, 41% of them shared, with log-normal lengths.

    They are spread as those of preference data are.
    """
    random, pairs = np.random.default_rng(0), []
    lengths = np.exp(random.normal(0, 0.5, (count, 3))) * np.array([0.41, 0.295, 0.295])
    lengths = np.maximum(1, lengths * unique * count / lengths.sum()).astype(int)
    for row in lengths:
        prompt, c, r = (random.integers(2, vocabulary, n).astype(np.int32) for n in row)
        sides = np.concatenate([prompt, c]), np.concatenate([prompt, r])
        pairs.append(TokenPair(*sides, len(prompt), 0))
    return pairs


def gradients_of(model, pairs, recompute, micro_tokens):
    """All gradients of a streamed step, as one vector."""
    batches = micro_batches(pairs, sources_of(pairs), micro_tokens)
    step = StreamedStep(model, batches, objective(), recompute)
    step.forward()
    parts = list(step.backward())
    return torch.cat(
        [part[name].flatten().double().cpu() for part in parts for name in sorted(part)]
    )


@torch.no_grad()
def features_of(model, pairs, share):
    return torch.cat(model.features(pack_pairs(pairs, share=share)))


def model_checks():
    """Rewards with and without shared prompts, and gradients of every kind of recomputation."""
    checks = []
    families = {
        "gpt_neox": replace(NEOX, **TINY, mlp_width=256),
        "llama": replace(LLAMA, **TINY, mlp_width=172),
    }
    for (family, config), dtype in product(families.items(), dict.fromkeys((torch.float32, DTYPE))):
        title = f"{family}, {name_of(dtype)}"
        allowed = 2e-2 if dtype == torch.bfloat16 else 1e-4
        pairs, model = random_pairs(20, config.vocabulary, 60), small_model(config, dtype)
        error = relative(features_of(model, pairs, True), features_of(model, pairs, False))
        checks.append(check("sharing", title, error, allowed))
        expected = gradients_of(model, pairs, "none", 10**9)
        for recompute in RECOMPUTE:
            error = relative(gradients_of(model, pairs, recompute, 200), expected)
            name = f"{title}, streamed {recompute} in micro-batches"
            checks.append(check("gradient", name, error, allowed))
    return checks


def after_steps(config, recipe, pairs, dtype=torch.float32):
    """All parameters as one vector, after three steps of a small model."""
    model, optimizer = small_model(config, dtype), AdamW(recipe.parameters, recipe.moments)
    for name, p in list(model.named_parameters()):
        held = optimizer.adopt(name, p.detach(), home_of(recipe))
        replace_parameter(model, name, held)
    optimizer.learning_rate = 1e-3
    engine = open_engine(model, optimizer, recipe)
    for _ in range(3):
        engine.step(pairs, sources_of(pairs), objective())
    engine.settle()
    values = [optimizer.value(name, p) for name, p in model.named_parameters()]
    return torch.cat([value.flatten().cpu() for value in values])


def engine_checks():
    """Streamed steps against plain ones in fp32; what is offloaded against what is not."""
    config, checks = replace(NEOX, **TINY, mlp_width=256), []
    pairs = random_pairs(20, config.vocabulary, 60)
    before = torch.cat([p.detach().flatten().cpu() for p in small_model(config).parameters()])
    plain = after_steps(config, Recipe(), pairs)
    for recompute in RECOMPUTE:
        recipe = Recipe("streamed", recompute=recompute, micro_tokens=300)
        moved = after_steps(config, recipe, pairs) - before
        name = f"streamed {recompute}, 3 AdamW steps (noise of zero gradients included)"
        checks.append(check("steps", name, relative(moved, plain - before), 0.2))
    for recipe in (EXACT, LEAN):
        recipe = replace(recipe, micro_tokens=300)
        here = after_steps(config, recipe, pairs, DTYPE)
        away = after_steps(config, replace(recipe, offload=OFFLOADS), pairs, DTYPE)
        name = f"{recipe.parameters}, {recipe.moments}: states and inputs on the host"
        error = relative(away - before, here - before)
        checks.append(check("host", name, error, 1e-2 if CUDA else 0))
    return checks


def moved_by(parameters, moments, value, gradients, device):
    """How far ten updates move a tensor on a device."""
    optimizer = AdamW(parameters, moments)
    p = optimizer.adopt("p", value.to(device, copy=True))
    optimizer.learning_rate = 1e-3
    for g in gradients.to(device):
        optimizer.update("p", p, g)
        optimizer.steps += 1
    return optimizer.value("p", p).cpu() - value


def storage_checks():
    """Every storage against the same on the CPU: exact ones to rounding, others to their grain."""
    torch.manual_seed(0)
    value, gradients, checks = torch.randn(300, 1000), torch.randn(10, 300, 1000), []
    for parameters, moments in product(PARAMETERS, MOMENTS):
        expected, moved = (
            moved_by(parameters, moments, value, gradients, device) for device in ("cpu", DEVICE)
        )
        exact = parameters != "bfloat16" and moments == "float32"
        compiled = ", compiled" if CUDA and fused(parameters, moments) else ""
        name = f"{parameters}, {moments}{compiled}"
        checks.append(check("storage", name, relative(moved, expected), 1e-4 if exact else 0.1))
    return checks


# ---- how fast is it ------------------------------------------------------------------------------


def run_steps(name, config, recipe, pairs, steps=3):
    """Seconds, shares of the peak, and memory against the plan, of steps of all pairs."""
    empty_memory()
    shapes = tuple(shape_of(pair) for pair in pairs)
    work = Workload(shapes, 1, tokens_of(shapes))
    planned = memory_of(config, work, recipe, DTYPE.itemsize, CUDA)
    began = seconds()
    optimizer = AdamW(recipe.parameters, recipe.moments)
    model = random_model(config, optimizer, DEVICE, home_of(recipe))
    model.trunk.compute_dtype = DTYPE
    engine = open_engine(model, optimizer, recipe)
    optimizer.learning_rate = 1e-6
    setup, times = seconds() - began, []
    allocated = torch.cuda.memory_allocated() if CUDA else 0
    for _ in range(steps):
        began = seconds()
        step_result = engine.step(pairs, sources_of(pairs), objective())
        times.append(seconds() - began)
    peak = torch.cuda.max_memory_allocated() if CUDA else 0
    best = min(times[1:])  # the first one compiles
    useful, executed = step_flops(config, work, recipe)
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
        "allocated_gb": allocated / 1e9,
        "peak_gb": peak / 1e9,
        "planned_gb": planned.peak / 1e9,
        "phase": planned.phase,
        "host_gb": planned.offloaded / 1e9,
        "loss": step_result.loss.item(),
    }
    print(step_line(result, best), flush=True)
    return result


def step_line(r, best):
    return (
        f"step       {r['shape']}, {r['recipe']}: {best:.3f} s, {r['pairs_per_second']:.1f} "
        f"pairs/s, {r['tokens_per_second']:,.0f} tokens/s, executed {r['executed_share']:.0%}, "
        f"useful {r['useful_share']:.0%} of peak; {r['peak_gb']:.1f} GB at the peak, "
        f"planned {r['planned_gb']:.1f}"
    )


def try_steps(name, config, recipe, pairs):
    """The figures of a recipe, or why there are none."""
    try:
        return run_steps(name, config, recipe, pairs)
    except torch.OutOfMemoryError as error:
        print(f"step       {name}, {recipe}: out of memory ({str(error)[:100]})", flush=True)
        return {"shape": name, "recipe": str(recipe), "skipped": "out of memory"}


def load_and_save(config):
    """GB/s of writing a checkpoint with its states, and of reading it, on this machine's disk."""
    empty_memory()
    optimizer = AdamW("split", "int8")
    model = random_model(config, optimizer, DEVICE)
    tensors = {
        name: Lazy(tuple(p.shape), torch.float32, partial(optimizer.value, name, p))
        for name, p in model.named_parameters()
    }
    for name, state in optimizer.state.items():
        tensors |= {f"{kind}.{name}": t for kind, t in state.items() if kind != "low"}
    with tempfile.TemporaryDirectory() as folder:
        path, began = Path(folder) / "x.safetensors", seconds()
        write_tensors(path, tensors)
        writing, gigabytes = seconds() - began, path.stat().st_size / 1e9
        began = seconds()
        for tensor in load_file(path).values():
            tensor.to(DEVICE)
        reading = seconds() - began
    written, read = gigabytes / writing, gigabytes / reading
    print(
        f"disk       {gigabytes:.2f} GB: written at {written:.2f} GB/s, read at {read:.2f} GB/s",
        flush=True,
    )
    return {"gigabytes": gigabytes, "write_gb_per_second": written, "read_gb_per_second": read}


# ---- the report ----------------------------------------------------------------------------------


def markdown(report):
    """The report as the engine's README wants it."""
    passed = sum(c["passed"] for c in report["checks"])
    table = MarkdownTable(
        "shape",
        "recipe",
        "pairs/s",
        "tokens/s",
        "executed, useful share of peak",
        "peak GB: measured, planned",
        "host GB",
    )
    for r in report["steps"]:
        if "skipped" in r:
            table.add(r["shape"], f"`{r['recipe']}`", r["skipped"], "", "", "", "")
            continue
        table.add(
            r["shape"],
            f"`{r['recipe']}`",
            f"{r['pairs_per_second']:.1f}",
            f"{r['tokens_per_second']:,.0f}",
            f"{r['executed_share']:.1%}, {r['useful_share']:.1%}",
            f"{r['peak_gb']:.1f}, {r['planned_gb']:.1f}",
            f"{r['host_gb']:.1f}",
        )
    text = (
        f"{report['device']}, torch {report['torch']}, {report['date']}, "
        f"`python tests/bench/gpu.py`; {passed} of {len(report['checks'])} checks passed.\n\n"
        f"{table}\n"
    )
    if "disk" in report:
        written, read = (report["disk"][f"{verb}_gb_per_second"] for verb in ("write", "read"))
        text += f"\nDisk: {written:.2f} GB/s written, {read:.2f} GB/s read.\n"
    return text


def parse_options():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("gpu.json"),
        help="write the results here as JSON, and beside it as Markdown",
    )
    parser.add_argument(
        "--seconds", type=float, default=520, help="start no further part after so many seconds"
    )
    parser.add_argument("--shape", action="append", choices=tuple(SHAPES), help="only these shapes")
    return parser.parse_args()


class Report:
    """What was measured, written after every part: a run that is cut short has what it has."""

    def __init__(self, options):
        self.options, self.began = options, time.monotonic()
        self.values = {
            "device": NAME,
            "torch": torch.__version__,
            "date": time.strftime("%-d %B %Y"),
            "checks": [],
            "steps": [],
        }

    @property
    def elapsed(self):
        return time.monotonic() - self.began

    @property
    def has_time(self):
        return self.elapsed < self.options.seconds

    def save(self):
        self.values["elapsed"] = self.elapsed
        self.options.output.write_text(json.dumps(self.values, indent=2))
        self.options.output.with_suffix(".md").write_text(markdown(self.values))


def check_everything(report):
    for checks in (attention_checks, model_checks, storage_checks, engine_checks):
        report.values["checks"] += checks()
        report.save()
    if not all(c["passed"] for c in report.values["checks"]):
        sys.exit("something is wrong on this device: no speed was measured")


def measure_shape(name, report):
    """Steps of one shape by each of its recipes, as long as there is time."""
    config = SHAPES[name] if CUDA else replace(SHAPES[name], **TINY, mlp_width=256)
    count, unique = (80, 342) if CUDA else (10, 30)
    pairs = random_pairs(count, config.vocabulary, unique)
    for recipe in RECIPES[name]:
        if report.has_time:
            result = try_steps(name, config, recipe, pairs)
        else:
            skipped = "not run: out of time"
            result = {"shape": name, "recipe": str(recipe), "skipped": skipped}
        report.values["steps"].append(result)
        report.save()


def main():
    options = parse_options()
    report = Report(options)
    print(f"{NAME}, torch {torch.__version__}, {DTYPE}", flush=True)
    check_everything(report)
    for name in options.shape or SHAPES:
        measure_shape(name, report)
    if report.has_time:
        config = NEOX if CUDA else replace(NEOX, **TINY, mlp_width=256)
        report.values["disk"] = load_and_save(config)
    report.save()
    print(f"\n{markdown(report.values)}\n{report.elapsed:.0f} s; {options.output}")


if __name__ == "__main__":
    main()
