"""Running one cell of a grid, and its margins, which are stored and read back.

    prepare    write its world and its model, unless they are there
    train      an ordinary run directory, which continues after a kill
    score      margins of every test source -> margins/CELL.safetensors, written last

A cell with margins of its own fingerprint is finished, and skipped.
"""

import hashlib
import json
import shutil
import time
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..checksums import read_checked_json, require_directory_as_written, write_checked_json
from ..data.labels import MAJORITY
from ..data.pairs import load_source
from ..data.world import World, small_gpt_neox
from ..files import directory_written_whole, make_directory
from ..model.checkpoint import Checkpoint, random_checkpoint
from ..model.tensors import require_as_written, write_tensors
from ..options import InputError
from ..report import source_margins
from ..reward import ModelOptions, RewardModel, open_reward_model
from ..reward_training import TrainOptions
from ..train import train
from ..units import in_time
from .drift import DriftWatch
from .grid import Cell, train_options
from .learners import LEARNINGS, chooser_worth, learner_worth
from .testbed import chosen_for, open_testbed

HELD_OUT = 4  # one of so many test prompts fits temperatures, under --protocol clean


class SourceMargins(NamedTuple):
    """Margins of one model on one source, its test pairs, and the prompts: (N,) each.

    Pairs that are not test pairs are held out: they fit temperatures.
    """

    margins: np.ndarray
    is_test: np.ndarray
    prompts: np.ndarray


ModelMargins = dict[str, SourceMargins]  # name of a source -> margins of one model


def margins_file(output: Path, cell: Cell) -> Path:
    """Where the margins of a cell are stored."""
    return output / "margins" / f"{cell.name}.safetensors"


def drift_file(output: Path, cell: Cell) -> Path:
    """Where the drift of a watched cell is stored."""
    return output / "margins" / f"{cell.name}.drift.json"


# ---- is it finished? -----------------------------------------------------------------------------


def fingerprint(cell: Cell) -> str:
    """What the margins of a cell depend on.

    That is its options, and for real data the content of its files and the identity of its model.
    Where and in which portions a run is computed changes nothing.
    """
    options = cell.options | {"device": "", "micro_tokens": 0, "recompute": "", "memory": ""}
    content = []
    if cell.world is None:
        training_files = [train_path for train_path, _ in cell.sources.values()]
        files = [*cell.tests.values(), *training_files]
        content = [Checkpoint(str(cell.model)).identity(), *map(content_digest, files)]
    parts = [options, list(cell.sources), list(cell.tests), str(cell.world), content]
    if cell.testbed:
        parts += [str(cell.testbed.world), str(cell.design)]
    if cell.learner:
        parts += [cell.learner, str(LEARNINGS.get(cell.learner))]
    return json.dumps(parts)


@cache
def content_digest(path: str) -> str:
    """sha256 over a file, or over all files of a directory in the order of their names."""
    files = [Path(path)]
    if Path(path).is_dir():
        files = sorted(p for p in Path(path).rglob("*") if p.is_file())
    digests = [hashlib.sha256(file.read_bytes()).digest() for file in files]
    return hashlib.sha256(b"".join(digests)).hexdigest()


def is_finished(output: Path, cell: Cell) -> bool:
    """Whether the margins of exactly this cell are there, and its drift if it is watched."""
    path = margins_file(output, cell)
    try:
        require_as_written(path, is_ours=True)
        with safe_open(path, framework="np") as file:
            is_same = (file.metadata() or {}).get("of") == fingerprint(cell)
        if cell.is_watched:
            read_checked_json(drift_file(output, cell))
    except (SafetensorError, OSError, InputError):
        return False
    return is_same


# ---- running -------------------------------------------------------------------------------------


def run_cell(output: Path, cell: Cell) -> int:
    """Train a cell, unless it is finished, and store its margins; returns the exit code of train.

    What training prints goes to a log beside its run directory.
    """
    if is_finished(output, cell):
        return 0
    prepare(cell)
    options = train_options(output, cell)
    log = output / "runs" / f"{cell.name}.log"
    make_directory(log.parent)
    make_directory(margins_file(output, cell).parent)
    watch = DriftWatch(cell) if cell.is_watched else None
    if watch and Path(options.output).exists():
        shutil.rmtree(options.output)  # a continued run would lack the first points of its drift
    with open(log, "a", encoding="utf-8") as file, redirect_stdout(file):
        if cell.sources:  # the untrained model, `raw`, has none
            exit_code = train(options, watch)
            if exit_code:
                return exit_code
        tensors = tensors_of(cell, options)
    if watch and watch.points:
        write_checked_json(drift_file(output, cell), {"points": watch.points})
    write_tensors(margins_file(output, cell), tensors, {"of": fingerprint(cell)})
    return 0


