"""Records: files of JSON lines, of one JSON list, and directories of them, read object by object.

Every error names the file, the line and what was found there. What the keys of an object mean is
told in forms.py.
"""

import gzip
import json
import os
import re
import zlib
from codecs import getincrementaldecoder
from collections.abc import Generator, Iterator, Sequence
from functools import partial
from typing import Any, BinaryIO

from ..checksums import CHECKSUMS, require_records_as_written
from ..files import refuse_pointer
from ..options import InputError, require

LONGEST_LINE = 8_000_000  # bytes; and characters of an item of a list, or of a row of a table
MOST_BLANK_LINES = 1_000_000
READ_AT_ONCE = 1 << 20  # bytes of a file that is one JSON list
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
DATA_FILES = (".jsonl", ".jsonl.gz", ".json", ".json.gz")
TEXT_TABLES = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
PARQUET = ".parquet"
TABLES = (*TEXT_TABLES, PARQUET)
CONVERTED = "converted.json"  # says of a directory what `minimore data convert` wrote there

Record = dict[str, Any]


def read_records(path: str) -> Generator[tuple[str, Record], None, None]:
    """("file:line", object) for each line of a JSON lines file, plain or .gz.

    Blank lines are passed over. A file that begins with [ is one JSON list, and "file:item" is
    yielded. A directory stands for the data files in it, in order of name. Raises InputError, which
    names file and line, for anything that is not UTF-8 JSON objects, and for a file that we wrote
    and that was changed.
    """
    if os.path.isdir(path):
        for file_path in data_files(path):
            yield from read_records(file_path)
        return
    require(
        not str(path).lower().endswith(TABLES),
        f"{path}: is a table; expected JSON lines, which `minimore data convert` makes of it",
    )
    line = blank_lines = 0
    try:
        refuse_pointer(path)
        require_records_as_written(path)
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rb") as file:
            for line, raw in enumerate(iter(partial(file.readline, LONGEST_LINE + 1), b""), 1):
                if line == 1 and raw.removeprefix(BYTE_ORDER_MARK).lstrip().startswith(b"["):
                    yield from ListReader(path, raw, file).items()
                    return
                where = f"{path}:{line}"
                require(len(raw) <= LONGEST_LINE, too_large(where, "a line"))
                text = raw.decode("utf-8-sig" if line == 1 else "utf-8")
                if text.strip():
                    yield where, _object(_parse(text, where, "one object a line"), where)
                    continue
                blank_lines += 1
                require(blank_lines <= MOST_BLANK_LINES, too_many_blank(where))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}:{line}: not UTF-8 ({error.reason} at byte {error.start})"
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None


def data_files(directory: str, kinds: tuple[str, ...] = DATA_FILES) -> list[str]:
    """The data files of a directory, in order of name. kinds: endings of those that can be read.

    Refused are training and test files in one directory, and files of data that would not be read:
    tables beside JSON, say, which may hold the same records.
    """
    listed = sorted(name for name in os.listdir(directory) if name != CHECKSUMS)
    require(
        "config.json" not in listed,
        f"{directory}: is a run or a checkpoint (it has config.json), not data; expected pairs",
    )
    names = [name for name in listed if name.endswith(DATA_FILES)]
    tables = [name for name in listed if name.lower().endswith(TABLES)]
    require(
        not names or not tables,
        f"{directory}: holds {some_of([*tables[:1], *names])}, tables and JSON; name the files",
    )
    names = names or [name for name in tables if name.lower().endswith(kinds)]
    for name in names:
        path = os.path.join(directory, name)
        require(
            os.path.isfile(path), f"{path}: no file that can be read; remove it, or name the others"
        )
    is_converted = CONVERTED in names
    names = [name for name in names if name != CONVERTED]
    require(names, f"{directory}: a directory without a file of data; expected {', '.join(kinds)}")
    words = {word for name in names for word in re.split(r"[^a-z]+", name.lower())}
    require(
        not {"train", "test"} <= words,
        f"{directory}: holds training and test files ({some_of(names)}); name the files",
    )
    require(
        not is_converted or len(names) == 1,
        f"{directory}: holds several splits or tastes ({some_of(names)}); name the files",
    )
    return [os.path.join(directory, name) for name in names]


