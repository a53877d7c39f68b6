"""What a training will take, before anything is allocated: the verb `plan`."""

import math
import shutil
import textwrap
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from ..data.pairs import load_sources
from ..data.sampling import mix_of
from ..files import refuse_existing, write_json
from ..model.checkpoint import find, read_config
from ..model.recompute import RECOMPUTE
from ..model.tokenizer import Tokenizer
from ..options import (
    COUNT,
    MOST,
    Range,
    check_ranges,
    option,
    parse_sources,
    require,
    training_files,
)
from ..reward import check_length
from ..tables import Table
from ..units import in_bytes, in_flops, in_time
from .choose import (
    Candidate,
    Job,
    best_for,
    exact_recipes,
    fastest,
    parse_memory,
    reason,
    what_would_fit,
)
from .distributed import check_group
from .flops import EFFICIENCY, GPUS, step_flops
from .host import available_memory
from .memory import Memory
from .recipe import OFFLOADS, Recipe
from .sizes import bytes_held, checkpoint_bytes, parameter_shapes, trained_parameters
from .trained import HEAD, trained_blocks
from .workload import RunOptions, Workload, assumed_workload, workload_of

SIZES = (24e9, 40e9, 80e9, 141e9)  # bytes of the GPUs that people have
ASSUMED_BATCH_SIZE = 80
MOST_ASSUMED_PAIRS = 10**4  # of a step that is made up
MOST_GPUS = 64
MOST_TOKENS = 10**6  # of a pair that is made up
PAGE_WIDTH = 100  # characters

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

# On several GPUs; the storage is fp32 throughout.
GROUP_RECIPES = {f"fp32 AdamW, --recompute {name}": Recipe(recompute=name) for name in RECOMPUTE}


@dataclass(frozen=True, kw_only=True)
class PlanOptions(RunOptions):
    """What `plan` takes."""

    model: str = option(
        value="MODEL",
        help="checkpoint directory, of which config.json alone is enough, or hub name",
        positional=True,
    )
    tokens: int = option(
        342,
        help="without --source: unique tokens a pair (342 is the mean of five public sets)",
    )
    pairs: int = option(
        200_000,
        within=Range(least=1, most=MOST),
        help="without --source: pairs of the whole run",
    )
    objective: str = option(
        "reward",
        choices=("reward", "language"),
        help="what is trained: a reward model on pairs, or a policy on responses (a pair is then a "
        "prompt with one response)",
    )
    gpus: int = option(
        1,
        within=Range(least=1, most=MOST_GPUS),
        help="GPUs of one machine that share the work, by torchrun --nproc-per-node GPUS",
    )
    host_memory: str | None = option(
        None,
        value="64GB",
        help="what may be offloaded to the host's memory (default: what this machine has free)",
    )
    output: str | None = option(
        None, value="RUN", help="where the run is to be: the disk's free space is compared"
    )
    keep: int = option(1, within=COUNT, help="checkpoints that the run is to keep, as in `train`")
    json: str | None = option(None, value="OUT.json", help="write all figures here; must not exist")


def plan(options: PlanOptions) -> None:
    """Print what a training will take: by recipe, by GPU, and for the recipe that is named."""
    check_ranges(options)
    refuse_existing(options.json, "--json")
    fixed = options.chosen_recipe(options.micro_tokens)
    limit = None if options.memory is None else parse_memory(options.memory)
    host = host_of(options)
    if limit is None:
        Recipe(**fixed).check()
    model_type, job = open_job(options)
    fixed = job.fixed(fixed)
    check_group(Recipe(**fixed), len(job.work.largest), 1, job.gpus)
    asked = {"micro_tokens": options.micro_tokens, "train": fixed.get("train", Recipe.train)}
    rows = recipe_rows(job, asked)
    fits = {size: best_exact(job, asked, size, host) for size in SIZES}
    print(heading(model_type, job, asked["train"], host), end="\n\n")
    print(recipe_table(rows, job.gpus, host), end="\n\n")
    print(fits_by_size(job, asked, fits, host), end="\n\n")
    recipe = Recipe(**fixed) if limit is None else recipe_for_memory(job, fixed, limit, host)
    print(page_of(job, recipe, host), end="\n\n")
    print(disk_lines(job, recipe, options))
    if options.json:
        write_json(options.json, figures(job, rows, fits, recipe))


