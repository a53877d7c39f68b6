"""A finished grid: its options, cells and margins, and what its intervals are taken over."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..figures import plots
from .grid import Cell, ReproduceOptions
from .statistics import Results, Schemes, by_seed

Curves = dict[str, list[tuple]]  # label -> points (x, mean over seeds, half its interval)


@dataclass(frozen=True, eq=False)
class Grid:
    """A finished grid: its options, its cells, their margins by name, and its directory."""

    options: ReproduceOptions
    cells: Sequence[Cell]
    results: Results
    output: Path

    @property
    def names(self) -> list[str]:
        """The test sources."""
        return list(self.cells[0].tests)

    def values(self, *keys: str) -> list[tuple[Any, ...]]:
        """The combinations of these keys of `Cell.at` that occur, in order."""
        return list(dict.fromkeys(tuple(cell.at[key] for key in keys) for cell in self.cells))

    def schemes_at(self, **place: Any) -> Schemes:
        """The figures of every scheme at one place of the grid."""
        return by_seed(self.cells, self.results, **place)

    def draw_curves(self, name: str, curves: Curves, across: str, up: str) -> None:
        """Draw curves to figures/NAME.png, if there are any and it is possible."""
        if plots.available() and curves:
            plots.draw_curves(curves, across, up, self.output / "figures" / f"{name}.png")


def notes(options: ReproduceOptions, with_pairs: bool = True) -> str:
    """What ± and ! mean in this experiment.

    with_pairs: the noise of test pairs that seeds share is in the intervals.
    """
    if options.seed_count() > 2:
        flag = (
            "! a difference whose interval excludes 0 (of 20 that are none, one looks like one;"
            " ECEs near their floor are never flagged)"
        )
    else:
        flag = (
            "fewer than three seeds say nothing of what training adds, so no difference is flagged"
        )
    over = interval_over(options, with_pairs)
    return f"{options.seed_count()} seeds; ± is half a 95% interval {over}; {flag}"


def interval_over(options: ReproduceOptions, with_pairs: bool) -> str:
    """Over what the intervals are taken, in words."""
    if not options.model:
        return "over seeds (t); every seed is another world, model and order"
    parts = []
    if options.seed_count() > 2:
        parts.append("over seeds (t), which share their data")
    if with_pairs:
        parts.append("over test pairs (bootstrap by prompt; not for worst and NLL)")
    return " and ".join(parts) or "nothing"
