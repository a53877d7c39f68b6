"""Texts: the pairs of a file as people read them, where no model is needed.

Messages are written by the chat template of a tokenizer if there is one, else plainly, as turns of
`Human:` and `Assistant:`.
"""

import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from ..model.tokenizer import Tokenizer
from .foreign.shapes import read_house_records
from .forms import ASSISTANT, Pair, record_pairs
from .labels import AS_WRITTEN, LabelRules
from .records import Record

# What begins a turn of the human, in plain dialogues and in those of the template of many models.
HUMAN = re.compile(r"(?:^|\n)[^\S\n]*(?:## )?(?:Human|User):")


class PlainTurns(Tokenizer):
    """Stands in the place of a tokenizer where no model reads: messages become plain turns."""

    template: str | None = None
    markers: list[str] = []
    bos: list[int] = []

    def __init__(self) -> None:
        """It needs no files."""


class ReadRecord(NamedTuple):
    """One record of a file with the pairs that it makes.

    where: "file:line". label_ties: pairs that it does not make because their scores are equal.
    """

    where: str
    record: Record
    pairs: list[Pair]
    label_ties: int

    @property
    def line(self) -> int:
        """The line in its file, or the item of a list."""
        return int(self.where.rpartition(":")[2])


class Reading(NamedTuple):
    """How records become texts.

    tokenizer: whose chat template writes messages; None writes them plainly. chat: strings are
    messages, too.
    """

    tokenizer: Tokenizer | None = None
    chat: bool = False

    def records(self, path: str, unlabelled: Counter[str] | None = None) -> Iterator[ReadRecord]:
        """Every record of a file with its pairs. Raises InputError for what cannot be read.

        unlabelled: counts comparisons of a foreign shape that have no label, by reason.
        """
        left_out: Counter[str] = Counter() if unlabelled is None else unlabelled
        for where, record in read_house_records(path, left_out):
            yield ReadRecord(where, record, *self.pairs(record, where))

    def pairs(
        self, record: Record, where: str, rules: LabelRules = AS_WRITTEN
    ) -> tuple[list[Pair], int]:
        """The pairs of one record, and its label ties. rules: what is read of its labels."""
        return record_pairs(record, where, self.tokenizer or PlainTurns(), self.chat, rules)

    def prompts(self, path: str) -> Iterator[str]:
        """The prompt of every pair of a file that has one."""
        for read in self.records(path):
            yield from (pair.prompt for pair in read.pairs if pair.prompt)


def opening_of(prompt: str) -> str:
    """What the human says first in a dialogue; the whole prompt where it has no turns.

    >>> opening_of("\\n\\nHuman: Hi.\\n\\nAssistant: Hello!\\n\\nHuman: Bye.\\n\\nAssistant:")
    ' Hi.'
    >>> opening_of("Name a colour.")
    'Name a colour.'
    """
    begin = HUMAN.search(prompt)
    if begin is None:
        return prompt
    ends = [prompt.find(mark, begin.end()) for mark in ASSISTANT]
    end = min((end for end in ends if end >= 0), default=len(prompt))
    return prompt[begin.end() : end]
