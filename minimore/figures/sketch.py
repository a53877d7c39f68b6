"""Curves in a terminal: a picture made of letters, and a file beside it where one is asked for.

    .35 |aa
        |  aaa      b
        |     aaa bb
    .00 |        ba
         1         32

The first letter of the alphabet marks the first curve, and so on.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from .plots import available, draw_curves

ROWS, COLUMNS = 10, 60  # of the picture
MARKS = "abcdefgh"  # of the curves, in the order in which they are named
DIRECTORY = "MINIMORE_FIGURES"  # the environment variable that names a directory for files

Points = tuple[Sequence[float], Sequence[float]]  # x and y


def show_curves(name: str, title: str, across: str, up: str, curves: Mapping[str, Points]) -> None:
    """Print curves; write NAME.png, too, if MINIMORE_FIGURES names a directory.

    across, up: what the axes mean. curves: {label: (x, y)}, at most eight. Without matplotlib the
    file is not written, and a line says so.
    """
    print(f"\n{title}\n{text_of_curves(across, up, curves)}")
    directory = os.environ.get(DIRECTORY)
    if not directory:
        return
    if not available():
        print(f"{name}.png is not written: it needs matplotlib, pip install 'minimore[plots]'")
        return
    Path(directory).mkdir(parents=True, exist_ok=True)
    points = {
        label: [(x_value, y_value, 0.0) for x_value, y_value in zip(x, y)]
        for label, (x, y) in curves.items()
    }
    path = draw_curves(points, across, up, Path(directory) / f"{name}.png", title)
    print(f"figure: {path}")


def text_of_curves(across: str, up: str, curves: Mapping[str, Points]) -> str:
    """The same as text: one letter a point, at its place between the ends of both axes.

    Where two curves meet, the letter of the earlier one stands.
    """
    all_x = np.concatenate([np.asarray(x, dtype=float) for x, _ in curves.values()])
    all_y = np.concatenate([np.asarray(y, dtype=float) for _, y in curves.values()])
    picture = np.full((ROWS, COLUMNS), " ")
    for mark, (x, y) in reversed(list(zip(MARKS, curves.values(), strict=False))):
        columns = places_on_axis(x, all_x, COLUMNS)
        rows = ROWS - 1 - places_on_axis(y, all_y, ROWS)
        picture[rows, columns] = mark
    highest, lowest = f"{all_y.max():.3g}", f"{all_y.min():.3g}"
    width = max(len(highest), len(lowest))
    ends = [highest, *[""] * (ROWS - 2), lowest]
    lines = [f"{end:>{width}} |{''.join(row).rstrip()}" for end, row in zip(ends, picture)]
    left, right = f"{all_x.min():.3g}", f"{all_x.max():.3g}"
    lines.append(f"{'':{width}}  {left}{right:>{COLUMNS - len(left)}}  {across}")
    legend = ", ".join(f"{mark} {label}" for mark, label in zip(MARKS, curves))
    return "\n".join([f"{up}: {legend}", *lines])


def places_on_axis(values: Sequence[float], all_values: np.ndarray, places: int) -> np.ndarray:
    """At which of so many places each value stands, from the least of all values to the largest."""
    low, high = all_values.min(), all_values.max()
    share = (np.asarray(values, dtype=float) - low) / ((high - low) or 1.0)
    return np.rint(share * (places - 1)).astype(int)
