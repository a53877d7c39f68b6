"""Does a method help, on these sources and with this model? `minimore compare-methods`.

    sweep      every method at every learning rate, with the first seed
    choice     each method keeps the rate with the lowest NLL on held-out prompts
    seeds      every method at its rate, with the other seeds
    verdict    what each method changes against the first one, and how sure that is (verdict.py)

A quarter of the prompts of every TEST file is held out: it chooses the rates, and the rest is the
test. Every training is an ordinary run directory, and whatever is finished is not computed again.
So the same command continues, and more seeds, rates and methods may be asked for later.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..calibration import accuracy, negative_log_likelihood
from ..data.overlap import print_overlap_of_files
from ..data.texts import Reading
from ..model.checkpoint import Checkpoint
from ..model.recompute import RECOMPUTE
from ..options import COUNT, Range, check_ranges, option, parse_sources, require, require_tests
from ..reward import check_length
from ..train import check_options, print_where_more_is_plain
from .cells import HELD_OUT, is_finished, margins_of, run_timed
from .grid import SCHEMES, Cell, train_options
from .reproduce import check_stored_identity, open_output, options_but
from .statistics import ModelMargins, Results, by_seed, every_figure
from .stored import write_report
from .verdict import verdict_text

PROTOCOL = "clean"  # of the margins: a quarter of the test prompts is held out
METHODS = tuple(name for name in SCHEMES if name not in ("raw", "single"))
# Options that leave a comparison what it is. It may be continued with other values of these.
FREE = (
    *("output", "method", "learning_rate", "seeds"),
    *("device", "micro_tokens", "recompute", "memory", "allow_overlap", "dry_run"),
)


@dataclass(frozen=True, kw_only=True)
class TrialOptions:
    """What `compare-methods` takes."""

    model: str = option(value="DIR|HUB", help="the checkpoint with which every training begins")
    source: tuple[str, ...] = option(
        (), repeat=True, value="NAME=TRAIN,TEST", help="once per source, with a test file"
    )
    output: str = option(
        value="DIR", help="directory for the runs and the report; the same command continues it"
    )
    method: tuple[str, ...] = option(
        (),
        repeat=True,
        choices=METHODS,
        help="once per method; the others are compared with the first one (default: uniform, more)",
    )
    learning_rate: tuple[float, ...] = option(
        (),
        repeat=True,
        help="peak learning rate (default: 1e-6, the paper's). Several are tried with one seed, and"
        " each method keeps the one with the lowest NLL on held-out prompts",
    )
    seeds: int = option(
        3, within=Range(least=1, most=100), help="trainings of each method (at least 3 to be sure)"
    )
    epochs: int = option(1, within=COUNT, help="passes over the sampled pairs")
    batch_size: int | None = option(None, within=COUNT, help="pairs a step (default: 16 x sources)")
    max_length: int = option(512, within=COUNT, help="tokens a text, cut on the left")
    micro_tokens: int = option(8192, within=COUNT, help="unique tokens computed at a time")
    recompute: str | None = option(
        None, choices=RECOMPUTE, help="what is made again in backward (default: none)"
    )
    memory: str | None = option(
        None, value="24GB", help="what a training may take of the device's memory: see train"
    )
    device: str = option("auto", choices=("auto", "cpu", "cuda"), help="where to compute")
    allow_overlap: bool = option(
        False, help="training and test files are meant to share prompts: do not warn of it"
    )
    dry_run: bool = option(False, help="print the trainings of the sweep, and stop")

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods, the first of which the others are compared with."""
        return self.method or ("uniform", "more")

    @property
    def rates(self) -> tuple[float, ...]:
        """The learning rates of the sweep."""
        return self.learning_rate or (1e-6,)


def compare_methods(options: TrialOptions) -> int:
    """Sweep, choose, train, and print the verdict; returns the exit code."""
    sources = checked_sources(options)
    output = Path(options.output)
    check_stored_identity(output, "comparison", identity_of(options))
    sweep_cells = [
        cell_of(options, sources, method, rate, 0)
        for rate in options.rates
        for method in options.methods
    ]
    print_plan(options, output, sweep_cells)
    if options.dry_run:
        return 0
    checkpoint = Checkpoint(options.model)
    # Refused now: the first training would refuse it when the comparison is on the disk already.
    check_length(checkpoint.config, options.max_length, checkpoint.directory, beyond=None)
    reading = Reading(checkpoint.tokenizer)
    require_held_out(options, sources, reading)
    if not options.allow_overlap:
        print_overlap_of_files(parse_sources(options.source), reading)
    open_output(output, "comparison", identity_of(options))
    exit_code = run_all(output, sweep_cells)
    if exit_code:
        return exit_code
    trials = [trial_of(output, cell) for cell in sweep_cells]
    best = best_rates(options, trials)
    print_sweep(options, trials, best)
    cells = [
        cell_of(options, sources, method, best[method], seed)
        for seed in range(options.seeds)
        for method in options.methods
    ]
    exit_code = run_all(output, cells)  # those of the first seed are finished
    if exit_code:
        return exit_code
    results = {cell.name: margins_of(output, cell, PROTOCOL) for cell in cells}
    report(options, output, cells, results)
    return 0


def checked_sources(options: TrialOptions) -> dict[str, tuple[str, str]]:
    """The files of every source. Raises InputError for what cannot be run."""
    check_ranges(options)
    paths = parse_sources(options.source)
    require(paths, "--source is missing: NAME=TRAIN,TEST, once per source")
    require_tests(paths)
    sources = {name: (train, str(test)) for name, (train, test) in paths.items()}
    require(len(options.methods) > 1, "--method: expected two or more, to be compared")
    for name, values in (("--method", options.methods), ("--learning-rate", options.rates)):
        require(len(set(values)) == len(values), f"{name}: expected every value once")
    for method in options.methods:
        for rate in options.rates:
            cell = cell_of(options, sources, method, rate, 0)
            check_options(train_options(Path(options.output), cell), list(sources))
    return sources


