"""The methods of neighbouring work on stored states, for `probe`.

K sources, N pairs of a source, D width, S seeds.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..calibration import accuracy, negative_log_likelihood, pair_ece
from .features import States
from .methods.by_name import DRAWN, METHODS, USES_SOURCE
from .methods.states import StatePairs

Runs = dict[str, dict[str, list]]  # row of a table -> rate -> (S, K)
Sources = Mapping[str, Mapping[str, States]]  # source -> "train" or "test" -> its states


def solved_runs(method: str, sources: Sources, seeds: int) -> Runs:
    """Rates of every seed and source by one of METHODS.

    A method that can use the source of a pair has a second row, in which it does.
    """
    train_parts = [parts["train"] for parts in sources.values()]
    scales = scales_of(train_parts)
    train = as_pairs(train_parts, scales)
    test = as_pairs([parts["test"] for parts in sources.values()], scales)
    sizes = test.source.bincount().tolist()
    rows = {method: False}
    if method in USES_SOURCE:
        rows[f"{method}, source known"] = True
    runs: Runs = {row: {"accuracy": [], "ece": [], "nll": []} for row in rows}
    for seed in range(seeds):
        if seed == 0 or method in DRAWN:  # what other methods learn is the same for every seed
            parameters = METHODS[method].fit(train, seed)
        for row, knows_source in rows.items():
            margins = METHODS[method].margins(parameters, test, knows_source).double()
            if not margins.isfinite().all():
                raise FloatingPointError(f"{row}, seed {seed}: a margin is not finite")
            by_source = [part.numpy() for part in margins.split(sizes)]
            for rate, values in rates_of(by_source).items():
                runs[row][rate].append(values)
    return runs


def rates_of(margins: Sequence[np.ndarray]) -> dict[str, list[float]]:
    """Accuracy, ECE and NLL of the margins of every source: {rate: (K,)}."""
    return {
        "accuracy": [accuracy(m) for m in margins],
        "ece": [pair_ece(m) for m in margins],
        "nll": [negative_log_likelihood(m) for m in margins],
    }


def print_notes(methods: Sequence[str], sources: Sources) -> None:
    """Say which options do not reach a method, and what a gate cannot read."""
    solved = [method for method in methods if method in METHODS]
    if solved:
        print(
            f"{', '.join(solved)}: solved on all training pairs, each counting the same; options"
            " of training steps and sampling are of weightings"
        )
    if "gated" in solved and any(parts["train"].prompt is None for parts in sources.values()):
        print("gated: a constant gate, since `features --prompt-states` stored no prompts")


# ---- states of one size --------------------------------------------------------------------------


class Scales(NamedTuple):
    """What is taken off states and prompts, (D,) each, and what they are then divided by."""

    centre: Tensor
    size: float
    prompt_centre: Tensor
    prompt_size: float


def scales_of(parts: Sequence[States]) -> Scales:
    """Of training states: their mean, and the root mean square of their differences.

    Of prompts, which have no differences, the root mean square around their mean. Without prompts
    these are not used.
    """
    centre = torch.cat([side.float() for part in parts for side in part[:2]]).mean(0)
    differences = torch.cat([part.chosen.float() - part.rejected.float() for part in parts])
    prompts = prompts_of(parts)
    prompts = torch.zeros(1, 1) if prompts is None else prompts
    prompt_centre = prompts.mean(0)
    return Scales(centre, size_of(differences), prompt_centre, size_of(prompts - prompt_centre))


def size_of(states: Tensor) -> float:
    """The root mean square of all numbers; 1 if they are all 0."""
    return float(states.square().mean().sqrt()) or 1.0


def prompts_of(parts: Sequence[States]) -> Tensor | None:
    """The prompts of all parts in fp32; nothing if one of them has none."""
    prompts = [part.prompt for part in parts if part.prompt is not None]
    return torch.cat(prompts).float() if len(prompts) == len(parts) else None


def as_pairs(parts: Sequence[States], scales: Scales) -> StatePairs:
    """The pairs of every source, one source after the other, in fp32.

    200,000 pairs of width 4096 take 6.6 GB, and half as much again with their prompts.
    """
    sizes = torch.tensor([len(part.chosen) for part in parts])
    chosen = (torch.cat([part.chosen for part in parts]).float() - scales.centre) / scales.size
    rejected = (torch.cat([part.rejected for part in parts]).float() - scales.centre) / scales.size
    prompts = prompts_of(parts)
    if prompts is not None:
        prompts = (prompts - scales.prompt_centre) / scales.prompt_size
    source = torch.arange(len(parts)).repeat_interleave(sizes)
    return StatePairs(chosen, rejected, source, len(parts), prompts)
