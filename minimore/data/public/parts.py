"""Training and test part of a set that share no prompt, and samples of them.

A prompt is compared without the case of its letters and its white space. Where a set has no split
of its own, about one opening in twenty goes to the test part, with all that was said behind it:
what comes after the same first turn never is on both sides.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np

from ...options import require
from ..dialogues import ASSISTANT
from ..foreign.convert import Rules, Tally, converted
from ..foreign.trees import TreeRules
from ..messages import is_conversation, messages_of
from ..prompts import as_bytes, normalised
from ..records import Record
from .changes import Input
from .sources import File, PublicSet

SHARED = "training pairs whose prompt is a test prompt"
TEST_SHARE = 0.05  # of the openings; the paper's test sets are about as large a share

Part = Callable[[], Iterator[Record]]  # the house records of a part, from the beginning again


# ---- what a record says --------------------------------------------------------------------------


def prompt_text(prompt: Any) -> str:
    """A prompt as a text, also if it is messages."""
    if not is_conversation(prompt):
        return str(prompt)
    messages = messages_of(prompt, "prompt", None, "user")
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)


def up_to_first_reply(prompt: Any) -> str:
    """The opening of a dialogue as it is written: all that stands before the first reply.

    >>> up_to_first_reply("\\n\\nHuman: hi\\n\\nAssistant: yes\\n\\nHuman: why?\\n\\nAssistant:")
    '\\n\\nHuman: hi'
    """
    if is_conversation(prompt):
        messages = messages_of(prompt, "prompt", None, "user")
        roles = [message["role"] for message in messages]
        return prompt_text(
            messages[: roles.index("assistant")] if "assistant" in roles else messages
        )
    text = str(prompt)
    return text[: min((text.find(mark) for mark in ASSISTANT if mark in text), default=len(text))]


def key_of(text: str) -> bytes:
    """Sixteen bytes that stand for a text, whatever the case of its letters and its white space."""
    return hashlib.sha256(as_bytes(normalised(text))).digest()[:16]


def prompt_key(record: Record) -> bytes:
    """The key of a record's prompt."""
    return key_of(prompt_text(record["prompt"]))


def is_test(record: Record) -> bool:
    """Whether a record of a set without a split belongs to its test part."""
    key = key_of(up_to_first_reply(record["prompt"]))
    return int.from_bytes(key[:8], "big") < TEST_SHARE * 2**64


# ---- pairs ---------------------------------------------------------------------------------------


def single_pairs(record: Record) -> tuple[list[Record], int]:
    """A converted record as records of one pair each, and how many label ties it has."""
    if "chosen" in record:
        return [record], 0
    rest = {key: value for key, value in record.items() if key not in ("responses", "scores")}
    pairs, ties = [], 0
    for one, other in combinations(zip(record["scores"], record["responses"]), 2):
        if one[0] == other[0]:
            ties += 1
            continue
        better, worse = (one, other) if one[0] > other[0] else (other, one)
        pairs.append(rest | {"chosen": better[1], "rejected": worse[1]})
    return pairs, ties


class Counts:
    """What a file holds. ties: pairs whose responses have the same score. prompts: their keys."""

    def __init__(self) -> None:
        self.records = self.pairs = self.ties = 0
        self.prompts: set[bytes] = set()

    def add(self, record: Record) -> None:
        """Count a record of the file."""
        pairs, ties = single_pairs(record)
        self.records += 1
        self.pairs += len(pairs)
        self.ties += ties
        self.prompts.add(prompt_key(record))


# ---- from the files of a set to its parts --------------------------------------------------------


