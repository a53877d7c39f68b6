"""Training a reward model: prepare, loop, finish. What any training shares is in training.py.

    main -> train -> loop -> engine.step -> objective.loss        from the command line to Eq. 7

K sources, B pairs in a step.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .best import FIGURES, Best, better_of, validation_line, write_best, write_which
from .data.labels import LabelRules
from .data.overlap import hashes_of, print_overlap, write_training_prompts
from .data.pairs import Source, TokenPair, load_sources
from .data.sampling import Mix, mix_of
from .data.validation import held_out_line, hold_out
from .engine.distributed import (
    check_group,
    from_first,
    is_first,
    joined,
    processes,
    refused_together,
)
from .engine.objective import RewardObjective, StepResult, labels_of
from .engine.optim import AdamW
from .engine.recipe import Recipe
from .engine.streamed import open_engine
from .engine.trained import ALL
from .engine.whole import WholeModelEngine, whole_model_bytes
from .engine.workload import RunOptions, workload_of
from .files import write_json, write_text
from .metrics import final_accuracy, lines_of_test_files, progress_line, step_metrics, what_is_wrong
from .model.checkpoint import Checkpoint, files_to_save
from .more import MOST_SOURCES, NORMALIZATIONS, WEIGHTINGS, Labels
from .options import (
    COUNT,
    Range,
    check_ranges,
    option,
    parse_sources,
    require,
    training_files,
)
from .report import evaluate_sources, is_at_chance, table
from .reward import check_length, load_reward_model
from .run import BEST, Lock, check_recipe, open_run
from .tables import number
from .training import (
    LoopOptions,
    Schedule,
    Training,
    Watch,
    begin,
    check_recipe_options,
    choose_recipe,
    hold_as_stored,
    loop,
    open_optimizer,
    open_origin,
    stop_requests,
    table_of_options,
    write_finished,
    write_weights,
)

# Name of a source -> its training file, which a held-out group has not, and its test file.
Paths = dict[str, tuple[str | None, str | None]]


@dataclass(frozen=True, kw_only=True)
class TrainOptions(LoopOptions, RunOptions):
    """What `train` takes.

    Learning rate, epochs, length and batch are the paper's; l2 and the linear schedule are those of
    the authors' code; the rest is ours.
    """

    method: str = option(
        "more",
        choices=tuple(WEIGHTINGS),
        help="how the sources' losses are weighted; proportional is the share of each source in "
        "the batch, so uniform under equal sampling",
    )
    normalize: str = option(
        "l2",
        choices=NORMALIZATIONS,
        help="more: scaling of the head gradients before the solve (with two sources, l2 makes the "
        "weights uniform)",
    )
    gradient_average: float = option(
        1.0,
        within=Range(above=0, most=1),
        help="more: weight of the newest head gradient in its running average; 1 keeps no average",
    )
    lambda_scope: str = option(
        "step",
        choices=("step", "group"),
        help="solve the weights over the whole step (the paper; with several micro-batches one "
        "more forward), or per group of one pair a source (the authors' code)",
    )
    lambda_gradients: str = option(
        "head",
        choices=("head", "all"),
        help="more: the gradients from which the weights are solved, those of the head (the paper) "
        "or of all parameters, which takes up to 1.75 times as long (needs --engine streamed and "
        "--recompute full)",
    )
    label_smoothing: float = option(
        0.0,
        within=Range(least=0, below=0.5),
        help="share of labels taken as the wrong way round; metrics.jsonl has the losses of "
        "sources without it",
    )
    pair_margins: bool = option(
        False,
        help='in the loss, take the "margin" of a pair off its reward margin, as Llama 2 did',
    )
    pair_weights: bool = option(
        False,
        help='multiply the loss of a pair by its "weight" over the mean weight of its source',
    )
    eval_steps: int | None = option(
        None,
        within=COUNT,
        help="steps between evaluations on the TEST files and on what --validation holds out "
        "(default: only at the end)",
    )
    validation: float | None = option(
        None,
        within=Range(above=0, below=1),
        help="hold out this share of every training source's prompts, chosen by --seed: nothing is "
        "trained on them in any source",
    )
    keep_best: str | None = option(
        None,
        choices=tuple(FIGURES),
        help="keep the model of the step with the highest accuracy or the lowest negative log "
        "likelihood, mean over the sources' held-out prompts, in RUN/best; RUN itself holds the "
        "model of the last step (needs --validation and --eval-steps)",
    )
    allow_overlap: bool = option(
        False, help="training and test files are meant to share prompts: do not warn of it"
    )

    @property
    def label_rules(self) -> LabelRules:
        """What is read of the labels."""
        return LabelRules(self.votes, self.ties, self.pair_margins, self.pair_weights)


def train(options: TrainOptions, watch: Watch | None = None) -> int:
    """Train a reward model; return the exit code: 0 finished, 128 + signal when asked to stop.

    watch: is called after every step with its number, the number of steps and the model.
    """
    with joined(options):
        with refused_together():
            paths = parse_sources(options.source, held_out_groups=True)
            check_options(options, [*training_files(paths)])
            run = open_run(options) if is_first() else None
        run = from_first(run)
        return 0 if run is None else train_in(run, options, paths, watch)


def train_in(run: Path, options: TrainOptions, paths: Paths, watch: Watch | None) -> int:
    """Train in a directory that is open for it; return the exit code."""
    with ExitStack() as stack:
        with refused_together():
            lock = stack.enter_context(Lock(run))
            training = prepare(options, paths, run, lock)
        with stop_requests() as signals:
            exit_code = loop(training, signals, watch)
        if exit_code == 0:
            finish(training)
    return exit_code


# ---- what a training consists of -----------------------------------------------------------------


@dataclass(kw_only=True)
class RewardTraining(Training):
    """The training of a reward model on several sources of pairs."""

    options: TrainOptions
    objective: RewardObjective
    sources: list[Source]
    test_sources: list[Source]
    validation_sources: list[Source]

    @property
    def names(self) -> list[str]:
        """The names of the sources."""
        return [source.name for source in self.sources]

    def batch_at(self, step: int) -> tuple[list[TokenPair], list[int]]:
        """The pairs of a step, and the source of each."""
        sampled = self.schedule.sampled_at(step)  # (B, 2): source, pair in the source
        if self.options.lambda_gradients == "all":  # micro-batches are of one source each
            sampled = sampled[np.argsort(sampled[:, 0], kind="stable")]
        return [self.sources[k].pairs[i] for k, i in sampled], sampled[:, 0].tolist()

    def record_of(
        self, step: int, items: Sequence[TokenPair], source: list[int], result: StepResult
    ) -> dict[str, Any]:
        """What metrics.jsonl says of a step: things as they were before its update.

        After every --eval-steps there are evaluations, of things as they are after it; with
        --keep-best there is one after the last step, too.
        """
        on_device = torch.tensor(source, device=result.z_chosen.device)
        labels = labels_of([pair.label for pair in items], result.head)
        record = {
            "step": step,
            "learning_rate": self.optimizer.learning_rate,
            "tokens": sum(pair.tokens for pair in items),
            **step_metrics(result, on_device, self.names, labels),
        }
        if self.options.lambda_gradients == "all":
            self.add_weights_by_head(record, result, on_device, labels)
        eval_steps = self.options.eval_steps
        is_due = eval_steps is not None and step % eval_steps == 0
        if is_due and self.test_sources:
            record["evaluation"] = self.report_on(self.test_sources)
        is_last_candidate = self.options.keep_best and step == self.schedule.steps
        if self.validation_sources and (is_due or is_last_candidate):
            record["validation"] = self.report_on(self.validation_sources)
            self.compare_with_best(step, record["validation"])
            if self.best:
                record["best"] = self.best.step
        return record

    def add_weights_by_head(
        self, record: dict[str, Any], result: StepResult, source: Tensor, labels: Labels | None
    ) -> None:
        """Add the weights that the gradients of the head alone would have had."""
        *_, weights = self.objective.losses_and_weights(
            result.head, result.z_chosen, result.z_rejected, source, labels
        )
        for name, weight in zip(self.names, weights.tolist()):
            record["sources"][name]["head_weight"] = weight

    def compare_with_best(self, step: int, report: dict[str, Any]) -> None:
        """Let a step be the best one, if it is, by its report on the validation sources."""
        by = self.options.keep_best
        if by:
            self.best = better_of(self.best, Best(step, by, report["mean"][by]))

    def progress_line(
        self, record: dict[str, Any], means: dict[str, Any] | None, seconds_left: float
    ) -> str:
        """Loss, accuracy and weight of each source; cosines of their gradients; the time left."""
        return progress_line(record, means, self.schedule.steps, seconds_left)

    def evaluation_lines(self, record: dict[str, Any]) -> list[str]:
        """Figures of every TEST file; the mean over the validation sources, and the best step."""
        lines = lines_of_test_files(record) if "evaluation" in record else []
        return lines + ([validation_line(record, self.best)] if "validation" in record else [])

    def what_begins(self) -> str:
        """Pairs a step, and the method."""
        return f"{self.schedule.batch_size} pairs, {self.options.method}"

    def what_is_wrong(self, record: dict[str, Any]) -> str | None:
        """What the first step shows that keeps a model from learning; None if it shows nothing."""
        return what_is_wrong(record)

    def name_of_loss(self, source: int) -> str:
        """The loss of a source, in words."""
        return f"the loss of source {self.names[source]!r}"

    def report_on(self, sources: Sequence[Source]) -> dict[str, Any]:
        """The report of the model as it is on some sources."""
        return evaluate_sources(self.model, sources, self.options.micro_tokens)[0]


# ---- prepare -------------------------------------------------------------------------------------


def check_options(options: TrainOptions, names: Sequence[str]) -> None:
    """Refuse options that cannot be run (InputError); names: of the sources."""
    check_ranges(options)
    if options.source_field is None:
        check_sources(options, names)  # else they are known when the files are read
    is_more = options.method == "more"
    require(
        options.lambda_scope != "group" or (options.sampling == "equal" and not options.shares),
        "--lambda-scope group needs --sampling equal, and no --shares: a group is one pair of every"
        " source",
    )
    require(
        is_more or (options.normalize == "l2" and options.gradient_average == 1),
        "--normalize and --gradient-average go with --method more",
    )
    require(
        not options.keep_best or (options.validation and options.eval_steps),
        "--keep-best chooses among evaluations of held-out prompts: it needs --validation SHARE and"
        " --eval-steps N",
    )
    if options.lambda_gradients == "all":
        check_whole_model(options)
    check_recipe_options(options)


def check_whole_model(options: TrainOptions) -> None:
    """Refuse what does not go with weights from the gradients of all parameters (InputError)."""
    name = "--lambda-gradients all"
    require(
        options.method == "more"
        and options.gradient_average == 1
        and options.lambda_scope == "step",
        f"{name} goes with --method more, --lambda-scope step and --gradient-average 1",
    )
    require(
        options.engine == "streamed" and options.recompute == "full",
        f"{name} needs --engine streamed and --recompute full: blocks are computed again, once for"
        " the weights and once with them",
    )
    require(options.train in (None, ALL), f"{name} is of all parameters; leave out --train")
    require(processes() == 1, f"{name}: runs in one process; leave out torchrun")


def check_sources(options: TrainOptions, names: Sequence[str]) -> Mix:
    """How the sources are mixed. Refuses what cannot be weighted, or cannot share a step."""
    require(
        options.method != "more" or len(names) <= MOST_SOURCES,
        f"--method more: {len(names)} sources, but the exact solver takes at most {MOST_SOURCES};"
        " merge some"
        + (f", or leave out --source-field {options.source_field}" if options.source_field else ""),
    )
    return mix_of(options, names)


def prepare(options: TrainOptions, paths: Paths, run: Path, lock: Lock) -> RewardTraining:
    """Open the model, or continue from the last checkpoint; read the data; choose the recipe.

    Nothing is written before everything that can be refused has been accepted.
    """
    origin, facts = open_origin(options, run)
    check_length(
        origin.config, options.max_length, origin.directory, beyond=options.beyond_positions
    )
    sources, test_sources = open_sources(options, paths, origin)
    mix = check_sources(options, [source.name for source in sources])
    sources, validation_sources = held_out_of(sources, options)
    if not options.allow_overlap:
        print_overlap(test_sources, hashes_of(sources))
    origin.tokenizer.longest = options.max_length
    files_to_save(origin)  # what cannot be saved in the end is refused now
    recipe = choose_recipe(
        options,
        origin,
        lambda: workload_of(options, sources, mix),
        whole_model_bytes(origin, len(sources)) if options.lambda_gradients == "all" else 0,
    )
    check_recipe(run, recipe)
    unit = len(sources) if options.lambda_scope == "group" else 1
    check_group(recipe, mix.batch_size, unit, processes())
    optimizer, adopt = open_optimizer(options, recipe, origin.config.blocks)
    model = load_reward_model(origin, options, adopt)
    weighting_state: dict[str, Tensor] = {}
    training = RewardTraining(
        options=options,
        run=run,
        origin=origin,
        sources=sources,
        test_sources=test_sources,
        validation_sources=validation_sources,
        schedule=Schedule(
            options,
            options.epochs,
            tuple(len(source.pairs) for source in sources),
            mix.batch_size,
            mix.sampling,
            mix.per_source,
            mix.per_step,
        ),
        objective=open_objective(options, len(sources), mix.sampling, weighting_state),
        weighting_state=weighting_state,
        model=model,
        optimizer=optimizer,
        engine=engine_of(options, model, optimizer, recipe),
        digests=digests_of(sources, validation_sources),
    )
    print_where_more_is_plain(options, len(sources))
    begin(training, recipe, facts, lock)
    if is_first():
        write_training_prompts(run, sources)
    return training


def open_sources(
    options: TrainOptions, paths: Paths, checkpoint: Checkpoint
) -> tuple[list[Source], list[Source]]:
    """The training sources, and the test sources if there are any; a line describes each."""
    train_sources: list[Source] = []
    test_sources: list[Source] = []
    read = partial(
        load_sources,
        tokenizer=checkpoint.tokenizer,
        rules=options.rules,
        labels=options.label_rules,
        field=options.source_field,
    )
    for name, (train_path, test_path) in paths.items():
        for source in read(name, train_path) if train_path else ():
            train_sources.append(source)
            print(source.line(), flush=True)
        for source in read(name, test_path) if test_path else ():
            test_sources.append(source)
            use = "  test" if train_path else "test only, never trained on:"
            print(f"{use} {source.line()}", flush=True)
    require(
        test_sources or options.validation or not options.eval_steps,
        "--eval-steps: no source has a TEST file; expected NAME=TRAIN.jsonl,TEST.jsonl, or"
        " --validation SHARE",
    )
    require_labels(options, train_sources)
    return train_sources, test_sources


def require_labels(options: TrainOptions, sources: Sequence[Source]) -> None:
    """Refuse margins or weights that were asked for, but that no training pair has (InputError)."""
    labels = [pair.label for source in sources for pair in source.pairs]
    require(
        not options.pair_margins or any(label.margin for label in labels),
        '--pair-margins: no training pair has a "margin"; leave it out',
    )
    require(
        not options.pair_weights or any(label.weight != 1 for label in labels),
        '--pair-weights: no training pairs have different "weight"s; leave it out',
    )


def held_out_of(sources: list[Source], options: TrainOptions) -> tuple[list[Source], list[Source]]:
    """What is trained on, and what --validation holds out; a line for each source."""
    if options.validation is None:
        return sources, []
    training, validation = hold_out(sources, options.validation, options.seed)
    for left, held_out in zip(training, validation):
        print(f"  {left.name}: {held_out_line(left, held_out)}", flush=True)
    return training, validation


def digests_of(sources: Sequence[Source], validation: Sequence[Source]) -> dict[str, str]:
    """What tells whether a source has the same texts, those that are held out included."""
    digests = {source.name: source.digest() for source in sources}
    for source in validation:
        digests[source.name] += source.digest()
    return digests


def engine_of(options: TrainOptions, model: Any, optimizer: AdamW, recipe: Recipe) -> Any:
    """The engine of a recipe, or the one that takes weights from all parameters."""
    if options.lambda_gradients == "all":
        recipe.check()
        return WholeModelEngine(model, optimizer, recipe)
    return open_engine(model, optimizer, recipe)


def open_objective(
    options: TrainOptions, sources: int, sampling: str, weighting_state: dict[str, Tensor]
) -> RewardObjective:
    """The reward objective with the weighting that was asked for; sampling: as in `Mix`."""
    weigh: Callable[..., Tensor] = partial(WEIGHTINGS[options.method], state=weighting_state)
    if options.method == "more":
        weigh = partial(weigh, normalize=options.normalize, average=options.gradient_average)
    return RewardObjective(
        sources,
        weigh,
        options.method,
        options.lambda_scope,
        sampling,
        options.label_smoothing,
        options.lambda_gradients == "all",
    )


def print_where_more_is_plain(options: TrainOptions, sources: int) -> None:
    """Say it where MORE has no choice of weights."""
    if options.method != "more":
        return
    if sources == 1:
        print("one source: its weight is always 1, so MORE is plain Bradley-Terry here")
    if sources == 2 and options.normalize == "l2":
        print(
            "two sources and --normalize l2: two gradients of equal length always get weights 1/2,"
            " so MORE is uniform here"
        )


# ---- finish --------------------------------------------------------------------------------------


def finish(training: RewardTraining) -> None:
    """Write the finished model, and evaluate it on the test sources."""
    write_weights(training)
    hold_as_stored(training)
    report = training.report_on(training.test_sources) if training.test_sources else None
    validation = None
    if training.validation_sources:
        validation = training.report_on(training.validation_sources)
    if is_first():
        write_reports(training, report, validation)


def write_reports(
    training: RewardTraining, report: dict[str, Any] | None, validation: dict[str, Any] | None
) -> None:
    """Write what was found on the test sources and on what was held out; the run is finished."""
    run, options = training.run, training.options
    if report:
        print(table(report))
        write_json(run / "evaluation.json", report)
    if validation:
        print(f"held out for validation:\n{table(validation)}")
        write_json(run / "validation.json", validation)
    print_if_at_chance(training, report or validation)
    results = [section("Results on the test files", report, "No test file was given.")]
    if validation:
        results.append(section("Results on the prompts held out for validation", validation))
    write_text(run / "README.md", model_card(training, "\n\n".join(results)))
    if options.keep_best and validation:
        finish_best(training, validation)
    write_finished(training)


def print_if_at_chance(training: RewardTraining, report: dict[str, Any] | None) -> None:
    """Say that a run has ended at chance, and what to look at.

    report: on the TEST files or, without them, on what was held out. If there is none, the training
    pairs of the last steps show it: in a first epoch no step has learned them before.
    """
    final = final_accuracy(training.run / "metrics.jsonl")
    steps_are_at_chance = final is not None and abs(final.deviation) < 2
    if not (is_at_chance(report) if report else steps_are_at_chance):
        return
    accuracies = [f"{number(report['mean']['accuracy'])} on new pairs"] if report else []
    if final:
        accuracies.append(
            f"{number(final.accuracy)} on the {final.pairs} training pairs of the last"
            f" {final.steps} steps"
        )
    print(f"at chance: the accuracy is {' and '.join(accuracies)}; a coin has .500")
    print(f"  {remedy_of_chance(training, has_learned=bool(final and final.deviation > 3))}")
    paths = parse_sources(training.options.source, held_out_groups=True)
    files = " ".join(training_files(paths).values())
    print(f"  what the pairs are like: minimore data look {files}")


def remedy_of_chance(training: RewardTraining, has_learned: bool) -> str:
    """What to try; has_learned: whether the training pairs are far from chance."""
    if has_learned:
        return (
            "it learned its training pairs and nothing about new ones: try fewer --epochs, a"
            " smaller --learning-rate or more pairs, and look whether the test asks the same"
        )
    return (
        f"--learning-rate is {training.options.learning_rate:g}: try 10 times more if the loss has"
        " hardly moved, and 10 times less if it has jumped;"
        f" {training.schedule.steps} steps may be too few (--epochs)"
    )


def finish_best(training: RewardTraining, validation: dict[str, Any]) -> None:
    """Write the model of the best step, and say which it is; validation: that of the last one."""
    run, best = training.run, training.best
    if best is None:  # its checkpoint was removed after the last step
        print(f"{run}: has no best step, since its checkpoint is gone; it has no {BEST}/")
        return
    which = f"## Which step\n\nStep {best.step} of {training.schedule.steps}, by {best}."
    card = model_card(training, which)
    write_best(run, best, training.model.kind, training.options.save_dtype, card)
    write_which(run, best, training.schedule.steps, validation["mean"][best.by])


def section(title: str, report: dict[str, Any] | None, missing: str = "") -> str:
    """A report as a part of a model card."""
    return f"## {title}\n\n" + (f"```\n{table(report)}\n```" if report else missing)


def model_card(training: RewardTraining, results: str) -> str:
    """README.md of a finished model: what it is, on which data, with which options, how good.

    results: the sections that say how good.
    """
    options = training.options
    options_table = table_of_options(options, ("source", "output", "resume", "model"))
    lines = [f"- {source.line()}" for source in training.sources]
    for source, held_out in zip(training.sources, training.validation_sources):
        lines.append(f"- {source.name}: {held_out_line(source, held_out)}")
    lines += [
        f"- {source.name}: {len(source.pairs)} pairs, tested and never trained on"
        for source in training.test_sources
        if source.name not in training.names
    ]
    counts = "\n".join(lines)
    eos = ", an EOS token behind the text" if options.append_eos == "yes" else ""
    return f"""---
tags: [reward-model, minimore]
pipeline_tag: text-classification
---

# Reward model trained with minimore

Made from `{options.model}`. \
The reward is the one logit of `AutoModelForSequenceClassification`, read at the last token\
{eos}; \
sigmoid(difference of two rewards) is the probability that people prefer the first.

## Data

{counts}

{results}

## Options

{options_table}
"""
