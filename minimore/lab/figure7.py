"""The report of `figure7`: does a lower ECE of the reward model make a better policy?

Every world has policies and reward models of its own, and gives one correlation over its models.
The interval is Student's over these: worlds are independent, the models of one world are not,
because they share its samples, its labels and its base policy. (A bootstrap that resamples whole
worlds asks the same; with five worlds its intervals are too short.)

M models of a world.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from ..figures import plots
from ..tables import Table, number
from ..uncertainty import over_seeds
from .alignment_figures import (
    Chooser,
    Figures,
    Truth,
    best_of_n,
    calibration_of,
    choices_at,
    chooser_of,
    figures_of,
    mean,
    own_temperature,
    policy_of,
    scale_of,
    truth_of,
)
from .association import partial, spearman
from .best_of import chosen, powers_of_two
from .finished import Grid, notes
from .scale_matters import BETA, THRESHOLD
from .scheme_tables import cell_text, difference_text
from .testbed import CONTROLS

TEMPERATURES = (0.25, 0.5, 1.0, 2.0, 4.0)  # powers of two divide without rounding
ROUNDING_TEMPERATURE = 3.0  # one that rounds
PREDICTORS = ("accuracy", "tau", "best of 4", "ece", "ece less noise", "nll")
SHOWN = ("plain", "sixteenth by heart")  # recipes whose best of n is shown
MIXTURES = 100  # of each world
MEMBERS = 3  # reward models of a mixture


@dataclass(frozen=True, eq=False)
class WorldOfModels:
    """One world: its truth, its reward models, and the figures of each as it was trained."""

    seed: int
    truth: Truth
    choosers: list[Chooser]
    figures: list[Figures]

    def column(self, name: str) -> np.ndarray:
        """A figure of every model: (M,)."""
        return np.array([figures[name] for figures in self.figures])

    def of_recipe(self, recipe: str) -> int:
        """The place of the model of a recipe."""
        return [chooser.recipe for chooser in self.choosers].index(recipe)

    @cached_property
    def tempered(self) -> list[list[Figures]]:
        """The figures of every model at every temperature; those of its policy stay the same."""
        return [
            [
                figures | calibration_of(chooser, T) | scale_of(chooser, self.truth, T)
                for T in TEMPERATURES
            ]
            for chooser, figures in zip(self.choosers, self.figures)
        ]

    @property
    def at_temperatures(self) -> list[Figures]:
        """The same one after the other."""
        return [figures for of_model in self.tempered for figures in of_model]


@lru_cache(maxsize=1)  # the text and the file of figures need the same
def worlds_of(grid: Grid) -> list[WorldOfModels]:
    """The worlds of a finished grid."""
    worlds = []
    for (seed,) in grid.values("seed"):
        cells = [cell for cell in grid.cells if cell.at["seed"] == seed]
        truth = truth_of(cells[0])
        choosers = [chooser_of(grid.output, cell, grid.results[cell.name]) for cell in cells]
        figures = [figures_of(chooser, truth) for chooser in choosers]
        worlds.append(WorldOfModels(seed, truth, choosers, figures))
    return worlds


def every_figure(grid: Grid) -> list[dict[str, Any]]:
    """What the tables are made of: one entry a reward model."""
    entries = []
    for world in worlds_of(grid):
        for chooser, figures in zip(world.choosers, world.figures):
            entry = {"recipe": chooser.recipe, "seed": chooser.seed} | figures
            curves = {
                name: values.tolist() for name, values in best_of_n(chooser, world.truth).items()
            }
            entry["best of n"] = curves
            entry["temperature"] = own_temperature(chooser)
            entries.append(entry)
    return entries


def report_figure7(grid: Grid) -> str:
    """All tables and what they say, and the drawings."""
    worlds = worlds_of(grid)
    models = sum(len(world.choosers) for world in worlds)
    parts = [
        notes(grid.options, with_pairs=False),
        f"{models} reward models in {len(worlds)} worlds, each used to tune the same policy of its"
        " world on the best of 4 samples to every prompt; r* and gains in σ of what the base"
        " writes; correlations are those of ranks, over the models of a world",
        policies_text(worlds),
        recipes_text(worlds),
        prediction_text(worlds),
        temperature_text(worlds),
        best_of_n_text(worlds),
        scale_text(worlds),
        mixture_text(worlds),
    ]
    draw(grid, worlds)
    return "\n\n".join(parts)


# ---- policies and models -------------------------------------------------------------------------


def policies_text(worlds: Sequence[WorldOfModels]) -> str:
    """What policies are worth: controls, and those that reward models tuned."""
    names = ("over base", "gain", "win", "kl", "perplexity")
    table = Table("policy", "r* over base", "gain: over random of 4", "win over SFT", "KL", "ppl")
    labels = ("base", "random of 4", "SFT on chosen responses", "best of 4 by r*")
    for control, label in zip(CONTROLS, labels):
        rows = [policy_of(world.truth.controls[control], world.truth) for world in worlds]
        table.add(label, *(cell_text([row[name] for row in rows]) for name in names))
    plain = [world.figures[world.of_recipe("plain")] for world in worlds]
    table.add("best of 4 by plain", *(cell_text([row[name] for row in plain]) for name in names))
    means = [[world.column(name).mean() for world in worlds] for name in names]
    table.add("best of 4, mean model", *map(cell_text, means))
    gain = difference_text([row["gain"] for row in plain])
    return f"{table}\ngain of the plain reward model: {gain}"


def recipes_text(worlds: Sequence[WorldOfModels]) -> str:
    """Every recipe: mean over worlds of its models' figures."""
    names = [*("accuracy", "ece", "nll", "tau", "best of 4", "regret of 4", "gain", "win")]
    names += ["kl", "perplexity"]
    headers = ("accuracy", "ECE", "NLL", "tau", "best of 4", "regret", "gain", "win", "KL", "ppl")
    table = Table("reward model", *headers)
    recipes = [chooser.recipe for chooser in worlds[0].choosers]
    for place, recipe in enumerate(recipes):
        means = [mean([world.figures[place][name] for world in worlds]) for name in names]
        table.add(recipe, *(number(value) for value in means[:-1]), f"{means[-1]:.2f}")
    return (
        "tau: Kendall's correlation with r* among 64 samples to a prompt; best of 4, regret: r* of"
        f" the chosen sample over the mean one, and what the truly best one has more\n{table}"
    )


