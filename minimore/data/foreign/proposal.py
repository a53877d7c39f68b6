"""Proposal: the options that would name the fields of a file of no known shape.

It is made from names and from the values of the first records. A field that says which of two
responses is better is never proposed as a response.
"""

import re
import shlex
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any

from ..records import Record
from ..values import is_absent, shown
from .fields import FIRST, SECOND, TIES, is_name_of_field

RECORDS_LOOKED_AT = 50
SHORT = 30  # characters of a value that may be a label rather than a text

# Parts of names by which a part of a comparison is recognised.
LIKELY = {
    "prompt": ("prompt", "question", "query", "instruction", "context", "post", "input"),
    "chosen": ("chosen", "prefer", "accept", "better", "good", "win", "pos", "best"),
    "rejected": ("reject", "worse", "bad", "los", "neg", "worst"),
}
# Words of names that a field has which says which response is better.
LABELS = {"winner", "preference", "label", "labels", "choice", "verdict"}


def proposal(records: Sequence[Record]) -> str:
    """The options by which `data convert` would read a file, as far as its first records show it.

    Where names do not say which response is better, two fields with similar names are proposed as
    the first and the second response, and with them a field that may say which one is better. KEY
    stands for a name that only the user knows.
    """
    keys = list(records[0])
    texts = [key for key in keys if holds_texts(key, records)]
    prompt = likely("prompt", texts)
    others = [key for key in texts if key != prompt]
    chosen, rejected = likely("chosen", others), likely("rejected", others)
    names = {"chosen": chosen, "rejected": rejected}
    if chosen is None or rejected is None:
        chosen, rejected = two_alike(others)
        labels = [key for key in keys if is_label(key, records)]
        labels += [key for key in keys if holds_few_words(key, records)]
        label = next(iter(labels), None)  # a guess: `data convert` refuses it if its values misfit
        names = {"chosen": chosen, "rejected": rejected, "winner": label}
    if prompt is None:
        prompt = next((key for key in others if key not in names.values()), None)
    return " ".join(
        f"--{part}-field {'KEY' if key is None else shlex.quote(key)}"
        for part, key in ({"prompt": prompt} | names).items()
    )


def likely(part: str, keys: Iterable[str]) -> str | None:
    """The first key whose name holds a word for this part of a comparison."""
    return next((key for key in keys if any(word in key.lower() for word in LIKELY[part])), None)


def two_alike(keys: Sequence[str]) -> tuple[str | None, str | None]:
    """The first two names that differ in one character alone; None where there are none.

    >>> two_alike(["question", "answer_a", "answer_b"])
    ('answer_a', 'answer_b')
    """
    for one, other in combinations(keys, 2):
        if len(one) == len(other) and sum(a != b for a, b in zip(one, other)) == 1:
            return one, other
    return None, None


def is_label(key: str, records: Sequence[Record]) -> bool:
    """Whether a field says which response is better: by its name, or by all of its values."""
    is_named_so = not LABELS.isdisjoint(re.split("[^a-z]+", key.lower()))
    values = [record[key] for record in records if not is_absent(record.get(key))]
    return is_named_so or (bool(values) and all(names_a_response(v, records[0]) for v in values))


def names_a_response(value: Any, record: Record) -> bool:
    """Whether a value is a usual word for one of two responses, or the name of a field."""
    is_word = isinstance(value, str) and value.strip().lower() in (*FIRST, *SECOND, *TIES)
    return is_word or is_name_of_field(value, record)


def holds_texts(key: str, records: Sequence[Record]) -> bool:
    """Whether a field may hold prompts or responses: texts or messages, no label and no numbers."""
    values = [record.get(key) for record in records]
    if is_label(key, records) or holds_few_words(key, records):
        return False
    are_texts = all(isinstance(value, (str, list, dict)) for value in values)
    are_numbers = all(re.fullmatch(r'"[-+.\d]*"', shown(value)) for value in values)
    return are_texts and not are_numbers


def holds_few_words(key: str, records: Sequence[Record]) -> bool:
    """Whether a field has few values, all of them short strings: winners, say, or languages."""
    values = [record.get(key) for record in records]
    are_short = all(isinstance(value, str) and len(value) <= SHORT for value in values)
    return are_short and len(values) > 3 and 2 * len(set(values)) <= len(values)
