"""Whether the files of a public set are what is known of them, and what differs if they are not."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .download import sha256_of
from .sources import File, PublicSet


class Input(NamedTuple):
    """A file of a set as it is here."""

    file: File
    path: Path
    size: int
    sha256: str


def input_of(file: File, path: Path) -> Input:
    """A file with its size and its checksum."""
    return Input(file, path, path.stat().st_size, sha256_of(path))


def changes_of_file(file: File, size: int | None, sha256: str | None) -> list[str]:
    """What differs between a file and what is known of it; None is not known.

    >>> changes_of_file(File("a.json", size=1200), 7, None)
    ['a.json has 7 bytes, expected 1,200']
    """
    changes = []
    if size is not None and file.size not in (None, size):
        changes.append(f"{file.path} has {size:,} bytes, expected {file.size:,}")
    if sha256 is not None and file.sha256 not in (None, sha256):
        changes.append(f"{file.path} has SHA-256 {sha256}, expected {file.sha256}")
    return changes


def changes_of_records(public_set: PublicSet, records: Mapping[str, int]) -> list[str]:
    """The same for how many records the files hold. records: of every file that was read."""
    expected = (
        (public_set.train, public_set.train_records),
        (public_set.test, public_set.test_records),
    )
    changes = []
    for files, count in expected:
        if count is None or not all(file.path in records for file in files):
            continue
        here = sum(records[file.path] for file in files)
        if here != count:
            names = files[0].path + (" and the like" if len(files) > 1 else "")
            changes.append(f"{names} has {here:,} records, expected {count:,}")
    return changes


def changes_since(manifest: dict[str, Any], inputs: Sequence[Input]) -> list[str]:
    """What differs between files and those that a manifest was made of."""
    recorded = {path: values["sha256"] for path, values in manifest["inputs"].items()}
    return [
        f"{here.file.path} has SHA-256 {here.sha256}, and the manifest says"
        f" {recorded[here.file.path]}"
        for here in inputs
        if recorded.get(here.file.path) not in (None, here.sha256)
    ]
