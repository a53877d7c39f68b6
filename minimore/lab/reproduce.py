"""The paper's experiments: run the grid, then tables with intervals over seeds, beside the paper's numbers. The `reproduce` verb.

K sources, S seeds, N test pairs.
"""

import json
import math
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np

from .. import plots
from ..calibration import accuracy, fit_temperature, negative_log_likelihood, pair_ece
from ..files import read_json, write_json, write_text
from ..options import InputError
from ..uncertainty import (
    CLEAR,
    debiased_ece,
    detectable,
    noise_floor,
    over_seeds,
    prompt_sums,
    resample,
)
from . import published as paper
from .grid import (
    PROTOCOLS,
    REGIMES,
    ReproduceOptions,
    check_plan,
    hours,
    is_finished,
    margins_of,
    run_cell,
)


def reproduce(o: ReproduceOptions) -> int:
    """Plan, run, and print the experiment's table; returns the exit code."""
    cells, out = check_plan(o), Path(o.output)
    wanted = json.loads(
        json.dumps(
            {
                k: v
                for k, v in asdict(o).items()
                if k
                not in (
                    "output",
                    "dry_run",
                    "device",
                    "micro_tokens",
                    "recompute",
                    "memory",
                    "seeds",
                )
            }
        )
    )
    if out.exists() and not (out / "grid.json").is_file():
        raise InputError(f"--output {out}: exists already and holds no grid; choose another name")
    if out.exists() and (given := read_json(out / "grid.json")) != wanted:
        different = next(k for k in (*wanted, *given) if given.get(k) != wanted.get(k))
        raise InputError(
            f"--output {out}: holds a grid with {different} {given.get(different)!r}, not {wanted.get(different)!r}; choose another name, or give the same options"
        )
    finished = [is_finished(out, cell) for cell in cells]
    print(
        f"{o.experiment}: {len(cells)} runs, {sum(finished)} of them finished; protocol {o.protocol}: {PROTOCOLS[o.protocol]}"
    )
    print(
        f"about {hours(o, [c for c, done in zip(cells, finished) if not done]):.2f} hours on this machine, by half the speed of its matrix products and 20 ms a step"
    )
    if o.dry_run:
        print(
            "\n".join(
                f"  {'finished' if done else 'to do   '}  {cell.name}"
                for cell, done in zip(cells, finished)
            )
        )
        return 0
    if not out.exists():
        out.mkdir(parents=True)
        write_json(out / "grid.json", wanted)
    for i, cell in enumerate(cells, 1):
        began, code = time.monotonic(), run_cell(out, cell)
        if code:
            return code
        if not finished[i - 1]:
            print(f"[{i}/{len(cells)}] {cell.name}: {time.monotonic() - began:.0f} s", flush=True)
    results = {tuple(cell.at.items()): margins_of(out, cell, o) for cell in cells}
    text = REPORTS[o.experiment](o, cells, results, out)
    write_json(out / "report.json", every_figure(cells, results))
    print("\n" + text)
    write_text(out / "report.txt", text + "\n")
    print(
        f"\nwritten to {out}/report.txt, every figure to report.json"
        + (f", drawings to {out}/figures" if plots.available() else "")
    )
    return 0


# ---- tables ------------------------------------------------------------------------------------------------------------------


def cell_text(values, pairs: float = 0.0) -> str:
    """Mean over seeds and half the width of its 95% interval: of seeds where there are three or more, and of test pairs if given."""
    mean, half = over_seeds(values)
    half = math.hypot(0 if math.isnan(half) else half, pairs)
    return f"{mean:.3f}" + (f" ± {half:.3f}" if half else "")


def difference_text(values, pairs: float = 0.0, may_flag: bool = True) -> str:
    """A difference seed by seed, with a ! where there are at least three seeds and its 95% interval excludes 0."""
    mean, half = over_seeds(values)
    flag = "!" if may_flag and len(values) > 2 and abs(mean) > math.hypot(half, pairs) else " "
    return cell_text(values, pairs).replace(f"{mean:.3f}", f"{mean:+.3f}", 1) + flag


