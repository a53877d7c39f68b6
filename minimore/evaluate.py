"""The `evaluate` verb: the report of a model, compared with a baseline and calibrated if asked."""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .comparison import compare, comparison_table, mean_difference, temperature_table, temperatures
from .data.labels import LabelOptions
from .data.overlap import (
    hashes_of,
    overlap_line,
    print_overlap,
    prompts_of,
    read_training_prompts,
    refuse_training_files,
)
from .data.pairs import Source, TextRules, load_sources
from .figures import plots
from .files import refuse_existing, write_json
from .model.checkpoint import Checkpoint
from .options import InputError, check_ranges, option, parse_sources, require
from .report import Margins, report_of, source_margins, table
from .reward import (
    ReadingOptions,
    load_reward_model,
    print_how_texts_end,
    run_of,
    run_options,
)
from .temperature import store_temperature, stored_temperature

Paths = Mapping[str, str]  # name of a source -> its file


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(ReadingOptions, LabelOptions):
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
    store_temperature: bool = option(
        False,
        help="keep the temperature that --calibrate fits to all held-out pairs in the run, where "
        "`score` applies it to probabilities",
    )
    json: str | None = option(None, value="OUT.json", help="write the report here; must not exist")
    figures: str | None = option(
        None,
        value="DIR",
        help="draw reliability diagrams and margin histograms into this directory (needs the extra "
        "plots)",
    )
    allow_overlap: bool = option(
        False,
        help="files are meant to share prompts with each other or with the model's training: do "
        "not warn of it, and accept training files",
    )


def evaluate(options: EvaluateOptions) -> None:
    """Print the table of a model on its test sources.

    Compare it with a baseline, fit temperatures, draw figures and write the report, where asked.
    """
    check_ranges(options)
    paths = parse_sources(options.source, test_only=True)
    held_out_paths: Paths = {}
    if options.calibrate:
        held_out_paths = parse_sources(options.calibrate, test_only=True, flag="--calibrate")
    check_outputs(options)
    require(
        options.calibrate or not options.store_temperature,
        "--store-temperature: needs --calibrate NAME=HELDOUT.jsonl, on which it is fitted",
    )
    check_held_out(held_out_paths, paths)
    check_baseline(options)

    if options.baseline:
        print(f"{options.model}:")
    measured = read(options, options.model, paths, held_out_paths)
    report = report_of(measured.margins, measured.sources)
    report |= {"model": options.model, "files": paths, **measured.rules._asdict()}
    print(table(report))
    stored = stored_temperature(run_of(Checkpoint(options.model)))
    if stored != 1:
        print(f"the run's stored temperature, {stored:.3f}, is not applied to these figures")
    if options.baseline:
        print(f"\n{options.baseline}, the baseline:")
        baseline = read(replace(options, model=options.baseline), options.baseline, paths, {})
        report["baseline"] = options.baseline
        report["baseline_report"] = report_of(baseline.margins, baseline.sources)
        print(f"{table(report['baseline_report'])}\n")
        report["differences"] = compare(
            measured.margins, measured.sources, baseline.margins, baseline.sources
        )
        report["mean_difference"] = mean_difference(report["differences"])
        print(comparison_table(report["differences"], options.baseline))
    if measured.held_out:
        report["temperatures"] = temperatures(
            measured.margins, measured.held_out, measured.shares, measured.held_out_shares
        )
        print(temperature_table(report["temperatures"]))
    if options.store_temperature:
        keep_temperature(options, report["temperatures"]["pooled"], measured, held_out_paths)
    if options.figures:
        figure = plots.draw_margins(
            measured.margins, Path(options.figures), measured.shares, options.model
        )
        print(f"figure: {figure}")
    if options.json:
        write_json(options.json, report)


def keep_temperature(
    options: EvaluateOptions, temperature: float | None, measured: "FileMargins", files: Paths
) -> None:
    """Store the temperature of all held-out pairs in the run."""
    run = run_of(Checkpoint(options.model))
    before = stored_temperature(run)
    if temperature is None:
        raise InputError(
            "--store-temperature: the held-out pairs leave no temperature to store: all of them are"
            " ranked right, or no better than by chance; expected more pairs, or another model"
        )
    pairs = sum(len(margins) for margins in measured.held_out.values())
    path = store_temperature(run, temperature, files, pairs)
    replaced = "" if before == 1 else f", in the place of {before:.3f}"
    print(f"temperature {temperature:.3f}, fitted on {pairs} pairs, is stored in {path}{replaced}")


# ---- what is refused before the work -------------------------------------------------------------