# ---- what is planned -----------------------------------------------------------------------------


def host_of(options: PlanOptions) -> float:
    """Bytes of the host's memory that may be offloaded to; infinite where the system is silent."""
    if options.host_memory is not None:
        return parse_memory(options.host_memory, "--host-memory")
    return available_memory() or math.inf


def open_job(options: PlanOptions) -> tuple[str, Job]:
    """The model's type, and what is to be computed with it, as on a GPU."""
    directory = find(options.model, config_only=True)
    values, family, config = read_config(directory)
    check_length(config, options.max_length, directory, beyond=options.beyond_positions)
    trained_blocks(options.train or Recipe.train, config.blocks)  # refused if there are fewer
    is_policy = options.objective == "language"
    require(
        not (is_policy and options.source),
        "--objective language: takes --tokens and --pairs, not --source; `align finetune --memory`"
        " plans with the real texts",
    )
    require(
        options.gpus == 1 or not is_policy,
        "--gpus: several GPUs train a reward model; expected --objective reward",
    )
    require(
        not (is_policy and options.train == HEAD),
        "--train head: expected all or last-N; the head alone is trained of a reward model only",
    )
    if options.source:
        work = real_workload(options, Tokenizer(directory))
    else:
        work = workload_without_data(options)
    if is_policy:
        is_tied = values.get("tie_word_embeddings", family.tied)
        work = work.of_language_model("tied" if is_tied else "untied")
    itemsize = 4 if options.compute_dtype == "float32" else 2
    flash = itemsize == 2
    return values["model_type"], Job(config, work, itemsize, flash, options.gpus)


def real_workload(options: PlanOptions, tokenizer: Tokenizer) -> Workload:
    """The workload of the files that --source names."""
    paths = parse_sources(options.source, held_out_groups=True)
    files = training_files(paths)
    if options.source_field is None:
        mix_of(options, [*files])  # refused before files are read
    for name, (_, test) in paths.items():
        require(test is None or Path(test).exists(), f"--source {name}: {test}: no such file")
    rules, labels = options.rules, options.label_rules
    sources = [
        source
        for name, train in files.items()
        for source in load_sources(name, train, tokenizer, rules, labels, options.source_field)
    ]
    return workload_of(options, sources, mix_of(options, [source.name for source in sources]))


def workload_without_data(options: PlanOptions) -> Workload:
    """The workload of equal pairs, as many and as long as the options say."""
    require(options.shares is None, "--shares: goes with --source")
    batch_size = ASSUMED_BATCH_SIZE if options.batch_size is None else options.batch_size
    longest = min(2 * options.max_length, MOST_TOKENS)
    hint = " (twice --max-length)" if longest < MOST_TOKENS else ""
    require(
        2 <= options.tokens <= longest,
        f"--tokens {options.tokens}: expected 2 to {longest}{hint}",
    )
    require(
        batch_size <= MOST_ASSUMED_PAIRS,
        f"--batch-size {batch_size}: expected 1 to {MOST_ASSUMED_PAIRS}",
    )
    return assumed_workload(options.tokens, options.pairs, batch_size, options.epochs)


def best_exact(job: Job, asked: Mapping[str, Any], limit: float, host: float) -> Candidate | None:
    """The fastest exact recipe that fits, whatever it is otherwise; asked: fields of it."""
    fixed = job.fixed(asked)
    return fastest(job, exact_recipes(fixed, job.itemsize), limit, host)


def recipe_for_memory(job: Job, fixed: Mapping[str, Any], limit: float, host: float) -> Recipe:
    """What `train --memory` would choose, and a paragraph that says why."""
    best = best_for(job, fixed, limit, host)
    print(paragraph(reason(job, best, fixed, limit)), end="\n\n")
    return best.recipe


# ---- the page ------------------------------------------------------------------------------------


class RecipeRow(NamedTuple):
    """One recipe of the table: what it takes, and seconds of the whole run by GPU."""

    recipe: Recipe
    memory: Memory
    held: float  # bytes a parameter that lie on the device throughout
    seconds: dict[str, float]