def noise_of_pairs(rows: list[dict], base: list[dict] | None = None) -> dict:
    """Half a 95% interval of the mean over seeds, less that of `base`, as test pairs are resampled by prompt: {rate: (K,)}.

    In the world every seed has test pairs of its own, so that seeds show this noise; on real files they share theirs.
    """
    halves = {"accuracy": [], "ece less noise": []}
    for name in rows[0]["margins"]:
        of = lambda some: [prompt_sums(row["margins"][name], row["prompts"][name]) for row in some]
        samples = of(rows) + of(base or [])
        for rate, found in zip(halves, resample(samples)):
            mean = found[: len(rows)].mean(0) - (found[len(rows) :].mean(0) if base else 0)
            low, high = np.quantile(mean, [0.025, 0.975])
            halves[rate].append((high - low) / 2)
    return {rate: np.array(h) for rate, h in halves.items()}


def figures_of(margins: dict[str, np.ndarray], prompts: dict[str, np.ndarray]) -> dict:
    """Accuracy, NLL, ECE, its floor and what is left of it without noise, of every source (K,)."""
    each = lambda f: np.array([f(m, prompts[name]) for name, m in margins.items()])
    return {
        "accuracy": each(lambda m, _: accuracy(m)),
        "nll": each(lambda m, _: negative_log_likelihood(m)),
        "ece": each(lambda m, _: pair_ece(m)),
        "ece less noise": each(debiased_ece),
        "floor": each(lambda m, p: noise_floor(m, p, replicates=100).mean),
    }


def with_derived(found: dict[str, dict]) -> dict[str, dict]:
    """{scheme: {source: (margins, test, prompt)}} of one seed -> {scheme: {source: test margins}}, with what needs no training of its own.

    top: each source by its own single model. averaging: the mean of the single models' margins, as they are and each divided by its own
    root mean square on the held-out pairs (on the test pairs if none are held out). + T: one temperature for all, fitted on the held-out pairs.
    """
    test = {
        scheme: {name: m[t] for name, (m, t, _) in sources.items()}
        for scheme, sources in found.items()
    }
    held = {
        scheme: np.concatenate([m[~t] for m, t, _ in sources.values()])
        for scheme, sources in found.items()
    }
    singles = {s.removeprefix("single "): s for s in found if s.startswith("single ")}
    derived = {}
    if singles:
        scale = {
            s: math.sqrt(np.mean(held[s] ** 2))
            if len(held[s])
            else math.sqrt(np.mean(np.concatenate(list(test[s].values())) ** 2))
            for s in singles.values()
        }
        names = list(singles)
        derived["top"] = {name: test[singles[name]][name] for name in names}
        derived["averaging"] = {
            name: np.mean([test[s][name] for s in singles.values()], 0) for name in names
        }
        derived["averaging scaled"] = {
            name: np.mean([test[s][name] / scale[s] for s in singles.values()], 0) for name in names
        }
    for scheme in test:
        if scheme != "raw" and not scheme.startswith("single ") and len(held[scheme]):
            temperature = fit_temperature(held[scheme])
            if 0 < temperature < math.inf:
                derived[f"{scheme} + T"] = {
                    name: m / temperature for name, m in test[scheme].items()
                }
    return test | derived


def by_seed(cells, results, **at) -> dict[str, list[dict]]:
    """{scheme: [figures of each seed]} of the cells at one place of the grid, derived schemes included."""
    seeds = sorted({cell.at["seed"] for cell in cells})
    schemes = {}
    for seed in seeds:
        here = {
            cell.at["scheme"]: results[tuple(cell.at.items())]
            for cell in cells
            if all(cell.at.get(k) == v for k, v in (at | dict(seed=seed)).items())
        }
        prompts = (
            {name: prompt[t] for name, (_, t, prompt) in next(iter(here.values())).items()}
            if here
            else {}
        )
        for scheme, margins in with_derived(here).items():
            schemes.setdefault(scheme, []).append(
                figures_of(margins, prompts) | {"margins": margins, "prompts": prompts}
            )
    return {scheme: rows for scheme, rows in schemes.items() if len(rows) == len(seeds)}


