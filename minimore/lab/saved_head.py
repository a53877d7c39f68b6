"""A head that was trained on stored states, put back on its trunk: a reward model on the disk.

K sources, D width, S seeds.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..checksums import write_checked_json
from ..files import directory_written_whole, write_text
from ..model.checkpoint import Checkpoint, files_to_save, model_tensors, write_model
from ..options import require
from ..reward import ModelOptions, load_reward_model
from .features import PROBE
from .solved import Runs

READ_BY = ("max_length", "truncate", "chat")  # what features.json says of how texts were read
NEEDED = ("model", *READ_BY)  # of features.json, besides what the states themselves need


class BestHead(NamedTuple):
    """Which head of a probe has the lowest mean NLL over the sources' test pairs, and its rates."""

    method: str
    seed: int
    rates: dict[str, float]  # accuracy, ece and nll, means over the sources


def best_head(runs: Runs) -> BestHead:
    """The best of all methods and seeds; of equal ones the first. runs: {method: {rate: (S, K)}}.

    >>> rates = {"accuracy": [[0.5], [0.75]], "ece": [[0.1], [0.2]], "nll": [[0.7], [0.6]]}
    >>> best_head({"more": rates})
    BestHead(method='more', seed=1, rates={'accuracy': 0.75, 'ece': 0.2, 'nll': 0.6})
    """
    nll = {method: np.mean(rates["nll"], axis=1) for method, rates in runs.items()}  # (S,)
    method = min(nll, key=lambda name: float(nll[name].min()))
    seed = int(nll[method].argmin())
    rates = {rate: float(np.mean(runs[method][rate][seed])) for rate in ("accuracy", "ece", "nll")}
    return BestHead(method, seed, rates)


def open_origin(model: str | None, description: Mapping[str, Any]) -> Checkpoint:
    """The model whose states were stored, by default from where it was then.

    description: what features.json says. Raises InputError for any other model, and for one that
    cannot be saved.
    """
    missing = [name for name in NEEDED if name not in description]
    require(
        not missing,
        f"--save: features.json does not say {', '.join(missing)} of the stored states; store the"
        " features again",
    )
    checkpoint = Checkpoint(model or description["model"])
    parts = [part for parts in description["sources"].values() for part in parts.values()]
    require(
        {part["of"].split()[0] for part in parts} == {checkpoint.identity()},
        f"--model {checkpoint.directory}: is not the model whose states were stored, or was copied"
        " since (it is known by its files' sizes and dates); expected that one, or store the"
        " features again",
    )
    files_to_save(checkpoint)
    return checkpoint


def save_head(
    output: str,
    head: Tensor,
    best: BestHead,
    checkpoint: Checkpoint,
    description: Mapping[str, Any],
) -> None:
    """Write a reward model: the trunk of a checkpoint, in fp32, and a head (D,) of a probe.

    description: what features.json says of the states on which the head was trained. options.json
    says how texts were read, so that `score` and `evaluate` read them so. It takes the memory of
    the trunk in fp32.
    """
    options = ModelOptions(model=str(checkpoint.directory), device="cpu", compute_dtype="float32")
    model = load_reward_model(checkpoint, options)
    model.head = torch.nn.Parameter(head)
    top = model.saved_top(checkpoint.family)
    tensors = model_tensors(checkpoint, model.trunk, top)
    read = {name: description[name] for name in READ_BY}
    read["append_eos"] = "yes" if description.get("append_eos") else "no"
    with directory_written_whole(Path(output)) as directory:
        made = {"model": description["model"], "method": best.method, "seed": best.seed}
        write_checked_json(directory / "options.json", made | read)
        write_text(directory / "README.md", model_card(best, description))
        write_model(directory, checkpoint, tensors, model.kind, "float32")
    rates = best.rates
    print(
        f"{output}: the head of {best.method}, seed {best.seed}, which has the lowest mean NLL of"
        f" all: {rates['nll']:.4f}, accuracy {rates['accuracy']:.4f}, ECE {rates['ece']:.4f}."
        " These test pairs chose it, so its figures on them are a little too good"
    )


def model_card(best: BestHead, description: Mapping[str, Any]) -> str:
    """README.md of the reward model."""
    sources = "\n".join(
        f"- {name}: {parts['train']['pairs']} training pairs, {parts['test']['pairs']} test pairs"
        for name, parts in description["sources"].items()
    )
    return f"""---
tags: [reward-model, minimore]
pipeline_tag: text-classification
---

# Reward model made with minimore: a {PROBE}

The trunk is that of `{description["model"]}`, as it is. Its head was trained by {best.method} with
seed {best.seed}, and has the lowest NLL on the test pairs of all heads that were tried.

## Data

{sources}
"""
