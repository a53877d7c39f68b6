"""Files that last: written whole or not at all.

A file is written beside its place, brought to the disk and then renamed into place. Whoever reads
it sees the old file or the new one, never half of one. Standard library only.
"""

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from .options import InputError

Kind = TypeVar("Kind", dict, list)


def beside(path: Path) -> Path:
    """A name next to `path` that nobody else uses."""
    return path.with_name(f"{path.name[:200]}.{secrets.token_hex(4)}.partial")


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Give the name of a file beside `path` to write to; at the end it takes the place of `path`.

        with written_whole("report.json") as unfinished:
            unfinished.write_text("{}")

    If the body raises, nothing changes at `path` and nothing is left beside it.
    """
    path = Path(path)
    unfinished = beside(path)
    try:
        yield unfinished
        to_disk(unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def directory_written_whole(path: Path) -> Iterator[Path]:
    """Give a new directory beside `path` to fill; at the end it is renamed to `path`.

    What a killed process left of an earlier try is removed first.
    """
    unfinished = path.with_name(f"{path.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def to_disk(path: Path) -> None:
    """Wait until the disk has what was written to a file."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with written_whole(path) as unfinished, open(unfinished, "x", encoding="utf-8") as file:
        file.write(text)


def write_json(path: str | Path, value: Any) -> None:
    """Write indented strict JSON. Raises ValueError for NaN and the infinities.

    A character is written as itself, unless the text holds half a surrogate pair: UTF-8 has no
    bytes for that, so then all that is not ASCII is escaped.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    holds_surrogates = any("\ud800" <= c <= "\udfff" for c in text)
    if holds_surrogates:
        text = json.dumps(value, indent=2, allow_nan=False)
    write_text(path, text + "\n")


def read_json(path: str | Path, kind: type[Kind] = dict) -> Kind:  # type: ignore[assignment]
    """Read a JSON object (or a list) from a file. Raises InputError for anything else."""
    path = Path(path)
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: not a plain file; expected a file of JSON")
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        is_config = path.name == "config.json"
        hint = "; expected a Hugging Face checkpoint directory" if is_config else ""
        raise InputError(f"{path}: no such file{hint}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({one_line(error)})") from None
    if not isinstance(value, kind):
        expected = "object" if kind is dict else "list"
        raise InputError(f"{path}: holds {type(value).__name__}; expected a JSON {expected}")
    return value


def refuse_existing(
    path: str | Path | None, flag: str = "--output", make_parents: bool = False
) -> None:
    """Outputs are never overwritten: refuse a path that exists, is empty or lies in no directory.

    With `make_parents` the directories above it may be missing, too.
    """
    if path is None:
        return
    if not path:
        raise InputError(f"{flag}: the path is empty")
    if os.path.lexists(path):
        raise InputError(f"{flag} {path}: exists already; choose another name or remove it")
    parent = Path(path).absolute().parent
    while make_parents and not os.path.lexists(parent):
        parent = parent.parent
    if not parent.is_dir():
        raise InputError(f"{flag} {path}: {parent} is not a directory; make it first")


def one_line(error: BaseException) -> str:
    """An error's text on one line, at most 160 characters."""
    return " ".join(str(error).split())[:160] or type(error).__name__