# ---- what predicts the gain ----------------------------------------------------------------------


def prediction_text(worlds: Sequence[WorldOfModels]) -> str:
    """Rank correlations of what is known of a reward model with what its policy gains."""
    table = Table("rank correlation of", "with gain", "with win", "gain | accuracy", "gain | tau")
    for name in PREDICTORS:
        table.add(
            name,
            correlation_text([correlation(world, name, "gain") for world in worlds]),
            correlation_text([correlation(world, name, "win") for world in worlds]),
            *(partial_text(worlds, name, "gain", other) for other in ("accuracy", "tau")),
        )
    accuracy = partial_text(worlds, "accuracy", "gain", "ece")
    lines = [
        "| accuracy: of models with equal accuracy (partial correlation of ranks)",
        str(table),
        f"accuracy with gain | ece: {accuracy}",
        "ECE and gain: " + verdict([correlation(world, "ece", "gain") for world in worlds]),
        "ECE and gain at equal accuracy: "
        + verdict([partial_of(world, "ece", "gain", "accuracy") for world in worlds]),
    ]
    return "\n".join(lines)


def correlation(world: WorldOfModels, name: str, outcome: str) -> float:
    """Rank correlation of two figures over the models of a world."""
    return float(spearman(world.column(name), world.column(outcome)))


