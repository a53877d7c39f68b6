"""The stage of gpu.py about policies: their loss, what they write, fine-tuning on the command line.

M targets of a step.
"""

import json
import tempfile
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
from gpu_correct import check, fact, finished, killed_after_a_checkpoint, minimore, relative
from gpu_shapes import (
    CUDA,
    DEVICE,
    DTYPE,
    EXACT,
    LEAN,
    PEAK,
    TINY_LLAMA,
    TINY_NEOX,
    config_of,
)
from gpu_speed import GB, by_function, empty_memory, seconds, timed, uncompiled
from models import random_value
from safetensors.torch import load_file

from minimore.alignment.generate import Sampling, generate
from minimore.alignment.language import LanguageObjective, Responses
from minimore.alignment.policy import LanguageModel
from minimore.data.world import World
from minimore.engine.flops import step_flops
from minimore.engine.memory import memory_of
from minimore.engine.optim import AdamW, replace_parameter
from minimore.engine.recipe import Recipe
from minimore.engine.streamed import open_engine
from minimore.engine.workload import Workload, tokens_of
from minimore.model.trunk import Trunk


class KeepsGradients:
    """Stands in for an optimizer: changes nothing, and keeps the gradients of the last step."""

    def __init__(self):
        self.gradients, self.steps = {}, 0

    def update(self, name, parameter, gradient):
        self.gradients[name] = gradient.double().cpu()


def small_policy(config, tied, dtype=torch.float32, device=DEVICE):
    """Weights of order one, in which an error shows; the same on every device."""
    generator = torch.Generator().manual_seed(0)
    trunk = Trunk(config)
    with torch.no_grad():
        for name, p in trunk.named_parameters():
            scale = p.shape[1] ** -0.5 if p.ndim > 1 else 0.2
            centre = float(name.endswith("norm.weight"))
            p.copy_(torch.randn(p.shape, generator=generator) * scale + centre)
    shape = trunk.embedding.weight.shape
    own = torch.randn(shape, generator=generator) / shape[1] ** 0.5
    model = LanguageModel(trunk, trunk.embedding.weight if tied else own)
    model.trunk.compute_dtype = dtype
    return (model.double() if dtype == torch.float64 else model).to(device)


