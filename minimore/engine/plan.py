"""What a training will take, before anything is allocated, and the recipe that fits: the verb `plan`, and what `train --memory` asks."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product

import torch

from ..data.pairs import Source, load_source
from ..data.sampling import DataOptions, batch_size_of, epoch_steps
from ..files import refuse_existing, write_json
from ..model.checkpoint import find, read_config
from ..model.recompute import RECOMPUTE
from ..model.tokenizer import Tokenizer
from ..model.trunk import ModelConfig
from ..options import MOST, InputError, option, parse_sources
from ..reward import ModelOptions, check_length
from .cost import (
    EFFICIENCY,
    GPUS,
    Gpu,
    Memory,
    PairShape,
    Workload,
    in_bytes,
    memory_of,
    parameter_bytes,
    sizes_of,
    state_bytes,
    step_flops,
    step_seconds,
    workload,
)
from .recipe import ENGINES, MOMENTS, OFFLOADS, PARAMETERS, Recipe, RecipeOptions

SIZES = (24e9, 40e9, 80e9, 141e9)
MOST_PLANNED = 10**4  # pairs of a step that is made up
EPOCHS = 20  # are looked at before a training


# ---- choosing ----------------------------------------------------------------------------------------------------------


def is_exact(recipe: Recipe, width: int) -> bool:
    """Whether nothing but the order of additions differs from fp32 AdamW. Split parameters are exact where one computes in bf16 anyway."""
    return recipe.moments == "float32" and (
        recipe.parameters == "float32" or recipe.parameters == "split" and width == 2
    )


def recipes(given: dict) -> list[Recipe]:
    """Every recipe that does not contradict itself or what is given, the simple ones first."""
    free = {
        "engine": ENGINES,
        "parameters": PARAMETERS,
        "moments": MOMENTS,
        "recompute": RECOMPUTE,
        "offload": ((), ("inputs",), ("states",), OFFLOADS),
    }
    tokens, found = given.get("micro_tokens", Recipe.micro_tokens), []
    for values in product(
        *((given[name],) if name in given else known for name, known in free.items()),
        sorted({tokens, *(n for n in (4096, 2048, 1024) if n < tokens)}, reverse=True),
    ):
        recipe = Recipe(*values, given.get("max_grad_norm"))
        try:
            recipe.check()
        except InputError:
            continue
        found.append(recipe)
    return found


def fastest(
    c: ModelConfig,
    work: Workload,
    candidates: Iterable[Recipe],
    limit: float,
    width: int,
    flash: bool,
    gpu: Gpu = GPUS["A100"],
    host: float = math.inf,
) -> tuple[Recipe, Memory] | None:
    """The simplest of the recipes that are as fast as any (to 1%) whose peak is at most `limit` bytes; None if none fits.

    A recipe that needs more than 93% of the limit is taken only if no other fits.
    """
    fitting = [
        (recipe, memory, step_seconds(c, work, recipe, gpu))
        for recipe in candidates
        if (memory := memory_of(c, work, recipe, width, flash)).peak <= limit
        and sum(memory.host.values()) <= host
    ]
    fitting = [found for found in fitting if found[1].peak <= 0.93 * limit] or fitting
    least = min((seconds for *_, seconds in fitting), default=0)
    return next(
        ((recipe, memory) for recipe, memory, seconds in fitting if seconds <= 1.01 * least), None
    )


def choose(
    c: ModelConfig,
    work: Workload,
    given: dict,
    limit: float,
    device: str,
    compute: torch.dtype,
    host: float = math.inf,
) -> Recipe:
    """The recipe for --memory: what was not given is chosen, exact ones only; prints which and why, or raises InputError.

    host: bytes of the host's memory that may be offloaded to.
    """
    width, flash, candidates = (
        compute.itemsize,
        device == "cuda" and compute.itemsize == 2,
        recipes(given),
    )
    if not candidates:
        Recipe(**given).check()  # says what contradicts what
    unasked = {name: getattr(Recipe, name) for name in ("parameters", "moments") if name in given}
    allowed = [r for r in candidates if is_exact(replace(r, **unasked), width)]
    found = fastest(c, work, allowed, limit, width, flash, host=host)
    if found is None:
        raise InputError(refusal(c, work, given, allowed, limit, width, flash, host))
    recipe, memory = found
    simplest = memory_of(c, work, allowed[0], width, flash).peak
    print(
        f"--memory: {in_bytes(memory.peak)} of {in_bytes(limit)} in the largest step, {len(work.largest)} pairs of {sum(p.tokens for p in work.largest):,} unique tokens"
        + (f", and {in_bytes(sum(memory.host.values()))} of the host's" if memory.host else "")
        + f", with {recipe}"
        + (
            ""
            if recipe == allowed[0]
            else f"; the simplest, {allowed[0]}, {'is slower' if simplest <= limit else f'would take {in_bytes(simplest)}'}"
        ),
        flush=True,
    )
    return recipe


def refusal(c, work, given, allowed, limit, width, flash, host) -> str:
    """Why nothing fits, and what would."""
    costs = lambda candidates: [(memory_of(c, work, r, width, flash), r) for r in candidates]
    leanest = lambda candidates: min(
        ((m.peak, r) for m, r in costs(candidates) if sum(m.host.values()) <= host),
        key=lambda pair: pair[0],
        default=(math.inf, None),
    )
    (least, recipe), (less, other) = leanest(allowed), leanest(recipes(given))
    room = f"the host has {in_bytes(host)} to offload to" if host < math.inf else ""
    if recipe is None:
        return f"--offload {' and '.join(given['offload'])}: takes {in_bytes(min(sum(m.host.values()) for m, _ in costs(allowed)))} of the host's memory, but {room}; offload less"
    held = sum(parameter_bytes(part, recipe) for part in sizes_of(c).parts)
    return (
        f"--memory: {in_bytes(limit)} are too little: the parameters alone take {in_bytes(held)}, training at least {in_bytes(least)} ({recipe}); "
        + (f"{room}; " if room else "")
        + (
            f"{in_bytes(less)} with {other}, which rounds at random"
            if less < least
            else "try a smaller --micro-tokens, --batch-size or --max-length"
        )
    )


def parse_memory(text: str) -> float:
    """ "24GB" -> 24e9, "24GiB" -> 24 x 2^30; MB and MiB, too."""
    units = {"GB": 1e9, "GiB": 2**30, "MB": 1e6, "MiB": 2**20}
    found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?(GiB|MiB|GB|MB)", text, re.ASCII)
    if not found or not float(found.group(1)):
        raise InputError(f"--memory {text}: expected a number with its unit, 24GB or 24GiB")
    return float(found.group(1)) * units[found.group(2)]


# ---- options and the verb ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RunOptions(RecipeOptions, DataOptions, ModelOptions):
    """What `train` and `plan` both take: a model, the data of a run, and its recipe."""


@dataclass(frozen=True, kw_only=True)
class PlanOptions(RunOptions):
    """What `plan` takes."""

    model: str = option(
        value="MODEL",
        help="checkpoint directory, of which config.json alone is enough, or hub name",
        positional=True,
    )
    tokens: int = option(
        342, help="without --source: unique tokens a pair (342 is the mean of five public sets)"
    )
    pairs: int = option(200_000, help="without --source: pairs of the whole run")
    json: str | None = option(None, value="OUT.json", help="write all figures here; must not exist")


RECIPES = {
    "fp32 AdamW, plain": Recipe(),
    "fp32 AdamW": Recipe("streamed"),
    "split master, fp32 moments": Recipe("streamed", "split"),
    "split master, bf16 moments (rounds)": Recipe("streamed", "split", "bfloat16"),
    "split master, 8-bit moments (rounds)": Recipe("streamed", "split", "int8"),
    "stochastic bf16, 8-bit moments (rounds)": Recipe("streamed", "bfloat16", "int8"),
    "split master, states on the host": Recipe("streamed", "split", offload=("states",)),
    "split master, states and inputs on the host": Recipe("streamed", "split", offload=OFFLOADS),
}


def plan(options: PlanOptions):
    """Print what a training will take: by recipe, by GPU, and for the recipe that the options name."""
    refuse_existing(options.json, "--json")
    given, limit = (
        options.chosen_recipe(options.micro_tokens),
        parse_memory(options.memory) if options.memory is not None else None,
    )
    recipe = Recipe(**given)
    if limit is None:
        recipe.check()
    directory = find(options.model, config_only=True)
    values, _, c = read_config(directory)
    check_length(c, options.max_length, directory)
    work = (
        given_workload(options)
        if not options.source
        else real_workload(options, Tokenizer(directory))
    )
    width, s, tokens = (
        4 if options.compute_dtype == "float32" else 2,
        sizes_of(c),
        sum(p.tokens for p in work.largest),
    )
    flash = width == 2
    print(
        f"model   {values['model_type']}, {s.parameters:,} parameters with the reward head, without a language-model head"
    )
    print(
        f"data    largest step {len(work.largest)} pairs, {tokens:,} unique tokens; {work.steps:,} steps, {work.tokens / 1e6:,.1f} million unique tokens"
    )
    print(
        f"flops   {in_flops(step_flops(c, work, Recipe())[0])} of use in the largest step; times below are of the whole run at {EFFICIENCY:.0%} of a GPU's peak (assumed)\n"
    )
    report = {"parameters": s.parameters, "workload": asdict(work), "recipes": {}, "fits": {}}
    print(
        f"{'with --recompute full':45} bytes a parameter   device     host   fits "
        + "  ".join(f"{name:>8}" for name in GPUS)
    )
    for name, recipe in RECIPES.items():
        recipe = replace(recipe, recompute="full", micro_tokens=options.micro_tokens)
        memory, hours = (
            memory_of(c, work, recipe, width, flash),
            {gpu: run_hours(c, work, recipe, g) for gpu, g in GPUS.items()},
        )
        fits = next((f"{size / 1e9:.0f}" for size in SIZES if memory.peak <= size), "none")
        held = sum(
            parameter_bytes(p, recipe)
            + (0 if "states" in recipe.offload else state_bytes(p, recipe))
            for p in s.parts
        ) + (4 * s.parameters if recipe.engine == "plain" else 0)
        print(
            f"{name:45} {held / s.parameters:17.2f} {in_bytes(memory.peak):>8} {in_bytes(sum(memory.host.values())) if memory.host else '-':>8} {fits:>6} "
            + "  ".join(f"{in_time(3600 * h):>8}" for h in hours.values())
        )
        report["recipes"][name] = {
            "recipe": asdict(recipe),
            "memory": asdict(memory),
            "hours": hours,
        }
    print()
    fits = {}
    for size in SIZES:
        found = fastest(
            c,
            work,
            [r for r in recipes({"micro_tokens": options.micro_tokens}) if is_exact(r, width)],
            size,
            width,
            flash,
        )
        line = (
            f"{found[0]}: {in_bytes(found[1].peak)}"
            + (f", host {in_bytes(sum(found[1].host.values()))}" if found[1].host else "")
            if found
            else "no exact recipe fits"
        )
        fits.setdefault(line, []).append(f"{size / 1e9:.0f}")
        report["fits"][f"{size / 1e9:.0f}"] = asdict(found[0]) if found else None
    print("\n".join(f"{', '.join(sizes)} GB: {line}" for line, sizes in fits.items()))
    if limit is not None:
        recipe = choose(
            c, work, given, limit, "cuda", torch.bfloat16 if width == 2 else torch.float32
        )
    print_recipe(c, work, recipe, width, flash, report)
    if options.json:
        write_json(options.json, report)


def print_recipe(c, work, recipe, width, flash, report):
    """One recipe in detail: bytes by kind at its fullest moment, time a step."""
    memory, (useful, executed) = (
        memory_of(c, work, recipe, width, flash),
        step_flops(c, work, recipe),
    )
    print(f"\n{recipe}\nfullest moment: {memory.moment}, {in_bytes(memory.peak)}")
    for place, items in (("device", memory.device), ("host", memory.host)):
        for name, count in items.items():
            print(f"  {place:6} {name:24} {in_bytes(count):>9}")
    print(
        f"{in_flops(executed)} executed in the largest step, {in_flops(useful)} of use; "
        + ", ".join(
            f"{name} {in_time(step_seconds(c, work, recipe, gpu))} a step, {in_time(3600 * run_hours(c, work, recipe, gpu))} in all"
            for name, gpu in GPUS.items()
        )
    )
    report["recipe"] = {
        "recipe": asdict(recipe),
        "memory": asdict(memory),
        "useful": useful,
        "executed": executed,
    }


def in_flops(count: float) -> str:
    """A number of FLOPs with its unit."""
    return f"{count / 1e12:,.1f} TFLOPs" if count >= 1e11 else f"{count / 1e9:,.2f} GFLOPs"


def in_time(seconds: float) -> str:
    """Hours, minutes, seconds or milliseconds."""
    unit, size = next(
        (u, s)
        for u, s in (("h", 3600), ("min", 60), ("s", 1), ("ms", 1e-3))
        if seconds >= s or u == "ms"
    )
    return f"{seconds / size:.1f} {unit}"


def run_hours(c: ModelConfig, work: Workload, recipe: Recipe, gpu: Gpu) -> float:
    """The largest step's time, scaled to the tokens of the whole run."""
    return (
        step_seconds(c, work, recipe, gpu)
        * work.tokens
        / sum(p.tokens for p in work.largest)
        / 3600
    )


