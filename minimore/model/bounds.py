"""How large a value of a chat template may be, and what its operations may ask for.

Much of what a template does is one call of C, which nothing can interrupt. So whatever could make
it long is refused before it begins: a list that would be endless if it were written out, a wide
field, many repetitions.
"""

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from jinja2.sandbox import SecurityError

LARGEST = 10**7  # characters of a text, and numbers that ask for such
ITEM = 10  # characters that an item of a list counts for
DEEPEST = 100  # lists in lists
WIDEST = 10**4  # characters of a field, or spaces of an indentation
MOST_KEYS = 10**4  # of a dictionary that is made at once: numbers as keys may all collide
LONGEST_SEARCH = 10**9  # characters of a text times those that are looked for from its end
LARGEST_NUMBER = 2.0**1000

VIEWS: Any = (type({}.keys()), type({}.values()), type({}.items()))
CONTAINERS: Any = (list, tuple, dict, set, frozenset, *VIEWS)

# Filters and methods whose numbers are lengths.
WIDE = (
    *("center", "ljust", "rjust", "zfill", "indent", "wordwrap", "expandtabs", "truncate"),
    *("tojson", "slice", "batch", "round"),
)
MULTIPLYING = ("indent", "wordwrap", "expandtabs")  # a text by an argument
SEARCHING = ("rfind", "rindex", "rsplit", "rpartition", "strip", "lstrip", "rstrip", "trim")
KEYED = ("dict", "fromkeys")
BINARY = ("encode", "to_bytes", "from_bytes")  # make or read what no text is


# ---- how large a value is ------------------------------------------------------------------------


class Measure(NamedTuple):
    """characters: of a value, written out. height: of what lies in it within each other."""

    characters: int
    height: int


def extent(value: Any) -> int:
    """The characters of a value, written out; an item counts for 10.

    What stands in two places counts twice, so a list that holds a list twice, thirty times over,
    is as large as it looks. Raises SecurityError for more than LARGEST, and for what is nested
    more than DEEPEST times: C compares, prints and hashes it without a pause.

    >>> extent("four"), extent(["four", [1, 2]]), extent(12)
    (4, 44, 0)
    """
    return measured([value], {}).characters - ITEM


def measured(container: Any, known: dict[int, Measure]) -> Measure:
    """How large a container is. known: what has been measured of it, by id: once is enough."""
    characters, height = ITEM * len(container), 1
    for part in parts_of(container):
        if isinstance(part, (str, bytes)):
            characters += len(part)
        elif isinstance(part, (*CONTAINERS, range)):
            if id(part) not in known:
                known[id(part)] = measured(part, known)
            characters += known[id(part)].characters
            height = max(height, 1 + known[id(part)].height)
    require_small(characters - ITEM)
    if height > DEEPEST:
        raise SecurityError(f"it nests lists more than {DEEPEST} times")
    return Measure(characters, height)


def parts_of(value: Any) -> list[Any]:
    """The values in a container, with the keys of a dictionary; nothing else has parts."""
    if isinstance(value, VIEWS):
        return parts_of(dict(value.mapping))
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    return list(value) if isinstance(value, CONTAINERS) else []


def size(value: Any) -> float:
    """How much of something a value stands for: its extent, or itself if it is a number."""
    return abs(value) if isinstance(value, (int, float)) else extent(value)


def longest(values: Iterable[Any]) -> int:
    """How many characters the longest value has; 0 for a number, and where there is no value."""
    return max((extent(value) for value in values), default=0)


# ---- what is refused -----------------------------------------------------------------------------


def require_small(*numbers: Any) -> None:
    """Refuse numbers above LARGEST."""
    for number in numbers:
        if isinstance(number, (int, float)) and abs(number) > LARGEST:
            raise SecurityError(f"it asks for more than {LARGEST:,} of something")


def require_small_result(operator: str, left: Any, right: Any) -> None:
    """Refuse left operator right where that is, or takes, too much."""
    are_numbers = isinstance(left, (int, float)) and isinstance(right, (int, float))
    if are_numbers and max(abs(left), abs(right)) > LARGEST_NUMBER:
        raise SecurityError("it computes with numbers of more than 300 digits")
    if operator == "**":
        require_small(left)
        require_small(size(right) * (LARGEST / 1000))  # so an exponent is at most 1000
    elif operator == "%" and isinstance(left, str):
        require_small_format(left, right)
    elif operator == "*" and not are_numbers:
        require_small(size(left) * size(right))
    elif operator == "+" and not are_numbers:
        require_small(size(left) + size(right))


def require_small_format(form: str, *values: Any) -> None:
    """Refuse a format with a very wide field, or whose fields together become too long."""
    named = [part for value in values for part in (parts_of(value) or [value])]
    widths: list[float] = [
        int(digits[:12]) for digits in re.findall(r"(?:%[^a-zA-Z%]*?|:[^{}]*?)(\d+)", form)
    ]
    if "*" in form or re.search(r":[^{}]*\{", form):  # a width may be a value
        widths += [part for part in named if isinstance(part, (int, float))]
    require_small(*widths)
    fields = form.count("%") + form.count("{")
    require_small(len(form) + fields * longest(named))


def require_bounded(name: str, *values: Any) -> None:
    """Refuse a filter or a method whose arguments ask for too much.

    values: what it is applied to, and its arguments.
    """
    if name in BINARY:
        raise SecurityError("it works with bytes; expected texts")
    first, others = (values[0], values[1:]) if values else (None, ())
    numbers = [abs(value) for value in others if isinstance(value, (int, float))]
    texts = [value for value in others if isinstance(value, str)]
    if name in WIDE:
        require_small(*(number * (LARGEST / WIDEST) for number in numbers))
    if name == "range":
        require_small(*values)
    elif name in ("format", "format_map") and isinstance(first, str):
        require_small_format(first, *others)
    elif name == "sum" and any(isinstance(value, CONTAINERS) for value in others):
        raise SecurityError("it adds up lists")  # which takes the square of their length
    elif name == "replace" and isinstance(first, str):
        old, new = (*texts, "", "")[:2]
        require_small(len(first) + first.count(old) * len(new))
    elif name == "translate" and isinstance(first, str):
        tables = [part for value in others for part in parts_of(value)]
        require_small(len(first) * max(1, longest(tables)))
    elif name == "join":
        parts = [value for value in values if not isinstance(value, str)]
        between = longest(value for value in values if isinstance(value, str))
        count = sum(len(part) for part in parts if hasattr(part, "__len__"))
        require_small(sum(map(extent, parts)) + count * between)
    elif name in MULTIPLYING:
        require_small(size(first) * max([1, *numbers, *map(len, texts)]))
    elif name == "tojson":
        separators = [part for value in others for part in parts_of(value)]
        require_small(extent(first) / ITEM * max([1, *numbers, *map(len, texts + separators)]))
    elif name in SEARCHING and isinstance(first, str):
        require_small(len(first) * longest(texts) * (LARGEST / LONGEST_SEARCH))
    elif name in KEYED:
        counts = [len(value) for value in values if hasattr(value, "__len__")]
        require_small(*(count * (LARGEST / MOST_KEYS) for count in counts))
    elif name == "int" and isinstance(first, str):
        require_small(len(first) * (LARGEST / 1000))  # so it has at most 1000 digits
