"""Any training: how it begins, the loop over its steps, and what a kill leaves whole.

train.py trains a reward model, alignment/finetune.py a policy. Each prepares a `Training` of its
own kind; what is here is the same for both, in three parts.

    begin    the directory is taken; a run that is continued is put back as it was
    loop     step after step, logged, saved, stopped on request
    finish   the functions that make an ordinary checkpoint of what was trained
"""

import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from .best import Best, saved_best
from .checksums import checksum
from .engine.choose import choose, parse_memory
from .engine.distributed import (
    ShardedAdamW,
    give_rows,
    is_first,
    most_of_all,
    own,
    processes,
    round_rows,
)
from .engine.host import available_memory, pinned
from .engine.objective import NonFiniteGradient, NonFiniteLoss, Objective
from .engine.optim import AdamW, where_it_is
from .engine.plain import PlainEngine
from .engine.recipe import Recipe
from .engine.streamed import StreamedEngine
from .engine.trained import is_trained, trained_blocks
from .engine.workload import Workload
from .files import write_bytes
from .metrics import Log, RecentSteps, remaining_log
from .model.checkpoint import Checkpoint, model_tensors, write_config
from .model.tensors import STORAGE, write_sharded
from .model.trunk import replace_parameter
from .options import flag_of, require
from .resume import Saver, check_whole, checkpoints, load_state, remove_superseded
from .reward import compute_type, device_of
from .run import Lock, start_run, stored_recipe
from .schedule import LINES_A_RUN, LoopOptions, Schedule, learning_rate_at
from .units import in_bytes

Watch = Callable[[int, int, Any], None]  # (step, number of steps, model), after every step


# ---- what a training consists of -----------------------------------------------------------------


@dataclass(kw_only=True)
class Training:
    """All that the loop needs: what is trained on, what is trained, and how.

    origin: what the model was opened from. model: a RewardModel or a LanguageModel. digests: of the
    texts of every source. weighting_state: what a weighting of the sources keeps from step to step.
    """

    options: LoopOptions  # and those of its kind
    run: Path
    origin: Checkpoint
    schedule: Schedule
    objective: Objective
    model: Any
    optimizer: AdamW
    engine: PlainEngine | StreamedEngine
    digests: dict[str, str]
    weighting_state: dict[str, Tensor] = field(default_factory=dict)
    first_step: int = 1
    best: Best | None = None  # the best step so far, where one is sought

    def batch_at(self, step: int) -> tuple[list[Any], list[int]]:
        """The items of a step, and the source of each."""
        raise NotImplementedError

    def record_of(
        self, step: int, items: Sequence[Any], source: list[int], result: Any
    ) -> dict[str, Any]:
        """What metrics.jsonl says of a step: things as they were before its update."""
        raise NotImplementedError

    def progress_line(
        self, record: dict[str, Any], means: dict[str, Any] | None, seconds_left: float
    ) -> str:
        """The line of a step on the screen; means: those of `RecentSteps`."""
        raise NotImplementedError

    def evaluation_lines(self, record: dict[str, Any]) -> list[str]:
        """What the evaluations after a step have shown; none for a step without one."""
        return []

    def what_begins(self) -> str:
        """What is trained, in a few words, for the first line."""
        raise NotImplementedError

    def what_is_wrong(self, record: dict[str, Any]) -> str | None:
        """What the first step shows that keeps a model from learning; None if it shows nothing."""
        return None

    def name_of_loss(self, source: int) -> str:
        """The loss of a source, in words."""
        return "the loss"


# ---- begin ---------------------------------------------------------------------------------------


def open_origin(options: LoopOptions, run: Path) -> tuple[Checkpoint, dict[str, Any] | None]:
    """The checkpoint that a training opens, and the facts in state.json if it is the run's own.

    That is the last checkpoint of a run that is continued; a new run opens --model, which has no
    such facts. Raises InputError for a checkpoint that is not whole.
    """
    last = checkpoints(run)[-1:]
    if not last:
        return Checkpoint(options.model), None
    facts = check_whole(last[0])
    return Checkpoint(str(last[0])), facts