def recipe_rows(job: Job, asked: Mapping[str, Any]) -> dict[str, RecipeRow]:
    """The rows of the table, by name; asked: fields of every recipe."""
    shapes = parameter_shapes(job.config, job.work.top)
    rows = {}
    for name, recipe in (RECIPES if job.gpus == 1 else GROUP_RECIPES).items():
        recipe = replace(recipe, **asked)
        if job.gpus == 1:
            recipe = replace(recipe, recompute="full")
        held = bytes_held(shapes, recipe) / shapes.parameters / job.gpus
        seconds = seconds_by_gpu(job, recipe)
        rows[name] = RecipeRow(recipe, job.memory(recipe), held, seconds)
    return rows


def seconds_by_gpu(job: Job, recipe: Recipe) -> dict[str, float]:
    """Seconds of the whole run on each GPU."""
    return {name: job.run_seconds(recipe, gpu) for name, gpu in GPUS.items()}


def heading(model_type: str, job: Job, train: str, host: float) -> str:
    """The model, the data, the FLOPs of its largest step, and what the table's columns mean."""
    work, shapes = job.work, parameter_shapes(job.config, job.work.top)
    recipe = Recipe(train=train)
    useful, _ = step_flops(job.config, work, recipe)
    tops = {
        "head": "the reward head, without a language-model head",
        "tied": "a tied language-model head",
        "untied": "the language-model head",
    }
    lines = {"model": f"{model_type}, {shapes.parameters:,} parameters with {tops[work.top]}"}
    if train != Recipe.train:
        lines["train"] = f"{train}, {trained_parameters(shapes, recipe):,} parameters"
    lines |= {
        "data": f"largest step {len(work.largest)} {work.unit}, {work.largest_tokens:,} unique"
        f" tokens; {work.steps:,} steps, {work.tokens / 1e6:,.1f} million unique tokens",
        "flops": f"{in_flops(useful)} useful in the largest step",
        "times": f"of the whole run, at {EFFICIENCY:.0%} of a GPU's peak (assumed)",
        "bytes": "of each parameter that lie on the device throughout a step",
    }
    if host < math.inf and job.gpus == 1:
        lines["host"] = f"{in_bytes(host)} of its memory to offload to"
    if job.gpus > 1:
        lines["gpus"] = f"{job.gpus}, at most {job.share.largest_tokens:,} tokens of a step for one"
    return "\n".join(f"{title:8}{line}" for title, line in lines.items())


def recipe_table(rows: dict[str, RecipeRow], gpus: int, host: float) -> Table:
    """What each recipe takes, on which GPU it fits beside this host, and its time on each."""
    title = "with --recompute full" if gpus == 1 else f"each of {gpus} GPUs"
    table = Table(title, "bytes", "device", "host", "fits", *GPUS)
    for name, row in rows.items():
        table.add(
            name,
            f"{row.held:.2f}",
            in_bytes(row.memory.peak),
            in_bytes(row.memory.offloaded) if row.memory.host else "-",
            smallest_gpu(row.memory) if row.memory.offloaded <= host else "host",
            *(in_time(seconds) for seconds in row.seconds.values()),
        )
    return table


def smallest_gpu(memory: Memory) -> str:
    """The size of the smallest GPU that has so much memory."""
    return next((in_gigabytes(size) for size in SIZES if memory.peak <= size), "none")


def fits_by_size(
    job: Job, asked: Mapping[str, Any], fits: dict[float, Candidate | None], host: float
) -> str:
    """The best exact recipe of each GPU; GPUs that take the same recipe share a line."""
    sizes_of_line: dict[str, list[str]] = {}
    for size, best in fits.items():
        if best is None:
            remedy = what_would_fit(job, job.fixed(asked), size, host)
            line = f"no exact recipe fits; {remedy}"
        else:
            line = what_fits(best)
        sizes_of_line.setdefault(line, []).append(in_gigabytes(size))
    return "\n".join(
        paragraph(f"{', '.join(sizes)} GB: {line}") for line, sizes in sizes_of_line.items()
    )


