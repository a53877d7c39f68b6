"""Training a reward model: prepare, loop, finish. run.py and resume.py make it safe to kill.

    main -> train -> loop -> engine.step -> objective.loss        from the command line to Eq. 7

K sources, B pairs in a step.
"""

import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from .checksums import checksum
from .data.pairs import Source, TokenPair, load_source
from .data.sampling import batch_size_of, epoch_steps
from .engine.choose import choose, parse_memory
from .engine.host import available_memory, pinned
from .engine.objective import NonFiniteGradient, NonFiniteLoss, RewardObjective, StepResult
from .engine.optim import AdamW
from .engine.plain import PlainEngine
from .engine.recipe import Recipe
from .engine.streamed import StreamedEngine, open_engine
from .engine.workload import RunOptions, workload_of
from .files import write_json, write_text
from .metrics import Log, cut_log, progress_line, step_metrics, what_is_wrong
from .model.checkpoint import Checkpoint, files_to_save, model_tensors, write_config
from .model.tensors import STORAGE, write_sharded
from .model.trunk import replace_parameter
from .more import MOST_SOURCES, WEIGHTINGS
from .options import (
    COUNT,
    Range,
    check_ranges,
    flag_of,
    option,
    parse_sources,
    require,
)
from .report import evaluate_sources, table
from .resume import Saver, check_whole, checkpoints, load_state, remove
from .reward import RewardModel, check_length, compute_type, device_of, load_reward_model
from .run import Lock, check_recipe, open_run, start_run, stored_recipe

Paths = dict[str, tuple[str, str | None]]  # name of a source -> its training and test files
Watch = Callable[[int, int, RewardModel], None]  # (step, number of steps, model), after every step


