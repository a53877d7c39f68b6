"""Pooled states of a frozen checkpoint, stored once. probe.py trains reward heads on them.

One evening of a GPU stores the states of a 7B model; a laptop does the rest.

K sources, N pairs, D width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..checksums import read_checked_json, write_checked_json
from ..data.labels import MAJORITY
from ..data.overlap import print_overlap_of_files
from ..data.pairs import Source, TokenPair, batches_by_length, load_sources, pack_pairs
from ..data.texts import Reading
from ..files import make_directory, one_line, sweep
from ..model.attention import pack
from ..model.checkpoint import Checkpoint
from ..model.tensors import require_as_written, write_tensors
from ..options import InputError, check_ranges, option, parse_sources, require, require_tests
from ..reward import ReadingOptions, RewardModel, load_reward_model

Part = TypeVar("Part")  # what is read of one part of a source

PARTS = ("train", "test")
PROBE = "linear probe on frozen features, not the paper's Table 2"


@dataclass(frozen=True, kw_only=True)
class FeaturesOptions(ReadingOptions):
    """What `features` takes."""

    source: tuple[str, ...] = option(
        (),
        repeat=True,
        value="NAME=TRAIN.jsonl,TEST.jsonl",
        help="once per source, with a test file",
    )
    output: str = option(
        value="DIR",
        help="directory for the states; an interrupted command goes on where it stopped",
    )
    dtype: str = option(
        "float16", choices=("float16", "float32"), help="type in which states are stored"
    )
    prompt_states: bool = option(
        False, help="store the state of every prompt, too, which the gated heads of probe read"
    )
    allow_overlap: bool = option(
        False, help="training and test files are meant to share prompts: do not warn of it"
    )


# ---- storing -------------------------------------------------------------------------------------


def features(options: FeaturesOptions) -> None:
    """Store the last hidden states of both sides of every pair.

    features.json comes last, so its presence means whole.
    """
    check_ranges(options)
    paths = parse_sources(options.source)
    require_tests(paths)
    output, checkpoint = Path(options.output), Checkpoint(options.model)
    rules = options.rules(checkpoint)
    refuse_other_directories(output)
    if not options.allow_overlap:
        print_overlap_of_files(paths, Reading(checkpoint.tokenizer, rules.chat))
    make_directory(output)
    sweep(output)
    model = load_reward_model(checkpoint, options)
    sources: dict[str, dict[str, Any]] = {}
    for k, (name, files) in enumerate(paths.items()):
        sources[name] = {}
        for part, path in zip(PARTS, files):
            (source,) = load_sources(name, path, checkpoint.tokenizer, rules, MAJORITY)
            file = f"{k:02d}.{part}.safetensors"
            identity = store(output / file, source, model, checkpoint, options)
            sources[name][part] = {
                "file": file,
                "pairs": len(source.pairs),
                "from": path,
                "of": identity,
            }
            print(f"{part:5} {source.line()}", flush=True)
    description = {
        "note": PROBE,
        "model": options.model,
        "width": checkpoint.config.width,
        **rules._asdict(),
        "dtype": options.dtype,
        "sources": sources,
    }
    stored = {part["file"] for parts in sources.values() for part in parts.values()}
    for path in output.glob("*.safetensors"):
        if path.name not in stored:  # of an unfinished command with more sources
            path.unlink()
    write_checked_json(output / "features.json", description)
    size = sum(path.stat().st_size for path in output.glob("*.safetensors"))
    print(f"{output}: states of {len(paths)} sources, {size / 1e6:.1f} MB")


def refuse_other_directories(output: Path) -> None:
    """Refuse a directory that is finished, or that holds something else."""
    if not output.exists():
        return
    is_unfinished = (
        output.is_dir()
        and not (output / "features.json").exists()
        and all(path.suffix in (".safetensors", ".partial") for path in output.iterdir())
    )
    require(is_unfinished, f"--output {output}: exists already; choose another name or remove it")


def store(
    path: Path,
    source: Source,
    model: RewardModel,
    checkpoint: Checkpoint,
    options: FeaturesOptions,
) -> str:
    """Store the states of one part of a source, unless the file holds these very states already.

    Returns what the states are of: the model, how it computed, and the pairs.
    """
    identity = (
        f"{checkpoint.identity()} {options.dtype} {model.trunk.compute_dtype} {source.digest()}"
        + " prompts" * options.prompt_states
    )
    if is_stored(path, identity):
        return identity
    dtype = getattr(torch, options.dtype)
    chosen, rejected = pooled_states(model, source.pairs, options.micro_tokens, dtype)
    tensors = {
        "chosen": chosen,
        "rejected": rejected,
        "prompt": torch.tensor([pair.prompt for pair in source.pairs]),
        "longer": torch.tensor([pair.longer for pair in source.pairs]),
    }
    if options.prompt_states:
        tensors["prompt_state"] = prompt_states(model, source.pairs, options.micro_tokens, dtype)
    write_tensors(path, tensors, {"of": identity})
    return identity


def is_stored(path: Path, identity: str) -> bool:
    """Whether a file holds the states of this model and of these pairs, as they were written."""
    try:
        require_as_written(path, is_ours=True)
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("of") == identity
    except (SafetensorError, OSError, InputError):
        return False


@torch.no_grad()
def pooled_states(
    model: RewardModel, pairs: Sequence[TokenPair], micro_tokens: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Last hidden states of the chosen and of the rejected texts: two (N, D), on the CPU.

    Raises FloatingPointError if a state is not finite in dtype.
    """
    states = torch.empty(2, len(pairs), model.head.shape[0], dtype=dtype)
    for places in batches_by_length([pair.tokens for pair in pairs], micro_tokens):
        batch = pack_pairs([pairs[place] for place in places])
        for side, z in enumerate(model.features(batch)):
            states[side, places] = z.to("cpu", dtype)
    check_finite(states)
    return states[0], states[1]


