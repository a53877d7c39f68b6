"""Curves: one page on trainings, as small multiples. Needs matplotlib (the extra `plots`).

    all sources together    loss, accuracy, ECE, learning rate
    a row for each source   loss, accuracy, margin, weight, cosine, ECE     a column for each figure

On a page of one run a colour stands for a kind of pairs, and on a page of several for a run. What
nobody logged has no panel.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files import written_whole
from .history import ALL, KINDS, History, Series, What
from .plots import LINES, PALETTE, require_matplotlib

OVERVIEW = ("loss", "accuracy", "ECE", "learning rate")
COLUMNS = ("loss", "accuracy", "margin", "weight", "head_weight", "cosine", "ECE")
TITLES = {  # if not the figure itself
    "weight": "weight λ",
    "head_weight": "λ by the head alone",
    "cosine": "mean cosine with others",
}
# Where a model stands that knows nothing: lines to compare with.
KNOWS_NOTHING = {"loss": math.log(2), "accuracy": 0.5, "margin": 0.0, "cosine": 0.0}
WEIGHTS = ("weight", "head_weight")
FROM_ZERO = (*WEIGHTS, "ECE", "learning rate")  # figures whose axis begins at 0
NAMES = {"training": "training", "validation": "held out", "test": "TEST files"}  # of KINDS
MARKS = {"validation": "o", "test": "s"}  # those of the test are hollow
GREY, PALE = "0.35", "0.8"
WIDTH = 14.0  # inches of the page
MOST_RUNS = len(PALETTE) * len(LINES)  # that colours and kinds of lines tell apart


def draw_page(histories: Sequence[History], stem: Path) -> list[Path]:
    """Draw the page of some runs, and write it as stem.png and stem.svg.

    The same logs make the same bytes. Raises InputError without matplotlib.
    """
    require_matplotlib("this page needs")
    from matplotlib.figure import Figure

    sources = list(dict.fromkeys(name for history in histories for name in history.sources))
    heights = [2.6, 1.5 * len(sources)] if sources else [2.6]  # inches
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.9), layout="constrained")
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    page = Page(histories)
    page.draw_overview(parts[0])
    if sources:
        page.draw_sources(parts[1], sources)
    page.explain_marks(figure)
    if len(histories) == 1:
        name = shortened(histories[0].run, 100)
        figure.suptitle(name, x=0.01, ha="left", size=12, weight="bold", parse_math=False)
    return save_page(figure, stem)


class Page:
    """What all panels of a page have in common: the runs, and how they are drawn.

    window: over how many steps lines are smoothed, a twentieth of the longest run, an odd number.
    """

    def __init__(self, histories: Sequence[History]):
        self.histories = histories
        self.window = 2 * (max(history.steps for history in histories) // 40) + 1
        self.is_alone = len(histories) == 1

    # ---- parts of the page

    def draw_overview(self, part: Any) -> None:
        """All sources together; what has a colour is named where its loss ends."""
        figures = [figure for figure in OVERVIEW if self.shows(figure)]
        for panel, figure in zip(part.subplots(1, len(figures), squeeze=False)[0], figures):
            self.draw_panel(panel, ALL, figure)
            is_mean = self.shows("weight") and figure in ("accuracy", "ECE")
            set_title(panel, f"{figure}, mean over sources" if is_mean else figure, size=10)
            panel.set_xlabel("step", fontsize=8, color=GREY)
            if figure in FROM_ZERO:
                panel.set_ylim(bottom=0)
            if figure == "loss":
                self.name_lines(panel)

    def draw_sources(self, part: Any, sources: Sequence[str]) -> None:
        """A row for each source; a column has one scale."""
        figures = [figure for figure in COLUMNS if self.shows(figure)]
        shape = (len(sources), len(figures))
        panels = part.subplots(*shape, sharex=True, sharey="col", squeeze=False)
        for row, source in zip(panels, sources):
            for panel, figure in zip(row, figures):
                self.draw_panel(panel, source, figure)
            label = row[0].set_ylabel(shortened(source), parse_math=False, weight="bold")
            label.set(rotation=0, ha="right", va="center", fontsize=10)
        for panel, figure in zip(panels[0], figures):
            smoothing = f", mean of {self.window} steps" if figure in WEIGHTS else ""
            set_title(panel, TITLES.get(figure, figure) + smoothing, size=9)
            if figure in FROM_ZERO:  # only now: it fixes the other end, for the whole column
                panel.set_ylim(bottom=0)
        for panel in panels[-1]:
            panel.set_xlabel("step", fontsize=8, color=GREY)

    def shows(self, figure: str) -> bool:
        """Whether a run has something to show of a figure; one source alone has no weight."""
        return any(
            history.has(figure) and (figure != "weight" or len(history.sources) > 1)
            for history in self.histories
        )

    # ---- one panel

    def draw_panel(self, panel: Any, source: str, figure: str) -> None:
        """One figure of one source, or of all together, of every run."""
        if figure in KNOWS_NOTHING and self.histories[0].sources:
            panel.axhline(KNOWS_NOTHING[figure], color=PALE, linewidth=0.8, zorder=0)
        for number, history in enumerate(self.histories):
            for kind in KINDS:
                series = history.series.get(What(kind, source, figure))
                if series is not None and kind == "training":
                    self.draw_training(panel, series, figure, number)
                elif series is not None:
                    self.draw_report(panel, series, kind, number)
            if history.best is not None and What("validation", source, figure) in history.series:
                colour, _ = self.style_of("validation", number)
                panel.axvline(history.best, color=colour, linewidth=0.9, linestyle=":")
        tidy(panel)

    def draw_training(self, panel: Any, series: Series, figure: str, number: int) -> None:
        """A smoothed line through the steps; of a run alone its single steps as dots, too.

        A learning rate is known exactly, so it is not smoothed.
        """
        colour, line = self.style_of("training", number)
        is_exact = figure == "learning rate" or self.window == 1
        if self.is_alone and not is_exact:
            alpha = min(0.3, 300 / len(series.steps))  # many dots are fainter than few
            dots = {"markersize": 3.5, "markeredgewidth": 0, "alpha": alpha, "rasterized": True}
            panel.plot(*series, ".", color=colour, **dots)
        values = series.values if is_exact else series.smoothed(self.window)
        panel.plot(series.steps, values, line, color=colour, linewidth=1.4)

    def draw_report(self, panel: Any, series: Series, kind: str, number: int) -> None:
        """Marks for what was measured on pairs that are not trained on."""
        colour, line = self.style_of(kind, number)
        face = "white" if kind == "test" else colour
        marks = {"marker": MARKS[kind], "markersize": 3.5, "markerfacecolor": face}
        panel.plot(*series, line, color=colour, linewidth=0.7, **marks)

    def style_of(self, kind: str, number: int) -> tuple[str, str]:
        """Colour and kind of line: by the kind of pairs for a run alone, else by the run."""
        place = KINDS.index(kind) if self.is_alone else number
        return PALETTE[place % len(PALETTE)], LINES[place // len(PALETTE)]

    # ---- words

    def name_lines(self, panel: Any) -> None:
        """The name of every line beside its end, one above the other where they meet."""
        low, high = panel.get_ylim()
        ends, names = [], []
        for number, history in enumerate(self.histories):
            for kind in KINDS if self.is_alone else ("training",):
                series = history.series.get(What(kind, ALL, "loss"))
                if series is not None:
                    values = series.smoothed(self.window) if kind == "training" else series.values
                    ends.append((values[-1] - low) / (high - low))
                    name = NAMES[kind] if self.is_alone else shortened(history.run)
                    names.append((name, self.style_of(kind, number)[0]))
        style = {"transform": panel.transAxes, "va": "center", "size": 9, "parse_math": False}
        for (name, colour), height in zip(names, spread(ends, gap=0.08)):
            panel.text(1.02, height, name, color=colour, **style)

    def explain_marks(self, figure: Any) -> None:
        """One line below the page: what lines, dots and marks are."""
        kinds = {what.kind for history in self.histories for what in history.series}
        steps = f"mean of {self.window} steps" if self.window > 1 else "every step"
        marks = [mark(f"training, {steps}")]
        if self.is_alone and self.window > 1:
            marks.append(mark("one step", linestyle="", marker=".", alpha=0.4))
        if "validation" in kinds:
            marks.append(mark("prompts held out for validation", marker="o"))
        if "test" in kinds:
            marks.append(mark("TEST files", marker="s", markerfacecolor="white"))
        bests = [history.best for history in self.histories if history.best is not None]
        if bests:
            which = f": {bests[0]}" if self.is_alone else ""
            marks.append(mark(f"best step by validation{which}", linestyle=":"))
        if self.histories[0].sources:
            marks.append(mark("a model that knows nothing", color=PALE))
        style = {"frameon": False, "fontsize": 8, "labelcolor": GREY, "ncols": len(marks)}
        figure.legend(handles=marks, loc="outside lower left", **style)


def mark(label: str, **style: Any) -> Any:
    """A line of the explanation: grey, unless the style says otherwise."""
    from matplotlib.lines import Line2D

    line = Line2D([], [], label=label, color=GREY, linewidth=1, markersize=4)
    line.set(**style)
    return line


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Heights in the same order, moved up as far as needed to be at least `gap` apart.

    >>> spread([0.5, 0.75, 0.5], gap=0.125)
    [0.5, 0.75, 0.625]
    """
    moved = [0.0] * len(heights)
    lowest = -math.inf
    for place in sorted(range(len(heights)), key=heights.__getitem__):
        moved[place] = max(heights[place], lowest)
        lowest = moved[place] + gap
    return moved