@dataclass
class Conversion:
    """The records of a set as pairs: its test part and its training part, as often as asked for.

    The test part comes first: the training part leaves out its prompts, so it is refused before the
    test part was read to its end. tallies: by file, what its last conversion read and left out.
    test_prompts: their keys, None until then. shared: the training pairs that were left out for
    their prompts.
    """

    public_set: PublicSet
    inputs: Sequence[Input]
    tallies: dict[str, Tally] = field(default_factory=dict)
    test_prompts: set[bytes] | None = None
    shared: int = 0

    def test(self) -> Iterator[Record]:
        """The records of the test files, or those of some openings of all files."""
        has_parts = bool(self.public_set.test)
        prompts = set()
        for record in self._records(self.public_set.test or self.public_set.train):
            if has_parts or is_test(record):
                prompts.add(prompt_key(record))
                yield record
        self.test_prompts = prompts

    def train(self) -> Iterator[Record]:
        """The other records, without those whose prompt the test part has.

        Raises RuntimeError before the test part was read to its end.
        """
        if self.test_prompts is None:
            raise RuntimeError("read all of test() first: train() leaves out its prompts")
        self.shared = 0
        has_parts = bool(self.public_set.test)
        for record in self._records(self.public_set.train):
            if not has_parts and is_test(record):
                continue
            if prompt_key(record) in self.test_prompts:
                self.shared += len(single_pairs(record)[0])
                continue
            yield record

    @property
    def records(self) -> dict[str, int]:
        """How many records every file holds that was converted."""
        return {path: tally.records for path, tally in self.tallies.items()}

    @property
    def left_out(self) -> dict[str, int]:
        """The comparisons that are in no part, by reason."""
        total = Counter({SHARED: self.shared})
        for tally in self.tallies.values():
            for name, counts in tally.files.items():
                taste = name.rpartition(".")[2]  # file_of names a file SPLIT.TASTE
                if self.public_set.taste in (None, taste):
                    total += counts.left_out
        return dict(sorted(total.items()))

    def _records(self, files: Sequence[File]) -> Iterator[Record]:
        """House records of some files, of the set's taste and languages."""
        rules = Rules(TreeRules(languages=self.public_set.languages))
        for here in self.inputs:
            if here.file not in files:
                continue
            tally = self.tallies[here.file.path] = Tally()
            for _, record in converted(str(here.path), self.public_set.shape, rules, tally):
                taste = record.pop("taste", None)
                if taste == self.public_set.taste:
                    yield record


# ---- samples -------------------------------------------------------------------------------------


def sampled(part: Part, count: int, seed: int, may_repeat: bool) -> Iterator[Record]:
    """So many pairs of a part, in its order; a pair that is taken twice stands there twice.

    A larger part is sampled by prompts: whole prompts in a random order until there are enough
    pairs, the last prompt cut. A smaller one is taken as often as it fits in, and the rest is
    sampled. Raises InputError if there are too few and none may be repeated.
    """
    keys = [prompt_key(pair) for pair in pairs_of(part())]
    require(keys, "no pairs that could be sampled")
    require(
        may_repeat or count <= len(keys),
        f"--test-pairs {count}: there are {len(keys)} test pairs; expected at most as many",
    )
    copies = copies_of_pairs(keys, count, np.random.default_rng(seed))
    for pair, times in zip(pairs_of(part()), copies):
        for _ in range(times):
            yield pair


def pairs_of(records: Iterable[Record]) -> Iterator[Record]:
    """The records of one pair each that records hold."""
    for record in records:
        yield from single_pairs(record)[0]


def copies_of_pairs(keys: list[bytes], count: int, random: np.random.Generator) -> np.ndarray:
    """How often every pair is taken, `count` times in all. keys: its prompt's. (pairs,)"""
    rounds, rest = divmod(count, len(keys))
    place_of = {key: place for place, key in enumerate(dict.fromkeys(keys))}
    prompts = np.array([place_of[key] for key in keys])
    turns = random.permutation(len(place_of))  # of the prompts
    # Whole prompts, by their turn; lexsort sorts by its last key first.
    order = np.lexsort((random.random(len(keys)), turns[prompts]))
    copies = np.full(len(keys), rounds)
    copies[order[:rest]] += 1
    return copies