def every_figure(cells, results) -> list[dict]:
    """What the tables are made of: one entry a place of the grid, scheme and seed, with accuracy, ECE and NLL of each source."""
    found = []
    for place in {
        json.dumps({k: v for k, v in cell.at.items() if k not in ("scheme", "seed")}): None
        for cell in cells
    }:
        for scheme, rows in by_seed(cells, results, **json.loads(place)).items():
            found += [
                json.loads(place)
                | {"scheme": scheme, "seed": seed}
                | {
                    rate: dict(zip(row["margins"], row[rate].tolist()))
                    for rate in ("accuracy", "ece", "ece less noise", "floor", "nll")
                }
                for seed, row in enumerate(rows)
            ]
    return found


def is_clear(*schemes: list[dict]) -> bool:
    """Whether the mean ECE of any of these schemes stands clear of its floor; ECEs that all lie near theirs are not ranked."""
    return any(
        np.mean([row["ece"] for row in rows]) >= CLEAR * np.mean([row["floor"] for row in rows])
        for rows in schemes
    )


def scheme_table(schemes: dict[str, list[dict]], names: list[str], real: bool = False) -> str:
    """One line a scheme: accuracy of each source, mean, worst; ECE mean and worst, and its floor; differences from uniform, seed by seed.

    real: seeds share their test pairs, whose noise is added to that of seeds where it is known: not for worst sources and NLL.
    """
    columns = [
        *(f"{n[:14]:>15}" for n in names),
        f"{'mean':>16}",
        f"{'worst':>16}",
        f" |{'ECE mean':>15}{'worst':>15}  floor",
        " | minus uniform:  accuracy        ECE less noise  NLL",
    ]
    lines, base = [f"{'':20}" + "".join(columns)], schemes.get("uniform")
    none = {"accuracy": np.zeros(len(names)), "ece less noise": np.zeros(len(names))}
    of_mean = lambda halves: float(np.sqrt((halves**2).sum()) / len(halves))
    for scheme, rows in schemes.items():
        if scheme.startswith("single "):
            continue
        each = {
            rate: np.array([row[rate] for row in rows])
            for rate in ("accuracy", "ece less noise", "nll", "ece")
        }  # (S, K)
        noise = noise_of_pairs(rows) if real else none
        line = f"{scheme:20}" + "".join(
            f"{cell_text(column, half):>15}"
            for column, half in zip(each["accuracy"].T, noise["accuracy"])
        )
        line += f"{cell_text(each['accuracy'].mean(1), of_mean(noise['accuracy'])):>16}{cell_text(each['accuracy'].min(1)):>16} |"
        line += f"{cell_text(each['ece'].mean(1), of_mean(noise['ece less noise'])):>15}{cell_text(each['ece'].max(1)):>15}  {np.mean([row['floor'] for row in rows]):.3f} | "
        if base and scheme != "uniform":
            noise, line = noise_of_pairs(rows, base) if real else none, line + " " * 16
            for rate, allowed in (
                ("accuracy", True),
                ("ece less noise", is_clear(rows, base)),
                ("nll", not real),
            ):
                gap = [row[rate].mean() - b[rate].mean() for row, b in zip(rows, base)]
                line += f"{difference_text(gap, of_mean(noise[rate]) if rate in noise else 0.0, allowed):16}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def cross_table(schemes, names) -> str:
    """Fig. 1: accuracy of the model trained on one source (row) on every source (column)."""
    lines = [f"{'trained on / tested on':24}" + "".join(f"{n[:14]:>16}" for n in names)]
    for scheme, rows in schemes.items():
        if scheme.startswith("single "):
            lines.append(
                f"{scheme.removeprefix('single '):24}"
                + "".join(
                    f"{cell_text(column):>16}"
                    for column in np.array([row["accuracy"] for row in rows]).T
                )
            )
    return "\n".join(lines)


def outlier_table(schemes, names) -> str:
    """Tables 4-6: box-plot outliers of the margins, beyond 1.5 interquartile ranges; counts and means, averaged over seeds and sources."""
    lines = [
        f"{'':20}{'above: share':>14}{'mean':>10}{'below: share':>14}{'mean':>10}{'all: mean |margin|':>20}"
    ]
    for scheme, rows in schemes.items():
        if scheme.startswith("single "):
            continue
        found = []
        for m in (m for row in rows for m in row["margins"].values()):
            low, high = np.quantile(m, [0.25, 0.75])
            above, below = m[m > high + 1.5 * (high - low)], m[m < low - 1.5 * (high - low)]
            found.append(
                [
                    len(above) / len(m),
                    above.mean() if len(above) else np.nan,
                    len(below) / len(m),
                    below.mean() if len(below) else np.nan,
                    np.abs(m).mean(),
                ]
            )
        share = [
            np.nanmean(column) if np.isfinite(column).any() else 0.0 for column in np.array(found).T
        ]  # a mean of no outlier is none
        lines.append(
            f"{scheme:20}{share[0]:14.3f}{share[1]:10.3f}{share[2]:14.3f}{share[3]:10.3f}{share[4]:20.3f}"
        )
    return "\n".join(lines)