def partial_of(world: WorldOfModels, name: str, outcome: str, other: str) -> float:
    """The same given a third figure."""
    return partial(world.column(name), world.column(outcome), [world.column(other)])


def partial_text(
    worlds: Sequence[WorldOfModels], name: str, outcome: str, other: str
) -> str | None:
    """Partial correlations as a cell; none where a figure would be given itself."""
    if name == other:
        return None
    return correlation_text([partial_of(world, name, outcome, other) for world in worlds])


def correlation_text(correlations: Sequence[float]) -> str:
    """The mean over worlds with its interval; "-" where a world has no such correlation."""
    return "-" if np.isnan(correlations).any() else difference_text(correlations)


def verdict(correlations: Sequence[float], outcome: str = "gain") -> str:
    """What correlations of the ECE with an outcome say, in words."""
    if np.isnan(correlations).any():
        return "too few models, or all of them the same, to say anything"
    centre, half = over_seeds(correlations)
    shown = f"{centre:+.2f} ± {half:.2f}"
    if np.isnan(half):
        return f"{centre:+.2f}; fewer than three worlds say no more"
    if abs(centre) <= half:
        return f"no connection can be told from chance ({shown})"
    better = "larger" if centre < 0 else "smaller"
    return f"a lower ECE goes with a {better} {outcome} ({shown})"


# ---- temperatures --------------------------------------------------------------------------------


def labelled(temperatures: Sequence[float]) -> list[tuple[str, Callable[[Chooser], float]]]:
    """Temperatures by their labels: the same for every model, and at last each model's own."""

    def same(temperature: float) -> Callable[[Chooser], float]:
        return lambda chooser: temperature

    return [*((f"{T:g}", same(T)) for T in temperatures), ("its own T", own_temperature)]


def temperature_text(worlds: Sequence[WorldOfModels]) -> str:
    """Every model at several temperatures: other ECEs, the same choices and the same policies."""
    table = Table("rewards divided by", "ECE", "NLL", "choices that change", "gain")
    gain = cell_text([world.column("gain").mean() for world in worlds])
    for label, temperature_of in labelled((*TEMPERATURES, ROUNDING_TEMPERATURE)):
        figures, changed, choices_made = [], 0, 0
        for world in worlds:
            at_T = [(chooser, temperature_of(chooser)) for chooser in world.choosers]
            own = [calibration_of(chooser, T) for chooser, T in at_T]
            figures.append([np.mean([row[name] for row in own]) for name in ("ece", "nll")])
            for chooser, T in at_T:
                is_other = choices_at(chooser, T) != choices_at(chooser, 1.0)
                changed += int(is_other.sum())
                choices_made += len(is_other)
        ece, nll = np.array(figures).T
        is_same = "the same" if not changed else "not computed"
        shown = gain if label == "1" else is_same
        table.add(label, cell_text(ece), cell_text(nll), f"{changed} of {choices_made:,}", shown)
    pooled = []
    for world in worlds:
        rows_of_world = world.at_temperatures
        ece, gains = (np.array([row[name] for row in rows_of_world]) for name in ("ece", "gain"))
        pooled.append(float(spearman(ece, gains)))
    return (
        "own T: the temperature that fits a quarter of the test prompts best; another rounding can"
        f" only make ties\n{table}\n"
        f"ECE with gain, each model at {len(TEMPERATURES)} temperatures: {correlation_text(pooled)}"
    )


# ---- best of n -----------------------------------------------------------------------------------


