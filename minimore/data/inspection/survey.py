"""A survey: everything that is counted of a file of pairs in one pass, pair by pair.

It holds some numbers of every pair and 256 bytes of every prompt, but texts of a sample only.

N pairs, G prompts.
"""

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ...model.tokenizer import Tokenizer
from ...options import InputError
from ..forms import Pair
from ..labels import LabelRules, read_label
from ..messages import PLAIN_TURNS
from ..pairs import CHARACTERS_AT_ONCE, encode
from ..prompts import normalised, text_hash
from ..records import Record
from ..texts import Reading, ReadRecord
from ..values import is_number
from .near_duplicates import BINS, near_copies, signature
from .signs import signs_of

LINES_SHOWN = 5
SAMPLE = 10_000  # pairs of which the texts are kept
MOST_SIGNATURES = 200_000  # prompts that are compared for near duplicates
ENCODED_AT_ONCE = 256  # pairs
UNCUT = 10**9  # tokens


@dataclass
class Count:
    """How many pairs show something, and the first lines that do."""

    total: int = 0
    lines: list[int] = field(default_factory=list)

    def add(self, line: int) -> None:
        """One more, in this line of its file."""
        self.total += 1
        if len(self.lines) < LINES_SHOWN and line not in self.lines:
            self.lines.append(line)


class EvenSample:
    """Items of a stream, evenly spaced, at most `most` of them.

    When it is full, it drops every second one, and takes every second one from then on.
    """

    def __init__(self, most: int):
        self.most, self.stride, self.seen = most, 1, 0
        self.items: list[tuple[int, Pair]] = []  # with its place in the stream

    def add(self, pair: Pair) -> None:
        """Offer the next item."""
        if self.seen % self.stride == 0:
            self.items.append((self.seen, pair))
        self.seen += 1
        if len(self.items) > self.most:
            self.items, self.stride = self.items[::2], 2 * self.stride


@dataclass
class Survey:
    """What a file holds.

    counts: by the name of a sign or a fault. lengths: of every pair, of prompt, chosen and rejected
    response, in `unit`. length_gaps: characters of the chosen response minus the rejected one's.
    prompts: of every pair, the number of its prompt.

    unlabelled: comparisons of a foreign shape that have no label, by reason. records_of_two: how
    many records have different scores of two responses; first_preferred: how many of these prefer
    the first. agreement: of every pair with votes, the share of them on the larger side.
    """

    path: str
    unit: str
    max_length: int | None
    records: int = 0
    label_ties: int = 0
    unlabelled: Counter[str] = field(default_factory=Counter)
    counts: dict[str, Count] = field(default_factory=dict)
    lengths: tuple[array, array, array] = field(
        default_factory=lambda: (array("q"), array("q"), array("q"))
    )
    length_gaps: array = field(default_factory=lambda: array("q"))
    prompts: array = field(default_factory=lambda: array("q"))
    number_of: dict[int, int] = field(default_factory=dict)  # of a prompt, by its hash
    signature_rows: list[np.ndarray] = field(default_factory=list)  # of different prompts
    signature_lines: array = field(default_factory=lambda: array("q"))
    signature_hashes: array = field(default_factory=lambda: array("q"))
    line_of: dict[int, int] = field(default_factory=dict)  # of a pair, by its hash
    sides: tuple[Counter[int], Counter[int]] = field(
        default_factory=lambda: (Counter(), Counter())
    )  # how often a response is chosen and rejected, by its hash
    records_of_two: int = 0
    first_preferred: int = 0
    agreement: array = field(default_factory=lambda: array("d"))
    sample: EvenSample = field(default_factory=lambda: EvenSample(SAMPLE))

    @property
    def name(self) -> str:
        """The name of the file."""
        return Path(self.path).name

    @property
    def pairs(self) -> int:
        """How many pairs there are."""
        return len(self.length_gaps)

    def count(self, name: str, line: int) -> None:
        """Count a sign or a fault in a line."""
        self.counts.setdefault(name, Count()).add(line)

    def signatures(self) -> np.ndarray:
        """The signatures of different prompts: (G, 64)."""
        return np.array(self.signature_rows, dtype=np.uint32).reshape(-1, BINS)


def survey_of(path: str, tokenizer: Tokenizer | None, max_length: int, chat: bool) -> Survey:
    """Read a file once and count. Raises InputError for what cannot be read.

    tokenizer: of the model that is to read the file, if one is known; without it, lengths are in
    characters, and what truncation does is not asked.
    """
    unit = "characters" if tokenizer is None else "tokens"
    survey = Survey(path, unit, None if tokenizer is None else max_length)
    reading = Reading(tokenizer or PLAIN_TURNS, chat)
    records = reading.records(path, survey.unlabelled)  # which it fills while it is read
    for some in in_portions(records):
        for read in some:
            count_record(survey, read)
            for pair in read.pairs:
                count_pair(survey, pair, read.line, tokenizer)
        pairs = [(pair, read.line) for read in some for pair in read.pairs]
        if tokenizer is None:
            lengths = count_characters(pairs)
        else:
            lengths = count_tokens(survey, pairs, tokenizer, max_length)
        for of_pair in lengths:
            for column, length in zip(survey.lengths, of_pair):
                column.append(length)
    count_near_copies(survey)
    return survey


