"""Sift: which comparisons make a pair or a label tie, and why the others do not.

Every record is read as training will read it (forms.py), so that what is written can be trained on.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations

from ...options import require
from ..forms import Pair, record_pairs
from ..labels import LabelRules
from ..records import Record
from .comparisons import scored


@dataclass
class FileCounts:
    """Of one file that is written: its pairs, its label ties, and what was left out by reason."""

    pairs: int = 0
    ties: int = 0
    left_out: Counter[str] = field(default_factory=Counter)

    def add(self, other: "FileCounts") -> None:
        """Add the counts of another file."""
        self.pairs += other.pairs
        self.ties += other.ties
        self.left_out.update(other.left_out)

    def line(self) -> str:
        """One line for the log."""
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.left_out.items()))
        line = f"{self.pairs} pairs, {self.ties} label ties, {self.left_out.total()} left out"
        return line + (f" ({reasons})" if reasons else "")


Single = tuple[Record, Pair]  # a comparison as a record of its own, and as texts


def sifted(record: Record, where: str, counts: FileCounts) -> Iterator[Record]:
    """The record, or those of its comparisons that are a pair or a label tie; all are counted.

    A pair has one response on each side. Blank responses and equal ones are left out. Raises
    InputError for a record that training would refuse.
    """
    is_scored = "responses" in record and "chosen" not in record
    if is_scored:
        singles, ties = _twos_of_scores(record, where)
    else:
        singles, ties = [(record, _single_pair(record, where))], set()
    usable = []
    for place, (single, pair) in enumerate(singles):
        reason = reason_against(pair)
        if reason:
            counts.left_out[reason] += 1
            continue
        usable.append(single)
        counts.ties += place in ties
        counts.pairs += place not in ties
    yield from [record] if is_scored and len(usable) == len(singles) else usable


def reason_against(pair: Pair) -> str:
    """Why two responses make no pair; empty if they do."""
    if pair.is_blank:
        return "blank"
    return "equal" if pair.chosen == pair.rejected else ""


def _single_pair(record: Record, where: str) -> Pair:
    """The one pair of a record, whose votes are checked, too; InputError if it has several."""
    pairs, _ = record_pairs(record, where, rules=LabelRules())
    require(
        len(pairs) == 1,
        f"{where}: a response is a list of several; expected a string, or messages",
    )
    return pairs[0]


def _twos_of_scores(record: Record, where: str) -> tuple[list[Single], set[int]]:
    """Every two of the responses as a record of its own, and which of them are label ties."""
    record_pairs(record, where)  # refuses scores that are none
    responses, scores = record["responses"], record["scores"]
    others = {key: value for key, value in record.items() if key not in ("responses", "scores")}
    singles: list[Single] = []
    ties: set[int] = set()
    for i, j in combinations(range(len(responses)), 2):
        two = scored(record["prompt"], [responses[i], responses[j]], [scores[i], scores[j]])
        as_pair = others | {"chosen": responses[i], "rejected": responses[j]}
        pair = _single_pair(as_pair, where)
        if scores[i] == scores[j]:
            ties.add(len(singles))
        singles.append((others | two, pair))
    return singles, ties