def check_outputs(options: EvaluateOptions) -> None:
    """Refuse outputs that exist, that lie in each other, or that cannot be drawn."""
    refuse_existing(options.json, "--json")
    refuse_existing(options.figures, "--figures")
    if options.figures and options.json:
        figures, report = Path(options.figures).absolute(), Path(options.json).absolute()
        require(
            not report.is_relative_to(figures),
            f"--json {options.json}: lies in --figures {options.figures}, which is made new;"
            " choose another place",
        )
    if options.figures:
        plots.require_matplotlib("--figures needs")


def check_held_out(held_out: Paths, tests: Paths) -> None:
    """Refuse held-out pairs of a source that is not tested, and those that are the test pairs."""
    test_files = [os.path.realpath(path) for path in tests.values()]
    for name, path in held_out.items():
        require(
            os.path.realpath(path) not in test_files,
            f"--calibrate {name}={path}: is a test file;"
            " a temperature fitted there would flatter itself",
        )
        require(
            name in tests,
            f"--calibrate {name}: is no --source; expected one of {', '.join(tests)}",
        )


def check_baseline(options: EvaluateOptions) -> None:
    """Refuse a baseline that does not open."""
    if options.baseline is None:
        return
    try:
        Checkpoint(options.baseline)
    except InputError as error:
        raise InputError(str(error).replace("--model", "--baseline")) from None


def refuse_trained_prompts(held_out: Sequence[Source], training: set[int]) -> None:
    """Refuse to store a temperature fitted where the model was trained: it would be too low."""
    for source in held_out:
        overlap = overlap_line(
            source.name, prompts_of(source), training, ("calibration", "training")
        )
        require(not overlap, f"--store-temperature: {overlap}")


def print_overlaps(tests: Sequence[Source], held_out: Sequence[Source], training: set[int]) -> None:
    """Warn of prompts that the test, the held-out pairs and the model's training share.

    training: the hashes of its prompts, as far as they are known.
    """
    print_overlap(tests, training, kinds=("test", "training"))
    print_overlap(held_out, training, kinds=("calibration", "training"))
    print_overlap(held_out, hashes_of(tests), kinds=("calibration", "test"))


# ---- the work ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FileMargins:
    """What one model says about the files: its margins of the test pairs and of held-out pairs."""

    rules: TextRules
    sources: list[Source]
    margins: Margins  # of the test pairs
    held_out: Margins
    held_out_sources: list[Source]

    @property
    def shares(self) -> Margins:
        """Of votes for the chosen response of every test pair."""
        return {source.name: source.shares for source in self.sources}

    @property
    def held_out_shares(self) -> Margins:
        """The same of the held-out pairs."""
        return {source.name: source.shares for source in self.held_out_sources}


def read(
    options: EvaluateOptions, model_name: str, paths: Paths, held_out_paths: Paths
) -> FileMargins:
    """Open a model and read the files with it. A line describes every source."""
    checkpoint = Checkpoint(model_name)
    rules = options.rules(checkpoint)
    print_how_texts_end(checkpoint, rules)
    if not options.allow_overlap:
        refuse_training_files(run_options(checkpoint), paths)
        refuse_training_files(run_options(checkpoint), held_out_paths, "--calibrate")

    def load(paths: Paths) -> list[Source]:
        labels, field = options.label_rules, options.source_field
        return [
            source
            for name, path in paths.items()
            for source in load_sources(name, path, checkpoint.tokenizer, rules, labels, field)
        ]

    sources, held_out = load(paths), load(held_out_paths)
    for source in (*sources, *held_out):
        print(source.line(), flush=True)
        prompts = {pair.prompt for pair in source.pairs}
        if len(prompts) == 1 and len(source.pairs) > 1:
            print(f"{source.name}: one prompt for all pairs, so they are taken as independent")
    if not options.allow_overlap:
        training = read_training_prompts(run_of(checkpoint))
        if options.store_temperature:
            refuse_trained_prompts(held_out, training)
        print_overlaps(sources, held_out, training)
    model = load_reward_model(checkpoint, options)

    def margins_of(sources: list[Source]) -> Margins:
        return {
            source.name: source_margins(model, source, options.micro_tokens) for source in sources
        }

    margins, held_out_margins = margins_of(sources), margins_of(held_out)
    if not checkpoint.has_head:
        print(
            f"{model_name}: no score.weight, so this is an untrained head (the paper's Raw)",
            file=sys.stderr,
        )
    return FileMargins(rules, sources, margins, held_out_margins, held_out)
