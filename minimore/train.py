"""Training a reward model: prepare, loop, finish. What any training shares is in training.py.

    main -> train -> loop -> engine.step -> objective.loss        from the command line to Eq. 7

K sources, B pairs in a step.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from .data.overlap import hashes_of, print_overlap, write_training_prompts
from .data.pairs import Source, load_sources
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
from .engine.objective import RewardObjective
from .engine.optim import AdamW
from .engine.recipe import Recipe
from .engine.streamed import open_engine
from .engine.trained import ALL
from .engine.whole import WholeModelEngine, whole_model_bytes
from .engine.workload import workload_of
from .finish import finish
from .model.checkpoint import Checkpoint, files_to_save
from .more import MOST_SOURCES, WEIGHTINGS
from .options import check_ranges, parse_sources, require, training_files
from .reward import check_length, load_reward_model
from .reward_training import Paths, RewardTraining, TrainOptions
from .run import Lock, check_recipe, open_run
from .schedule import Schedule
from .training import (
    Watch,
    begin,
    check_recipe_options,
    choose_recipe,
    loop,
    open_optimizer,
    open_origin,
    stop_requests,
)


def train(options: TrainOptions, watch: Watch | None = None) -> int:
    """Train a reward model; return the exit code: 0 finished, 128 + signal when asked to stop.

    watch: is called after every step with its number, the number of steps and the model.
    """
    with joined(options), ExitStack() as stack:
        with refused_together():
            paths = parse_sources(options.source, held_out_groups=True)
            check_options(options, [*training_files(paths)])
            lock = stack.enter_context(Lock(Path(options.output)))
            run = open_run(options) if is_first() else None
        run = from_first(run)
        return 0 if run is None else train_in(run, options, paths, lock, watch)


def train_in(
    run: Path, options: TrainOptions, paths: Paths, lock: Lock, watch: Watch | None
) -> int:
    """Train in a directory that is open for it; return the exit code."""
    with refused_together():
        training = prepare(options, paths, run, lock)
    with stop_requests() as signals:
        exit_code = loop(training, signals, watch)
    if exit_code == 0:
        finish(training)
    return exit_code


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
    is_over_all = options.lambda_gradients == "all"
    reserved = whole_model_bytes(origin, len(sources)) if is_over_all else 0
    workload = partial(workload_of, options, sources, mix)
    recipe = choose_recipe(options, origin, workload, reserved)
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
        schedule=schedule_of(options, sources, mix),
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


def schedule_of(options: TrainOptions, sources: Sequence[Source], mix: Mix) -> Schedule:
    """Which pairs every step sees, and its learning rate."""
    return Schedule(
        options,
        options.epochs,
        tuple(len(source.pairs) for source in sources),
        mix.batch_size,
        mix.sampling,
        mix.per_source,
        mix.per_step,
    )


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
    """Print where MORE can choose no weights, and is plain."""
    if options.method != "more":
        return
    if sources == 1:
        print("one source: its weight is always 1, so MORE is plain Bradley-Terry here")
    if sources == 2 and options.normalize == "l2":
        print(
            "two sources and --normalize l2: two gradients of equal length always get weights 1/2,"
            " so MORE is uniform here"
        )
