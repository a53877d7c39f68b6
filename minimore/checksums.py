"""Whether a file is as it was written.

Whatever we write and read again has a checksum: a safetensors file in its header
(model/tensors.py), a JSON file as its last key, a file of records beside it (scores.jsonl.crc32),
the other files of a directory in checksums.json, the log of a run in its saved states. Standard
library only.
"""

import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from .files import as_text, read_json, write_json, write_text, written_whole
from .options import InputError, require

CHECKSUM = "crc32"  # the key of a file's own checksum
CHECKSUMS = "checksums.json"  # the checksums of other files of a directory
BESIDE = ".crc32"  # what is added to a file's name for the file that holds its checksum
LONGEST_NAME = 255  # bytes, in most file systems
OUR_END = re.compile(rb'"crc32"\s*:\s*"[0-9a-f]{8}"\s*}\s*$')  # of a checksums.json


def checksum(data: bytes | memoryview, before: str = "0") -> str:
    """CRC-32 of some bytes, in 8 hexadecimal digits; before: that of the bytes in front of them.

    It finds every flipped bit. It is no protection against somebody who wants to deceive.

    >>> checksum(b"123456789"), checksum(b"6789", checksum(b"12345"))
    ('cbf43926', 'cbf43926')
    """
    return f"{zlib.crc32(data, int(before, 16)):08x}"


def file_checksum(path: Path) -> str:
    """CRC-32 of a file, in 8 hexadecimal digits."""
    result = checksum(b"")
    with open(path, "rb") as file:
        while part := file.read(1 << 24):
            result = checksum(part, result)
    return result


# ---- one JSON object -----------------------------------------------------------------------------


def write_checked_json(path: str | Path, value: dict[str, Any]) -> None:
    """Write a JSON object with a checksum of all its other keys as its last key."""
    write_json(path, value | {CHECKSUM: checksum(as_text(value).encode())})


def read_checked_json(path: str | Path) -> dict[str, Any]:
    """Read what `write_checked_json` wrote. Raises InputError for anything else."""
    value = read_json(path)
    stored = value.pop(CHECKSUM, None)
    try:
        expected = checksum(as_text(value).encode())
    except (ValueError, RecursionError):  # NaN, or many lists in lists: we write neither
        expected = None
    if stored is None or stored != expected:
        raise InputError(
            f"{path}: is not as it was written: its checksum is another or missing; restore it"
        )
    return value


# ---- a directory ---------------------------------------------------------------------------------


def write_checksums(directory: Path, checksums: dict[str, str]) -> None:
    """Write checksums.json; checksums: that of every file by its path in the directory."""
    write_checked_json(directory / CHECKSUMS, dict(sorted(checksums.items())))


def require_directory_as_written(directory: Path) -> None:
    """Refuse a file that checksums.json lists, if there is one, and that is not as it was written.

    Weights carry a checksum of their own.
    """
    path = directory / CHECKSUMS
    if not path.is_file():
        return
    for name, stored in read_checked_json(path).items():
        file = directory / name
        is_inside = ".." not in Path(name).parts and not Path(name).is_absolute()
        if not is_inside or not file.is_file() or file_checksum(file) != stored:
            raise InputError(
                f"{file}: is not as it was written: its checksum is another; restore it, or remove"
                f" {path} to take the directory as it is"
            )


# ---- a file of records ---------------------------------------------------------------------------


@contextmanager
def records_written_whole(path: str | Path) -> Iterator[TextIO]:
    """Give a file of text to write to; at the end it is at `path`, and its checksum beside it.

    If the body raises, neither is there. Raises InputError, before anything is written, for a name
    beside which there is no place for a checksum, and for one that says that the file is zipped.
    """
    require_name_of_records(Path(path))
    with written_whole(path) as unfinished:
        with open(unfinished, "w", encoding="utf-8", newline="\n") as file:
            yield file
        # First the checksum: a kill between the two then leaves no file that looks finished.
        write_checksum_beside(Path(path), file_checksum(unfinished))


def require_name_of_records(path: Path) -> None:
    """Refuse a name under which a file of records could not be finished, or not be read again."""
    most = LONGEST_NAME - len(BESIDE)
    size = len(os.fsencode(path.name))
    require(
        size <= most,
        f"{path}: a name of {size} bytes; expected at most {most}, since a checksum is written"
        f" beside it to NAME{BESIDE}",
    )
    beside = Path(f"{path}{BESIDE}")
    require(
        not beside.is_dir(),
        f"{beside}: is a directory, where the checksum of {path.name} is to be written; choose"
        " another name",
    )
    require(
        path.suffix != ".gz",
        f"{path}: is written as plain text, which nobody could read under such a name; leave out"
        " the .gz",
    )


def write_checksum_beside(path: Path, total: str) -> None:
    """Write the checksum of a file to another one beside it."""
    write_text(f"{path}{BESIDE}", f"{total}\n")


def require_records_as_written(path: str | Path) -> None:
    """Refuse a file that is not as we wrote it; one that we did not write has no checksum.

    It stands beside the file, or in checksums.json of its directory or of the one above.
    """
    path = Path(path)
    beside = Path(f"{path}{BESIDE}")
    if beside.is_file():
        _require_checksum(path, beside.read_bytes().decode(errors="replace").strip(), beside)
        return
    above = path.absolute().parent
    for directory in (above, above.parent):
        listing = directory / CHECKSUMS
        if listing.is_file() and is_ours(listing):
            stored = read_checked_json(listing).get(
                path.absolute().relative_to(directory).as_posix()
            )
            if stored is not None:
                _require_checksum(path, stored, listing)


def is_ours(listing: Path) -> bool:
    """Whether a checksums.json is one that we wrote: its last key is then a checksum of itself.

    Another program may have written another kind of checksums under that name, even of no JSON.
    """
    with open(listing, "rb") as file:
        file.seek(-min(100, listing.stat().st_size), os.SEEK_END)
        return OUR_END.search(file.read()) is not None


def _require_checksum(path: Path, stored: str, listing: Path) -> None:
    if path.is_file() and file_checksum(path) != stored:
        raise InputError(
            f"{path}: is not as it was written: its checksum is another; restore it, or remove"
            f" {listing} if it was changed on purpose"
        )