def in_portions(records: Iterable[ReadRecord]) -> Iterator[list[ReadRecord]]:
    """Records that are tokenised together: as many as have about ENCODED_AT_ONCE pairs or fewer."""
    portion: list[ReadRecord] = []
    pairs = characters = 0
    for read in records:
        portion.append(read)
        pairs += len(read.pairs)
        characters += sum(2 * len(p.prompt) + len(p.chosen) + len(p.rejected) for p in read.pairs)
        is_full = pairs >= ENCODED_AT_ONCE or characters >= CHARACTERS_AT_ONCE
        if is_full or len(portion) >= ENCODED_AT_ONCE:
            yield portion
            portion, pairs, characters = [], 0, 0
    if portion:
        yield portion


# ---- of a record ---------------------------------------------------------------------------------


def count_record(survey: Survey, read: ReadRecord) -> None:
    """Count what a record says besides its pairs: ties, the place of the better one, votes."""
    survey.records += 1
    survey.label_ties += read.label_ties
    scores = scores_of(read.record)
    if len(scores) == 2 and scores[0] != scores[1]:
        survey.records_of_two += 1
        survey.first_preferred += scores[0] > scores[1]
    if read.record.get("votes") is None:
        return
    try:
        label = read_label(read.record, read.where, LabelRules())
        survey.agreement.append(max(label.share, 1 - label.share))
    except InputError:
        survey.count("unreadable votes", read.line)


def scores_of(record: Record) -> list[float]:
    """The scores of a record's responses, in the order of the file; none where there are none."""
    scores = record.get("scores", record.get("score"))
    return scores if isinstance(scores, list) and all(map(is_number, scores)) else []


# ---- of a pair -----------------------------------------------------------------------------------


def count_pair(survey: Survey, pair: Pair, line: int, tokenizer: Tokenizer | None) -> None:
    """Count the signs of a pair, and what it has in common with those before it."""
    for sign in signs_of(pair, tokenizer):
        survey.count(sign, line)
    prompt, chosen, rejected = map(normalised, pair[:3])
    key = text_hash("\0".join((prompt, chosen, rejected)))
    reversed_key = text_hash("\0".join((prompt, rejected, chosen)))
    count_repeats(survey, key, reversed_key, line)
    for side, response in zip(survey.sides, (chosen, rejected)):
        if response:
            side[text_hash(response)] += 1
    survey.length_gaps.append(len(pair.chosen) - len(pair.rejected))
    survey.prompts.append(number_of_prompt(survey, prompt, line))
    survey.sample.add(pair)


def count_repeats(survey: Survey, key: int, reversed_key: int, line: int) -> None:
    """Count a pair that stood before, and two lines that hold one pair in both orders."""
    if key in survey.line_of:
        survey.count("duplicates", line)
    else:
        survey.line_of[key] = line
    if key != reversed_key and reversed_key in survey.line_of:
        survey.count("contradictions", survey.line_of[reversed_key])
        survey.count("contradictions", line)


def number_of_prompt(survey: Survey, prompt: str, line: int) -> int:
    """The number of a normalised prompt; a new one leaves its signature.

    A pair without a prompt has a number that no other pair has: its own place, below 0.
    """
    if not prompt:
        return -1 - len(survey.prompts)
    key = text_hash(prompt)
    if key in survey.number_of:
        return survey.number_of[key]
    survey.number_of[key] = len(survey.number_of)
    own = signature(prompt) if len(survey.signature_rows) < MOST_SIGNATURES else None
    if own is not None:
        survey.signature_rows.append(own)
        survey.signature_lines.append(line)
        survey.signature_hashes.append(key)
    return survey.number_of[key]


def count_near_copies(survey: Survey) -> None:
    """Count the different prompts that are near duplicates of one before them."""
    for place in near_copies(survey.signatures()).place:
        survey.count("near duplicates", survey.signature_lines[place])


# ---- lengths -------------------------------------------------------------------------------------


Lengths = tuple[int, int, int]  # of prompt, chosen and rejected response


def count_characters(pairs: list[tuple[Pair, int]]) -> Iterator[Lengths]:
    """The lengths of some pairs in characters."""
    for pair, _ in pairs:
        yield len(pair.prompt), len(pair.chosen), len(pair.rejected)


def count_tokens(
    survey: Survey, pairs: list[tuple[Pair, int]], tokenizer: Tokenizer, max_length: int
) -> Iterator[Lengths]:
    """The lengths of some pairs in tokens; counts what a cut to max_length does to them.

    Texts are cut on the left, and a BOS stays, as in training.
    """
    texts = [
        pair.prompt + response for pair, _ in pairs for response in (pair.chosen, pair.rejected)
    ]
    rendered = [pair.rendered for pair, _ in pairs]
    ids, _ = encode(texts, tokenizer, UNCUT, [flag for flag in rendered for _ in range(2)])
    prompts, _ = encode([pair.prompt for pair, _ in pairs], tokenizer, UNCUT, rendered)
    room = max_length - len(tokenizer.bos)
    for i, (_, line) in enumerate(pairs):
        chosen, rejected, prompt = ids[2 * i], ids[2 * i + 1], len(prompts[i])
        longest = max(len(chosen), len(rejected))
        if longest > max_length:
            survey.count("truncated", line)
        is_same = np.array_equal(chosen, rejected)
        if not is_same and np.array_equal(chosen[-room:], rejected[-room:]) and longest > room:
            survey.count("equal when cut", line)
        if prompt > len(tokenizer.bos) and longest - prompt >= room:
            survey.count("prompt cut away", line)
        yield prompt, len(chosen) - prompt, len(rejected) - prompt
