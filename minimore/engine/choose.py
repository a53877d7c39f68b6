"""Which recipe fits: what `--memory` chooses, and what it offers if nothing fits."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any, NamedTuple

import torch

from ..model.model_config import ModelConfig
from ..model.recompute import RECOMPUTE
from ..options import InputError
from ..units import in_bytes
from .distributed import GROUP_RECIPE, shares
from .flops import GPUS, Gpu, step_seconds
from .memory import Memory, memory_of
from .recipe import ENGINES, MOMENTS, OFFLOADS, PARAMETERS, Recipe
from .sizes import parameter_bytes, parameter_shapes
from .workload import Workload, tokens_of

SMALLER_MICRO_TOKENS = (4096, 2048, 1024)  # tried beside the given number
FEWEST_MICRO_TOKENS = (512, 256, 128)  # tried where nothing fits with any of these
AS_FAST = 1.01  # a recipe that takes so much longer than the fastest is as fast
COMFORTABLE = 0.93  # share of the memory that a recipe should not exceed if another one fits
UNITS = {"GB": 1e9, "GiB": 2**30, "MB": 1e6, "MiB": 2**20}


@dataclass(frozen=True)
class Job:
    """What recipes are compared on: a model, its work, and how its activations are computed.

    itemsize: bytes of an activation. flash: attention over one stream, as on CUDA in bf16. gpus:
    how many share the pairs of each step, and the model.
    """

    config: ModelConfig
    work: Workload
    itemsize: int
    flash: bool
    gpus: int = 1

    @cached_property
    def share(self) -> Workload:
        """The work of the GPU that has the most of the largest step."""
        items = self.work.largest
        parts = shares([sum(item) for item in items], 1, self.gpus)
        largest = max((items[part.start : part.stop] for part in parts), key=tokens_of)
        return replace(self.work, largest=largest)

    def memory(self, recipe: Recipe) -> Memory:
        """What the largest step takes on one GPU with this recipe."""
        return memory_of(self.config, self.share, recipe, self.itemsize, self.flash, self.gpus)

    def seconds(self, recipe: Recipe, gpu: Gpu) -> float:
        """How long the largest step takes with this recipe."""
        return step_seconds(self.config, self.share, recipe, gpu, self.gpus)

    def run_seconds(self, recipe: Recipe, gpu: Gpu) -> float:
        """How long the whole run takes: the largest step's time, scaled to all tokens."""
        return self.seconds(recipe, gpu) * self.work.tokens / self.work.largest_tokens

    def fixed(self, chosen: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a recipe that are not to choose: those the user chose, and a group's."""
        return (GROUP_RECIPE if self.gpus > 1 else {}) | dict(chosen)


class Candidate(NamedTuple):
    """A recipe and what it takes."""

    recipe: Recipe
    memory: Memory


# ---- which recipes there are ---------------------------------------------------------------------


def is_exact(recipe: Recipe, itemsize: int) -> bool:
    """Whether nothing but the order of additions differs from fp32 AdamW.

    Split parameters are exact where one computes in bf16 anyway.
    """
    if recipe.moments != "float32":
        return False
    return recipe.parameters == "float32" or (recipe.parameters == "split" and itemsize == 2)


def recipes(fixed: Mapping[str, Any]) -> list[Recipe]:
    """Every recipe that does not contradict itself, the simple ones first.

    fixed: the fields that are chosen already, by name.
    """
    values_of: dict[str, tuple] = {
        "engine": ENGINES,
        "parameters": PARAMETERS,
        "moments": MOMENTS,
        "recompute": RECOMPUTE,
        "offload": ((), ("inputs",), ("states",), OFFLOADS),
        "micro_tokens": micro_tokens_to_try(fixed.get("micro_tokens", Recipe.micro_tokens)),
    }
    for name in ("engine", "parameters", "moments", "recompute", "offload"):
        if name in fixed:
            values_of[name] = (fixed[name],)
    never_chosen = {name: fixed[name] for name in ("max_grad_norm", "train") if name in fixed}
    combinations = [
        Recipe(**dict(zip(values_of, values)), **never_chosen)
        for values in product(*values_of.values())
    ]
    return [recipe for recipe in combinations if is_consistent(recipe)]


def micro_tokens_to_try(most: int) -> tuple[int, ...]:
    """The number of tokens computed at a time, and smaller ones."""
    return (most, *(n for n in SMALLER_MICRO_TOKENS if n < most))


def is_consistent(recipe: Recipe) -> bool:
    """Whether a recipe does not contradict itself."""
    try:
        recipe.check()
    except InputError:
        return False
    return True


def exact_recipes(fixed: Mapping[str, Any], itemsize: int) -> list[Recipe]:
    """The recipes that are exact but for what the user fixed."""
    asked = {name: getattr(Recipe, name) for name in ("parameters", "moments") if name in fixed}
    return [r for r in recipes(fixed) if is_exact(replace(r, **asked), itemsize)]


# ---- which one fits ------------------------------------------------------------------------------


def fastest(
    job: Job,
    candidates: Iterable[Recipe],
    limit: float,
    host: float = math.inf,
    gpu: Gpu = GPUS["A100"],
) -> Candidate | None:
    """The simplest of the recipes that fit and are as fast as any of them; None if none fits.

    limit, host: bytes of the device's memory, and of the host's. A recipe that needs nearly all of
    the limit is taken only if no other fits. The candidates come in order, the simplest first.
    """
    fitting = that_fit(job, candidates, limit, host)
    comfortable = [c for c in fitting if c.memory.peak <= COMFORTABLE * limit]
    fitting = comfortable or fitting
    seconds = [job.seconds(candidate.recipe, gpu) for candidate in fitting]
    for candidate, taken in zip(fitting, seconds):
        if taken <= AS_FAST * min(seconds):
            return candidate
    return None


def that_fit(job: Job, candidates: Iterable[Recipe], limit: float, host: float) -> list[Candidate]:
    """The recipes that fit the device's memory and the host's, with what they take."""
    costed = [Candidate(recipe, job.memory(recipe)) for recipe in candidates]
    return [c for c in costed if c.memory.peak <= limit and c.memory.offloaded <= host]


def choose(
    config: ModelConfig,
    work: Workload,
    fixed: Mapping[str, Any],
    limit: float,
    device: str,
    compute: torch.dtype,
    host: float = math.inf,
    gpus: int = 1,
) -> Recipe:
    """The recipe for --memory: what the user did not fix is chosen, and only exact storage.

    limit: bytes of the memory of a device. host: bytes of the host's that may be offloaded to.
    Prints which recipe it is and why. Raises InputError if none fits.
    """
    is_flash = device == "cuda" and compute.itemsize == 2
    job = Job(config, work, compute.itemsize, is_flash, gpus)
    fixed = job.fixed(fixed)
    best = best_for(job, fixed, limit, host)
    print(reason(job, best, fixed, limit), flush=True)
    return best.recipe


def best_for(job: Job, fixed: Mapping[str, Any], limit: float, host: float = math.inf) -> Candidate:
    """The fastest recipe that fits, of those that are exact but for what the user fixed.

    Raises InputError if none fits.
    """
    if not recipes(fixed):
        Recipe(**fixed).check()  # says what contradicts what
    best = fastest(job, exact_recipes(fixed, job.itemsize), limit, host)
    if best is None:
        raise InputError(refusal(job, fixed, limit, host))
    return best


def reason(job: Job, best: Candidate, fixed: Mapping[str, Any], limit: float) -> str:
    """One line that says what the chosen recipe takes, and why the simplest one was not chosen."""
    recipe, memory = best
    items, tokens = len(job.work.largest), job.work.largest_tokens
    parts = [
        f"--memory: {in_bytes(memory.peak)} of {in_bytes(limit)} in the largest step, "
        f"{items} {job.work.unit} of {tokens:,} unique tokens"
    ]
    if memory.host:
        parts.append(f", and {in_bytes(memory.offloaded)} of the host's")
    parts.append(f", with {recipe}")
    simplest = exact_recipes(fixed, job.itemsize)[0]
    if recipe != simplest:
        peak = job.memory(simplest).peak
        why = "is slower" if peak <= limit else f"would take {in_bytes(peak)}"
        parts.append(f"; the simplest, {simplest}, {why}")
    return "".join(parts)


def refusal(job: Job, fixed: Mapping[str, Any], limit: float, host: float) -> str:
    """Why no exact recipe fits, and what would."""
    allowed = exact_recipes(fixed, job.itemsize)
    host_has = f"the host has {in_bytes(host)} to offload to"
    exact = leanest(job, allowed, host)
    if exact is None:
        least = min(job.memory(recipe).offloaded for recipe in allowed)
        return (
            f"--offload {' and '.join(fixed['offload'])}: takes {in_bytes(least)} of the host's "
            f"memory, but {host_has}; offload less"
        )
    shapes = parameter_shapes(job.config, job.work.top)
    parameters = sum(parameter_bytes(part, exact.recipe) for part in shapes.parts)
    return (
        f"--memory: {in_bytes(limit)} are too little: the parameters alone take "
        f"{in_bytes(parameters)}, training at least {in_bytes(exact.memory.peak)} "
        f"({exact.recipe}); {host_has + '; ' if host < math.inf else ''}"
        f"{what_would_fit(job, fixed, limit, host)}"
    )


def what_would_fit(job: Job, fixed: Mapping[str, Any], limit: float, host: float) -> str:
    """What fits where no exact recipe does: fewer tokens or pairs at a time, else what rounds.

    Nothing is named that does not fit.
    """
    exact, every = exact_recipes(fixed, job.itemsize), recipes(fixed)
    jobs = smaller_steps(job)
    for candidates, warning in ((exact, ""), (every, ", which rounds at random")):
        # What does not fit with the fewest pairs fits with no more.
        possible = that_fit(jobs[-1], with_fewer_tokens(candidates), limit, host)
        for smaller in jobs if possible else ():
            best = fastest(smaller, [recipe for recipe, _ in possible], limit, host)
            if best is not None:
                return f"{offer(job, smaller, best)}{warning}"
    return (
        "fewer pairs or tokens at a time and what rounds do not fit either; expected more memory,"
        " a smaller model, or less to train (--train)"
    )


def offer(job: Job, smaller: Job, best: Candidate) -> str:
    """What a recipe takes for the same job, or for one with fewer pairs a step."""
    pairs, memory = len(smaller.work.largest), in_bytes(best.memory.peak)
    host = f", host {in_bytes(best.memory.offloaded)}" if best.memory.host else ""
    batch = f"--batch-size {pairs} " if pairs < len(job.work.largest) else ""
    return f"{memory}{host} with {batch}{best.recipe}"


def smaller_steps(job: Job) -> list[Job]:
    """The job as it is, then with half of its pairs a step, a quarter, and so on, while even.

    The longest pairs of the largest step stay, which is as a rule more than a step of so many has.
    """
    longest_first = sorted(job.work.largest, key=sum, reverse=True)
    jobs, pairs = [job], len(longest_first)
    while pairs % 2 == 0 and pairs // 2 >= job.gpus:
        pairs //= 2
        work = replace(job.work, largest=tuple(longest_first[:pairs]))
        jobs.append(replace(job, work=work))
    return jobs


def with_fewer_tokens(candidates: Sequence[Recipe]) -> list[Recipe]:
    """The recipes, then those of the fewest tokens at a time with fewer than are chosen else."""
    fewest = min(recipe.micro_tokens for recipe in candidates)
    fewer = [n for n in FEWEST_MICRO_TOKENS if n < fewest]
    of_fewest = [recipe for recipe in candidates if recipe.micro_tokens == fewest]
    return [*candidates, *(replace(recipe, micro_tokens=n) for n in fewer for recipe in of_fewest)]


def leanest(job: Job, candidates: Iterable[Recipe], host: float) -> Candidate | None:
    """The recipe that takes least of the device's memory, of those for which the host has room."""
    costed = [Candidate(recipe, job.memory(recipe)) for recipe in candidates]
    possible = [candidate for candidate in costed if candidate.memory.offloaded <= host]
    return min(possible, key=lambda candidate: candidate.memory.peak, default=None)


def parse_memory(text: str, flag: str = "--memory") -> float:
    """Bytes of a number with its unit; flag: the option that gave it.

    >>> parse_memory("24GB"), parse_memory("0.5 MiB")
    (24000000000.0, 524288.0)
    """
    pattern = rf"([0-9]{{1,9}}(?:\.[0-9]{{1,9}})?) ?({'|'.join(UNITS)})"
    match = re.fullmatch(pattern, text, re.ASCII)
    if match is None or float(match.group(1)) == 0:
        raise InputError(f"{flag} {text}: expected a number with its unit, 24GB or 24GiB")
    return float(match.group(1)) * UNITS[match.group(2)]
