"""Files that last: written whole or not at all.

A file is written beside its place, brought to the disk and then renamed into place, and the
directory is brought to the disk, too. Whoever reads it sees the old file or the new one, never half
of one, also after a power cut. Standard library only.
"""

import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

try:
    import fcntl
except ImportError:  # not a Unix
    fcntl = None  # type: ignore[assignment]

from .options import InputError

Kind = TypeVar("Kind", dict, list)

LARGEST_JSON = 500_000_000  # bytes; the largest tokenizer.json has a tenth of it
POINTER = b"version https://git-lfs"  # how a Git LFS pointer begins, which stands for a file


# ---- to the disk ---------------------------------------------------------------------------------


def beside(path: Path) -> Path:
    """A name next to `path` that nobody else uses."""
    return path.with_name(f"{beginning_of_name(path)}.{secrets.token_hex(4)}.partial")


def beginning_of_name(path: Path) -> str:
    """As much of a file's name as leaves room for what `beside` adds to it: 200 bytes at most."""
    return os.fsencode(path.name)[:200].decode(errors="ignore")


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Give an empty file beside `path` to write to; at the end it takes the place of `path`.

        with written_whole("report.json") as unfinished:
            unfinished.write_text("{}")

    At the end it is on the disk. If the body raises, nothing changes at `path` and nothing is left
    beside it. What a killed process left of an earlier try is removed first. Directories above it
    that are missing are made.
    """
    path = Path(path)
    with directories_above(path):
        sweep_beside(path)
        unfinished, descriptor = new_file_beside(path)
        try:
            yield unfinished
            to_disk(unfinished)
            os.replace(unfinished, path)
            to_disk(path.parent)
        finally:
            unfinished.unlink(missing_ok=True)
            if descriptor is not None:
                os.close(descriptor)


def new_file_beside(path: Path) -> tuple[Path, int | None]:
    """Make an empty file beside `path`, locked until the descriptor is closed.

    The descriptor is None on Windows, which has no such locks and renames no open file.
    """
    while True:
        unfinished = beside(path)
        descriptor = os.open(unfinished, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        if fcntl is None:
            os.close(descriptor)
            return unfinished, None
        # Another process that sweeps may have seen it before it was locked, and removed it.
        if lock(descriptor) is not False and unfinished.exists():
            return unfinished, descriptor
        os.close(descriptor)


def sweep_beside(path: Path) -> None:
    """Remove the unfinished files of `path` that killed processes left.

    That of a living process is locked. Where there are no locks, all stay.
    """
    ours = re.compile(re.escape(beginning_of_name(path)) + r"\.[0-9a-f]{8}\.partial")
    left = []
    with suppress(OSError):  # a directory that may be written to, but not listed
        left = [file for file in path.parent.iterdir() if ours.fullmatch(file.name)]
    for unfinished in left:
        with suppress(OSError):  # somebody else has removed it, or it is not ours to open
            descriptor = os.open(unfinished, os.O_RDWR)
            try:
                if lock(descriptor):
                    unfinished.unlink()
            finally:
                os.close(descriptor)


@contextmanager
def directory_written_whole(path: Path) -> Iterator[Path]:
    """Give a new directory beside `path` to fill; at the end it is renamed to `path`.

    At the end it is on the disk with everything in it. What a killed process left of an earlier try
    is removed first. Directories above it that are missing are made.
    """
    unfinished = unfinished_name(path)
    with directories_above(path):
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        try:
            yield unfinished
            for part in (*unfinished.rglob("*"), unfinished):
                to_disk(part)
            os.replace(unfinished, path)
            to_disk(path.parent)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def directories_above(path: Path) -> Iterator[None]:
    """Make the directories above a path; if the body raises, those that are empty go again."""
    made = make_directory(path.parent)
    try:
        yield
    except BaseException:
        for directory in reversed(made):
            with suppress(OSError):  # not empty: something else is there by now
                directory.rmdir()
        raise


def unfinished_name(path: Path) -> Path:
    """Where `directory_written_whole` fills what is to become `path`."""
    return path.with_name(f"{path.name}.partial")


def sweep(directory: Path) -> None:
    """Remove what a kill left unfinished; what a living process writes is locked, and stays."""
    for unfinished in directory.glob("*.partial"):
        if unfinished.is_dir() and not unfinished.is_symlink():
            shutil.rmtree(unfinished)
        elif unfinished.is_symlink() or not is_locked(unfinished):
            unfinished.unlink(missing_ok=True)


def is_locked(path: Path) -> bool:
    """Whether another process, or another part of this one, holds the lock of a file."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # it is gone, or nobody may read it
        return False
    try:
        return lock(descriptor) is False
    finally:
        os.close(descriptor)


