"""Between files: the prompts that two of them share, and which of that is a fault."""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from .findings import Finding
from .near_duplicates import near_copies
from .survey import LINES_SHOWN, Survey

NEAR_COPIES_BETWEEN = 0.02  # share of one file's prompts that nearly stand in another


class Between(NamedTuple):
    """What two files share: the hashes of prompts, and the findings that come of it."""

    one: Survey
    other: Survey
    shared: set[int]
    findings: list[Finding]


def all_between(surveys: Sequence[Survey]) -> list[Between]:
    """What every file shares with each one before it.

    Two files that are both for training, or both for a test, by their names, are two sources: that
    they share prompts is no fault.
    """
    results = []
    for i, one in enumerate(surveys):
        for other in surveys[:i]:
            shared = one.number_of.keys() & other.number_of.keys()
            are_alike = part_of(one) is not None and part_of(one) == part_of(other)
            findings = [] if are_alike else list(findings_between(one, other, shared))
            results.append(Between(one, other, shared, findings))
    return results


def part_of(survey: Survey) -> str | None:
    """What the name of a file says that it is for; None if it says nothing."""
    words = re.split("[^a-z]+", survey.name.lower())
    return next((part for part in ("train", "validation", "test") if part in words), None)


def findings_between(one: Survey, other: Survey, shared: set[int]) -> Iterator[Finding]:
    """Prompts of a file that stand, or nearly stand, in another one."""
    flatters = (
        "If one is for training and the other for a test, the test flatters the model; split them"
        " by prompt (minimore data split)."
    )
    if shared:
        numbers = [one.number_of[key] for key in shared]
        pairs = np.isin(np.array(one.prompts), numbers).sum()
        yield Finding(
            "shared prompts",
            len(shared),
            len(one.number_of),
            [],
            f"prompts of {one.name}, those of {pairs} of its pairs, stand in {other.name}, too."
            f" {flatters}",
        )
    copies = near_copies(one.signatures(), other.signatures())
    places = [place for place in copies.place if one.signature_hashes[place] not in shared]
    if len(places) >= max(1, NEAR_COPIES_BETWEEN * len(one.number_of)):
        yield Finding(
            "near duplicates between files",
            len(places),
            len(one.number_of),
            [one.signature_lines[place] for place in places[:LINES_SHOWN]],
            f"prompts of {one.name} are near duplicates of prompts of {other.name}. {flatters}",
        )
