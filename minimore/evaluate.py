"""How good and how well calibrated is a reward model, per source, and how sure is that? The report and the `evaluate` verb."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from . import calibration, plots, uncertainty
from .data.pairs import Source, load_source
from .files import refuse_existing, write_json
from .model.checkpoint import Checkpoint
from .options import InputError, option, parse_sources
from .reward import ReadingOptions, RewardModel, load_reward_model, pair_rewards

RATES = (
    "accuracy",
    "ece",
    "ace",
    "mce",
    "brier",
    "nll",
    "mean_margin",
    "length_accuracy",
    "random_accuracy",
)


def source_margins(model: RewardModel, source: Source, micro_tokens: int) -> np.ndarray:
    """Margins (chosen minus rejected) of every pair of a source: (N,) float64."""
    rewards = pair_rewards(model, source.pairs, micro_tokens).double()
    return (rewards[:, 0] - rewards[:, 1]).numpy()


# ---- one model ---------------------------------------------------------------------------------------------------------


def source_report(margins: np.ndarray, source: Source) -> dict:
    """All figures of one source. `pairs` excludes label ties; ece, ace and mce are the paper's, 10 bins, both orders.

    Intervals are 95%, prompts resampled; ece_debiased is ece less what noise adds, ece_floor what it would be by noise alone, and
    `calibration` is a verdict: "over-confident", "under-confident", or "indistinguishable" from calibrated, and then ece_interval is
    None, for a bootstrap of so small an ECE covers too little.
    Baselines on the same pairs: length_accuracy prefers the longer response (in characters), random_accuracy is 1/2.
    """
    prompts = np.array([p.prompt for p in source.pairs])
    accuracy, ece = uncertainty.intervals(margins, prompts)
    floor = uncertainty.noise_floor(margins, prompts)
    report = {
        "pairs": len(margins),
        "prompts": len(np.unique(prompts)),
        "label_ties": source.label_ties,
        "identical": source.identical,
        "truncated": int(source.truncated),
        "blank": int(source.blank),
        "named": int(source.named),
        "dropped": source.dropped,
        "reward_ties": int((margins == 0).sum()),
        "accuracy": calibration.accuracy(margins),
        "accuracy_interval": _ends(accuracy),
        "ece": calibration.pair_ece(margins),
        "ece_debiased": ece.value,
        "ece_floor": floor.mean,
        "ece_floor_high": floor.high,
        "ace": calibration.pair_ace(margins),
        "mce": calibration.pair_mce(margins),
        "brier": calibration.brier(margins),
        "nll": calibration.negative_log_likelihood(margins),
        "mean_margin": float(margins.mean()),
        "length_accuracy": calibration.accuracy([p.longer for p in source.pairs]),
        "random_accuracy": 0.5,
    }
    confident = calibration.probability(np.abs(margins)).mean() > report["accuracy"]
    clear = uncertainty.is_miscalibrated(report["ece"], floor)
    return report | {
        "calibration": ("over-confident" if confident else "under-confident")
        if clear
        else "indistinguishable",
        "ece_interval": _ends(ece) if clear else None,
    }


def evaluate_sources(
    model: RewardModel, sources: Sequence[Source], micro_tokens: int = 8192
) -> tuple[dict, dict]:
    """The report {"sources": {name: ...}, "mean": rates averaged over sources, unweighted, "worst": ...} and the margins by name."""
    margins = {s.name: source_margins(model, s, micro_tokens) for s in sources}
    return report_of(margins, sources), margins


def report_of(margins: dict[str, np.ndarray], sources: Sequence[Source]) -> dict:
    """The report of `evaluate_sources` from margins by name; `worst` has the lowest accuracy and the largest ECE of any source."""
    reports = {s.name: source_report(margins[s.name], s) for s in sources}
    every = lambda rate: [r[rate] for r in reports.values()]
    return {
        "sources": reports,
        "mean": {rate: float(np.mean(every(rate))) for rate in (*RATES, "ece_debiased")},
        "worst": {"accuracy": min(every("accuracy")), "ece": max(every("ece"))},
    }


def _ends(interval):
    return [None if math.isnan(end) else end for end in interval[1:]]


def _cell(value, ends):
    """A value with its interval: ".550 [.506, .593]"."""
    return f"{_number(value)} [{_number(ends[0])}, {_number(ends[1])}]"


def _number(x):
    return "?" if x is None else f"{x:.3f}".replace("0.", ".", 1)


def table(report: dict) -> str:
    """The report as text: one line a source, then the mean and the worst source."""
    wide = max(len(n) for n in [*report["sources"], "source"])
    lines = [
        f"{'source':{wide}}   pairs prompts  accuracy [95%]        NLL  margin  longer    ECE  floor  calibration: ECE less noise [95%]"
    ]
    for name, r in report["sources"].items():
        verdict = (
            "indistinguishable from calibrated"
            if r["ece_interval"] is None
            else f"{_cell(r['ece_debiased'], r['ece_interval'])} {r['calibration']}"
        )
        lines.append(
            f"{name:{wide}} {r['pairs']:7d} {r['prompts']:7d}  {_cell(r['accuracy'], r['accuracy_interval']):17}  {r['nll']:.3f}  {r['mean_margin']:6.3f}  {r['length_accuracy']:.3f}  "
            f"{r['ece']:.3f}  {r['ece_floor']:.3f}  {verdict}"
        )
    mean, worst = report["mean"], report["worst"]
    lines.append(
        f"{'mean':{wide}} {'':15}  {_number(mean['accuracy']):17}  {mean['nll']:.3f}  {mean['mean_margin']:6.3f}  {mean['length_accuracy']:.3f}  {mean['ece']:.3f}"
    )
    lines.append(
        f"{'worst':{wide}} {'':15}  {_number(worst['accuracy']):17}  {'':20}  {worst['ece']:.3f}"
    )
    return "\n".join(lines)


# ---- two models, on the same pairs ---------------------------------------------------------------------------------------


def compare(
    margins: dict, sources: Sequence[Source], baseline: dict, baseline_sources: Sequence[Source]
) -> dict:
    """Per source, this model minus the baseline on the pairs that both could use; `exceeds_noise` names what does."""
    found = {}
    for mine, theirs in zip(sources, baseline_sources):
        both = sorted({p.index for p in mine.pairs} & {p.index for p in theirs.pairs})
        place = [{p.index: i for i, p in enumerate(s.pairs)} for s in (mine, theirs)]
        if not both:
            raise InputError(f"source {mine.name!r}: no pair that both models can use")
        a, b = (
            margins[mine.name][[place[0][i] for i in both]],
            baseline[mine.name][[place[1][i] for i in both]],
        )
        prompts = np.array([mine.pairs[place[0][i]].prompt for i in both])
        accuracy, ece = uncertainty.difference_intervals(a, b, prompts)
        eces, floors = (
            [calibration.pair_ece(m) for m in (a, b)],
            [uncertainty.noise_floor(m, prompts) for m in (a, b)],
        )
        clear = {"accuracy": accuracy.excludes_zero, "ece": uncertainty.may_rank(ece, eces, floors)}
        found[mine.name] = {
            "pairs": len(both),
            "accuracy": accuracy.value,
            "accuracy_interval": _ends(accuracy),
            "ece_debiased": ece.value,
            "ece_interval": _ends(ece)
            if any(map(uncertainty.is_miscalibrated, eces, floors))
            else None,
            "exceeds_noise": [what for what, is_clear in clear.items() if is_clear],
        }
    return found


def comparison_table(found: dict, baseline: str) -> str:
    """The comparison as text."""
    wide = max(len(n) for n in [*found, "source"])
    lines = [
        f"minus {baseline}, on the same pairs (95% each: of 20 differences that are none, one looks like one):",
        f"{'source':{wide}}   pairs  accuracy [95%]         ECE less noise [95%]   exceeds noise",
    ]
    for name, r in found.items():
        ece = (
            "both near the floor"
            if r["ece_interval"] is None
            else _cell(r["ece_debiased"], r["ece_interval"])
        )
        lines.append(
            f"{name:{wide}} {r['pairs']:7d}  {_cell(r['accuracy'], r['accuracy_interval']):21}  {ece:21}  "
            f"{' and '.join(r['exceeds_noise']) or 'nothing'}"
        )
    return "\n".join(lines)


# ---- temperature ---------------------------------------------------------------------------------------------------------


def temperatures(margins: dict, held_out: dict) -> dict:
    """Temperatures fitted on held-out margins, per source and pooled, and what they do to the test sources.

    margins, held_out: {source: (N,)}. A temperature changes no ranking, so no accuracy. Where the held-out pairs leave none
    (separable, or not informative) it is None, and so is what would follow.
    """

    def scaled(m, temperature):
        usable = temperature is not None
        return {
            "ece": calibration.pair_ece(m / temperature) if usable else None,
            "nll": calibration.negative_log_likelihood(m / temperature) if usable else None,
        }

    fit = lambda m: t if 0 < (t := calibration.fit_temperature(m)) < math.inf else None
    pooled = fit(np.concatenate(list(held_out.values())))
    own = {name: fit(m) for name, m in held_out.items()}
    return {
        "pooled": pooled,
        "sources": {
            name: {
                "temperature": own.get(name),
                "ece": calibration.pair_ece(m),
                "nll": calibration.negative_log_likelihood(m),
                "by_pooled": scaled(m, pooled),
                "by_own": scaled(m, own.get(name)),
            }
            for name, m in margins.items()
        },
    }


def temperature_table(found: dict) -> str:
    """The temperatures as text."""
    number = lambda x: "none" if x is None else f"{x:.3f}"
    wide = max(len(n) for n in [*found["sources"], "source"])
    lines = [
        f"temperature fitted on held-out pairs; one for all: {number(found['pooled'])} (none: no such pairs were given, or they are separable, or not informative)",
        f"{'source':{wide}}  own T    ECE: as is  one T  own T    NLL: as is  one T  own T",
    ]
    for name, r in found["sources"].items():
        cells = [
            [
                number(part["ece" if what == "ECE" else "nll"])
                for part in (r, r["by_pooled"], r["by_own"])
            ]
            for what in ("ECE", "NLL")
        ]
        lines.append(
            f"{name:{wide}}  {number(r['temperature']):5}         {'  '.join(f'{c:5}' for c in cells[0])}         {'  '.join(f'{c:5}' for c in cells[1])}"
        )
    return "\n".join(lines)


# ---- the verb ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(ReadingOptions):
    """What `evaluate` takes."""

    source: tuple[str, ...] = option(
        (), repeat=True, value="NAME=TEST.jsonl", help="once per source"
    )
    baseline: str | None = option(
        None, value="DIR|HUB", help="another model: differences on the same pairs, with intervals"
    )
    calibrate: tuple[str, ...] = option(
        (),
        repeat=True,
        value="NAME=HELDOUT.jsonl",
        help="pairs, other than the test pairs, on which temperatures are fitted",
    )
    json: str | None = option(None, value="OUT.json", help="write the report here; must not exist")
    figures: str | None = option(
        None,
        value="DIR",
        help="draw reliability diagrams and margin histograms into this directory (needs the extra plots)",
    )


def evaluate(options: EvaluateOptions):
    """Print the table of a model on its test sources; compare and calibrate, write the report and the figures if asked."""
    paths = parse_sources(options.source, test_only=True)
    held_out = (
        parse_sources(options.calibrate, test_only=True, flag="--calibrate")
        if options.calibrate
        else {}
    )
    refuse_existing(options.json, "--json")
    refuse_existing(options.figures, "--figures")
    if (
        options.figures
        and options.json
        and Path(options.json).absolute().is_relative_to(Path(options.figures).absolute())
    ):
        raise InputError(
            f"--json {options.json}: lies in --figures {options.figures}, which is made new; choose another place"
        )
    if options.figures and not plots.available():
        raise InputError("--figures needs matplotlib: pip install 'minimore[plots]'")
    for name, path in held_out.items():
        if Path(path).resolve() in [Path(p).resolve() for p in paths.values()]:
            raise InputError(
                f"--calibrate {name}={path}: is a test file; a temperature fitted there would flatter itself"
            )
        if name not in paths:
            raise InputError(
                f"--calibrate {name}: is no --source; expected one of {', '.join(paths)}"
            )
    if options.baseline is not None:
        try:
            Checkpoint(options.baseline)  # before the work
        except InputError as error:
            raise InputError(str(error).replace("--model", "--baseline")) from None
    limits, margins, sources, held = read_margins(options, paths, held_out)
    report = report_of(margins, sources) | {"model": options.model, "files": paths} | limits
    print(table(report))
    if options.baseline:
        _, theirs, their_sources, _ = read_margins(
            replace(options, model=options.baseline), paths, {}
        )
        report |= {
            "baseline": options.baseline,
            "differences": compare(margins, sources, theirs, their_sources),
        }
        print(comparison_table(report["differences"], options.baseline))
    if held:
        report["temperatures"] = temperatures(margins, held)
        print(temperature_table(report["temperatures"]))
    if options.figures:
        print(f"figure: {plots.draw_margins(margins, Path(options.figures))}")
    if options.json:
        write_json(options.json, report)


def read_margins(
    options: EvaluateOptions, paths: dict, held_out: dict
) -> tuple[dict, dict, list[Source], dict]:
    """Open options.model and read files with it: its limits, margins by test source, the sources, margins by held-out source."""
    checkpoint = Checkpoint(options.model)
    limit, truncate = options.limits(checkpoint)
    load = lambda paths: [
        load_source(name, path, checkpoint.tokenizer, limit, truncate)
        for name, path in paths.items()
    ]
    sources, held = load(paths), load(held_out)
    for source in (*sources, *held):
        print(source.line(), flush=True)
        if len({p.prompt for p in source.pairs}) == 1 < len(source.pairs):
            print(f"{source.name}: one prompt for all pairs, so they are taken as independent")
    model = load_reward_model(checkpoint, options)
    margins, held_margins = (
        {s.name: source_margins(model, s, options.micro_tokens) for s in part}
        for part in (sources, held)
    )
    if not checkpoint.has_head:
        print(
            f"{options.model}: no score.weight, so this is an untrained head (the paper's Raw)",
            file=sys.stderr,
        )
    return {"max_length": limit, "truncate": truncate}, margins, sources, held_margins
