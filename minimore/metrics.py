"""What a training says of every step: the record in metrics.jsonl, and the line on the screen.

A saved state knows the checksum of the log up to its step, so that a line that was lost, repeated
or changed is noticed.

K sources, B pairs in a step, D width.
"""

import json
import math
import os
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checksums import checksum
from .engine.objective import StepResult
from .files import to_disk
from .more import Labels, bradley_terry_losses, head_gradients
from .options import InputError
from .tables import number
from .units import in_whole_time


@torch.no_grad()
def step_metrics(
    result: StepResult, source: Tensor, names: Sequence[str], labels: Labels | None = None
) -> dict[str, Any]:
    """What metrics.jsonl says of one step.

    source: (B,) integers in [0, K); names: of the sources; labels: of the pairs. Per source: pairs,
    loss (without label smoothing), accuracy, mean margin, weight and the norm of the head gradient;
    the cosines between the sources' head gradients. None where a source has no pair.
    """
    K, head = len(names), result.head
    margins = (result.z_chosen - result.z_rejected) @ head  # (B,)
    is_right = (margins > 0).double() + 0.5 * (margins == 0)  # a reward tie is half right
    if labels is not None:
        is_right[labels.share == 0.5] = 0.5  # and so is any answer where votes are evenly split
    pairs = (head, result.z_chosen, result.z_rejected, source, K, 0.0, labels)
    losses = bradley_terry_losses(*pairs)
    gradients = head_gradients(*pairs)  # (K, D)
    norms = gradients.norm(dim=1)
    by_source = {}
    for k, name in enumerate(names):
        mine = source == k
        by_source[name] = {
            "pairs": int(mine.sum()),
            "loss": finite(losses[k]),
            "accuracy": finite(is_right[mine].mean()),
            "margin": finite(margins[mine].mean()),
            "weight": float(result.weights[k]),
            "gradient_norm": finite(norms[k]),
        }
    return {
        "loss": float(result.loss),
        "sources": by_source,
        "cosines": cosines_between(gradients / norms[:, None], names),
    }


def cosines_between(units: Tensor, names: Sequence[str]) -> dict[str, float | None]:
    """The cosine of every two rows of length 1, by the names of both. units: (K, D)."""
    cosines = (units @ units.T).tolist()
    return {
        f"{names[i]} ~ {names[j]}": finite(cosines[i][j])
        for i in range(len(names))
        for j in range(i + 1, len(names))
    }


def finite(value: Tensor | float) -> float | None:
    """A number as JSON can hold it: None instead of NaN or infinity."""
    return float(value) if math.isfinite(value) else None


def progress_line(
    record: Mapping[str, Any], means: Mapping[str, Any] | None, steps: int, seconds_left: float
) -> str:
    """One line: per source loss, accuracy and weight; the range of the cosines; the time left.

    means: those of `RecentSteps`, which stand in brackets.
    """
    cells = [
        source_cell(name, figures, means["sources"][name] if means else None)
        for name, figures in record["sources"].items()
    ]
    cosines = [cosine for cosine in record["cosines"].values() if cosine is not None]
    if cosines:
        cells.append(f"cosines {min(cosines):.2f} to {max(cosines):.2f}")
    if seconds_left > 0:
        cells.append(f"{in_whole_time(seconds_left)} left")
    return "  ".join([position_and_loss(record, means, steps), *cells])


def position_and_loss(
    record: Mapping[str, Any], means: Mapping[str, Any] | None, steps: int
) -> str:
    """How a line begins: "step 8/80  loss 0.6931 (0.7012)"."""
    mean = f" ({means['loss']:.4f})" if means else ""
    return f"step {record['step']}/{steps}  loss {record['loss']:.4f}{mean}"


def source_cell(name: str, figures: Mapping[str, Any], means: Mapping[str, Any] | None) -> str:
    """What the line says of one source: "ana 0.693 (0.702)  50% (48%) w0.20"."""
    if not figures["pairs"]:
        return f"{name} none"
    loss, accuracy = f"{figures['loss']:.3f}", f"{figures['accuracy']:4.0%}"
    if means:
        loss, accuracy = f"{loss} ({means['loss']:.3f})", f"{accuracy} ({means['accuracy']:.0%})"
    return f"{name} {loss} {accuracy} w{figures['weight']:.2f}"


class RecentSteps:
    """The records of the last steps, and means over them: a single step holds few pairs.

    most: of so many steps, at most.
    """

    def __init__(self, most: int):
        self.most = most
        self.records: deque[Mapping[str, Any]] = deque(maxlen=most)

    def append(self, record: Mapping[str, Any]) -> None:
        """Add the record of a step; the oldest one goes."""
        self.records.append(record)

    def means(self) -> dict[str, Any] | None:
        """Mean loss of the steps; of every source, loss and accuracy. None for a single step.

        Those of a source are means over its pairs.
        """
        if len(self.records) < 2:
            return None
        names = self.records[-1].get("sources", {})
        return {
            "loss": sum(record["loss"] for record in self.records) / len(self.records),
            "sources": {name: self._means_of(name) for name in names},
        }

    def _means_of(self, name: str) -> dict[str, float] | None:
        """Those of one source; None where no step had a pair of it."""
        rows = [record["sources"][name] for record in self.records]
        pairs = sum(row["pairs"] for row in rows)
        if not pairs:
            return None
        return {
            figure: sum(row["pairs"] * row[figure] for row in rows if row["pairs"]) / pairs
            for figure in ("loss", "accuracy")
        }


