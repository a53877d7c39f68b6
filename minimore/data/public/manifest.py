"""The manifest of a public set: what stands beside its files, and whether they are as it says."""

from pathlib import Path
from typing import Any

from ...checksums import read_checked_json
from ...options import InputError, require
from .download import sha256_of


def read_manifest(path: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Read a manifest. Raises InputError if it is none, or if it is of another request.

    request: the options on which the bytes of the files depend.
    """
    manifest = read_checked_json(path)
    earlier = manifest.get("request")
    if not isinstance(earlier, dict) or "outputs" not in manifest:
        raise InputError(
            f"{path}: is no manifest of data get; choose another --output, or remove it"
        )
    differing = [
        f"{name} {earlier.get(name)}, not {value}"
        for name, value in request.items()
        if earlier.get(name) != value
    ]
    require(
        not differing,
        f"{path}: was written with {'; '.join(differing)}; choose another --output, or remove it"
        " and the files it lists",
    )
    return manifest


def is_complete(manifest: dict[str, Any], directory: Path) -> bool:
    """Whether all files are there. Raises InputError if one is not as it was written."""
    paths = {directory / part["file"]: part["sha256"] for part in manifest["outputs"].values()}
    for path, stored in paths.items():
        require(
            not path.exists() or sha256_of(path) == stored,
            f"{path}: is not as it was written: its checksum is another; remove it, and give the"
            " same command again",
        )
    return all(path.exists() for path in paths)