def some_of(names: Sequence[str], most: int = 4) -> str:
    """The first of some names, as a message shows them.

    >>> some_of("abcde"), some_of("abc")
    ('a, b, c, d, ...', 'a, b, c')
    """
    return ", ".join([*names[:most], *(["..."] if len(names) > most else [])])


def too_large(where: str, what: str) -> str:
    """What is said of a line that is longer than it may be."""
    return f"{where}: {what} of more than {LONGEST_LINE / 1e6:,.0f} million bytes"


def too_many_blank(where: str) -> str:
    """What is said of a file that is mostly blank lines: a small file of .gz may hold billions."""
    return f"{where}: more than {MOST_BLANK_LINES:,} blank lines; expected records"


def _parse(text: str, where: str, expected: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_without_repeats)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error}); expected {expected}") from None


def _without_repeats(pairs: list[tuple[str, Any]]) -> Record:
    """The keys and values of an object. Raises InputError for a key that stands there twice."""
    record = dict(pairs)
    if len(record) == len(pairs):
        return record
    seen: set[str] = set()
    for key, _ in pairs:
        require(key not in seen, f'"{key}" stands twice in one object; expected every key once')
        seen.add(key)
    return record


class ListReader:
    """The items of a file that is one JSON list; a part of the file is in memory at a time.

    first: the bytes of the file that were read already.
    """

    def __init__(self, path: str, first: bytes, file: BinaryIO | gzip.GzipFile):
        self.path, self.file = path, file
        self.decoder = getincrementaldecoder("utf-8-sig")()
        self.json = json.JSONDecoder(object_pairs_hook=_without_repeats)
        self.text, self.place, self.is_whole = self.decoder.decode(first), 0, False

    def items(self) -> Iterator[tuple[str, Record]]:
        """("file:item", object) for each item. Raises InputError for what is no list."""
        self._take("[")
        item = 0
        while self._next() != "]":
            item += 1
            where = f"{self.path}:{item}"
            if item > 1:
                self._take(",", where)
            yield where, _object(self._value(where), where)
        self._take("]")
        require(
            not self._next(),
            f"{self.path}: goes on behind its list; expected one list, or one object a line",
        )

    def _next(self) -> str:
        """The next character that is no white space; "" at the end of the file."""
        while True:
            length = len(self.text)
            while self.place < length and self.text[self.place] in " \t\r\n":
                self.place += 1
            if self.place < length or self.is_whole:
                return self.text[self.place : self.place + 1]
            self._read_on()

    def _take(self, mark: str, where: str | None = None) -> None:
        character = self._next()
        require(
            character == mark,
            f"{where or self.path}: not JSON ({character!r} instead of {mark!r}); expected a list"
            " of objects, or one object a line",
        )
        self.place += 1

    def _value(self, where: str) -> Any:
        """The value that comes next; more is read until it is whole."""
        self._next()
        while True:
            try:
                value, end = self.json.raw_decode(self.text, self.place)
            except InputError as error:
                raise InputError(f"{where}: {error}") from None
            except (ValueError, RecursionError) as error:
                reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
                require(
                    not self.is_whole and not isinstance(error, RecursionError),
                    f"{where}: not JSON ({reason}); expected an object",
                )
            else:
                if end < len(self.text) or self.is_whole:  # else a number may go on
                    self.place = end
                    return value
            require(len(self.text) - self.place <= LONGEST_LINE, too_large(where, "an item"))
            self._read_on()

    def _read_on(self) -> None:
        """Forget what was used, and read more: at least as much as is still unused.

        So the text doubles while an item is not whole, and a long item takes linear time.
        """
        self.text = self.text[self.place :]
        part = self.file.read(max(READ_AT_ONCE, len(self.text)))
        self.text += self.decoder.decode(part, final=not part)
        self.place, self.is_whole = 0, not part


def _object(value: Any, where: str) -> Record:
    require(isinstance(value, dict), f"{where}: a JSON {type(value).__name__}; expected an object")
    return value


def json_line(record: Record, where: str) -> str:
    """A record as JSON; escapes only where UTF-8 has no bytes for half of a surrogate pair."""
    try:
        text = json.dumps(record, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise InputError(f"{where}: holds a number that is not finite; expected JSON") from None
    except TypeError as error:  # of a table: a date, say
        raise InputError(f"{where}: cannot be written as JSON ({error})") from None
    has_bytes = text.encode("utf-8", "replace").decode() == text
    return text if has_bytes else json.dumps(record)
