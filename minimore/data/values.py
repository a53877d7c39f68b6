"""Values: what a record holds under a key, checked, or one line that says what is wrong with it.

where: "file:line", and of a value its key, too; every error begins with it.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..options import InputError, require

MOST_NUMBER = 1e300  # a score is smaller
MOST_RESPONSES = 100  # to one prompt: they make up to 4,950 pairs


def shown(value: Any) -> str:
    """The beginning of a value, as an error shows it."""
    try:
        return json.dumps(value, ensure_ascii=False)[:60]
    except RecursionError:
        return f"a deeply nested {type(value).__name__}"
    except TypeError:  # from Python, not from a file of JSON
        return f"of type {type(value).__name__}"


def keys_of(record: Mapping[str, Any]) -> str:
    """The keys of a record, as an error shows them."""
    return ", ".join(map(str, record)) or "none"


def value_of(record: Mapping[str, Any], key: str, where: str) -> Any:
    """record[key], or an InputError that shows the keys that are there."""
    require(key in record, f'{where}: "{key}" is missing; found keys: {keys_of(record)}')
    return record[key]


def string_of(value: Any, where: str, expected: str = "a string") -> str:
    """A value that is a string and can be encoded; InputError for any other."""
    if not isinstance(value, str):
        raise InputError(f"{where} is {shown(value)}; expected {expected}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(
            f"{where} holds half of a surrogate pair; expected valid Unicode"
        ) from None
    return value


def text_at(record: Mapping[str, Any], key: str, where: str, expected: str = "a string") -> str:
    """record[key] as a string that can be encoded; InputError if it is none, or missing."""
    return string_of(value_of(record, key, where), f'{where}: "{key}"', expected)


def is_number(value: Any) -> bool:
    """Whether a value is a number; JSON's true and false are not.

    >>> is_number(1), is_number(True)
    (True, False)
    """
    return type(value) in (int, float)


def is_score(value: Any) -> bool:
    """Whether a value is a number that responses can be compared by: neither huge nor NaN."""
    return is_number(value) and abs(value) < MOST_NUMBER


# ---- values of files as others make them ---------------------------------------------------------


def object_of(value: Any, where: str) -> dict[str, Any]:
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
    """A value that is a score, or a string of one, since every value of a CSV file is a string.

    >>> number_of("2", ""), number_of(2.5, "")
    (2, 2.5)
    """
    number = value
    if isinstance(value, str):
        number = _number_in(value)
    require(is_score(number), f"{where} is {shown(value)}; expected a number")
    return number


def number_or_none(value: Any, where: str) -> float | None:
    """A score as `number_of` reads it; None if nobody gave one."""
    return None if is_absent(value) else number_of(value, where)


def grade_of(value: Any, where: str) -> float:
    """A score, or whether a response is good: true is 1, and false is 0.

    >>> grade_of(True, ""), grade_of("False", ""), grade_of(2.5, "")
    (1, 0, 2.5)
    """
    if isinstance(value, bool):
        return int(value)
    words = {"true": 1, "false": 0}  # as a table has them
    word = value.strip().lower() if isinstance(value, str) else ""
    return words[word] if word in words else number_of(value, where)


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


def choice_at(
    record: Mapping[str, Any], key: str, where: str, choices: Sequence[float]
) -> float | None:
    """record[key], which is one of some numbers; None if nobody gave a label."""
    value = value_of(record, key, where)
    if is_absent(value):
        return None
    named = f'{where}: "{key}"'
    number = number_of(value, named)
    words = " or ".join(map(str, choices))
    require(number in choices, f"{named} is {shown(value)}; expected {words}")
    return number