@dataclass(frozen=True, kw_only=True)
class TrainOptions(RunOptions):
    """What `train` takes.

    Learning rate, epochs, length and batch are the paper's; l2 and the linear schedule are those of
    the authors' code; the rest is ours.
    """

    output: str = option(
        value="RUN", help="run directory to make; must not exist, except with --resume"
    )
    resume: bool = option(
        False, help="continue the run in --output: the same command again, plus this"
    )
    method: str = option(
        "more",
        choices=tuple(WEIGHTINGS),
        help="how the sources' losses are weighted; proportional is the share of each source in "
        "the batch, so uniform under equal sampling",
    )
    normalize: str = option(
        "l2",
        choices=("none", "l2", "loss", "loss+"),
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
    learning_rate: float = option(1e-6, within=Range(above=0), help="peak learning rate")
    warmup: float = option(
        0.0,
        within=Range(least=0, most=1),
        help="share of the steps in which the learning rate rises linearly from 0",
    )
    schedule: str = option(
        "linear",
        choices=("linear", "cosine", "constant"),
        help="learning rate after warmup",
    )
    weight_decay: float = option(0.0, within=Range(least=0), help="AdamW's decoupled weight decay")
    label_smoothing: float = option(
        0.0,
        within=Range(least=0, below=0.5),
        help="share of labels taken as the wrong way round; metrics.jsonl has the losses of "
        "sources without it",
    )
    save_steps: int = option(500, within=COUNT, help="steps between checkpoints")
    keep: int = option(1, within=COUNT, help="checkpoints to keep, the newest ones")
    eval_steps: int | None = option(
        None,
        within=COUNT,
        help="steps between evaluations on the TEST files (default: only at the end)",
    )
    log_steps: int = option(
        1, within=COUNT, help="steps between printed lines; metrics.jsonl has every step"
    )
    save_dtype: str = option(
        "float32",
        choices=tuple(STORAGE),
        help="type in which the finished model is stored",
    )


def train(options: TrainOptions, watch: Watch | None = None) -> int:
    """Train a reward model; return the exit code: 0 finished, 128 + signal when asked to stop.

    watch: is called after every step with its number, the number of steps and the model.
    """
    paths = parse_sources(options.source)
    check_options(options, len(paths))
    run = open_run(options)
    if run is None:
        return 0
    with Lock(run) as lock:
        training = prepare(options, paths, run, lock)
        with stop_requests() as signals:
            exit_code = loop(training, signals, watch)
        if exit_code == 0:
            finish(training)
    return exit_code


# ---- what a training consists of -----------------------------------------------------------------


@dataclass(frozen=True)
class Schedule:
    """Which pairs a step sees, and its learning rate: all of it known before the first step.

    Steps are numbered from 1. sizes: pairs of each source.
    """

    options: TrainOptions
    sizes: tuple[int, ...]
    batch_size: int

    @property
    def steps(self) -> int:
        """Steps of the whole training."""
        return self._steps_per_epoch * self.options.epochs

    def sampled_at(self, step: int) -> np.ndarray:
        """The pairs of a step: (B, 2), a source and a pair in it."""
        epoch, place = divmod(step - 1, self._steps_per_epoch)
        return self._epoch(epoch)[place]

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a step."""
        return learning_rate_at(step - 1, self.steps, self.options)

    @property
    def _steps_per_epoch(self) -> int:
        return len(self._epoch(0))

    def _epoch(self, epoch: int) -> list[np.ndarray]:
        o = self.options
        return _cached_epoch_steps(
            self.sizes, o.sampling, o.pairs_per_source, self.batch_size, o.seed, epoch
        )


_cached_epoch_steps = lru_cache(maxsize=2)(epoch_steps)  # the first epoch, and the present one


def learning_rate_at(step: int, steps: int, options: TrainOptions) -> float:
    """Learning rate of step 0, 1, ..., steps - 1.

    It rises linearly during the warmup, then follows the schedule, which would reach 0 at `steps`.
    """
    warmup_steps = math.ceil(options.warmup * steps)
    if step < warmup_steps:
        return options.learning_rate * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    factors = {
        "linear": 1 - progress,
        "cosine": (1 + math.cos(math.pi * progress)) / 2,
        "constant": 1.0,
    }
    return options.learning_rate * factors[options.schedule]


@dataclass
class Training:
    """All that the loop needs: what is trained on, what is trained, and how."""

    options: TrainOptions
    run: Path
    origin: Checkpoint  # what the model was opened from
    sources: list[Source]
    test_sources: list[Source]
    schedule: Schedule
    objective: RewardObjective
    weighting_state: dict[str, Tensor]
    model: RewardModel
    optimizer: AdamW
    engine: PlainEngine | StreamedEngine
    digests: dict[str, str]  # of the sources' pairs
    first_step: int = 1

    @property
    def names(self) -> list[str]:
        """The names of the sources."""
        return [source.name for source in self.sources]


# ---- prepare -------------------------------------------------------------------------------------


def check_options(options: TrainOptions, sources: int) -> int:
    """Refuse options that cannot be run (InputError); return the number of pairs in a step."""
    check_ranges(options)
    batch_size = batch_size_of(options, sources)
    is_more = options.method == "more"
    require(
        options.lambda_scope != "group" or options.sampling == "equal",
        "--lambda-scope group needs --sampling equal: a group is one pair of every source",
    )
    require(
        not is_more or sources <= MOST_SOURCES,
        f"--method more: {sources} sources, but the exact solver takes at most {MOST_SOURCES};"
        " merge some",
    )
    require(
        is_more or (options.normalize == "l2" and options.gradient_average == 1),
        "--normalize and --gradient-average go with --method more",
    )
    if options.memory is None:
        Recipe(**options.chosen_recipe(options.micro_tokens)).check()
    else:
        parse_memory(options.memory)
    return batch_size


def prepare(options: TrainOptions, paths: Paths, run: Path, lock: Lock) -> Training:
    """Open the model, or continue from the last checkpoint; read the data; choose the recipe.

    Nothing is written before everything that can be refused has been accepted.
    """
    last = checkpoints(run)[-1:]
    facts = check_whole(last[0]) if last else None
    origin = Checkpoint(str(last[0]) if last else options.model)
    check_length(origin.config, options.max_length, origin.directory)
    sources, test_sources = load_sources(options, paths, origin)
    batch_size = batch_size_of(options, len(sources))
    files_to_save(origin)  # what cannot be saved in the end is refused now
    recipe = choose_recipe(options, origin, sources, batch_size)
    check_recipe(run, recipe)
    model, optimizer = open_trainable(options, origin, recipe)
    weighting_state: dict[str, Tensor] = {}
    training = Training(
        options=options,
        run=run,
        origin=origin,
        sources=sources,
        test_sources=test_sources,
        schedule=Schedule(options, tuple(len(source.pairs) for source in sources), batch_size),
        objective=open_objective(options, len(sources), weighting_state),
        weighting_state=weighting_state,
        model=model,
        optimizer=optimizer,
        engine=open_engine(model, optimizer, recipe),
        digests={source.name: source.digest() for source in sources},
    )
    print_where_more_is_plain(options, len(sources))
    lock.take()
    start_run(run, options, recipe)
    if facts:
        restore(training, last[0], facts)
    total = facts["log"] if facts else checksum(b"")
    cut_log(run / "metrics.jsonl", training.first_step - 1, total)
    return training


def restore(training: Training, checkpoint: Path, facts: dict[str, Any]) -> None:
    """Put everything back as it was when the checkpoint was saved; the model is loaded already."""
    step = load_state(
        checkpoint,
        facts,
        training.optimizer,
        training.weighting_state,
        training.digests,
        training.model.head.device,
    )
    steps = training.schedule.steps
    require(
        step <= steps,
        f"{checkpoint}: comes after the last of this run's {steps} steps;"
        " remove it to start again from step 0",
    )
    training.first_step = step + 1


def load_sources(
    options: TrainOptions, paths: Paths, checkpoint: Checkpoint
) -> tuple[list[Source], list[Source]]:
    """The training sources, and the test sources that were given; a line describes each."""
    train_sources, test_sources = [], []
    read = partial(
        load_source,
        tokenizer=checkpoint.tokenizer,
        max_length=options.max_length,
        truncate=options.truncate,
        chat=options.chat,
    )
    for name, (train_path, test_path) in paths.items():
        train_sources.append(read(name, train_path))
        print(train_sources[-1].line(), flush=True)
        if test_path:
            test_sources.append(read(name, test_path))
            print(f"  test {test_sources[-1].line()}", flush=True)
    require(
        test_sources or not options.eval_steps,
        "--eval-steps: no source has a TEST file; expected NAME=TRAIN.jsonl,TEST.jsonl",
    )
    return train_sources, test_sources


def choose_recipe(
    options: TrainOptions, checkpoint: Checkpoint, sources: Sequence[Source], batch_size: int
) -> Recipe:
    """The recipe that was asked for. With --memory the rest is chosen, so that it fits.

    A run that is continued keeps the storage of numbers that it began with.
    """
    stored = stored_recipe(Path(options.output)) if options.resume else {}
    chosen = options.chosen_recipe(options.micro_tokens, stored)
    if options.memory is None:
        return Recipe(**chosen)
    return choose(
        checkpoint.config,
        workload_of(options, sources, batch_size),
        chosen,
        parse_memory(options.memory),
        device_of(options),
        compute_type(options),
        available_memory() or math.inf,
    )


def open_trainable(
    options: TrainOptions, checkpoint: Checkpoint, recipe: Recipe
) -> tuple[RewardModel, AdamW]:
    """The model, stored as the recipe says, and the optimizer that holds its states."""
    optimizer = AdamW(recipe.parameters, recipe.moments, options.weight_decay, seed=options.seed)

    def adopt(name: str, value: Tensor) -> Tensor:
        if "states" in recipe.offload:
            return optimizer.adopt(name, value, pinned)
        return optimizer.adopt(name, value)

    return load_reward_model(checkpoint, options, adopt), optimizer


def open_objective(
    options: TrainOptions, sources: int, weighting_state: dict[str, Tensor]
) -> RewardObjective:
    """The reward objective with the weighting that was asked for."""
    weigh: Callable = partial(WEIGHTINGS[options.method], state=weighting_state)
    if options.method == "more":
        weigh = partial(weigh, normalize=options.normalize, average=options.gradient_average)
    return RewardObjective(
        sources,
        weigh,
        options.method,
        options.lambda_scope,
        options.sampling,
        options.label_smoothing,
    )


def print_where_more_is_plain(options: TrainOptions, sources: int) -> None:
    """Say it where MORE cannot differ from plain weights."""
    if options.method != "more":
        return
    if sources == 1:
        print("one source: its weight is always 1, so MORE is plain Bradley-Terry here")
    if sources == 2 and options.normalize == "l2":
        print(
            "two sources and --normalize l2: two gradients of equal length always get weights 1/2,"
            " so MORE is uniform here"
        )


# ---- loop ----------------------------------------------------------------------------------------


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Give a list that holds a signal's number once Ctrl-C or SIGTERM has asked for a stop.

    The loop looks at it after each step. A second Ctrl-C interrupts at once.
    """
    received: list[int] = []

    def handler(number: int, _: Any) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)
        print(f"\n{signal.Signals(number).name}: finishing this step, then saving", flush=True)

    handlers_before = {
        number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield received
    finally:
        for number, handler_before in handlers_before.items():
            signal.signal(number, handler_before)


def loop(training: Training, signals: list[int], watch: Watch | None) -> int:
    """Take every step that is left; return 0, or 128 + the number of the signal that stopped it.

    signals: the list of `stop_requests`, which may be filled while a step runs.
    """
    options, steps = training.options, training.schedule.steps
    print_what_begins(training)
    saver = Saver(training.run, training.origin, training.digests, options.keep)
    with Log(training.run / "metrics.jsonl") as log, saver:
        clock = Clock(training.first_step, steps)
        for step in range(training.first_step, steps + 1):
            pairs, source = batch_at(step, training)
            training.optimizer.learning_rate = training.schedule.learning_rate_at(step)
            head_before = training.model.head.detach().clone()
            try:
                result = training.engine.step(pairs, source, training.objective)
            except (NonFiniteLoss, NonFiniteGradient) as error:
                stop_at(step, error, training, saver)  # raises
            if watch:
                watch(step, steps, training.model)

            record = record_of(step, pairs, source, head_before, result, training)
            if options.eval_steps and step % options.eval_steps == 0:
                record["evaluation"] = evaluation_of(training)
            record["seconds"] = round(clock.seconds, 3)
            log.append(record)
            wrong = what_is_wrong(record) if step == training.first_step else None
            if wrong:
                print(f"step {step}: {wrong}", flush=True)
            if step % options.log_steps == 0 or step == steps:
                print(progress_line(record, steps, clock.seconds_left_after(step)), flush=True)

            saver.raise_error()  # of the thread that writes the checkpoint before
            if step % options.save_steps == 0 or step == steps or signals:
                training.engine.settle()  # the optimizer's states may be on their way to the host
                saver.save(
                    training.model, training.optimizer, training.weighting_state, log.to_disk()
                )
            if signals:
                saver.wait()
                print(
                    f"stopped after step {step} of {steps}, saved;"
                    " the same command with --resume continues"
                )
                return 128 + signals[0]
    return 0


def batch_at(step: int, training: Training) -> tuple[list[TokenPair], list[int]]:
    """The pairs of a step, and the source of each."""
    sampled = training.schedule.sampled_at(step)  # (B, 2): source, pair in the source
    return [training.sources[k].pairs[i] for k, i in sampled], sampled[:, 0].tolist()


def record_of(
    step: int,
    pairs: Sequence[TokenPair],
    source: list[int],
    head_before: Tensor,
    result: StepResult,
    training: Training,
) -> dict[str, Any]:
    """What metrics.jsonl says of a step: things as they were before its update."""
    on_device = torch.tensor(source, device=result.z_chosen.device)
    return {
        "step": step,
        "learning_rate": training.optimizer.learning_rate,
        "tokens": sum(pair.tokens for pair in pairs),
        **step_metrics(head_before, result, on_device, training.names),
    }


class Clock:
    """Seconds since the first step began, and how many are left."""

    def __init__(self, first_step: int, steps: int):
        self.began, self.first_step, self.steps = time.monotonic(), first_step, steps

    @property
    def seconds(self) -> float:
        """Seconds so far."""
        return time.monotonic() - self.began

    def seconds_left_after(self, step: int) -> float:
        """Seconds left after a step, if the other steps take as long as those so far."""
        return self.seconds / (step - self.first_step + 1) * (self.steps - step)


def stop_at(
    step: int, error: NonFiniteLoss | NonFiniteGradient, training: Training, saver: Saver
) -> NoReturn:
    """Raise FloatingPointError for a step that cannot be taken; what was saved before is kept."""
    training.engine.settle()
    saver.wait()
    what = "a gradient"
    if isinstance(error, NonFiniteLoss):
        what = f"the loss of source {training.names[error.source]!r}"
    last = checkpoints(training.run)[-1:]
    remaining = last[0] if last else "no checkpoint"
    raise FloatingPointError(
        f"step {step}: {what} is not finite; {remaining} is kept; try a smaller --learning-rate"
    ) from None


def print_what_begins(training: Training) -> None:
    """One line: steps, pairs, method, size and device."""
    parameters = sum(p.numel() for p in training.model.parameters())
    is_continued = training.first_step > 1
    print(
        f"{training.schedule.steps} steps of {training.schedule.batch_size} pairs,"
        f" {training.options.method}, {parameters:,} parameters on {training.model.head.device}"
        + (f", continuing after step {training.first_step - 1}" if is_continued else ""),
        flush=True,
    )


def evaluation_of(training: Training) -> dict[str, Any]:
    """The report on the test sources."""
    micro_tokens = training.options.micro_tokens
    return evaluate_sources(training.model, training.test_sources, micro_tokens)[0]


# ---- finish --------------------------------------------------------------------------------------


def finish(training: Training) -> None:
    """Write the finished model, evaluate it, and remove the checkpoints.

    config.json is written last: its presence means finished.
    """
    run, options = training.run, training.options
    write_weights(training)
    hold_as_stored(training)
    report = evaluation_of(training) if training.test_sources else None
    if report:
        print(table(report))
        write_json(run / "evaluation.json", report)
    write_text(run / "README.md", model_card(options, training.sources, report))
    write_config(run, training.origin, options.save_dtype)
    for old in checkpoints(run):
        remove(old)
    print(f"finished: {run}")


def write_weights(training: Training) -> None:
    """Write the weights: the fp32 number behind each parameter, rounded once, to --save-dtype.

    Of a split parameter the model holds one half and the optimizer the other.
    """
    model, optimizer = training.model, training.optimizer

    def whole(name: str, p: Tensor) -> Tensor:
        return optimizer.value(f"trunk.{name}", p)

    save_dtype = training.options.save_dtype
    tensors = model_tensors(training.origin, model.trunk, model.head, save_dtype, value=whole)
    write_sharded(training.run, tensors)


def hold_as_stored(training: Training) -> None:
    """Let the model hold what was stored, in the types in which `evaluate` would hold it.

    What is evaluated is then what was stored. One parameter at a time takes the place of its
    optimizer's states, so that no second model is ever in memory.
    """
    model, optimizer = training.model, training.optimizer
    stored_type = STORAGE[training.options.save_dtype]
    for name in list(optimizer.state):
        parameter = model.get_parameter(name)
        value = optimizer.value(name, parameter).to(stored_type)
        del optimizer.state[name]
        is_matrix = parameter.ndim > 1
        held_type = model.trunk.compute_dtype if is_matrix else torch.float32
        replace_parameter(model, name, value.to(held_type))


def model_card(
    options: TrainOptions, sources: Sequence[Source], report: dict[str, Any] | None
) -> str:
    """README.md of a finished run: what it is, on which data, with which options, how good."""
    named_above = ("source", "output", "resume", "model")
    rows = "\n".join(
        f"| `{flag_of(name)}` | `{value}` |"
        for name, value in asdict(options).items()
        if name not in named_above
    )
    counts = "\n".join(f"- {source.line()}" for source in sources)
    results = f"```\n{table(report)}\n```" if report else "No test file was given."
    return f"""---
tags: [reward-model, minimore]
pipeline_tag: text-classification
---

# Reward model trained with minimore

Made from `{options.model}`. \
The reward is the one logit of `AutoModelForSequenceClassification`, read at the last token; \
sigmoid(difference of two rewards) is the probability that people prefer the first.

## Data

{counts}

## Results on the test files

{results}

## Options

| option | value |
|---|---|
{rows}
"""
