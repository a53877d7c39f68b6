"""Whether a file is as it was written.

Whatever we write and read again has a checksum: a safetensors file in its header
(model/tensors.py), a JSON file as its last key, the other files of a directory in checksums.json,
the log of a run in its saved states. Standard library only.
"""

import zlib
from pathlib import Path
from typing import Any

from .files import as_text, read_json, write_json
from .options import InputError

CHECKSUM = "crc32"  # the key of a file's own checksum
CHECKSUMS = "checksums.json"  # the checksums of other files of a directory


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