def best_of_n_text(worlds: Sequence[WorldOfModels]) -> str:
    """What the best of n is worth, and what reward models promise of it: log-odds."""
    counts = powers_of_two(worlds[0].truth.many.shape[1])
    shown = [name for name in SHOWN if name in [c.recipe for c in worlds[0].choosers]]
    headers = [f"{name}: {side}" for name in shown for side in ("promised", "worth")]
    table = Table("n", "by r*", "mean model: worth", *headers)
    columns = [ideal_curves(worlds), mean_curves(worlds)]
    for recipe in shown:
        curves = [
            best_of_n(world.choosers[world.of_recipe(recipe)], world.truth) for world in worlds
        ]
        columns += [np.array([curve[side] for curve in curves]) for side in ("promised", "worth")]
    for place, n in enumerate(counts):
        table.add(n, *(cell_text(column[:, place]) for column in columns))
    return (
        "best of n, exact over all subsets of a prompt's samples, over the mean sample, in"
        f" log-odds: what the model's own reward promises, and what r* is worth\n{table}"
    )


def ideal_curves(worlds: Sequence[WorldOfModels]) -> np.ndarray:
    """The best of n by the truth, of every world: (worlds, counts)."""
    rows = []
    for world in worlds:
        ideal = Chooser(
            "r*", world.seed, {}, world.truth.few, world.truth.many, world.choosers[0].policy
        )
        rows.append(best_of_n(ideal, world.truth)["worth"])
    return np.array(rows)


def mean_curves(worlds: Sequence[WorldOfModels]) -> np.ndarray:
    """The mean over models of what their best of n is worth, of every world: (worlds, counts)."""
    return np.array(
        [
            np.mean([best_of_n(chooser, world.truth)["worth"] for chooser in world.choosers], 0)
            for world in worlds
        ]
    )


# ---- what depends on the scale -------------------------------------------------------------------


def scale_text(worlds: Sequence[WorldOfModels]) -> str:
    """A threshold and a penalty: by temperature, and how the ECE goes with what they win."""
    names = ("threshold", "kept", "kept reward", "penalty", "tilted", "tilted kl")
    headers = ("threshold: use", "kept", "r* kept", "penalty: use", "r* tilted", "KL")
    table = Table("rewards divided by", *headers)
    for label, temperature_of in labelled(TEMPERATURES):
        means = []
        for world in worlds:
            figures = [
                scale_of(chooser, world.truth, temperature_of(chooser))
                for chooser in world.choosers
            ]
            own = {name: mean([row[name] for row in figures]) for name in names}
            own["kept reward"] /= own["kept"] or 1.0  # of those that are kept, by whichever model
            means.append(list(own.values()))
        table.add(label, *(cell_text(column) for column in np.array(means).T))
    prediction = Table("rank correlation of", "threshold: use", "penalty: use", "r* tilted", "gain")
    outcomes = ("threshold", "penalty", "tilted", "gain")
    for label, is_tempered in (("as trained", False), (f"at {len(TEMPERATURES)} T", True)):
        figures_of_worlds = [
            world.at_temperatures if is_tempered else world.figures for world in worlds
        ]
        for name, other in (("accuracy", None), ("ece", None), ("ece", "accuracy")):
            cells = []
            for outcome in outcomes:
                values = [
                    rank_correlation(rows, name, outcome, other) for rows in figures_of_worlds
                ]
                cells.append(correlation_text(values))
            condition = f" | {other}" if other else ""
            prediction.add(f"{name}{condition}, {label}", *cells)
    return (
        f"threshold: keep samples that beat the prompt's first one with a probability over"
        f" {THRESHOLD:g}; penalty: weigh samples by exp(r / {BETA:g}), the best policy for reward"
        f" minus {BETA:g} KL; use: what is won so, as a share of what the truth would"
        f" win\n{table}\n\n{prediction}\n{scale_verdicts(worlds)}"
    )


def scale_verdicts(worlds: Sequence[WorldOfModels]) -> str:
    """What the ECE of models as trained says of a threshold and of a penalty, in words."""
    lines = []
    for outcome in ("threshold", "penalty"):
        values = [rank_correlation(world.figures, "ece", outcome, "accuracy") for world in worlds]
        said = verdict(values, f"use of the {outcome}")
        lines.append(f"ECE and the {outcome} at equal accuracy, as trained: {said}")
    return "\n".join(lines)


