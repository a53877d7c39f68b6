"""Parts of an experiment that are made once and stored: a kill loses at most the one being made."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..checksums import read_checked_json, write_checked_json
from ..options import InputError


def stored_or_made(path: Path, make: Callable[[], Any]) -> Any:
    """What is stored at a path, or what `make` returns, which is then stored there as JSON."""
    try:
        return read_checked_json(path)["figures"]
    except (InputError, OSError, KeyError):  # not there, or a kill or a disk spoiled it
        figures = make()
        write_checked_json(path, {"figures": figures})
        return figures