@torch.no_grad()
def prompt_states(
    model: RewardModel, pairs: Sequence[TokenPair], micro_tokens: int, dtype: torch.dtype
) -> Tensor:
    """Hidden states at the last token that both texts of a pair begin with: (N, D), on the CPU.

    That is the end of the prompt, or of a first word that both responses share. A pair whose texts
    share no token has a state of zeros; such pairs are counted.
    """
    states = torch.zeros(len(pairs), model.head.shape[0], dtype=dtype)
    shared = [place for place, pair in enumerate(pairs) if pair.shared]
    for batch in batches_by_length([pairs[place].shared for place in shared], micro_tokens):
        places = [shared[i] for i in batch]
        prompts = [pairs[place].chosen[: pairs[place].shared].tolist() for place in places]
        stream = pack([([], [prompt]) for prompt in prompts])
        states[places] = model.trunk(stream.to(model.head.device)).to("cpu", dtype)
    if len(shared) < len(pairs):
        print(f"{len(pairs) - len(shared)} pairs share no token: their prompts have no state")
    check_finite(states)
    return states


def check_finite(states: Tensor) -> None:
    """Raise FloatingPointError if a state is not finite in its type."""
    if not states.isfinite().all():
        raise FloatingPointError(
            f"a hidden state is not finite in {states.dtype}; try --dtype float32"
        )


# ---- reading -------------------------------------------------------------------------------------


class Stored(NamedTuple):
    """One part of one source.

    difference: chosen minus rejected states (N, D), as stored. longer: (N,) characters by which the
    chosen response is longer.
    """

    difference: Tensor
    longer: np.ndarray


class States(NamedTuple):
    """One part of one source, both sides apart.

    chosen, rejected: (N, D), as stored. prompt: (N, D), or nothing if it was not stored.
    """

    chosen: Tensor
    rejected: Tensor
    prompt: Tensor | None


def load_features(directory: str) -> tuple[dict[str, Any], dict[str, dict[str, Stored]]]:
    """features.json, and {source: {"train" | "test": Stored}}. Raises InputError."""
    return _load(directory, _stored)


def load_states(directory: str) -> dict[str, dict[str, States]]:
    """{source: {"train" | "test": States}}. Raises InputError."""
    return _load(directory, _states)[1]


def _load(
    directory: str, read: Callable[[str, dict[str, Tensor]], Part]
) -> tuple[dict[str, Any], dict[str, dict[str, Part]]]:
    """features.json, and what `read` makes of the tensors of every part."""
    home = Path(directory)
    require(
        not home.is_dir() or (home / "features.json").is_file(),
        f"--features {directory}: is not whole; run the same `minimore features` command again",
    )
    try:
        description = read_checked_json(home / "features.json")
        stored = {
            name: {
                part: read(parts[part]["file"], _tensors(home, parts[part], description["width"]))
                for part in PARTS
            }
            for name, parts in description["sources"].items()
        }
    except (KeyError, TypeError, AttributeError, ValueError, SafetensorError, OSError) as error:
        raise InputError(
            f"--features {directory}: damaged ({one_line(error)}); store the features again"
        ) from None
    require(stored, f"--features {directory}: holds no source")
    return description, stored


def _tensors(home: Path, part: dict[str, Any], width: int) -> dict[str, Tensor]:
    """The tensors of one stored part; ValueError if they are not what features.json says."""
    name = part["file"]
    if Path(name).name != name:
        raise ValueError(f"{name} is no plain file name")
    require_as_written(home / name, is_ours=True)
    with safe_open(home / name, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        identity = file.metadata()["of"]
    if identity != part["of"]:
        raise ValueError(f"{name}: holds states of other pairs or of another model")
    pairs = len(tensors["longer"])
    for key in ("chosen", "rejected", "prompt_state"):
        shape = tuple(tensors[key].shape) if key in tensors else (pairs, width)
        if shape != (pairs, width) or not pairs:
            raise ValueError(f"{name}: {key} states of shape {shape}, expected (N, {width})")
    return tensors


def _stored(name: str, tensors: dict[str, Tensor]) -> Stored:
    """The differences of a part."""
    difference = tensors["chosen"].sub_(tensors["rejected"])
    _require_finite(name, difference)
    return Stored(difference, tensors["longer"].numpy())


def _states(name: str, tensors: dict[str, Tensor]) -> States:
    """Both sides of a part, and its prompts."""
    states = States(tensors["chosen"], tensors["rejected"], tensors.get("prompt_state"))
    for tensor in states:
        if tensor is not None:
            _require_finite(name, tensor)
    return states


def _require_finite(name: str, states: Tensor) -> None:
    if not all(part.isfinite().all() for part in states.split(4096)):
        raise ValueError(f"{name}: a state is not finite")
