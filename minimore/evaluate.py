"""How good and how well calibrated is a reward model, per source? The report and the `evaluate` verb."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Sequence

import numpy as np

from . import calibration, plots
from .checkpoint import Checkpoint
from .options import InputError, option, parse_sources, refuse_existing, write_json
from .pairs import Source, load_source
from .reward import ReadingOptions, RewardModel, load_reward_model, pair_rewards

RATES = ("accuracy", "ece", "ace", "mce", "brier", "nll", "mean_margin", "length_accuracy", "random_accuracy")


def source_margins(model: RewardModel, source: Source, micro_tokens: int) -> np.ndarray:
    """Margins (chosen minus rejected) of every pair of a source: (N,) float64."""
    rewards = pair_rewards(model, source.pairs, micro_tokens).double()
    return (rewards[:, 0] - rewards[:, 1]).numpy()


def source_report(margins: np.ndarray, source: Source) -> dict:
    """All figures of one source. `pairs` excludes label ties; ece, ace and mce are the paper's, 10 bins, both orders.

    Baselines on the same pairs: length_accuracy prefers the longer response (in characters), random_accuracy is 1/2.
    """
    return {
        "pairs": len(margins), "label_ties": source.label_ties, "identical": source.identical,
        "truncated": int(source.truncated), "blank": int(source.blank), "named": int(source.named), "dropped": source.dropped,
        "reward_ties": int((margins == 0).sum()),
        "accuracy": calibration.accuracy(margins), "ece": calibration.pair_ece(margins),
        "ace": calibration.pair_ace(margins), "mce": calibration.pair_mce(margins),
        "brier": calibration.brier(margins), "nll": calibration.negative_log_likelihood(margins),
        "mean_margin": float(margins.mean()),
        "length_accuracy": calibration.accuracy([p.longer for p in source.pairs]), "random_accuracy": 0.5,
    }


def evaluate_sources(model: RewardModel, sources: Sequence[Source], micro_tokens: int = 8192) -> tuple[dict, dict]:
    """The report {"sources": {name: ...}, "mean": rates averaged over sources, unweighted} and the margins by name."""
    margins = {s.name: source_margins(model, s, micro_tokens) for s in sources}
    reports = {s.name: source_report(margins[s.name], s) for s in sources}
    mean = {rate: float(np.mean([r[rate] for r in reports.values()])) for rate in RATES}
    return {"sources": reports, "mean": mean}, margins


def table(report: dict) -> str:
    """The report as text: one line a source, then the mean."""
    wide = max(len(n) for n in [*report["sources"], "mean"])
    lines = [f"{'source':{wide}}   pairs   ties  accuracy    ECE    ACE    MCE  Brier    NLL  margin | longer  random"]
    for name, r in [*report["sources"].items(), ("mean", report["mean"])]:
        counts = f"{r['pairs']:7d}{r['label_ties']:7d}" if "pairs" in r else " " * 14
        lines.append(f"{name:{wide}} {counts}   {r['accuracy']:7.4f}{r['ece']:7.4f}{r['ace']:7.4f}{r['mce']:7.4f}"
                     f"{r['brier']:7.4f}{r['nll']:7.4f}{r['mean_margin']:8.4f} | {r['length_accuracy']:6.4f}{r['random_accuracy']:8.4f}")
    return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(ReadingOptions):
    """What `evaluate` takes."""
    source: tuple[str, ...] = option((), repeat=True, value="NAME=TEST.jsonl", help="once per source")
    json: str | None = option(None, value="OUT.json", help="write the report here; must not exist")
    figures: str | None = option(None, value="DIR", help="draw reliability diagrams and margin histograms into this directory (needs the extra plots)")


def evaluate(options: EvaluateOptions):
    """Print the table of a model on its test sources; write the report and the figures if asked."""
    paths = parse_sources(options.source, test_only=True)
    refuse_existing(options.json, "--json")
    refuse_existing(options.figures, "--figures")
    if options.figures and options.json and Path(options.json).absolute().is_relative_to(Path(options.figures).absolute()):
        raise InputError(f"--json {options.json}: lies in --figures {options.figures}, which is made new; choose another place")
    if options.figures and not plots.available():
        raise InputError("--figures needs matplotlib: pip install 'minimore[plots]'")
    checkpoint = Checkpoint(options.model)
    limit, truncate = options.limits(checkpoint)
    sources = [load_source(name, path, checkpoint.tokenizer, limit, truncate) for name, path in paths.items()]
    for source in sources:
        print(source.line(), flush=True)
    model = load_reward_model(checkpoint, options)
    report, margins = evaluate_sources(model, sources, options.micro_tokens)
    if options.figures:
        figure = plots.draw_margins(margins, Path(options.figures))
    if options.json:
        write_json(options.json, report | {"model": options.model, "max_length": limit, "truncate": truncate, "files": paths})
    print(table(report))
    if options.figures:
        print(f"figure: {figure}")
    if not checkpoint.has_head:
        print(f"{options.model}: no score.weight, so this is an untrained head (the paper's Raw)", file=sys.stderr)