def notes(o, pairs: bool = True) -> str:
    """What ± and ! mean in this experiment; pairs: whether the noise of shared test pairs is in them."""
    if not o.model:
        over = "over seeds (t); every seed is another world, model and order"
    else:
        over = (
            " and ".join(
                ["over seeds (t), which share their data"] * (o.seeds > 2)
                + ["over test pairs (bootstrap by prompt; not for worst and NLL)"] * pairs
            )
            or "nothing"
        )
    flag = "! a difference whose interval excludes 0 (of 20 that are none, one looks like one; ECEs near their floor are never flagged)"
    return f"{o.seeds} seeds; ± is half a 95% interval {over}; " + (
        flag
        if o.seeds > 2
        else "fewer than three seeds say nothing of what training adds, so no difference is flagged"
    )


def report_table2(o, cells, results, out) -> str:
    """Table 2, the cross-source matrix, the outliers of margins, and the paper's numbers."""
    names, parts = list(cells[0].tests), [notes(o)]
    for size in dict.fromkeys(cell.at["size"] for cell in cells):
        schemes = by_seed(cells, results, size=size)
        parts += [f"size {size}", scheme_table(schemes, names, bool(o.model))]
        if "more" in schemes and "uniform" in schemes:
            gaps = {
                r: [a[r].mean() - b[r].mean() for a, b in zip(schemes["more"], schemes["uniform"])]
                for r in ("accuracy", "ece less noise")
            }
            if o.seeds > 2:
                parts[-1] += (
                    f"\nsmallest difference between more and uniform that {o.seeds} seeds would show: accuracy {detectable(gaps['accuracy']):.3f}, ECE {detectable(gaps['ece less noise']):.3f}"
                )
        if any(s.startswith("single ") for s in schemes):
            parts.append(
                "cross-source accuracy of the single models (Fig. 1)\n"
                + cross_table(schemes, names)
            )
        parts.append(
            "box-plot outliers of the margins (Tables 4-6)\n" + outlier_table(schemes, names)
        )
        if plots.available():
            shown = {
                s: {
                    rate: [over_seeds(column) for column in np.array([row[rate] for row in rows]).T]
                    for rate in ("accuracy", "ece")
                }
                for s, rows in schemes.items()
                if not s.startswith("single ")
            }
            label = f"size-{str(size).replace('/', '_')}"
            plots.draw_schemes(shown, names, out / "figures" / f"{label}.png")
            plots.draw_boxes(
                {
                    name: {
                        s: np.concatenate([row["margins"][name] for row in schemes[s]])
                        for s in shown
                    }
                    for name in names
                },
                out / "figures" / f"{label}-margins.png",
            )
    return "\n\n".join([*parts, paper.table_2()])


def report_regimes(o, cells, results, out) -> str:
    """Where the weights matter: one block a regime."""
    parts = [notes(o)]
    for regime in REGIMES:
        parts += [
            f"regime {regime}: {', '.join(f'{k} {v}' for k, v in REGIMES[regime].items()) or 'the defaults'}",
            scheme_table(by_seed(cells, results, regime=regime), list(cells[0].tests)),
        ]
    return "\n\n".join(parts)


