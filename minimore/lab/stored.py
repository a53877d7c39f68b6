"""What an experiment stores: its parts, each when it is made, and in the end its report.

A kill loses at most the part that is being made.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..checksums import read_checked_json, write_checked_json
from ..files import write_json, write_text
from ..options import InputError


def stored_or_made(path: Path, make: Callable[[], Any], key: str = "figures") -> Any:
    """What is stored at a path, or what `make` returns, which is then stored there as JSON.

    key: the one under which the file holds it.
    """
    try:
        return read_checked_json(path)[key]
    except (InputError, OSError, KeyError):  # not there, or a kill or a disk spoiled it
        figures = make()
        write_checked_json(path, {key: figures})
        return figures


def write_report(output: Path, figures: Any, text: str, drawings: str = "") -> None:
    """Write report.json and report.txt, and print the text; drawings: where they are, in words."""
    write_json(output / "report.json", figures)
    write_text(output / "report.txt", text + "\n")
    print(f"\n{text}\n\nwritten to {output}/report.txt, every figure to report.json{drawings}")
