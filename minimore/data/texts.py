"""Texts: the pairs of a file as people read them, where no model is needed.

Messages are written by the chat template of a tokenizer if there is one, else plainly, as turns of
`Human:` and `Assistant:`.
"""

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from ..model.tokenizer import Tokenizer
from .foreign.shapes import read_house_records, refuse_part_of_pair
from .forms import Pair, record_pairs
from .messages import PLAIN_TURNS
from .records import Record


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

    tokenizer: whose chat template writes messages. chat: strings are messages, too.
    """

    tokenizer: Tokenizer = PLAIN_TURNS
    chat: bool = False

    def records(self, path: str, unlabelled: Counter[str] | None = None) -> Iterator[ReadRecord]:
        """Every record of a file with its pairs. Raises InputError for what cannot be read.

        unlabelled: counts comparisons of a foreign shape that have no label, by reason.
        """
        left_out: Counter[str] = Counter() if unlabelled is None else unlabelled
        for where, record in read_house_records(path, left_out):
            yield ReadRecord(where, record, *self.pairs(record, where))

    def pairs(self, record: Record, where: str) -> tuple[list[Pair], int]:
        """The pairs of one record, and its label ties."""
        refuse_part_of_pair(record, where)
        return record_pairs(record, where, self.tokenizer, self.chat)

    def prompts(self, path: str) -> Iterator[str]:
        """The prompt of every pair of a file that has one."""
        for read in self.records(path):
            yield from (pair.prompt for pair in read.pairs if pair.prompt)
