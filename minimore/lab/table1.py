"""The report of `table1`: MultiTask against MORE on two sources, and the policies that they tune.

The paper's sources are Helpful and Harmless, ours two annotators of the world, whose drifts are
opposite. Who wins is not asked of GPT-4: r* is known.
"""

from functools import lru_cache
from typing import Any

from ..tables import Table
from . import published
from .alignment_figures import (
    Figures,
    Truth,
    calibration_of,
    chooser_of,
    policy_of,
    truth_of,
    verdicts,
)
from .finished import Grid, notes
from .grid import Cell
from .scheme_tables import cell_text, difference_text
from .testbed import Judgement

BASELINE = "multitask"
VERDICTS = ("win", "tie", "lose")


def report_table1(grid: Grid) -> str:
    """A table with a line a width and scheme, and the paper's."""
    entries = every_figure(grid)
    sizes = list(dict.fromkeys(entry["size"] for entry in entries))
    schemes = list(dict.fromkeys(entry["scheme"] for entry in entries))
    perplexities = [f"ppl {name}" for name in grid.names]
    against = [f"{verdict} against {BASELINE}" for verdict in VERDICTS]
    headers = ("accuracy", "ECE", "gain", *perplexities, "win", "tie", "lose", "win - lose")
    table = Table("width, reward model", *headers)
    for size in sizes:
        for scheme in schemes:
            rows = [e for e in entries if (e["size"], e["scheme"]) == (size, scheme)]
            columns = ("accuracy", "ece", "gain", *perplexities)
            cells: list[str | None] = [cell_text([row[name] for row in rows]) for name in columns]
            if scheme == BASELINE:
                cells += [None] * 4
            else:
                cells += [cell_text([row[name] for row in rows]) for name in against]
                cells.append(difference_text([row[against[0]] - row[against[2]] for row in rows]))
            table.add(f"{size} {scheme}", *cells)
    explained = (
        "gain: r* over the policy that was tuned on random samples, in σ of what the base writes;"
        f" win, tie, lose: against the policy of {BASELINE} by r*. With two sources MORE has"
        " uniform weights, because it scales both gradients to the same length; unscaled it has"
        " not"
    )
    return "\n\n".join(
        [notes(grid.options, with_pairs=False), explained, str(table), published.table_1()]
    )


@lru_cache(maxsize=1)  # the text and the file of figures need the same
def every_figure(grid: Grid) -> list[dict[str, Any]]:
    """One entry a reward model."""
    entries = []
    for (seed,) in grid.values("seed"):
        cells = [cell for cell in grid.cells if cell.at["seed"] == seed]
        truth = truth_of(cells[0])
        choosers = {
            cell.name: chooser_of(grid.output, cell, grid.results[cell.name]) for cell in cells
        }
        for cell in cells:
            chooser, baseline = choosers[cell.name], choosers[baseline_of(cell, cells).name]
            entry = {key: cell.at[key] for key in ("size", "scheme", "seed")}
            entry |= calibration_of(chooser) | figures_of_policy(chooser.policy, truth, grid.names)
            shares = verdicts(chooser.policy.rewards, baseline.policy.rewards)
            for verdict, share in zip(VERDICTS, shares):
                entry[f"{verdict} against {BASELINE}"] = share
            entries.append(entry)
    return entries


def baseline_of(cell: Cell, cells: list[Cell]) -> Cell:
    """The baseline of the same width and world."""
    return next(
        other
        for other in cells
        if (other.at["size"], other.at["scheme"]) == (cell.at["size"], BASELINE)
    )


def figures_of_policy(policy: Judgement, truth: Truth, names: list[str]) -> Figures:
    """What a policy is worth, with the perplexity of every annotator's preferred responses."""
    by_name = {f"ppl {name}": float(value) for name, value in zip(names, policy.perplexities)}
    return policy_of(policy, truth) | by_name
