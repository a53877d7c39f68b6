"""Records: files of JSON lines, of one JSON list, and directories of them, read object by object.

Every error names the file, the line and what was found there. What the keys of an object mean is
told in forms.py.
"""

import gzip
import json
import os
import re
import zlib
from collections.abc import Generator, Iterator
from functools import partial
from typing import Any

from ..files import refuse_pointer
from ..options import InputError, require

LONGEST_LINE = 8_000_000  # bytes
LARGEST_LIST = 200_000_000  # bytes of a file that is one JSON list
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
DATA_FILES = (".jsonl", ".jsonl.gz", ".json", ".json.gz")
CONVERTED = "converted.json"  # says of a directory what `minimore data convert` wrote there

Record = dict[str, Any]


def read_records(path: str) -> Generator[tuple[str, Record], None, None]:
    """("file:line", object) for each line of a JSON lines file, plain or .gz.

    Blank lines are passed over. A file that begins with [ is one JSON list, and "file:item" is
    yielded. A directory stands for the data files in it, in order of name. Raises InputError, which
    names file and line, for anything that is not UTF-8 JSON objects.
    """
    if os.path.isdir(path):
        for file_path in _data_files(path):
            yield from read_records(file_path)
        return
    line = 0
    try:
        refuse_pointer(path)
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rb") as file:
            for line, raw in enumerate(iter(partial(file.readline, LONGEST_LINE + 1), b""), 1):
                if line == 1 and raw.removeprefix(BYTE_ORDER_MARK).lstrip().startswith(b"["):
                    raw += file.read(LARGEST_LIST)
                    require(len(raw) <= LARGEST_LIST, too_large(path, "a list", LARGEST_LIST))
                    yield from _list_items(raw.decode("utf-8-sig"), path)
                    return
                require(
                    len(raw) <= LONGEST_LINE, too_large(f"{path}:{line}", "a line", LONGEST_LINE)
                )
                text = raw.decode("utf-8-sig" if line == 1 else "utf-8")
                if text.strip():
                    where = f"{path}:{line}"
                    yield where, _object(_parse(text, where, "one object a line"), where)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}:{line}: not UTF-8 ({error.reason} at byte {error.start})"
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None


def _data_files(directory: str) -> list[str]:
    """The data files of a directory. Training and test files in one directory are refused."""
    names = sorted(
        name
        for name in os.listdir(directory)
        if name.endswith(DATA_FILES) and os.path.isfile(os.path.join(directory, name))
    )
    is_converted = CONVERTED in names
    names = [name for name in names if name != CONVERTED]
    require(names, f"{directory}: a directory without a .jsonl or .json file (.gz too)")
    words = {word for name in names for word in re.split(r"[^a-z]+", name.lower())}
    require(
        not {"train", "test"} <= words,
        f"{directory}: holds training and test files ({', '.join(names[:4])}); name the files",
    )
    require(
        not is_converted or len(names) == 1,
        f"{directory}: holds several splits or tastes ({', '.join(names[:4])}); name the files",
    )
    return [os.path.join(directory, name) for name in names]


def too_large(where: str, what: str, most: int) -> str:
    """What is said of a line, or of a list, that is longer than it may be."""
    return f"{where}: {what} of more than {most / 1e6:,.0f} million bytes; expected JSON lines"


def _list_items(text: str, path: str) -> Iterator[tuple[str, Record]]:
    """The objects of a JSON list, decoded one by one: all at once, they may need 25 times its size.

    An object of more than LONGEST_LINE characters is refused.
    """
    place, number = _behind_space(text, text.index("[") + 1), 0
    is_open = text[place : place + 1] != "]"
    window = Window(text, place)
    while is_open:
        number += 1
        where = f"{path}:{number}"
        value, place = window.decoded(place, where)
        yield where, _object(value, where)
        place = _behind_space(text, place)
        is_open = text[place : place + 1] == ","
        place = _behind_space(text, place + 1) if is_open else place
    is_closed = text[place : place + 1] == "]" and _behind_space(text, place + 1) == len(text)
    require(
        is_closed,
        f"{path}: not JSON behind item {number}; expected a list of objects, or one object a line",
    )


class Window:
    """The part of a long text in which items are decoded, so that none is longer than it.

    start: where it begins in the text.
    """

    def __init__(self, text: str, start: int):
        self.text, self.start, self.decoder = text, start, json.JSONDecoder()
        self.part = text[start : start + 2 * LONGEST_LINE]

    def decoded(self, place: int, where: str) -> tuple[Any, int]:
        """The value that begins at a place of the text, and where it ends."""
        if place - self.start > LONGEST_LINE:
            self.start, self.part = place, self.text[place : place + 2 * LONGEST_LINE]
        try:
            value, end = self.decoder.raw_decode(self.part, place - self.start)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", error)
            if self.start + len(self.part) < len(self.text):
                reason = f"{reason}, or longer than {LONGEST_LINE / 1e6:,.0f} million characters"
            raise InputError(
                f"{where}: not JSON ({reason}); expected a list of objects, or one object a line"
            ) from None
        return value, self.start + end


def _behind_space(text: str, place: int) -> int:
    """The next place of a text that is no white space."""
    while text[place : place + 1] in (" ", "\t", "\n", "\r"):
        place += 1
    return place


def _parse(text: str, where: str, expected: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error}); expected {expected}") from None


def _object(value: Any, where: str) -> Record:
    require(isinstance(value, dict), f"{where}: a JSON {type(value).__name__}; expected an object")
    return value


def json_line(record: Record, where: str) -> str:
    """A record as JSON; escapes only where UTF-8 has no bytes for half of a surrogate pair."""
    try:
        text = json.dumps(record, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise InputError(f"{where}: holds a number that is not finite; expected JSON") from None
    has_bytes = text.encode("utf-8", "replace").decode() == text
    return text if has_bytes else json.dumps(record)