def given_workload(options: PlanOptions) -> Workload:
    """Equal pairs: 41% of their tokens shared, as the mean of five public sets."""
    batch = 80 if options.batch_size is None else options.batch_size
    for name, value, least, most in (
        ("max-length", options.max_length, 1, MOST),
        ("tokens", options.tokens, 2, min(2 * options.max_length, 10**6)),
        ("pairs", options.pairs, 1, MOST),
        ("batch-size", batch, 1, MOST_PLANNED),
        ("epochs", options.epochs, 1, MOST),
    ):
        if not least <= value <= most:
            raise InputError(
                f"--{name} {value}: expected {least} to {most}"
                + (" (twice --max-length)" if name == "tokens" and most < 10**6 else "")
            )
    shared = int(0.41 * options.tokens) if options.tokens > 3 else 0
    rest = options.tokens - shared
    pair, steps = (
        PairShape(shared, rest - rest // 2, rest // 2),
        -(-options.pairs // batch) * options.epochs,
    )
    return Workload(
        (pair,) * min(batch, options.pairs), steps, options.pairs * options.epochs * options.tokens
    )


def real_workload(options: RunOptions, tokenizer: Tokenizer) -> Workload:
    """Of the files that --source names."""
    paths = parse_sources(options.source)
    batch = batch_size_of(options, len(paths))
    return workload_of(
        options,
        [
            load_source(name, path, tokenizer, options.max_length, options.truncate)
            for name, (path, _) in paths.items()
        ],
        batch,
    )


def workload_of(options: RunOptions, sources: Sequence[Source], batch: int) -> Workload:
    """Of the steps that a training with these options takes; of many epochs the first EPOCHS are looked at, and later ones taken to be like them."""
    sizes, seen = [len(s.pairs) for s in sources], min(options.epochs, EPOCHS)
    work = workload(
        sources,
        (
            epoch_steps(sizes, options.sampling, options.pairs_per_source, batch, options.seed, e)
            for e in range(seen)
        ),
    )
    return replace(
        work, steps=work.steps * options.epochs // seen, tokens=work.tokens * options.epochs // seen
    )