def begin(training: Training, recipe: Recipe, facts: dict[str, Any] | None, lock: Lock) -> None:
    """Take the directory, and put a run that is continued back as it was.

    Nothing is written before the run's own state has been accepted, too: a finished run that cannot
    go on stays a finished one. facts: those of `open_origin`.
    """
    lock.take()
    if facts:
        restore(training, facts)
    if not is_first():
        return
    path = training.run / "metrics.jsonl"
    checksum_of_log = facts["log"] if facts else checksum(b"")
    log = remaining_log(path, training.first_step - 1, checksum_of_log)
    start_run(training.run, training.options, recipe)
    write_bytes(path, log)


def restore(training: Training, facts: dict[str, Any]) -> None:
    """Put everything back as it was when the checkpoint was saved; the model is loaded already."""
    checkpoint = training.origin.directory
    step = load_state(
        checkpoint,
        facts,
        training.model,
        training.optimizer,
        training.weighting_state,
        training.digests,
    )
    steps = training.schedule.steps
    require(
        step <= steps,
        f"{checkpoint}: comes after the last of this run's {steps} steps;"
        " remove it to start again from step 0",
    )
    training.first_step = step + 1
    training.best = saved_best(training.run, facts)
    print_other_schedule(training, facts.get("steps"))


def print_other_schedule(training: Training, steps_before: int | None) -> None:
    """Say what it changes that a run was given more epochs than it began with.

    steps_before: of the whole run, when its state was saved; None where a state does not say it.
    """
    options, schedule, taken = training.options, training.schedule, training.first_step - 1
    if steps_before is None or steps_before == schedule.steps:
        return
    rates_before = [learning_rate_at(s, steps_before, options) for s in range(1, taken + 1)]
    rates_now = [schedule.learning_rate_at(s) for s in range(1, taken + 1)]
    line = f"the run has {schedule.steps} steps now, and had {steps_before} when step {taken} ended"
    if rates_before == rates_now:
        print(f"{line}; those are steps of the longer run, too", flush=True)
        return
    before, after = rates_before[-1], schedule.learning_rate_at(taken + 1)
    print(
        f"{line}; with --schedule {options.schedule} and --warmup {options.warmup:g} the learning"
        f" rate depends on that: it was {before:.3g}, and goes on with {after:.3g}, so this is not"
        f" the run that {schedule.epochs} epochs from the start would have made",
        flush=True,
    )


def check_recipe_options(options: LoopOptions) -> None:
    """Refuse a recipe that contradicts itself, and a --memory without a size (InputError)."""
    if options.memory is None:
        Recipe(**options.chosen_recipe(options.micro_tokens)).check()
    else:
        parse_memory(options.memory)


def choose_recipe(
    options: LoopOptions, checkpoint: Checkpoint, work: Callable[[], Workload], reserved: int = 0
) -> Recipe:
    """The recipe that was asked for. With --memory the rest is chosen, so that the work fits.

    A run that is continued keeps the storage of numbers that it began with. work: computes the
    workload, which takes time and is needed with --memory only. reserved: bytes of that memory
    which the training takes besides.
    """
    stored = stored_recipe(Path(options.output)) if options.resume else {}
    chosen = options.chosen_recipe(options.micro_tokens, stored)
    trained_blocks(chosen.get("train", Recipe.train), checkpoint.config.blocks)  # may be refused
    if options.memory is None:
        return Recipe(**chosen)
    limit = parse_memory(options.memory) - reserved
    if reserved:
        needed = f"--memory {options.memory}: the weights of the sources take {in_bytes(reserved)}"
        require(limit > 0, f"{needed}; expected more memory, or --lambda-gradients head")
        print(f"{needed} of it, so {in_bytes(limit)} are left for the recipe", flush=True)
    return choose(
        checkpoint.config,
        work(),
        chosen,
        limit,
        device_of(options),
        compute_type(options),
        available_memory() or math.inf,
        processes(),
    )