def what_fits(best: Candidate) -> str:
    """A recipe and its bytes."""
    host = f", host {in_bytes(best.memory.offloaded)}" if best.memory.host else ""
    return f"{in_bytes(best.memory.peak)}{host}, with {best.recipe}"


def in_gigabytes(size: float) -> str:
    """The size of a GPU without its unit."""
    return f"{size / 1e9:.0f}"


def paragraph(text: str) -> str:
    """Lines that fit the page; all but the first are indented."""
    return textwrap.fill(text, PAGE_WIDTH, subsequent_indent="    ", break_on_hyphens=False)


def page_of(job: Job, recipe: Recipe, host: float) -> str:
    """One recipe in detail: bytes by kind in its fullest phase, and its time."""
    memory = job.memory(recipe)
    useful, executed = step_flops(job.config, job.share, recipe)
    missing = memory.offloaded - host
    too_little = f"the host has {in_bytes(missing)} too little\n\n" if missing > 0 else ""
    return (
        f"{paragraph(str(recipe))}\n\n"
        f"fullest phase: {memory.phase}, {in_bytes(memory.peak)}\n"
        f"{memory_table(memory)}\n\n"
        f"{too_little}"
        f"{in_flops(executed)} executed in the largest step, {in_flops(useful)} useful"
        f"{'' if job.gpus == 1 else ', by the GPU with most of it'}\n"
        f"{time_table(job, recipe)}"
    )


def disk_lines(job: Job, recipe: Recipe, options: PlanOptions) -> str:
    """What checkpoints take of the disk, and what is free where the run is to be."""
    each = checkpoint_bytes(parameter_shapes(job.config, job.work.top), recipe)
    most = each * (options.keep + 1)
    text = (
        f"disk: a checkpoint takes {in_bytes(each)}, and all of them at most {in_bytes(most)}: "
        f"--keep {options.keep} and the one that is being written"
    )
    if options.output is not None:
        free = free_space(Path(options.output))
        verdict = "enough" if most <= free else f"too little by {in_bytes(most - free)}"
        text += f"; {in_bytes(free)} are free at {options.output}, {verdict}"
    return paragraph(text)


def free_space(run: Path) -> int:
    """Bytes that are free on the disk where a run is to be; the directory need not exist yet."""
    above = run.absolute()
    while not above.is_dir():
        above = above.parent
    return shutil.disk_usage(above).free


def memory_table(memory: Memory) -> Table:
    """Bytes by kind, on the device and on the host."""
    table = Table("place", "kind", "size", left=("kind",))
    for kind, size in memory.device.items():
        table.add("device", kind, in_bytes(size))
    for kind, size in memory.host.items():
        table.add("host", kind, in_bytes(size))
    return table


def time_table(job: Job, recipe: Recipe) -> Table:
    """Times of the largest step and of the whole run on each GPU."""
    table = Table("GPU", "a step", "the run")
    for name, run in seconds_by_gpu(job, recipe).items():
        table.add(name, in_time(job.seconds(recipe, GPUS[name])), in_time(run))
    return table


def figures(
    job: Job,
    rows: dict[str, RecipeRow],
    fits: dict[float, Candidate | None],
    recipe: Recipe,
) -> dict[str, Any]:
    """All numbers of the page, for --json."""
    useful, executed = step_flops(job.config, job.share, recipe)
    return {
        "gpus": job.gpus,
        "parameters": parameter_shapes(job.config, job.work.top).parameters,
        "workload": asdict(job.work),
        "recipes": {
            name: {
                "recipe": asdict(row.recipe),
                "memory": asdict(row.memory),
                "hours": {gpu: seconds / 3600 for gpu, seconds in row.seconds.items()},
            }
            for name, row in rows.items()
        },
        "fits": {
            in_gigabytes(size): asdict(best.recipe) if best else None for size, best in fits.items()
        },
        "recipe": {
            "recipe": asdict(recipe),
            "memory": asdict(job.memory(recipe)),
            "checkpoint": checkpoint_bytes(parameter_shapes(job.config, job.work.top), recipe),
            "useful": useful,
            "executed": executed,
        },
    }