def lines_of_test_files(record: Mapping[str, Any]) -> list[str]:
    """What an evaluation on the TEST files has shown: a line for each source."""
    rows = record["evaluation"]["sources"]
    widest = max(map(len, rows))
    return [
        f"test after step {record['step']}: {name:{widest}}  {figures_of(row)}"
        for name, row in rows.items()
    ]


def figures_of(row: Mapping[str, Any]) -> str:
    """The figures of a report that are looked at first, of one source or of the mean."""
    return (
        f"accuracy {number(row['accuracy'])}, NLL {number(row['nll'])},"
        f" margin {number(row['mean_margin'])}, ECE {number(row['ece'])}"
    )


def what_is_wrong(record: Mapping[str, Any]) -> str | None:
    """What a step shows that keeps a model from learning; None if it shows nothing.

    A loss of exactly log 2 on every source means that every margin is zero or rounding.
    """
    seen = [figures for figures in record["sources"].values() if figures["pairs"]]
    if all(figures["gradient_norm"] == 0 for figures in seen):
        return (
            "the gradient of the head is zero: all pairs have the same hidden states on both sides;"
            " is --max-length so short that the responses are cut away?"
        )
    if all(abs(figures["loss"] - math.log(2)) < 1e-6 for figures in seen if figures["loss"]):
        return (
            "all margins are zero or rounding, so accuracy stays at 1/2: the head is zero, or the"
            " model sees no difference between the two sides of a pair"
        )
    return None


class FinalAccuracy(NamedTuple):
    """The accuracy of the training pairs of the last steps, each before the step learned it."""

    accuracy: float
    pairs: int
    steps: int

    @property
    def deviation(self) -> float:
        """Standard deviations of a coin's accuracy on so many pairs, by which it is above 1/2."""
        return (self.accuracy - 1 / 2) * 2 * math.sqrt(self.pairs)


def final_accuracy(log: Path) -> FinalAccuracy | None:
    """That of the last fifth of the steps in the log of a run; None for a log without steps."""
    lines = log.read_bytes().splitlines()
    records = [json.loads(line) for line in lines[-math.ceil(len(lines) / 5) :]]
    rows = [row for record in records for row in record["sources"].values() if row["pairs"]]
    if not rows:
        return None
    pairs = sum(row["pairs"] for row in rows)
    right = sum(row["pairs"] * row["accuracy"] for row in rows)
    return FinalAccuracy(right / pairs, pairs, len(records))


# ---- the log -------------------------------------------------------------------------------------


class Log:
    """metrics.jsonl of a run, to which a line a step is appended. Use it as a context.

    is_written: of several processes that train together, only one writes it.
    """

    def __init__(self, path: Path, is_written: bool = True):
        self.path, self.is_written = path, is_written
        self.total = checksum(b"")  # of all lines that the log holds

    def __enter__(self) -> "Log":
        if self.is_written:
            self.total = checksum(self.path.read_bytes())
            self.file = self.path.open("ab")
        return self

    def __exit__(self, *_: Any) -> None:
        if self.is_written:
            self.file.close()

    def append(self, record: Mapping[str, Any]) -> None:
        """Add the record of a step."""
        if not self.is_written:
            return
        line = (json.dumps(record, allow_nan=False) + "\n").encode()
        self.file.write(line)
        self.file.flush()
        self.total = checksum(line, self.total)

    def to_disk(self) -> str:
        """Bring all lines to the disk, as must be done before their step is saved; the checksum."""
        if self.is_written:
            os.fsync(self.file.fileno())
            to_disk(self.path.parent)
        return self.total


def remaining_log(path: Path, step: int, total: str) -> bytes:
    """The lines of a log without those of steps after `step`: these steps will be taken again.

    total: the checksum of the lines that remain. A log that was removed begins anew, which is said.
    Raises InputError if other lines remain.
    """
    if step and not path.exists():
        print(f"{path} is missing: the log begins after step {step}", flush=True)
        return b""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    try:
        whole = [
            line for line in lines if line.endswith(b"\n") and json.loads(line)["step"] <= step
        ]
    except (ValueError, TypeError, KeyError, RecursionError):
        whole = []
    if checksum(b"".join(whole)) != total:
        raise InputError(
            f"{path}: is not the log of this run's first {step} steps: a line was lost, repeated or"
            " changed; restore it, or remove the file to go on without the log so far"
        )
    return b"".join(whole)