def open_optimizer(
    options: LoopOptions, recipe: Recipe, blocks: int
) -> tuple[AdamW, Callable[[str, Tensor], Tensor]]:
    """The optimizer of a recipe, and the function that gives it every parameter as it is loaded.

    The function takes a name and a value, and returns what the model is to hold of it. blocks: of
    the model.
    """
    kind = AdamW if processes() == 1 else ShardedAdamW
    optimizer = kind(recipe.parameters, recipe.moments, options.weight_decay, seed=options.seed)

    def adopt(name: str, value: Tensor) -> Tensor:
        home = pinned if "states" in recipe.offload else where_it_is
        return optimizer.adopt(name, value, home, is_trained(name, recipe.train, blocks))

    return optimizer, adopt


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


def loop(training: Training, signals: list[int], watch: Watch | None = None) -> int:
    """Take every step that is left; return 0, or 128 + the number of the signal that stopped it.

    signals: the list of `stop_requests`, which may be filled while a step runs.
    """
    options, steps = training.options, training.schedule.steps
    log_steps = options.log_steps or math.ceil(steps / LINES_A_RUN)
    print_what_begins(training, log_steps)
    print_if_nothing_moves(training)
    recent_steps = RecentSteps(log_steps)
    saver = Saver(training.run, training.origin, training.digests, options.keep or 1)
    with Log(training.run / "metrics.jsonl", is_written=is_first()) as log, saver:
        clock = Clock(training.first_step, steps)
        for step in range(training.first_step, steps + 1):
            items, source = training.batch_at(step)
            training.optimizer.learning_rate = training.schedule.learning_rate_at(step)
            try:
                result = training.engine.step(items, source, training.objective)
            except (NonFiniteLoss, NonFiniteGradient) as error:
                raise_not_finite(step, error, training, saver)
            if watch:
                watch(step, steps, training.model)
            record = training.record_of(step, items, source, result)
            record["seconds"] = round(clock.seconds, 3)
            log.append(record)
            recent_steps.append(record)
            print_progress(record, training, clock, recent_steps)
            saver.raise_error()  # of the thread that writes the checkpoint before
            is_best = training.best is not None and training.best.step == step
            is_due = is_best or step % options.save_steps == 0 or step == steps or bool(signals)
            is_due = bool(most_of_all(is_due))  # processes save together, and stop together
            if is_due:
                save(training, saver, log)
            # A signal that came too late for this save ends the next step.
            stop = most_of_all(signals[0] if signals else 0) if is_due else 0
            if stop:
                saver.wait()
                print(
                    f"stopped after step {step} of {steps}, saved;"
                    " the same command with --resume continues"
                )
                return 128 + stop
    return 0


def print_progress(
    record: dict[str, Any], training: Training, clock: "Clock", recent_steps: RecentSteps
) -> None:
    """Print the lines of the first and the last step, of some between, and of every evaluation.

    Before that of the first step comes what is wrong with it. recent_steps: over which
    means are taken, this one included; after so many steps there is a line.
    """
    step, steps = record["step"], training.schedule.steps
    begins = step == training.first_step
    wrong = training.what_is_wrong(record) if begins else None
    if wrong:
        print(f"step {step}: {wrong}", flush=True)
    if begins or step % recent_steps.most == 0 or step == steps:
        seconds_left = clock.seconds_left_after(step)
        print(training.progress_line(record, recent_steps.means(), seconds_left), flush=True)
    for line in training.evaluation_lines(record):
        print(line, flush=True)


def save(training: Training, saver: Saver, log: Log) -> None:
    """Save the state after the step that was taken last."""
    training.engine.settle()  # the optimizer's states may be on their way to the host
    facts: dict[str, Any] = {"steps": training.schedule.steps}
    if training.best:
        facts["best"] = training.best._asdict()
    saver.save(training.model, training.optimizer, training.weighting_state, log.to_disk(), facts)


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


