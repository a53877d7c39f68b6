"""Between files: the prompts that two of them share, and labels that do not go together."""

import os
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ...tables import number
from ...uncertainty import Interval, intervals
from .findings import FEWEST_FOR_WORDS, Finding, longer_wins, sample_of
from .near_duplicates import near_copies
from .survey import LINES_SHOWN, Survey
from .word_rule import fitted_rule

NEAR_COPIES_BETWEEN = 0.02  # share of one file's prompts that nearly stand in another
PARTS = ("train", "validation", "test")  # words of a name that say what a file is for
ENDINGS = {"jsonl", "json", "csv", "tsv", "parquet", "gz"}


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
            results.append(Between(one, other, shared, list(findings_of_two(one, other, shared))))
    return results


def findings_of_two(one: Survey, other: Survey, shared: set[int]) -> Iterator[Finding]:
    """What is wrong between two files, by what their names say that they are for."""
    parts = part_of(one), part_of(other)
    if parts[0] != parts[1] or parts[0] is None:
        yield from findings_between(one, other, shared)
    if parts[0] != parts[1] and are_of_one_source(one, other):
        yield from labels_turned_round(one, other)


def part_of(survey: Survey) -> str | None:
    """What the name of a file says that it is for; None if it says nothing."""
    return next((part for part in PARTS if part in words_of_name(survey)), None)


def words_of_name(survey: Survey) -> list[str]:
    """The words and numbers of a file's name, without those of its ending."""
    words = re.findall("[a-z]+|[0-9]+", survey.name.lower())
    return [word for word in words if word not in ENDINGS]


def are_of_one_source(one: Survey, other: Survey) -> bool:
    """Whether two files are parts of one source: their names differ in what they are for alone.

    helpful.train.jsonl and helpful.test.jsonl are; so are train.jsonl and test.jsonl of one
    directory.
    """
    if part_of(one) is None or part_of(other) is None:
        return False
    rests = [[w for w in words_of_name(survey) if w not in PARTS] for survey in (one, other)]
    directories = {os.path.dirname(os.path.realpath(survey.path)) for survey in (one, other)}
    return rests[0] == rests[1] and (bool(rests[0]) or len(directories) == 1)


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


def labels_turned_round(one: Survey, other: Survey) -> Iterator[Finding]:
    """Labels of two parts of a source that contradict each other, as when all of one are swapped.

    The word rule that is fitted on either part is clearly worse than a coin on the other one.
    """
    if min(len(survey.sample.items) for survey in (one, other)) < FEWEST_FOR_WORDS:
        return
    on_one = rule_transferred(fitted=other, tested=one)
    on_other = rule_transferred(fitted=one, tested=other)
    if on_one.high < 0.5 and on_other.high < 0.5:
        yield Finding(
            "labels turned round?",
            round((1 - on_one.value) * one.pairs),
            one.pairs,
            [],
            f"pairs of {one.name} are ranked against their labels by what length and a few words"
            f" say in {other.name}; the longer response wins in {number(longer_wins(one).value)} of"
            f" {one.name} and in {number(longer_wins(other).value)} of {other.name}. Chosen and"
            " rejected may be mixed up in one of them; read a few pairs of each.",
        )


def rule_transferred(fitted: Survey, tested: Survey) -> Interval:
    """The accuracy on one file of the word rule that is fitted on another."""
    pairs, prompts = sample_of(tested)
    return intervals(fitted_rule(sample_of(fitted)[0]).margins(pairs), prompts)[0]
