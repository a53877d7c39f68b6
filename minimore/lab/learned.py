"""The report of `policies`: what policies learn from pairs, with a reward model and without.

A policy is judged by what it writes: by the true shared reward r*, by the annotator whom it serves
worst, and by how much of the base's own responses it has forgotten.

P prompts, n responses to each, K annotators.
"""

from functools import lru_cache
from typing import Any

from safetensors.torch import load_file

from ..tables import Table
from .cells import margins_file
from .finished import Grid, notes
from .learners import Worth
from .recipes import LEARNERS
from .scheme_tables import cell_text, difference_text
from .testbed import open_testbed

BASELINE = "dpo"
COLUMNS = ("r*", "worst annotator", "KL from base", "forgotten", "tokens")
COMPARED = ("r*", "worst annotator", "forgotten")


def report_policies(grid: Grid) -> str:
    """A line a learner, and what each has more than DPO in the same world."""
    by_learner = {
        learner: [entry for entry in every_figure(grid) if entry["learner"] == learner]
        for learner in LEARNERS
    }
    table = Table("learner", *COLUMNS)
    differences = Table(f"minus {BASELINE}", *COMPARED)
    for learner, entries in by_learner.items():
        table.add(learner, *(cell_text([entry[name] for entry in entries]) for name in COLUMNS))
        if learner == BASELINE:
            continue
        gaps = (
            [own[name] - other[name] for own, other in zip(entries, by_learner[BASELINE])]
            for name in COMPARED
        )
        differences.add(learner, *map(difference_text, gaps))
    explained = (
        "r*, worst annotator: true reward of what the policy writes over what the base writes, in σ"
        " of r* over the base's samples; the annotator is the one who gains least. KL from base,"
        " forgotten: KL(policy | base) and KL(base | policy), nats a response"
    )
    return "\n\n".join(
        [notes(grid.options, with_pairs=False), explained, str(table), str(differences)]
    )


@lru_cache(maxsize=1)  # the text and the file of figures need the same
def every_figure(grid: Grid) -> list[dict[str, Any]]:
    """One entry a policy."""
    entries = []
    for (seed,) in grid.values("seed"):
        cells = {cell.at["learner"]: cell for cell in grid.cells if cell.at["seed"] == seed}
        worths = {
            learner: Worth.of_tensors(load_file(margins_file(grid.output, cell)))
            for learner, cell in cells.items()
        }
        base = cells["base"]
        assert base.testbed is not None
        sigma = float(open_testbed(*base.testbed, base.design).many.std())
        for learner, worth in worths.items():
            figures = figures_of(worth, worths["base"], sigma)
            entries.append({"learner": learner, "seed": seed} | figures)
    return entries


def figures_of(worth: Worth, base: Worth, sigma: float) -> dict[str, float]:
    """The COLUMNS of a policy; sigma: standard deviation of r* over the base's samples."""
    gains = worth.annotators.mean((0, 1)) - base.annotators.mean((0, 1))  # (K,)
    return {
        "r*": float(worth.shared.mean() - base.shared.mean()) / sigma,
        "worst annotator": float(gains.min()) / sigma,
        "KL from base": worth.kl,
        "forgotten": worth.forgotten,
        "tokens": worth.tokens,
    }
