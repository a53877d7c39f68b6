"""A survey: everything that is counted of a file of pairs in one pass, pair by pair.

It holds some numbers of every pair and 256 bytes of every prompt, but texts of a sample only.

N pairs, G prompts.
"""

import hashlib
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
from ..overlap import normalised, prompt_hash
from ..pairs import CHARACTERS_AT_ONCE, encode
from ..records import Record
from ..texts import Reading, ReadRecord
from .near_duplicates import BINS, near_copies, signature
from .signs import signs_of

LINES_SHOWN = 5
SAMPLE = 10_000  # pairs of which the texts are kept
MOST_SIGNED = 200_000  # prompts that are compared for near duplicates
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
    response, in `unit`. longer: characters of the chosen response minus the rejected one's.
    prompts: of every pair, the number of its prompt.

    unlabelled: comparisons of a foreign shape that have no label, by reason. first_wins: of records
    with the scores of two responses, how many there are and how many prefer the first. agreement:
    of every pair with votes, the share of them on the larger side.
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
    longer: array = field(default_factory=lambda: array("q"))
    prompts: array = field(default_factory=lambda: array("q"))
    number_of: dict[int, int] = field(default_factory=dict)  # of a prompt, by its hash
    signed: list[np.ndarray] = field(default_factory=list)  # signatures of different prompts
    signed_lines: array = field(default_factory=lambda: array("q"))
    signed_hashes: array = field(default_factory=lambda: array("q"))
    line_of: dict[int, int] = field(default_factory=dict)  # of a pair, by its hash
    sides: tuple[Counter[int], Counter[int]] = field(
        default_factory=lambda: (Counter(), Counter())
    )  # how often a response is chosen and rejected, by its hash
    first_wins: list[int] = field(default_factory=lambda: [0, 0])
    agreement: array = field(default_factory=lambda: array("d"))
    sample: EvenSample = field(default_factory=lambda: EvenSample(SAMPLE))

    @property
    def name(self) -> str:
        """The name of the file."""
        return Path(self.path).name

    @property
    def pairs(self) -> int:
        """How many pairs there are."""
        return len(self.longer)

    def count(self, name: str, line: int) -> None:
        """Count a sign or a fault in a line."""
        self.counts.setdefault(name, Count()).add(line)

    def signatures(self) -> np.ndarray:
        """The signatures of different prompts: (G, 64)."""
        return np.array(self.signed, dtype=np.uint32).reshape(-1, BINS)


def survey_of(path: str, tokenizer: Tokenizer | None, max_length: int, chat: bool) -> Survey:
    """Read a file once and count. Raises InputError for what cannot be read.

    tokenizer: of the model that is to read the file, if one is known; without it, lengths are in
    characters, and what truncation does is not asked.
    """
    unit = "characters" if tokenizer is None else "tokens"
    survey = Survey(path, unit, None if tokenizer is None else max_length)
    records = Reading(tokenizer, chat).records(path, survey.unlabelled)
    for some in in_portions(records):
        for read in some:
            count_record(survey, read)
            for pair in read.pairs:
                count_pair(survey, pair, read.line, tokenizer)
        pairs = [(pair, read.line) for read in some for pair in read.pairs]
        if tokenizer is None:
            add_lengths(survey, [tuple(map(len, pair[:3])) for pair, _ in pairs])
        else:
            add_lengths(survey, count_tokens(survey, pairs, tokenizer, max_length))
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
        survey.first_wins[0] += 1
        survey.first_wins[1] += scores[0] > scores[1]
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
    return scores if isinstance(scores, list) and are_numbers(scores) else []


def are_numbers(values: Iterable[object]) -> bool:
    """Whether all values are numbers."""
    return all(type(value) in (int, float) for value in values)


# ---- of a pair -----------------------------------------------------------------------------------


def count_pair(survey: Survey, pair: Pair, line: int, tokenizer: Tokenizer | None) -> None:
    """Count the signs of a pair, and what it has in common with those before it."""
    for sign in signs_of(pair, tokenizer):
        survey.count(sign, line)
    prompt, chosen, rejected = map(normalised, pair[:3])
    count_repeats(
        survey, hash_of(prompt, chosen, rejected), hash_of(prompt, rejected, chosen), line
    )
    for side, response in zip(survey.sides, (chosen, rejected)):
        if response:
            side[hash_of(response)] += 1
    survey.longer.append(len(pair.chosen) - len(pair.rejected))
    survey.prompts.append(number_of_prompt(survey, pair.prompt, prompt, line))
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


def number_of_prompt(survey: Survey, prompt: str, normalised_prompt: str, line: int) -> int:
    """The number of a prompt; a new one is signed. A pair without a prompt has a number alone."""
    if not normalised_prompt:
        return -1 - survey.pairs
    key = prompt_hash(prompt)
    if key in survey.number_of:
        return survey.number_of[key]
    survey.number_of[key] = len(survey.number_of)
    own = signature(normalised_prompt) if len(survey.signed) < MOST_SIGNED else None
    if own is not None:
        survey.signed.append(own)
        survey.signed_lines.append(line)
        survey.signed_hashes.append(key)
    return survey.number_of[key]


def hash_of(*texts: str) -> int:
    """Eight bytes of BLAKE2b of some texts."""
    data = "\0".join(texts).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def count_near_copies(survey: Survey) -> None:
    """Count the different prompts that are near duplicates of one before them."""
    for place in near_copies(survey.signatures()).place:
        survey.count("near duplicates", survey.signed_lines[place])


# ---- lengths -------------------------------------------------------------------------------------


def add_lengths(survey: Survey, lengths: Iterable[tuple[int, ...]]) -> None:
    """Keep the lengths of prompt, chosen and rejected response of some pairs."""
    for of_pair in lengths:
        for column, length in zip(survey.lengths, of_pair):
            column.append(length)


def count_tokens(
    survey: Survey, pairs: list[tuple[Pair, int]], tokenizer: Tokenizer, max_length: int
) -> Iterator[tuple[int, int, int]]:
    """The lengths of some pairs in tokens; counts what a cut to max_length does to them.

    Texts are cut on the left, and a BOS stays, as in training.
    """
    texts = [
        text for pair, _ in pairs for text in (pair.prompt + pair.chosen, pair.prompt + pair[2])
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
