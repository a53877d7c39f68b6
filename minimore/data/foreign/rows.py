"""Rows: files in which every row is one response, compared with the others to the same prompt."""

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from ...options import require
from ..records import Record
from ..values import MOST_RESPONSES, grade_of, is_absent, value_of
from .comparisons import Item, Note, rated

# What HelpSteer and HelpSteer2 rate, from 0 to 4; each is a taste.
ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")


class Keys(NamedTuple):
    """Under which keys a row has its prompt, its response and its scores.

    scores: of several, each is a taste.
    """

    prompt: str
    response: str
    scores: tuple[str, ...]


# By the names of shapes (shapes.py).
KEYS_OF = {
    "helpsteer": Keys("prompt", "response", ATTRIBUTES),
    "unpaired": Keys("prompt", "completion", ("label",)),  # true or false: good or not
}


def items_of_rows(located: Iterable[tuple[str, Record]], keys: Keys) -> Iterator[tuple[str, Item]]:
    """("file:line", comparisons) of the rows of every prompt; those of a file are in memory.

    The line is that of the prompt's first row.
    """
    groups: dict[str, list[tuple[str, Record]]] = {}
    for where, record in located:
        values = {key: value_of(record, key, where) for key in (keys.prompt, keys.response)}
        for key in keys.scores:
            score = value_of(record, key, where)
            named = f'{where}: "{key}"'
            values[key] = None if is_absent(score) else grade_of(score, named)
        prompt = json.dumps(values[keys.prompt])
        rows = groups.setdefault(prompt, [])
        rows.append((where, values))
        require(
            len(rows) <= MOST_RESPONSES,
            f"{where}: the prompt has more than {MOST_RESPONSES} responses, the first in"
            f" {rows[0][0]}; expected at most so many",
        )
    for rows in groups.values():
        yield from _items_of_prompt(rows, keys)


def _items_of_prompt(rows: Sequence[tuple[str, Record]], keys: Keys) -> Iterator[tuple[str, Item]]:
    """The comparisons of the rows of one prompt, by every score."""
    where, first = rows[0]
    if len(rows) == 1:
        yield where, Note("prompts with a single response, which is compared with none")
    responses = [row[keys.response] for _, row in rows]
    for key in keys.scores:
        scores = [row[key] for _, row in rows]
        taste = {"taste": key} if len(keys.scores) > 1 else {}
        for item in rated(first[keys.prompt], responses, scores, "no score", **taste):
            yield where, item
