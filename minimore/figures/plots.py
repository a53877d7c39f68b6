"""Figures, if matplotlib is installed (the extra `plots`): reliability, margins, weights."""

from pathlib import Path
from typing import Any

import numpy as np

from ..calibration import pair_ece, pair_reliability
from ..files import written_whole
from ..options import require

# Okabe and Ito's colours, which colour-blind readers can tell apart.
PALETTE = (
    *("#0072B2", "#E69F00", "#009E73", "#CC79A7"),
    *("#56B4E9", "#D55E00", "#F0E442", "#000000"),
)
MARKERS = "osD^vPX*"
LINES = ("-", "--", "-.", ":")  # so that a grey print still tells sources apart


def available() -> bool:
    """Whether matplotlib is installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def require_matplotlib(what: str) -> None:
    """Refuse what needs matplotlib where it is not installed (InputError)."""
    require(available(), f"{what} matplotlib: pip install 'minimore[plots]'")


def _figure(columns: float, rows: int = 1) -> Any:
    """An empty figure, as large as so many panels side by side and below each other.

    Raises InputError without matplotlib.
    """
    require_matplotlib("figures need")
    from matplotlib.figure import Figure

    return Figure(figsize=(3.2 * columns, 3.0 * rows), layout="constrained")  # inches


def draw_margins(
    margins: dict[str, np.ndarray],
    directory: Path,
    outcomes: dict[str, np.ndarray] | None = None,
    method: str = "",
) -> Path:
    """Reliability diagrams and histograms of margins, a column for every source.

    The title names the method or the model, and above each column stands its ECE. A source has a
    colour, a marker and a kind of line of its own, and all histograms have the same bins.

    Top: the paper's bins, which hold both orders of every pair, each with its 95% interval, as of
    one vote a pair. outcomes: of every pair the share of votes for its chosen response, by default
    1. Where pairs have several votes, the intervals are too wide.
    """
    figure = _figure(len(margins), 2)
    figure.suptitle(_plain(method))
    axes = figure.subplots(2, len(margins), squeeze=False)
    edges = _bins(np.concatenate(list(margins.values())))
    for k, (name, m) in enumerate(margins.items()):
        of_pairs = outcomes[name] if outcomes else 1.0
        bins = pair_reliability(m, outcomes=of_pairs)
        top, bottom = axes[0, k], axes[1, k]
        is_filled = bins.count > 0
        shares = bins.accuracy[is_filled]
        low, high = _wilson(shares, bins.count[is_filled])
        top.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
        top.errorbar(
            bins.confidence[is_filled],
            shares,
            (shares - low, high - shares),
            linestyle=LINES[k % len(LINES)],
            marker=MARKERS[k % len(MARKERS)],
            color=PALETTE[k % len(PALETTE)],
            markersize=4,
            capsize=2,
        )
        top.set(
            title=f"{_plain(name)}, ECE {pair_ece(m, outcomes=of_pairs):.3f}",
            xlabel="predicted probability",
            ylabel="share that came true",
            xlim=(0, 1),
            ylim=(0, 1),
        )
        bottom.hist(m, bins=edges, color=PALETTE[k % len(PALETTE)])
        bottom.axvline(0, color="black", linewidth=0.8)
        bottom.set(xlabel="margin (chosen minus rejected)", ylabel="pairs")
    return _save(figure, directory / "margins.png")


def draw_weights(weights: dict[str, list[float]], directory: Path) -> Path:
    """The weight of every source in every step: dots, and their average over a tenth of the run."""
    figure = _figure(2)
    axis = figure.subplots()
    for k, (name, values) in enumerate(weights.items()):
        colour, window = PALETTE[k % len(PALETTE)], max(1, len(values) // 10)
        average = np.convolve(values, np.ones(window) / window, "valid")
        steps = np.arange(1, len(values) + 1)
        axis.plot(steps, values, ".", color=colour, alpha=0.25, markersize=2)
        axis.plot(
            np.arange(len(average)) + (window + 1) / 2,
            average,
            LINES[k % len(LINES)],
            color=colour,
            label=_plain(name),
        )
    axis.axhline(1 / len(weights), color="grey", linewidth=0.8)
    smoothing = f"dots: single steps; lines: mean of {window} steps"
    axis.set(title=smoothing, xlabel="step", ylabel="weight (lambda)", ylim=(0, None))
    axis.legend(fontsize="small", ncols=len(weights), loc="upper center")
    return _save(figure, directory / "weights.png")


def draw_boxes(margins: dict[str, dict[str, np.ndarray]], path: Path) -> Path:
    """Box plots of the margins, one panel a source and one box a scheme.

    margins: {source: {scheme: (N,)}}. Whiskers end at 1.5 interquartile ranges.
    """
    figure = _figure(len(margins))
    panels = figure.subplots(1, len(margins), sharey=True, squeeze=False)[0]
    for k, (panel, (name, schemes)) in enumerate(zip(panels, margins.items())):
        panel.boxplot(
            list(schemes.values()),
            orientation="vertical",
            flierprops={"markersize": 1},
            medianprops={"color": PALETTE[k % len(PALETTE)]},
        )
        labels = [_plain(scheme) for scheme in schemes]
        places = np.arange(1, len(schemes) + 1)
        panel.set_xticks(places, labels, rotation=90, fontsize="x-small")
        panel.set(title=_plain(name), ylabel="margin (chosen minus rejected)" if k == 0 else "")
        panel.axhline(0, color="grey", linewidth=0.8)
    return _save(figure, path)


def draw_schemes(schemes: dict[str, dict], names: list[str], path: Path) -> Path:
    """Accuracy (top) and ECE (bottom) of every scheme on every source.

    schemes: {scheme: {rate: [(mean, half interval) of each source]}}.
    """
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


def draw_curves(
    curves: dict[str, list[tuple]], across: str, up: str, path: Path, title: str = ""
) -> Path:
    """Lines through points (x, mean, half interval), one line a label."""
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
    axis.set(xlabel=across, ylabel=up, title=_plain(title))
    axis.grid(axis="y", color="0.9")
    axis.legend(fontsize="small")
    return _save(figure, path)


def draw_points(panels: list[tuple[str, str, dict[str, tuple]]], path: Path) -> Path:
    """Panels side by side: (across, up, {label: (x, y)}), points of one kind a label."""
    figure = _figure(1.2 * len(panels))
    for axis, (across, up, points) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels
    ):
        for k, (label, (x, y)) in enumerate(points.items()):
            axis.plot(
                x,
                y,
                MARKERS[k % len(MARKERS)],
                color=PALETTE[k % len(PALETTE)],
                markersize=4,
                alpha=0.7,
                label=_plain(label),
            )
        axis.set(xlabel=across, ylabel=up)
        axis.grid(color="0.9")
    figure.axes[0].legend(fontsize="x-small")
    return _save(figure, path)


def draw_lengths(lengths: dict[str, tuple[np.ndarray, np.ndarray]], unit: str, path: Path) -> Path:
    """Lengths of responses, and how often the longer one wins, a column for every file.

    lengths: {name: (chosen, rejected)}, each (N,). Bottom: pairs in five equal parts by how much
    their lengths differ, each with its 95% interval.
    """
    figure = _figure(len(lengths), 2)
    axes = figure.subplots(2, len(lengths), squeeze=False)
    for k, (name, (chosen, rejected)) in enumerate(lengths.items()):
        top, bottom = axes[0, k], axes[1, k]
        edges = np.geomspace(1, max(2, chosen.max(), rejected.max()), 30)
        for side, of_side, style in (("chosen", chosen, "-"), ("rejected", rejected, "--")):
            top.hist(np.maximum(of_side, 1), edges, histtype="step", linestyle=style, label=side)
        top.set(title=_plain(name), xlabel=f"{unit} of a response", ylabel="pairs", xscale="log")
        top.legend(fontsize="x-small")
        difference = (chosen - rejected)[chosen != rejected]
        parts = np.array_split(difference[np.argsort(np.abs(difference), kind="stable")], 5)
        filled = [part for part in parts if len(part)]
        at = np.array([np.abs(part).mean() for part in filled])
        shares = np.array([(part > 0).mean() for part in filled])
        low, high = _wilson(shares, np.array([len(part) for part in filled]))
        bottom.errorbar(
            at, shares, (shares - low, high - shares), fmt="o-", color=PALETTE[0], capsize=2
        )
        bottom.axhline(0.5, color="grey", linewidth=0.8)
        bottom.set(xlabel=f"difference in {unit}", ylabel="the longer wins", ylim=(0, 1))
    return _save(figure, path)


def _wilson(share: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ends of the 95% interval of a share of `count` pairs, taken as independent.

    Source: Wilson 1927.
    """
    z = 1.96
    middle = share + z**2 / (2 * count)
    half = z * np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    scale = 1 + z**2 / count
    low, high = (middle - half) / scale, (middle + half) / scale
    # At a share of 0 or 1 an end equals the share but for rounding, and no bar may be negative.
    return np.minimum(low, share), np.maximum(high, share)


def _plain(name: str) -> str:
    """A source's name as it is, not as mathematics."""
    return name.replace("$", r"\$")


def _bins(values: np.ndarray, count: int = 40) -> np.ndarray:
    """Edges of equal bins that hold all values, also where these are all the same."""
    low, high = values.min(), values.max()
    room = max(high - low, 1e-6 * max(abs(low), abs(high)), 1e-6) / count
    return np.linspace(low - room, high + room, count + 1)


def _save(figure: Any, path: Path) -> Path:
    """Write the figure whole or not at all."""
    with written_whole(path) as unfinished:
        figure.savefig(unfinished, dpi=120, format="png")
    return path