def require_held_out(
    options: TrialOptions, sources: dict[str, tuple[str, str]], reading: Reading
) -> None:
    """Refuse several learning rates where no TEST file has prompts by which to choose (InputError).

    reading: how the files become texts.
    """
    if len(options.rates) == 1:
        return
    prompts_by_file = (prompts_in(reading, test) for _, test in sources.values())
    require(
        any(prompts >= HELD_OUT for prompts in prompts_by_file),
        f"several --learning-rate: no TEST file has {HELD_OUT} prompts, of which one can be held"
        " out to choose between them; give one rate, or larger TEST files",
    )


def prompts_in(reading: Reading, path: str) -> int:
    """How many prompts a file has; a pair without one counts on its own."""
    pairs = [pair for read in reading.records(path) for pair in read.pairs]
    named = {pair.prompt for pair in pairs if pair.prompt}
    return len(named) + sum(not pair.prompt for pair in pairs)


def identity_of(options: TrialOptions) -> dict[str, Any]:
    """The options that make a comparison what it is, as comparison.json holds them."""
    return options_but(FREE, options)


def print_plan(options: TrialOptions, output: Path, sweep_cells: Sequence[Cell]) -> None:
    """Print how many trainings there are; in a dry run also the names of those of the sweep."""
    further_seeds = options.seeds - 1  # the sweep has the first one
    total = len(sweep_cells) + further_seeds * len(options.methods)
    names = parse_sources(options.source)
    print(f"{total} trainings of {', '.join(options.methods)} on {', '.join(names)}", flush=True)
    for cell in sweep_cells[: len(options.methods)]:  # one of each method
        print_where_more_is_plain(train_options(output, cell), len(names))
    if options.dry_run:
        for cell in sweep_cells:
            state = "finished" if is_finished(output, cell) else "to do   "
            print(f"  {state}  {cell.name}")


def cell_of(
    options: TrialOptions, sources: dict[str, tuple[str, str]], method: str, rate: float, seed: int
) -> Cell:
    """One training: a method at a learning rate, with a seed."""
    own_options = {
        "learning_rate": rate,
        "epochs": options.epochs,
        "batch_size": options.batch_size,
        "max_length": options.max_length,
        "micro_tokens": options.micro_tokens,
        "recompute": options.recompute,
        "memory": options.memory,
        "device": options.device,
        "seed": seed,
        "log_steps": 100,
    }
    return Cell(
        at={"scheme": method, "rate": repr(rate), "seed": seed},
        model=options.model,
        sources=sources,
        tests={name: test for name, (_, test) in sources.items()},
        options=own_options | SCHEMES[method],
    )


def run_all(output: Path, cells: Sequence[Cell]) -> int:
    """Run the cells that are not finished; returns the first exit code that is not 0, or 0."""
    for cell in cells:
        if is_finished(output, cell):
            continue
        exit_code = run_timed(output, cell, cell.name)
        if exit_code:
            return exit_code
    return 0


# ---- the sweep -----------------------------------------------------------------------------------


class Trial(NamedTuple):
    """A method at a learning rate, and how it does on held-out prompts, mean over sources."""

    method: str
    rate: float
    accuracy: float
    nll: float


def trial_of(output: Path, cell: Cell) -> Trial:
    """What a finished cell shows on its held-out prompts; a source without any does not count.

    If no source has any, there is nothing to see: a coin's accuracy, and no loss.
    """
    sources: ModelMargins = margins_of(output, cell, PROTOCOL)
    all_held_out = [margins[~is_test] for margins, is_test, _ in sources.values()]
    held_out = [margins for margins in all_held_out if len(margins)]
    return Trial(
        cell.at["scheme"],
        cell.options["learning_rate"],
        float(np.mean([accuracy(own) for own in held_out])) if held_out else 0.5,
        float(np.mean([negative_log_likelihood(own) for own in held_out])) if held_out else 0.0,
    )


def best_rates(options: TrialOptions, trials: Sequence[Trial]) -> dict[str, float]:
    """The learning rate of every method: that with the lowest NLL on held-out prompts."""
    best = {}
    for method in options.methods:
        own = [trial for trial in trials if trial.method == method]
        best[method] = min(own, key=lambda trial: trial.nll).rate
    return best


def print_sweep(options: TrialOptions, trials: Sequence[Trial], best: dict[str, float]) -> None:
    """A line for every method and rate, and a hint where the best rate is at an end of the sweep.

    best: method -> the rate that it keeps.
    """
    if len(options.rates) == 1:
        return
    for trial in trials:
        mark = "  <- kept" if best[trial.method] == trial.rate else ""
        print(
            f"learning rate {trial.rate:g}  {trial.method}: held-out accuracy"
            f" {trial.accuracy:.3f}, NLL {trial.nll:.4f}{mark}"
        )
    rates = sorted(options.rates)
    for method, rate in best.items():
        if rate in (rates[0], rates[-1]):
            end = "smallest" if rate == rates[0] else "largest"
            print(f"{method} keeps the {end} rate of the sweep: a further one may be better")


# ---- the report ----------------------------------------------------------------------------------


def report(options: TrialOptions, output: Path, cells: Sequence[Cell], results: Results) -> None:
    """Print the verdict, and write it and every figure.

    The figures hold what follows of a method, too (METHOD + T); the verdict is on methods alone.
    """
    schemes = {
        method: rows
        for method, rows in by_seed(list(cells), results).items()
        if method in options.methods
    }
    text = verdict_text(schemes, list(cells[0].tests))
    write_report(output, every_figure(cells, results), text)
