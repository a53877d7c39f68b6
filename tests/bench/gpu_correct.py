"""The stages of gpu.py that ask whether a GPU computes the right numbers."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch
from gpu_shapes import (
    CUDA,
    DEVICE,
    DTYPE,
    EXACT,
    LEAN,
    NEOX,
    TINY_GEMMA3,
    TINY_LLAMA,
    TINY_NEOX,
    home_of,
    name_of,
    objective,
    random_pairs,
    sources_of,
)
from safetensors.torch import load_file

from minimore.data.pairs import pack_pairs
from minimore.data.world import World
from minimore.engine.objective import micro_batches
from minimore.engine.optim import AdamW, replace_parameter
from minimore.engine.recipe import MOMENTS, OFFLOADS, PARAMETERS, Recipe
from minimore.engine.streamed import StreamedStep, open_engine
from minimore.model.attention import attend, pack
from minimore.model.recompute import RECOMPUTE
from minimore.model.trunk import Trunk
from minimore.reward import RewardModel


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def check(name, error, allowed):
    """A record of something that is right if the error is at most what is allowed."""
    passed = bool(error <= allowed)  # NaN never is
    return {"kind": "check", "name": name, "error": error, "allowed": allowed, "passed": passed}


def fact(name, value):
    return {"kind": "fact", "name": name, "value": value}


# ---- attention -----------------------------------------------------------------------------------


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
    return check(f"{name}, {name_of(dtype)}", max(errors), 2e-2 if dtype.itemsize == 2 else 1e-4)


def attention():
    scale = 1 if CUDA else 16
    prompt, chosen, rejected = ([1] * (n // scale) for n in (300, 180, 96))
    lone = [([], [prompt]), ([], [chosen]), ([], [rejected])]
    shared = [(prompt, [chosen, rejected])] * 4
    short = [(prompt, [[1], [2]]), ([], [[3]])]
    yield check_attention("lone texts", 16, 16, 128, lone)
    yield check_attention("shared prompt, queries < keys", 16, 16, 128, shared)
    yield check_attention("shared prompt, grouped heads", 16, 4, 128, shared)
    yield check_attention("shared prompt, head width 80", 32, 32, 80, shared)
    yield check_attention("one-token responses", 16, 16, 64, short)
    if CUDA:
        yield check_attention("shared prompt, tiles", 16, 4, 128, shared, torch.float32)


# ---- gradients, engines, storages ----------------------------------------------------------------


def small_model(config, dtype=torch.float32, device=DEVICE):
    """Weights of order one, in which an error shows; the same on every device."""
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(config.width, generator=generator) / config.width**0.5
    model = RewardModel(Trunk(config), head)
    with torch.no_grad():
        for name, p in model.trunk.named_parameters():
            scale = p.shape[1] ** -0.5 if p.ndim > 1 else 0.2
            centre = name.endswith("norm.weight") * (1 - config.norm_offset)
            p.copy_(torch.randn(p.shape, generator=generator) * scale + centre)
    model.trunk.compute_dtype = dtype
    if dtype == torch.float64:
        model = model.double()
    return model.to(device)


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
    batch = pack_pairs(pairs, share=share)
    return torch.cat(model.features(batch)).double().cpu()


def model_checks():
    """Features and gradients in every type against float64 on the CPU."""
    tiny = {"gpt_neox": TINY_NEOX, "llama": TINY_LLAMA, "gemma3": TINY_GEMMA3}
    for family, config in tiny.items():
        pairs = (
            random_pairs(20, config.vocabulary, 60)
            if CUDA
            else random_pairs(5, config.vocabulary, 30)
        )
        exact = small_model(config, torch.float64, "cpu")
        features, gradients = (
            features_of(exact, pairs, True),
            gradients_of(exact, pairs, "none", 10**9),
        )
        for dtype in dict.fromkeys((torch.float32, DTYPE)):
            title = f"{family}, {name_of(dtype)}"
            allowed = 3e-2 if dtype.itemsize == 2 else 1e-4
            model = small_model(config, dtype)
            for share in (True, False):
                error = relative(features_of(model, pairs, share), features)
                yield check(f"features, {title}, {'' if share else 'not '}shared", error, allowed)
            for recompute in RECOMPUTE:
                error = relative(gradients_of(model, pairs, recompute, 200), gradients)
                yield check(f"gradients, {title}, streamed {recompute}", error, 3 * allowed)


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
    pairs = (
        random_pairs(20, TINY_NEOX.vocabulary, 60)
        if CUDA
        else random_pairs(5, TINY_NEOX.vocabulary, 30)
    )
    before = torch.cat([p.detach().flatten().cpu() for p in small_model(TINY_NEOX).parameters()])
    plain = after_steps(TINY_NEOX, Recipe(), pairs)
    for recompute in RECOMPUTE:
        recipe = Recipe("streamed", recompute=recompute, micro_tokens=300 if CUDA else 150)
        moved = after_steps(TINY_NEOX, recipe, pairs) - before
        name = f"streamed {recompute}, 3 AdamW steps (noise of zero gradients included)"
        yield check(name, relative(moved, plain - before), 0.2)
    for recipe in (EXACT, LEAN):
        recipe = replace(recipe, micro_tokens=300 if CUDA else 150)
        here = after_steps(TINY_NEOX, recipe, pairs, DTYPE)
        away = after_steps(TINY_NEOX, replace(recipe, offload=OFFLOADS), pairs, DTYPE)
        name = f"{recipe.parameters}, {recipe.moments}: states and inputs on the host"
        yield check(name, relative(away - before, here - before), 5e-2 if CUDA else 0)


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
    rows = 300 if CUDA else 10
    value, gradients = torch.randn(rows, 1000), torch.randn(10, rows, 1000)
    for parameters, moments in product(PARAMETERS, MOMENTS):
        expected, moved = (
            moved_by(parameters, moments, value, gradients, device) for device in ("cpu", DEVICE)
        )
        exact = parameters != "bfloat16" and moments == "float32"
        name = f"storage {parameters}, {moments}"
        yield check(name, relative(moved, expected), 1e-4 if exact else 0.1)


def steps():
    yield from model_checks()
    yield from engine_checks()
    yield from storage_checks()


# ---- the same bits twice -------------------------------------------------------------------------


def repeat():
    """How far two runs of the same step are apart, as it is and with deterministic algorithms."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    config = replace(NEOX, blocks=2) if CUDA else TINY_NEOX
    pairs = random_pairs(20, config.vocabulary, 342 if CUDA else 30)
    model = small_model(config, DTYPE)
    torch.utils.deterministic.fill_uninitialized_memory = False
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        one, other = (gradients_of(model, pairs, "full", 4000) for _ in range(2))
        words = "deterministic algorithms" if deterministic else "default algorithms"
        error = relative(one, other)
        if deterministic:
            yield check(f"the same gradient twice, {words}", error, 0.0)
        else:
            yield fact(f"the same gradient twice, {words}, relative difference", error)


