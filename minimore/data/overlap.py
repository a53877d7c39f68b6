"""Overlap: prompts that a test shares with the training, which makes it flatter the model.

A prompt is known by eight bytes of a hash, so that 160,000 prompts are 1.3 MB in the directory of a
run. There, `evaluate` finds what the run was trained on.
"""

import os
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..files import one_line
from ..model.tensors import require_as_written, write_tensors
from ..options import InputError, parse_sources, require, training_files
from .pairs import NO_PROMPT, Source
from .prompts import normalised, prompt_hash
from .texts import Reading

TRAINING_PROMPTS = "training_prompts.safetensors"  # in the directory of a run
SHOWN = 60  # characters of an example
KINDS = ("test", "training")  # what is compared, unless it is said


class Overlap(NamedTuple):
    """How many of so many different prompts others have, too, and the first of them."""

    shared: int
    prompts: int
    example: str


def overlap_of(prompts: Iterable[str], others: Container[int]) -> Overlap:
    """The prompts that others have, too. others: their hashes."""
    shared, seen = [], set[int]()
    for prompt in prompts:
        key = prompt_hash(prompt)
        if key in others and key not in seen:
            shared.append(prompt)
        seen.add(key)
    return Overlap(len(shared), len(seen), shared[0] if shared else "")


def prompts_of(source: Source) -> list[str]:
    """The different prompts of a source's pairs; a pair without a prompt shares it with none."""
    return [prompt for prompt in source.prompts if not prompt.startswith(NO_PROMPT)]


def hashes_of(sources: Iterable[Source]) -> set[int]:
    """The hashes of all prompts of several sources."""
    return {prompt_hash(prompt) for source in sources for prompt in prompts_of(source)}


def print_overlap(
    sources: Iterable[Source],
    others: Container[int],
    kinds: tuple[str, str] = KINDS,
) -> None:
    """Print a line for every source that shares prompts with others.

    others: hashes of their prompts. kinds: what the prompts of the sources and of the others are.
    """
    for source in sources:
        warning = overlap_line(source.name, prompts_of(source), others, kinds)
        if warning:
            print(warning, flush=True)


def overlap_line(
    name: str, prompts: Iterable[str], others: Container[int], kinds: tuple[str, str] = KINDS
) -> str:
    """What is said of prompts that others have, too; "" where they share none."""
    overlap = overlap_of(prompts, others)
    if not overlap.shared:
        return ""
    example = normalised(overlap.example)
    beginning = example[:SHOWN] + ("..." if len(example) > SHOWN else "")
    return (
        f"{name}: {overlap.shared} of {overlap.prompts} {kinds[0]} prompts are {kinds[1]} prompts,"
        f" too, such as {beginning!r}; split by prompt (minimore data split), or give"
        " --allow-overlap if it is meant"
    )


def print_overlap_of_files(paths: Mapping[str, tuple[str, str]], reading: Reading) -> None:
    """Print a line for every test file that shares prompts with the training files.

    paths: training and test file by source. reading: reads a file as texts, which is faster than
    to tokenise it.
    """
    training = {
        prompt_hash(prompt) for train, _ in paths.values() for prompt in reading.prompts(train)
    }
    for name, (_, test) in paths.items():
        warning = overlap_line(name, reading.prompts(test), training)
        if warning:
            print(warning, flush=True)


# ---- what a run was trained on -------------------------------------------------------------------


def write_training_prompts(run: Path, sources: Sequence[Source]) -> None:
    """Write the hashes of all training prompts into the directory of a run, in order."""
    hashes = torch.tensor(sorted(hashes_of(sources)), dtype=torch.int64)
    write_tensors(run / TRAINING_PROMPTS, {"prompts": hashes})


def read_training_prompts(run: Path) -> set[int]:
    """The hashes that a run was trained on; none where its directory says nothing of them.

    Raises InputError for a file that is not as it was written.
    """
    path = run / TRAINING_PROMPTS
    if not path.is_file():
        return set()
    require_as_written(path, is_ours=True)
    try:
        return set(load_file(path)["prompts"].tolist())
    except (SafetensorError, KeyError, OSError) as error:
        raise InputError(
            f"{path}: holds no training prompts ({one_line(error)}); restore or remove it"
        ) from None


def refuse_training_files(
    run_options: dict[str, Any], paths: Mapping[str, str], flag: str = "--source"
) -> None:
    """Refuse a test file, or what another flag names, on which a run was trained.

    run_options: its options.json; {} for no run. paths: file by source.
    """
    sources = run_options.get("source")
    if not isinstance(sources, list) or not all(isinstance(value, str) for value in sources):
        return
    files = training_files(parse_sources(sources, held_out_groups=True))
    training = {os.path.realpath(train) for train in files.values()}
    for name, path in paths.items():
        require(
            os.path.realpath(path) not in training,
            f"{flag} {name}={path}: the model was trained on this file; expected other pairs, or"
            " --allow-overlap if it is meant",
        )