def shortened(name: str, most: int = 24) -> str:
    """A name of at most so many characters: its end, where paths differ."""
    return name if len(name) <= most else "…" + name[-(most - 1) :]


def set_title(panel: Any, title: str, size: float) -> None:
    """A title at the left of a panel."""
    panel.set_title(title, fontsize=size, loc="left", color="0.15")


def tidy(panel: Any) -> None:
    """Two spines and few ticks."""
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color(PALE)
    panel.tick_params(labelsize=7, color=PALE, labelcolor=GREY, length=2)
    panel.yaxis.set_major_formatter("{x:g}")
    panel.locator_params(nbins=4, axis="y")
    panel.locator_params(nbins=5, axis="x", integer=True)
    panel.margins(x=0.02)


# ---- to the disk ---------------------------------------------------------------------------------


def save_page(figure: Any, stem: Path) -> list[Path]:
    """Write the page as PNG and as SVG, each whole or not at all; neither holds a date."""
    from matplotlib import rc_context

    paths = [stem.with_name(f"{stem.name}.{suffix}") for suffix in ("png", "svg")]
    for path in paths:
        metadata = {"Date": None} if path.suffix == ".svg" else None
        with written_whole(path) as unfinished, rc_context({"svg.hashsalt": "minimore"}):
            figure.savefig(unfinished, dpi=144, format=path.suffix[1:], metadata=metadata)
    return paths
