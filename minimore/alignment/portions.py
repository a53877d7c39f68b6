"""What survives a kill: the unfinished file of a command that writes portion by portion.

    line 1    what the result depends on: the options, the model, the input
    line 2..  the records, as they come

Every line begins with the checksum of all that was written up to it. So a reader notices a line
that is damaged, cut short or in another place, and stops in front of it.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from ..checksums import checksum
from ..files import locked, make_directory, to_disk
from ..options import InputError, require


class Line(NamedTuple):
    """What a line says, the checksum of all up to it, and where it ends, in bytes."""

    value: dict[str, Any]
    checksum: str
    end: int


@dataclass
class Unfinished:
    """An unfinished file. records: how many it holds. checksum: of all its lines."""

    path: Path
    records: int
    checksum: str

    def append(self, records: Sequence[dict[str, Any]]) -> None:
        """Add records and bring them to the disk."""
        so_far = self.checksum
        with open(self.path, "a", encoding="utf-8", newline="\n") as file:
            for record in records:
                text = json.dumps(record)
                so_far = checksum(text.encode(), so_far)
                file.write(f"{so_far} {text}\n")
            file.flush()
            os.fsync(file.fileno())
        self.records += len(records)
        self.checksum = so_far

    def stored(self) -> Iterator[dict[str, Any]]:
        """The records, in order; the line of the identity is none.

        Raises InputError behind the last one if some of those that were added are not there.
        """
        count = 0
        for line in islice(whole_lines(self.path), 1, None):
            count += 1
            yield line.value
        require(
            count == self.records,
            f"{self.path}: holds {count} whole records, but {self.records} were written; something"
            " else has changed it. Remove it to begin anew",
        )

    def remove(self) -> None:
        """Remove the file, as soon as the result is on the disk."""
        self.path.unlink()


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Within, no other process writes this unfinished file (InputError)."""
    make_directory(path.parent)
    with open(path, "ab"):  # there must be something to lock
        pass
    descriptor = locked(path, f"{path}: another process is writing it; wait for it, or stop it")
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def begin_or_continue(
    path: Path, identity: dict[str, Any], resume: bool, portion: int = 1
) -> Unfinished:
    """Begin an unfinished file, or continue the one that is there behind its last whole portion.

    identity: JSON of what the result depends on. portion: how many records belong together; a
    portion that was cut short will be written again, as a whole. Raises InputError for a file that
    was begun with another identity, and, unless resume, for one that is there at all.
    """
    if not is_begun(path):
        return _begun(path, identity)
    require(resume, f"{path}: is unfinished; continue it with --resume, or remove it to begin anew")
    return _continued(path, identity, portion)


def _begun(path: Path, identity: dict[str, Any]) -> Unfinished:
    path.write_bytes(b"")  # another file of this name would not have the lock of `alone`
    work = Unfinished(path, -1, checksum(b""))  # the identity that comes first is no record
    work.append([identity])
    to_disk(path.absolute().parent)
    return work


def _continued(path: Path, identity: dict[str, Any], portion: int) -> Unfinished:
    lines = whole_lines(path)
    first = next(lines, None)
    if first is None or first.value != identity:
        raise InputError(
            f"{path}: was begun with other options, another model or another input;"
            " give the same command again, or remove it"
        )
    last, records = first, 0
    for count, line in enumerate(lines, 1):
        if count % portion == 0:
            last, records = line, count
    cut_behind(path, last.end)
    return Unfinished(path, records, last.checksum)


def is_begun(path: Path) -> bool:
    """Whether a file is there and its first line came to the disk before a kill."""
    if not path.exists():
        return False
    with open(path, "rb") as file:
        return file.readline().endswith(b"\n")


def whole_lines(path: Path) -> Iterator[Line]:
    """The lines up to the first one that is damaged, cut short or in another place."""
    so_far, end = checksum(b""), 0
    with open(path, "rb") as file:
        for line in file:
            line_checksum, _, text = line.partition(b" ")
            so_far, end = checksum(text[:-1], so_far), end + len(line)
            if not text.endswith(b"\n") or line_checksum != so_far.encode():
                return
            yield Line(json.loads(text), so_far, end)


def cut_behind(path: Path, end: int) -> None:
    """Cut a file to so many bytes."""
    with open(path, "r+b") as file:
        file.truncate(end)
        file.flush()
        os.fsync(file.fileno())
