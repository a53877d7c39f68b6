"""Comparisons: what a record of any shape is turned into, and the checked values it is made of.

A reader of a shape (readers.py, trees.py, rows.py) gives *items*: house records, as forms.py reads
them, and in their place `LeftOut` where a comparison has no label. Nothing else may happen to a
comparison: what a reader cannot understand is an InputError.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from ...options import require
from ..forms import MOST_RESPONSES, prompt_end
from ..messages import Messages, is_conversation, messages_of, shown, string_of
from ..records import Record

MOST_NUMBER = 1e300  # forms.py reads no larger score


class LeftOut(NamedTuple):
    """Comparisons of two responses that become no pair, and why.

    taste: the name of the file in which they would have been, if there are several.
    """

    reason: str
    comparisons: int = 1
    taste: str = ""


class Note(NamedTuple):
    """Something worth knowing that changes no comparison."""

    what: str


Item = Record | LeftOut | Note


# ---- from two or more responses to a house record ------------------------------------------------


def preferred(prompt: Any, two: Sequence[Any], first_is_better: bool | None) -> Record:
    """Two responses of which one is better, or neither (None): then they have equal scores.

    >>> preferred("P", ["a", "b"], False)
    {'prompt': 'P', 'chosen': 'b', 'rejected': 'a'}
    >>> preferred("P", ["a", "b"], None)
    {'prompt': 'P', 'responses': ['a', 'b'], 'scores': [0, 0]}
    """
    if first_is_better is None:
        return scored(prompt, list(two), [0, 0])
    chosen, rejected = two if first_is_better else reversed(two)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def voted(prompt: Any, two: Sequence[Any], votes: list[float]) -> Record:
    """Two responses with how many annotators prefer each; as many for both are a label tie.

    A tie has scores, not votes: nobody may take its first response for the better one.

    >>> voted("P", ["a", "b"], [1, 2])
    {'prompt': 'P', 'chosen': 'b', 'rejected': 'a', 'votes': [2, 1]}
    """
    if votes[0] == votes[1]:
        return scored(prompt, list(two), votes)
    record = preferred(prompt, two, votes[0] > votes[1])
    return record | {"votes": sorted(votes, reverse=True)}


def scored(prompt: Any, responses: list[Any], scores: list[float]) -> Record:
    """Several responses with a score each; the higher is the better."""
    return {"prompt": prompt, "responses": responses, "scores": scores}


def twos(responses: int) -> int:
    """How many comparisons of two there are among so many responses.

    >>> twos(4)
    6
    """
    return responses * (responses - 1) // 2


def apart(texts: Sequence[Any], where: str) -> tuple[Any, list[Any]]:
    """Whole texts, or whole conversations, as the prompt that they share and the rest of each.

    Texts are cut behind the last assistant mark that they share, conversations behind the last turn
    that they share. Raises InputError for conversations that begin differently.
    """
    if not any(map(is_conversation, texts)):
        strings = [string_of(text, where, "a text, or messages") for text in texts]
        end = prompt_end(strings)
        return strings[0][:end], [text[end:] for text in strings]
    conversations = [messages_of(text, where, None, "assistant") for text in texts]
    end = _shared_turns(conversations)
    require(
        end > 0 and all(len(turns) > end for turns in conversations),
        f"{where}: the conversations do not answer the same turns; expected one beginning for both",
    )
    return conversations[0][:end], [turns[end:] for turns in conversations]


def _shared_turns(conversations: Sequence[Messages]) -> int:
    """How many messages conversations share at their beginning, up to one that asks for an answer.

    It may be all messages of one of them.
    """
    shared = 0
    for turns in zip(*conversations):
        if any(turn != turns[0] for turn in turns):
            break
        shared += 1
    while shared and conversations[0][shared - 1]["role"] == "assistant":
        shared -= 1
    return shared


# ---- checked values ------------------------------------------------------------------------------


def value_of(record: Record, key: str, where: str) -> Any:
    """record[key], or an InputError that shows the keys that are there."""
    require(key in record, f'{where}: "{key}" is missing; found keys: {keys_of(record)}')
    return record[key]


def keys_of(record: Record) -> str:
    """The keys of a record, as an error shows them."""
    return ", ".join(map(str, record)) or "none"


def text_at(record: Record, key: str, where: str) -> str:
    """record[key] as a string that can be encoded."""
    return string_of(value_of(record, key, where), f'{where}: "{key}"')


def object_of(value: Any, where: str) -> Record:
    """A value that is a JSON object."""
    require(isinstance(value, dict), f"{where} is {shown(value)}; expected an object")
    return value


def list_of(value: Any, where: str, least: int = 1) -> list[Any]:
    """A value that is a list, neither too short nor longer than the responses to one prompt."""
    require(
        isinstance(value, list) and least <= len(value) <= MOST_RESPONSES,
        f"{where} is {shown(value)}; expected a list of {least} to {MOST_RESPONSES}",
    )
    return value


def number_of(value: Any, where: str) -> float:
    """A finite number; a string that is one will do, since every value of a CSV file is a string.

    >>> number_of("2", ""), number_of(2.5, "")
    (2, 2.5)
    """
    number = value
    if isinstance(value, str):
        number = _number_in(value)
    is_number = type(number) in (int, float) and abs(number) < MOST_NUMBER
    require(is_number, f"{where} is {shown(value)}; expected a number")
    return number


def _number_in(text: str) -> int | float | None:
    for kind in (int, float):
        try:
            return kind(text[:400])
        except ValueError:
            continue
    return None


def is_absent(value: Any) -> bool:
    """Whether nobody gave a label: null, or an empty field of a table."""
    return value is None or value == ""


def choice_at(record: Record, key: str, where: str, choices: Sequence[float]) -> float | None:
    """record[key], which is one of some numbers; None if nobody gave a label."""
    value = value_of(record, key, where)
    if is_absent(value):
        return None
    named = f'{where}: "{key}"'
    number = number_of(value, named)
    words = " or ".join(map(str, choices))
    require(number in choices, f"{named} is {shown(value)}; expected {words}")
    return number


def carried(record: Record, **names: str) -> Record:
    """Strings of a record that go along with its pairs, under the name that they have here."""
    return {
        name: record[key]
        for name, key in names.items()
        if isinstance(record.get(key), str) and record[key]
    }