# ---- the command ---------------------------------------------------------------------------------

RECIPES = {
    "streamed split int8": ["--engine", "streamed", "--parameters", "split", "--moments", "int8"],
    "plain float32": [],
}


def minimore(*arguments):
    command = [sys.executable, "-m", "minimore", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finished(process, kind):
    """Wait for a command; returns its output. Raises RuntimeError with it if it failed."""
    output, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{kind}: exit code {process.returncode}\n{output[-1500:]}")
    return output


def command():
    """`minimore demo`."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        pairs = 200 if CUDA else 50
        demo = minimore("demo", "--output", Path(folder) / "demo", "--pairs", pairs)
        mean = next(line for line in finished(demo, "demo").splitlines() if line[:5] == "mean ")
        seconds = time.perf_counter() - began
        yield fact(f"demo of {pairs} pairs", f"{seconds:.0f} s; {' '.join(mean.split())}")


def kills():
    """Trainings that are killed and resumed, through the command line."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        World(annotators=("ana", "ben", "cleo"), train_pairs=(200,) * 3).write(folder / "world")
        for name, recipe in RECIPES.items():
            whole, killed = folder / f"whole {name}", folder / f"killed {name}"
            finished(train(folder / "world", whole, recipe), name)
            killed_after_a_checkpoint(train(folder / "world", killed, recipe), killed)
            finished(train(folder / "world", killed, [*recipe, "--resume"]), f"{name}, resumed")
            theirs, ours = (load_file(run / "model.safetensors") for run in (whole, killed))
            error = max((theirs[key] - ours[key]).abs().max().item() for key in theirs)
            yield fact(f"killed and resumed, {name}: largest difference of a weight", error)
            shutil.rmtree(killed)


def train(world, output, more):
    """Begin a training of three sources, 12 pairs a step, with a checkpoint every 5 steps."""
    sources = [
        word
        for name in ("ana", "ben", "cleo")
        for word in ("--source", f"{name}={world}/data/{name}.train.jsonl")
    ]
    options = ["--batch-size", "12", "--save-steps", "5", "--learning-rate", "1e-3"]
    options += ["--max-length", "64"]
    return minimore(
        "train", "--model", world / "model", *sources, *options, *more, "--output", output
    )


def killed_after_a_checkpoint(process, output):
    """Kill a training as soon as it has a checkpoint of step 5 or later."""
    while process.poll() is None and not list(output.glob("checkpoint-*")):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