def report_sources(o, cells, results, out) -> str:
    """Fig. 6: ECE and accuracy on the first two sources by the number of sources."""
    lines = [
        notes(o, pairs=False),
        "",
        f"{'K':3}{'scheme':14}{'ECE of the first two':>24}{'accuracy of the first two':>28}{'mean accuracy':>18}",
    ]
    curves = {}
    for K in dict.fromkeys(cell.at["K"] for cell in cells):
        for scheme, rows in by_seed(cells, results, K=K).items():
            if not scheme.startswith("single "):
                ece, right = (
                    [row["ece"][:2].mean() for row in rows],
                    [row["accuracy"][:2].mean() for row in rows],
                )
                curves.setdefault(scheme, []).append((K, *over_seeds(ece)))
                lines.append(
                    f"{K:<3}{scheme:14}{cell_text(ece):>24}{cell_text(right):>28}{cell_text([row['accuracy'].mean() for row in rows]):>18}"
                )
    if plots.available():
        plots.draw_curves(
            curves, "sources K", "ECE of the first two sources", out / "figures" / "sources.png"
        )
    return "\n".join(lines)


def report_scaling(o, cells, results, out) -> str:
    """Accuracy, ECE, and what sharing costs: each source's own model minus the shared one, at equal steps and with the same pairs of that source.

    Below 0 the other sources' pairs help more than their tastes hurt.
    """
    lines = [
        notes(o, pairs=False),
        "",
        "cost of sharing: each source's own model (all its pairs, as many steps) minus the shared model; below 0 where other sources' pairs help",
        f"{'regime':10}{'pairs':>7}{'size':>7}{'uniform: accuracy':>20}{'ECE':>16}{'top: accuracy':>18}{'ECE':>16}{'cost of sharing':>20}",
    ]
    curves = {}
    for regime, pairs, size in dict.fromkeys(
        (c.at["regime"], c.at["pairs"], c.at["size"]) for c in cells
    ):
        schemes = by_seed(cells, results, regime=regime, pairs=pairs, size=size)
        mean = lambda scheme, rate: (
            [row[rate].mean() for row in schemes[scheme]] if scheme in schemes else []
        )
        damage = [a - b for a, b in zip(mean("top", "accuracy"), mean("uniform", "accuracy"))]
        texts = [
            cell_text(v) if v else "-"
            for v in (
                mean("uniform", "accuracy"),
                mean("uniform", "ece"),
                mean("top", "accuracy"),
                mean("top", "ece"),
            )
        ]
        lines.append(
            f"{regime:10}{pairs:7d}{size:>7}{texts[0]:>20}{texts[1]:>16}{texts[2]:>18}{texts[3]:>16}{difference_text(damage) if damage else '-':>20}"
        )
        if damage:
            curves.setdefault(f"{regime}, {size}", []).append((pairs, *over_seeds(damage)))
    if plots.available() and curves:
        plots.draw_curves(
            curves,
            "training pairs a source",
            "cost of sharing (accuracy)",
            out / "figures" / "scaling.png",
        )
    return "\n".join(lines)


def report_drift(o, cells, results, out) -> str:
    """What the models' rewards consist of, over training: shares of the margins' mean square, and slopes."""
    lines = [
        notes(o, pairs=False),
        "",
        "slopes of the margins on r* and on each annotator's own drift, and shares of their mean square, on 300 test pairs of each, which by chance give drift about 1% of what is neither",
        f"{'scheme':16}{'steps':>7}{'slope r*':>18}{'slope own drift':>20}{'share r*':>18}{'drift':>18}{'other':>18}",
    ]
    curves = {}
    for size, scheme in dict.fromkeys((c.at["size"], c.at["scheme"]) for c in cells):
        tracks = [
            read_json(out / "margins" / f"{c.name}.drift.json", list)
            for c in cells
            if (c.at["size"], c.at["scheme"]) == (size, scheme)
        ]
        for points in zip(*tracks):
            values = np.array([[np.nan if x is None else x for x in p["mean"]] for p in points])
            lines.append(
                f"{scheme:16}{points[0]['step']:7d}"
                + "".join(
                    f"{cell_text(column):>{w}}" for column, w in zip(values.T, (18, 20, 18, 18, 18))
                )
            )
            curves.setdefault(scheme, []).append((points[0]["step"], *over_seeds(values[:, 3])))
    if plots.available():
        plots.draw_curves(
            curves, "step", "share of drift in the margins", out / "figures" / "drift.png"
        )
    return "\n".join(lines)


REPORTS = {
    "table2": report_table2,
    "regimes": report_regimes,
    "sources": report_sources,
    "scaling": report_scaling,
    "drift": report_drift,
}