def random_items(count, vocabulary, prompt, response):
    """Prompts of so many tokens on the mean with one response each."""
    random = np.random.default_rng(0)

    def ids(mean):
        return random.integers(2, vocabulary, random.integers(mean // 2, 2 * mean)).tolist()

    return [Responses(ids(prompt), [ids(response)]) for _ in range(count)]


def gradients_of(model, items, recipe):
    optimizer = KeepsGradients()
    open_engine(model, optimizer, recipe).step(items, [0] * len(items), LanguageObjective())
    names = sorted(optimizer.gradients)
    return torch.cat([optimizer.gradients[name].flatten() for name in names])


def gradient_checks():
    """Gradients of the language loss in every engine against float64 on the CPU."""
    for family, config in {"gpt_neox": TINY_NEOX, "llama": TINY_LLAMA}.items():
        items = random_items(12 if CUDA else 5, config.vocabulary, 20, 30)
        for tied in (False, True):
            exact = small_policy(config, tied, torch.float64, "cpu")
            expected = gradients_of(exact, items, Recipe())
            for recipe in (Recipe(), Recipe("streamed", recompute="full", micro_tokens=300)):
                for dtype in dict.fromkeys((torch.float32, DTYPE)):
                    allowed = 1e-4 if dtype == torch.float32 else 5e-2
                    model = small_policy(config, tied, dtype)
                    error = relative(gradients_of(model, items, recipe), expected)
                    words = f"{family}, {'tied' if tied else 'untied'}, {recipe.engine}, {dtype}"
                    yield check(f"language gradients, {words}", error, allowed)


def writing_checks():
    """What is written on the GPU is what is written on the CPU, alone and in company."""
    for family, config in {"gpt_neox": TINY_NEOX, "llama": TINY_LLAMA}.items():
        count, tokens = (9, 24) if CUDA else (4, 8)
        prompts = [item.prompt for item in random_items(count, config.vocabulary, 20, 2)]
        greedy = Sampling(temperature=0, max_new_tokens=tokens)
        seeds = [[number, 100 + number] for number in range(len(prompts))]
        written = []
        for device in ("cpu", DEVICE):
            model = small_policy(config, False, device=device).eval()
            samples = generate(model, prompts, [[0]] * len(prompts), greedy)
            written.append([sample.tokens for sample in samples])
        different = sum(a != b for a, b in zip(*written))
        yield check(f"{family}: greedy texts that differ from the CPU's", different, 0)
        sampling = Sampling(top_p=0.9, max_new_tokens=tokens)
        together = generate(model, prompts, seeds, sampling)
        alone = [
            sample.tokens
            for prompt, own in zip(prompts, seeds)
            for sample in generate(model, [prompt], [own], sampling)
        ]
        different = sum(a.tokens != b for a, b in zip(together, alone))
        yield check(f"{family}: samples that differ in company", different, 0)


# ---- at size -------------------------------------------------------------------------------------


def large_policy(config, optimizer):
    """Each parameter is made on the device and adopted at once, as in loading a checkpoint."""
    with torch.device("meta"):
        trunk = Trunk(config)
    generator = torch.Generator(DEVICE).manual_seed(0)
    for name, p in list(trunk.named_parameters()):
        value = random_value(name, p.shape, generator)
        replace_parameter(trunk, name, optimizer.adopt(f"trunk.{name}", value))
    shape = (config.vocabulary, config.width)
    unembedding = optimizer.adopt("output", random_value("output", shape, generator))
    trunk.compute_dtype = DTYPE
    return LanguageModel(trunk, unembedding)


def tuning(recipe):
    """A step of fine-tuning: tokens a second, share of the peak, memory against the plan."""
    config = config_of("Pythia-1.4B")
    count, prompt, response = (64, 100, 150) if CUDA else (5, 8, 12)
    items = random_items(count, config.vocabulary, prompt, response)
    shapes = tuple((len(prompt), *map(len, responses)) for prompt, responses in items)
    work = Workload(shapes, 1, tokens_of(shapes), "untied")
    planned = memory_of(config, work, recipe, DTYPE.itemsize, CUDA)
    empty_memory()
    optimizer = AdamW(recipe.parameters, recipe.moments)
    engine = open_engine(large_policy(config, optimizer), optimizer, recipe)
    optimizer.learning_rate = 1e-6
    times = []
    for _ in range(3):
        began = seconds()
        engine.step(items, [0] * len(items), LanguageObjective())
        times.append(seconds() - began)
    peak = torch.cuda.max_memory_allocated() if CUDA else 0
    best = min(times[1:])
    _, executed = step_flops(config, work, recipe)
    value = (
        f"{len(items) / best:.1f} prompts/s, {work.tokens / best:,.0f} tokens/s,"
        f" {executed / best / PEAK:.1%} executed, {peak / GB:.1f} GB of {planned.peak / GB:.1f}"
        f" planned ({planned.phase})"
    )
    yield fact(f"fine-tuning Pythia-1.4B, 64 prompts, `{recipe}`", value)


def writing(samples):
    """Tokens a second of a policy of 1.4 billion parameters that writes."""
    write, sampling = writer(samples)
    write()  # warms up
    taken = timed(write)
    tokens = samples * sampling.max_new_tokens
    step = taken / sampling.max_new_tokens
    value = f"{tokens / taken:,.0f} tokens/s, {step * 1e3:.1f} ms a token"
    yield fact(f"writing, Pythia-1.4B, {samples} samples at a time", value)


def writer(samples):
    """A call that writes so many samples with Pythia-1.4B, and how they are drawn."""
    config = config_of("Pythia-1.4B")
    empty_memory()
    model = large_policy(config, AdamW("bfloat16" if CUDA else "float32", "int8")).eval()
    prompts = [item.prompt for item in random_items(samples, config.vocabulary, 60, 2)]
    sampling = Sampling(temperature=1.2, max_new_tokens=128 if CUDA else 8)
    return partial(generate, model, prompts, [[n] for n in range(samples)], sampling), sampling


def writing_by_function():
    """What the CPU does while 16 samples are written, compiled and not."""
    for words in ("compiled", "uncompiled"):
        with uncompiled() if words == "uncompiled" else nullcontext():
            write, _ = writer(16 if CUDA else 4)
            write()
            yield fact(f"writing, {words}, s", timed(write))
            yield from by_function(write, f"writing, {words}")


# ---- the command line ----------------------------------------------------------------------------


def chain():
    """Sample, select, fine-tune with a kill, compare: as one would from a shell."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        World(annotators=("ana", "ben"), train_pairs=(200,), test_pairs=60).write(home / "world")
        model, data = home / "world" / "model", home / "world" / "data"
        began = time.perf_counter()

        def step(*words):
            return minimore("align", *words)

        tune = ["finetune", "--model", model, "--input", data / "ana.train.jsonl"]
        tune += ["--responses", "all", "--learning-rate", "3e-3", "--batch-size", "20"]
        tune += ["--epochs", "8", "--save-steps", "10"]
        finished(step(*tune, "--output", home / "base"), "finetune")
        killed_after_a_checkpoint(step(*tune, "--output", home / "killed"), home / "killed")
        finished(step(*tune, "--output", home / "killed", "--resume"), "finetune, resumed")
        theirs, ours = (load_file(home / run / "model.safetensors") for run in ("base", "killed"))
        error = max((theirs[key] - ours[key]).abs().max().item() for key in theirs)
        yield fact("fine-tuning killed and resumed: largest difference of a weight", error)
        sample = ["sample", "--input", data / "ben.test.jsonl", "--max-new-tokens", 24]
        for run in ("base", "killed"):
            output = ["--model", home / run, "--output", home / f"{run}.jsonl"]
            finished(step(*sample, *output), "sample")
        compare = ["compare", "--judge", f"world:{home / 'world'}", "--json", home / "out.json"]
        files = ["--input", home / "base.jsonl", "--other", home / "killed.jsonl"]
        finished(step(*compare, *files), "compare")
        verdict = json.loads((home / "out.json").read_text())["verdict"]
        taken = time.perf_counter() - began
        yield fact("finetune, sample, compare of a run and its twin", f"{verdict}; {taken:.0f} s")


def policy():
    yield from gradient_checks()
    yield from writing_checks()
    yield from tuning(EXACT)
    yield from tuning(LEAN)
    for samples in (16, 128) if CUDA else (4,):
        yield from writing(samples)