def raise_not_finite(
    step: int, error: NonFiniteLoss | NonFiniteGradient, training: Training, saver: Saver
) -> NoReturn:
    """Raise FloatingPointError for a step that cannot be taken; what was saved before is kept."""
    training.engine.settle()
    saver.wait()
    what = "a gradient"
    if isinstance(error, NonFiniteLoss):
        what = training.name_of_loss(error.source)
    last = checkpoints(training.run)[-1:]
    remaining = last[0] if last else "no checkpoint"
    raise FloatingPointError(
        f"step {step}: {what} is not finite; {remaining} is kept; try a smaller --learning-rate"
        if is_first()
        else ""  # all processes say the same
    ) from None


def print_what_begins(training: Training, log_steps: int) -> None:
    """Steps, what is trained, size and device; where lines show means, over how many steps."""
    parameters = sum(p.numel() for p in training.model.parameters())
    trained = sum(p.numel() for p in training.model.parameters() if p.requires_grad)
    is_continued = training.first_step > 1
    print(
        f"{training.schedule.steps} steps of {training.what_begins()}, {parameters:,} parameters on"
        f" {training.model.top.device}"
        + (f", of which {trained:,} are trained" if trained < parameters else "")
        + (f", {processes()} processes" if processes() > 1 else "")
        + (f", continuing after step {training.first_step - 1}" if is_continued else ""),
        flush=True,
    )
    if 1 < log_steps < training.schedule.steps:
        print(f"a line every {log_steps} steps; in brackets means over the last {log_steps}")


def print_if_nothing_moves(training: Training) -> None:
    """One line when steps are too small to change the weights.

    A step of AdamW moves a number by about the learning rate. In fp32 the neighbours of p lie
    |p| 2^-23 apart or a little less, and a step below half of that is rounded away. (Weights in
    bf16 are computed in fp32 and rounded at random, so smaller steps arrive on average.)
    """
    rate = training.options.learning_rate
    trained = [p for p in training.model.parameters() if p.requires_grad]
    largest = max(trained, key=Tensor.numel)
    typical = own(largest.detach()).flatten()[:100_000].abs().float().median().item()
    if rate < typical * 2**-24:
        print(
            f"--learning-rate {rate:g} is below the rounding of weights like {typical:.1g}:"
            " the model stays as it is",
            flush=True,
        )


# ---- finish --------------------------------------------------------------------------------------


def write_weights(training: Training) -> None:
    """Write the weights: the fp32 number behind each parameter, rounded once, to --save-dtype.

    Of a split parameter the model holds one half and the optimizer the other.
    """
    model, origin, save_dtype = training.model, training.origin, training.options.save_dtype
    top = model.saved_top(origin.family)
    tensors = model_tensors(origin, model.trunk, top, save_dtype, training.optimizer.value)
    if is_first():
        write_sharded(training.run, tensors)
    else:
        give_rows(tensors)


def hold_as_stored(training: Training) -> None:
    """Let the model hold what was stored, in the types in which `evaluate` would hold it.

    What is evaluated is then what was stored. The optimizer's states of a parameter go as its new
    value comes, one parameter at a time, so that no second model is ever in memory.
    """
    model, optimizer = training.model, training.optimizer
    stored_type = STORAGE[training.options.save_dtype]
    if processes() > 1:
        optimizer.state.clear()
        round_rows(model, stored_type)
        return
    for name in list(optimizer.state):
        parameter = model.get_parameter(name)
        value = optimizer.value(name, parameter).to(stored_type)
        del optimizer.state[name]
        is_matrix = parameter.ndim > 1
        held_type = model.trunk.compute_dtype if is_matrix else torch.float32
        replace_parameter(model, name, value.to(held_type))


def table_of_options(options: LoopOptions, named_above: Sequence[str]) -> str:
    """The options of a run as the table of its README.md, but for those that it names above."""
    rows = [
        f"| `{flag_of(name)}` | `{value}` |"
        for name, value in asdict(options).items()
        if name not in named_above
    ]
    return "\n".join(["| option | value |", "|---|---|", *rows])


def write_finished(training: Training) -> None:
    """Make the run an ordinary checkpoint, and remove the saved states that it is not to keep.

    config.json is written last: its presence means finished.
    """
    write_config(training.run, training.origin, training.model.kind, training.options.save_dtype)
    remove_superseded(training.run, training.options.keep or 0)
    print(f"finished: {training.run}")
