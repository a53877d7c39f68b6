"""Figures, if matplotlib is installed (the extra `plots`): reliability, margins, weights over time."""

import os
from pathlib import Path

import numpy as np

from .calibration import pair_reliability
from .files import beside
from .options import InputError

PALETTE = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#D55E00",
    "#F0E442",
    "#000000",
)  # Okabe and Ito
MARKERS = "osD^vPX*"
LINES = ("-", "--", "-.", ":")  # so that a grey print still tells sources apart


def available() -> bool:
    """Whether matplotlib is installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def _figure(columns, rows=1):
    if not available():
        raise InputError("figures need matplotlib: pip install 'minimore[plots]'")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * columns, 3.0 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def draw_margins(margins: dict[str, np.ndarray], directory: Path) -> Path:
    """Per source: reliability diagram (top, the paper's both-orders bins, 95% intervals of each) and histogram of margins (bottom)."""
    figure = _figure(len(margins), 2)
    axes = figure.subplots(2, len(margins), squeeze=False)
    for k, (name, m) in enumerate(margins.items()):
        r, top, bottom = pair_reliability(m), axes[0, k], axes[1, k]
        filled = r.count > 0
        top.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
        low, high = _wilson(r.accuracy[filled], r.count[filled])
        top.errorbar(
            r.confidence[filled],
            r.accuracy[filled],
            (r.accuracy[filled] - low, high - r.accuracy[filled]),
            fmt="o-",
            color=PALETTE[k % len(PALETTE)],
            markersize=4,
            capsize=2,
        )
        top.set(
            title=_plain(name),
            xlabel="predicted probability",
            ylabel="share that came true",
            xlim=(0, 1),
            ylim=(0, 1),
        )
        bottom.hist(m, bins=_bins(m), color=PALETTE[k % len(PALETTE)])
        bottom.axvline(0, color="black", linewidth=0.8)
        bottom.set(xlabel="margin (chosen minus rejected)", ylabel="pairs")
    return _save(figure, directory / "margins.png")


def draw_weights(weights: dict[str, list[float]], directory: Path) -> Path:
    """The weight of every source over the steps of a run: dots, and their moving average over a tenth of the run."""
    figure = _figure(2)
    axis = figure.subplots()
    for k, (name, values) in enumerate(weights.items()):
        colour, window = PALETTE[k % len(PALETTE)], max(1, len(values) // 10)
        average = np.convolve(values, np.ones(window) / window, "valid")
        axis.plot(
            np.arange(1, len(values) + 1), values, ".", color=colour, alpha=0.25, markersize=2
        )
        axis.plot(
            np.arange(len(average)) + (window + 1) / 2,
            average,
            LINES[k % len(LINES)],
            color=colour,
            label=_plain(name),
        )
    axis.axhline(1 / len(weights), color="grey", linewidth=0.8)
    axis.set(xlabel="step", ylabel="weight (lambda)", ylim=(0, None))
    axis.legend(fontsize="small", ncols=len(weights), loc="upper center")
    return _save(figure, directory / "weights.png")


def _wilson(share, count):
    """95% interval of a share of `count` pairs, taken as independent: Wilson 1927."""
    z2 = 1.96**2
    middle, half = (
        share + z2 / (2 * count),
        1.96 * np.sqrt(share * (1 - share) / count + z2 / (4 * count**2)),
    )
    return np.minimum((middle - half) / (1 + z2 / count), share), np.maximum(
        (middle + half) / (1 + z2 / count), share
    )


def draw_boxes(margins: dict[str, dict[str, np.ndarray]], path: Path) -> Path:
    """Box plots of the margins, one panel a source and one box a scheme: {source: {scheme: (N,)}}. Whiskers end at 1.5 interquartile ranges."""
    figure = _figure(len(margins))
    for k, (axis, (name, schemes)) in enumerate(
        zip(figure.subplots(1, len(margins), sharey=True, squeeze=False)[0], margins.items())
    ):
        axis.boxplot(
            list(schemes.values()),
            orientation="vertical",
            flierprops={"markersize": 1},
            medianprops={"color": PALETTE[k % len(PALETTE)]},
        )
        axis.set_xticks(
            np.arange(1, len(schemes) + 1),
            [_plain(s) for s in schemes],
            rotation=90,
            fontsize="x-small",
        )
        axis.set(title=_plain(name), ylabel="margin (chosen minus rejected)" if k == 0 else "")
        axis.axhline(0, color="grey", linewidth=0.8)
    return _save(figure, path)


def draw_schemes(schemes: dict[str, dict], names: list[str], path: Path) -> Path:
    """Accuracy (top) and ECE (bottom) of every scheme on every source: {scheme: {rate: [(mean, half interval) per source]}}."""
    figure = _figure(2.5, 2)
    for axis, rate in zip(figure.subplots(2, 1, sharex=True), ("accuracy", "ece")):
        for k, (scheme, rates) in enumerate(schemes.items()):
            mean, half = np.array(rates[rate]).T
            place = np.arange(len(names)) + 0.7 * (k / max(1, len(schemes) - 1) - 0.5)
            axis.errorbar(
                place,
                mean,
                np.nan_to_num(half),
                fmt=MARKERS[k % len(MARKERS)],
                color=PALETTE[k % len(PALETTE)],
                markersize=5,
                linewidth=1,
                label=_plain(scheme),
                markerfacecolor="white" if k >= len(PALETTE) else None,
            )
        axis.set(
            ylabel={"accuracy": "accuracy", "ece": "ECE"}[rate],
            xticks=np.arange(len(names)),
            xticklabels=[_plain(n) for n in names],
        )
        axis.grid(axis="y", color="0.9")
    figure.axes[0].legend(
        fontsize="x-small", ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0)
    )
    return _save(figure, path)


def draw_curves(curves: dict[str, list[tuple]], across: str, up: str, path: Path) -> Path:
    """Lines through (x, mean, half interval), one a label."""
    figure = _figure(2)
    axis = figure.subplots()
    for k, (label, points) in enumerate(curves.items()):
        x, mean, half = np.array(points, dtype=float).T
        axis.errorbar(
            x,
            mean,
            np.nan_to_num(half),
            color=PALETTE[k % len(PALETTE)],
            linestyle=LINES[k % len(LINES)],
            marker=MARKERS[k % len(MARKERS)],
            markersize=4,
            capsize=2,
            label=_plain(label),
        )
    axis.set(xlabel=across, ylabel=up)
    axis.grid(axis="y", color="0.9")
    axis.legend(fontsize="small")
    return _save(figure, path)


def _plain(name):
    """A source's name as it is, not as mathematics."""
    return name.replace("$", r"\$")


def _bins(values, count=40):
    """Edges of equal bins that hold all values, also where these are all the same."""
    low, high = values.min(), values.max()
    room = max(high - low, 1e-6 * max(abs(low), abs(high)), 1e-6) / count
    return np.linspace(low - room, high + room, count + 1)


def _save(figure, path):
    made, unfinished = not path.parent.exists(), beside(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(unfinished, dpi=120, format="png")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
        if made and not any(path.parent.iterdir()):
            path.parent.rmdir()
    return path