def run_timed(output: Path, cell: Cell, label: str) -> int:
    """Run a cell, and print a label with the time that it took; returns the exit code of train."""
    began = time.monotonic()
    exit_code = run_cell(output, cell)
    if exit_code == 0:
        print(f"{label}: {in_time(time.monotonic() - began)}", flush=True)
    return exit_code


def tensors_of(cell: Cell, options: TrainOptions) -> dict[str, Tensor]:
    """What is stored of a cell that is trained: margins of its model, and what its policy does."""
    testbed = open_testbed(*cell.testbed, cell.design) if cell.testbed else None
    if testbed and cell.learner and not cell.sources:
        return learner_worth(testbed, cell.learner).tensors()
    model, checkpoint = open_trained(cell, options)
    tensors = margins_and_prompts(model, checkpoint, cell, options)
    if testbed and cell.learner:
        return tensors | chooser_worth(testbed, model, checkpoint).tensors()
    if testbed:
        tensors |= chosen_for(testbed, model, checkpoint)
    return tensors


def prepare(cell: Cell) -> None:
    """Write the cell's world, and its untrained model inside it, unless they are there.

    With real data there is nothing to write.
    """
    if cell.world is None:
        return
    model = Path(cell.model)  # .../WORLD/width-SIZE
    world_directory = model.parent  # holds its files of pairs and its tokenizer, too
    prepare_world(world_directory, cell.world)
    if cell.testbed:
        prepare_world(*cell.testbed)
    if not model.exists():
        config = small_gpt_neox(width=int(cell.at["size"]))
        tokenizer = world_directory / "tokenizer.json"
        with directory_written_whole(model) as unfinished:
            random_checkpoint(unfinished, config, tokenizer, seed=cell.world.seed)


def prepare_world(directory: Path, world: World) -> None:
    """Write a world, unless it is there."""
    if not directory.exists():
        make_directory(directory.parent)
        with directory_written_whole(directory) as unfinished:
            world.write(unfinished)
    require_directory_as_written(directory)


def open_trained(cell: Cell, options: TrainOptions) -> tuple[RewardModel, Checkpoint]:
    """The reward model of a cell; a raw one is opened as it was before any training."""
    directory = options.output if cell.sources else str(cell.model)
    return open_reward_model(
        ModelOptions(model=directory, device=options.device, seed=options.seed)
    )


def margins_and_prompts(
    model: RewardModel, checkpoint: Checkpoint, cell: Cell, options: TrainOptions
) -> dict[str, Tensor]:
    """What is stored of a cell: "margins.k" and "prompt.k" (N,) of the pairs of test source k."""
    tensors = {}
    for k, (name, path) in enumerate(cell.tests.items()):
        source = load_source(name, path, checkpoint.tokenizer, options.max_length, labels=MAJORITY)
        margins = source_margins(model, source, options.micro_tokens)
        tensors[f"margins.{k}"] = torch.from_numpy(margins)
        tensors[f"prompt.{k}"] = torch.tensor([pair.prompt for pair in source.pairs])
    return tensors


# ---- reading back --------------------------------------------------------------------------------


def margins_of(output: Path, cell: Cell, protocol: str) -> ModelMargins:
    """The stored margins of a finished cell, by source.

    Under the protocol "clean", a quarter of the prompts is held out, if a source has enough.
    """
    sources = {}
    with safe_open(margins_file(output, cell), framework="np") as file:
        for k, name in enumerate(cell.tests):
            margins, prompts = file.get_tensor(f"margins.{k}"), file.get_tensor(f"prompt.{k}")
            is_test = np.ones(len(margins), bool)
            if protocol == "clean" and len(np.unique(prompts)) >= HELD_OUT:
                is_test = prompts % HELD_OUT != 0
            sources[name] = SourceMargins(margins, is_test, prompts)
    return sources