def rank_correlation(rows: Sequence[Figures], name: str, outcome: str, other: str | None) -> float:
    """Rank correlation of two figures, given a third one if there is one."""
    columns = {key: np.array([row[key] for row in rows]) for key in (name, outcome)}
    if other is None:
        return float(spearman(columns[name], columns[outcome]))
    return partial(columns[name], columns[outcome], [np.array([row[other] for row in rows])])


def mixture_text(worlds: Sequence[WorldOfModels]) -> str:
    """Choosing by the mean reward of several models, as trained, tempered at random, and fitted."""
    table = Table("best of 4 by the mean reward of 3 models", "r* over the mean sample")
    outcomes: dict[str, list[float]] = {}
    alone, at_equal_accuracy = [], []
    for world in worlds:
        mixtures = mixtures_of(world)
        for label in ("members alone", "as trained", "tempered at random", "each at its own T"):
            outcomes.setdefault(label, []).append(float(np.mean([m[label] for m in mixtures])))
        alone.append(rank_correlation(mixtures, "ece", "tempered at random", None))
        at_equal_accuracy.append(
            rank_correlation(mixtures, "ece", "tempered at random", "accuracy")
        )
    for label, values in outcomes.items():
        table.add(label, cell_text(values))
    return (
        f"{table}\nmean ECE of tempered members with r* of the mixture's choice:"
        f" {correlation_text(alone)}; at equal accuracy: {correlation_text(at_equal_accuracy)}"
    )


def mixtures_of(world: WorldOfModels) -> list[Figures]:
    """Random mixtures of a world's models: r* of what they choose, by how rewards are scaled."""
    random = np.random.default_rng([world.seed, 3])
    own = [own_temperature(chooser) for chooser in world.choosers]
    few = world.truth.few / world.truth.sigma
    mixtures = []
    for _ in range(MIXTURES):
        members = random.choice(len(world.choosers), MEMBERS, replace=False)
        places = random.integers(len(TEMPERATURES), size=MEMBERS)
        rewards = [world.choosers[member].few for member in members]
        by_label = {
            "as trained": np.ones(MEMBERS),
            "tempered at random": np.array(TEMPERATURES)[places],
            "each at its own T": np.array([own[member] for member in members]),
        }
        figures = {
            "members alone": mean([world.figures[m]["best of 4"] for m in members]),
            "accuracy": mean([world.figures[m]["accuracy"] for m in members]),
            "ece": mean([world.tempered[m][place]["ece"] for m, place in zip(members, places)]),
        }
        for label, temperatures in by_label.items():
            mixed = np.mean([r / T for r, T in zip(rewards, temperatures)], 0)
            figures[label] = float((chosen(few, mixed.argmax(1)) - few.mean(1)).mean())
        mixtures.append(figures)
    return mixtures


# ---- drawings ------------------------------------------------------------------------------------


def draw(grid: Grid, worlds: Sequence[WorldOfModels]) -> None:
    """Figure 7 with known truth, and best of n."""
    if not plots.available():
        return
    panels = []
    for name, label in (("ece", "ECE"), ("accuracy", "accuracy"), ("tau", "rank correlation")):
        points = {
            f"world {world.seed}": (world.column(name), world.column("gain")) for world in worlds
        }
        panels.append((label, "gain of the policy (σ)", points))
    plots.draw_points(panels, grid.output / "figures" / "figure7.png")
    counts = powers_of_two(worlds[0].truth.many.shape[1])
    curves = {"by r*": ideal_curves(worlds), "mean model": mean_curves(worlds)}
    lines = {
        label: [(n, *over_seeds(values[:, place])) for place, n in enumerate(counts)]
        for label, values in curves.items()
    }
    grid.draw_curves("best-of-n", lines, "n", "worth of the best of n (log-odds)")
