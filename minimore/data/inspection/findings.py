"""Findings: which counts of a survey are faults, what each means, and what to do about it.

A count becomes a finding from a share on that is at least twice the largest one in any of ten clean
files, the training and test files of the paper's five kinds of source. Below it stays a count.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ...tables import number, with_interval
from ...uncertainty import Interval, intervals
from ..forms import Pair
from .survey import Survey
from .word_rule import WordRule, word_rule


class Fault(NamedTuple):
    """A share of pairs from which a count is a finding, and the sentences that say so.

    what: follows "12 of 100 pairs ...". advice: what it means and what to do.
    """

    share: float
    what: str
    advice: str


# By the name of what is counted. In the ten clean files no share is above half of the one here.
FAULTS = {
    "blank": Fault(
        0.01,
        "have a blank response",
        "A model learns from them that silence is good or bad; find where the text was lost.",
    ),
    "identical": Fault(
        0.01,
        "have the same text on both sides",
        "There is no preference to learn from them; remove them, or look for a mixed-up column.",
    ),
    "no prompt": Fault(
        0.01,
        "have no prompt",
        "The model judges an answer without its question; look for a column that was not written.",
    ),
    "prompt repeated": Fault(
        0.01,
        "repeat the prompt at the beginning of both responses",
        'The model reads it twice; leave out "prompt" if the responses are whole texts.',
    ),
    "refusals": Fault(
        0.4,
        "hold a response that begins with a refusal",
        "The labels may be about refusing alone; see which side refuses, or mix other data in.",
    ),
    "cut off": Fault(
        0.4,
        "hold a response that ends inside a sentence",
        "Unless they are no sentences, they were probably cut before they came here, and the reward"
        " is read at their end; export them again, whole.",
    ),
    "further turns": Fault(
        0.05,
        "hold a response that goes on with another turn",
        "The reward is read behind that turn; end each response where the human speaks again.",
    ),
    "template marks": Fault(
        0.01,
        "hold marks of some model's chat template as plain text",
        "Another model never saw them, and the same one saw them as tokens; give conversations as"
        " messages, which the model's own template writes.",
    ),
    "special tokens": Fault(
        0.02,
        "hold names of special tokens in their texts",
        "They are read as text, not as tokens; remove what a tokenizer has written there.",
    ),
    "duplicates": Fault(
        0.1,
        "stood in the file before, word for word",
        "They count twice, in training and in every interval; keep one of each.",
    ),
    "contradictions": Fault(
        0.02,
        "stand in the file in both orders",
        'No model can be right on both; join them into one record with "votes".',
    ),
    "near duplicates": Fault(
        0.05,
        "bring a new prompt that is a near duplicate of one before it",
        "A split by prompt lets them into training and test; remove or group them first.",
    ),
    "unreadable votes": Fault(
        0.0,
        'have "votes" that are not two numbers of annotators',
        "Training refuses the file; mend them, or give --votes ignore there.",
    ),
    "equal when cut": Fault(
        0.01,
        "are the same on both sides once they are cut to --max-length",
        "The model sees no difference, so its accuracy there is 1/2; raise --max-length.",
    ),
    "prompt cut away": Fault(
        0.25,
        "have a response so long that nothing of the prompt is left within --max-length",
        "The model judges an answer without its question; raise --max-length.",
    ),
}
MOSTLY_TIES = 0.5  # share of label ties
ONE_WAY = 0.95  # share of records in which the first, or the second, is preferred
FEWEST_FOR_ONE_WAY = 50  # records
STOCK_RESPONSE = 0.05  # share of pairs that hold one response
FEWEST_FOR_STOCK = 10  # pairs
LENGTH_EXPLAINS = 0.75  # share in which the longer, or the shorter, wins; all of its interval
WORDS_EXPLAIN = 0.85  # accuracy of the word rule; all of its interval
FEWEST_FOR_WORDS = 20  # pairs
FEWEST_PROMPTS = 10  # that the word rule is fitted on and tested on


class Finding(NamedTuple):
    """A fault of the data. lines: the first few that show it; none where it is about all."""

    name: str
    cases: int
    total: int
    lines: list[int]
    sentence: str

    def __str__(self) -> str:
        where = f" (lines {', '.join(map(str, self.lines))})" if self.lines else ""
        return f"{self.name}: {self.cases} of {self.total} {self.sentence}{where}"


class SimpleRules(NamedTuple):
    """How far the longer response, and length with a few words, explain the labels of a file."""

    longer: Interval
    words: WordRule | None  # None with too few pairs to test it


def rules_of(survey: Survey) -> SimpleRules:
    """How often the longer response wins, and the accuracy of the word rule."""
    pairs, prompts = sample_of(survey)
    has_enough = len(pairs) >= FEWEST_FOR_WORDS
    return SimpleRules(longer_wins(survey), word_rule(pairs, prompts) if has_enough else None)


def longer_wins(survey: Survey) -> Interval:
    """In which share of the pairs the longer response wins."""
    return intervals(np.sign(np.array(survey.length_gaps)), np.array(survey.prompts))[0]


def sample_of(survey: Survey) -> tuple[Sequence[Pair], np.ndarray]:
    """The pairs whose texts a survey holds, and the numbers of their prompts, (N,).

    If nearly all have one prompt, each pair counts as a prompt of its own.
    """
    places, pairs = zip(*survey.sample.items)
    prompts = np.array(survey.prompts)[list(places)]
    has_enough = len(np.unique(prompts)) >= FEWEST_PROMPTS
    return pairs, prompts if has_enough else np.arange(len(pairs))


# ---- of one file ---------------------------------------------------------------------------------


def findings_of(survey: Survey, rules: SimpleRules) -> list[Finding]:
    """The faults of one file."""
    of_counts = [
        Finding(name, count.total, survey.pairs, count.lines, f"pairs {fault.what}. {fault.advice}")
        for name, fault in FAULTS.items()
        if (count := survey.counts.get(name)) and count.total >= fault.share * survey.pairs
    ]
    return [*of_counts, *findings_about_labels(survey), *findings_about_rules(survey, rules)]


def findings_about_labels(survey: Survey) -> Iterator[Finding]:
    """Labels that tie, or that follow a place or one text."""
    pairs_and_ties = survey.pairs + survey.label_ties
    if survey.label_ties >= MOSTLY_TIES * pairs_and_ties:
        yield Finding(
            "label ties",
            survey.label_ties,
            pairs_and_ties,
            [],
            "pairs have equal scores, and are left out. Ask for finer scores, or use their votes.",
        )
    records, first = survey.records_of_two, survey.first_preferred
    most = max(first, records - first)
    if records >= FEWEST_FOR_ONE_WAY and most >= ONE_WAY * records:
        yield Finding(
            "one way round",
            most,
            records,
            [],
            f"records prefer the {'first' if 2 * first > records else 'second'} response. If"
            " annotators saw them in this order, the labels may be a habit; if the file was sorted"
            " by score, nothing is wrong.",
        )
    yield from stock_responses(survey)


def stock_responses(survey: Survey) -> Iterator[Finding]:
    """The response that stands in most pairs, if it is always on the same side."""
    both = survey.sides[0] + survey.sides[1]
    fewest = max(FEWEST_FOR_STOCK, STOCK_RESPONSE * survey.pairs)
    for key, total in both.most_common(1):
        most = max(side[key] for side in survey.sides)
        if total >= fewest and most >= ONE_WAY * total:
            side = "chosen" if survey.sides[0][key] == most else "rejected"
            yield Finding(
                "stock response",
                most,
                survey.pairs,
                [],
                f"pairs have one and the same text as their {side} response. A model learns the"
                " text, not what makes it good; keep a few of them.",
            )


def findings_about_rules(survey: Survey, rules: SimpleRules) -> Iterator[Finding]:
    """Labels that a rule without understanding explains."""
    longer, words = rules.longer, rules.words
    explains_length = longer.low > LENGTH_EXPLAINS or longer.high < 1 - LENGTH_EXPLAINS
    if explains_length:
        which = "longer" if longer.value > 0.5 else "shorter"
        share = longer.value if longer.value > 0.5 else 1 - longer.value
        yield Finding(
            "length rule",
            round(share * survey.pairs),
            survey.pairs,
            [],
            f"pairs prefer the {which} response. A model may learn length alone; compare it with"
            " `longer` in the report, and look at pairs in which the other one wins.",
        )
    if words and words.accuracy.low > WORDS_EXPLAIN and not explains_length:
        names = ", ".join(repr(name) for name, _ in words.strongest[:3])
        yield Finding(
            "word rule",
            round(words.accuracy.value * survey.sample.seen),
            survey.pairs,
            [],
            f"pairs are ranked right by length and a few words alone (most by {names}). The labels"
            " may follow how a text was made; see whether that is the preference that you want.",
        )


# ---- the floor -----------------------------------------------------------------------------------


def rule_lines(rules: SimpleRules) -> list[str]:
    """What the rules reach, in words: the floor that a model must beat."""
    lines = [f"The longer response wins in {with_interval(*_parts(rules.longer))} of the pairs."]
    if rules.words:
        strongest = ", ".join(
            f"{name!r} {number(weight, 2)}" for name, weight in rules.words.strongest
        )
        lines.append(
            f"Length and a few words alone reach {with_interval(*_parts(rules.words.accuracy))}"
            f" on prompts that they were not fitted on; a model must beat that. Most weight have"
            f" {strongest}."
        )
    return lines


def _parts(interval: Interval) -> tuple[float, tuple[float | None, float | None]]:
    """An estimate and the ends of its interval, None where there is no number."""
    low, high = (None if math.isnan(end) else end for end in interval[1:])
    return interval.value, (low, high)