def make_directory(path: Path) -> list[Path]:
    """Make a directory and those above it, unless they are there, and bring them to the disk.

    Returns those that were not there, from the top.
    """
    path = path.absolute()
    missing = []
    while not path.is_dir():
        missing.append(path)
        path = path.parent
    made = []
    try:
        for directory in reversed(missing):
            directory.mkdir(exist_ok=True)
            made.append(directory)
            to_disk(directory.parent)
    except OSError:  # too long, say
        for directory in reversed(made):
            directory.rmdir()
        raise
    return made


def to_disk(path: Path) -> None:
    """Wait until the disk has what was written to a file, or which names a directory holds."""
    is_directory = path.is_dir()
    if is_directory and os.name == "nt":
        return  # Windows opens no directory
    # Windows brings only files to the disk that are open for writing; no directory can be.
    descriptor = os.open(path, os.O_RDONLY if is_directory else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems bring names to the disk by themselves, and refuse to be asked.
        if not is_directory or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def locked(path: Path, taken: str) -> int | None:
    """Lock a file or a directory until the descriptor that is returned is closed.

    None if the system has no such locks. Raises InputError, with the message `taken`, if another
    process holds it.
    """
    if fcntl is None:
        return None
    descriptor = os.open(path, os.O_RDONLY)
    if lock(descriptor) is False:
        os.close(descriptor)
        raise InputError(taken)
    return descriptor


def lock(descriptor: int) -> bool | None:
    """Try to lock an open file: whether it worked; None where the system has no such locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:  # another process, or another descriptor of this one, holds it
        return False
    except OSError:  # a file system without locks
        return None
    return True


# ---- text and JSON -------------------------------------------------------------------------------


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all."""
    with written_whole(path) as unfinished:
        unfinished.write_bytes(content)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with written_whole(path) as unfinished, open(unfinished, "w", encoding="utf-8") as file:
        file.write(text)


def write_json(path: str | Path, value: Any) -> None:
    """Write indented strict JSON. Raises ValueError for NaN and the infinities."""
    write_text(path, as_text(value))


def as_text(value: Any) -> str:
    """Indented strict JSON, with a line's end.

    A character is written as itself, unless the text holds half a surrogate pair: UTF-8 has no
    bytes for that, so then all that is not ASCII is escaped.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    holds_surrogates = any("\ud800" <= c <= "\udfff" for c in text)
    if holds_surrogates:
        text = json.dumps(value, indent=2, allow_nan=False)
    return text + "\n"


def read_json(path: str | Path, kind: type[Kind] = dict) -> Kind:  # type: ignore[assignment]
    """Read a JSON object (or a list) from a file. Raises InputError for anything else."""
    path = Path(path)
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: not a plain file; expected a file of JSON")
    if path.exists() and path.stat().st_size > LARGEST_JSON:
        raise InputError(f"{path}: more than {LARGEST_JSON // 10**6} million bytes of JSON")
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


def refuse_pointer(path: str | Path) -> None:
    """Refuse a Git LFS pointer that stands in the place of a file."""
    if not os.path.isfile(path):
        return  # a pipe is read once only
    with open(path, "rb") as file:
        is_pointer = file.read(len(POINTER)) == POINTER
    if is_pointer:
        raise InputError(
            f"{path}: is a Git LFS pointer, which stands for the file; fetch it with `git lfs pull`"
        )


def refuse_existing(path: str | Path | None, flag: str = "--output") -> None:
    """Outputs are never overwritten: refuse a path that exists, is empty or lies in no directory.

    The directories above it may be missing; whoever writes makes them.
    """
    if path is None:
        return
    if not path:
        raise InputError(f"{flag}: the path is empty")
    if os.path.lexists(path):
        raise InputError(f"{flag} {path}: exists already; choose another name or remove it")
    parent = Path(path).absolute().parent
    while not os.path.lexists(parent):
        parent = parent.parent
    if not parent.is_dir():
        raise InputError(f"{flag} {path}: {parent} is not a directory; choose another place")


# What systems, allocators and libraries say when there is no memory left.
SHORTAGE = re.compile(
    "can(no|')t allocate memory|cannot allocate memory|out of memory|bad_alloc|not enough memory",
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, a GPU, the system or a library has no memory left.

    It is no fault of the file that is being read, so whoever blames files asks this first.
    """
    is_named_so = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    has_no_memory = isinstance(error, OSError) and error.errno == errno.ENOMEM
    return is_named_so or has_no_memory or SHORTAGE.search(str(error)) is not None


def blame(error: BaseException) -> None:
    """Raise an error again that is a shortage of memory, before a file is blamed for it."""
    if is_out_of_memory(error) and not isinstance(error, InputError):
        raise error


def one_line(error: BaseException) -> str:
    """An error's text on one line, at most 160 characters."""
    try:
        text = str(error)
    except Exception:  # of an error that a reader's code has made
        text = ""
    return " ".join(text.split())[:160] or type(error).__name__
