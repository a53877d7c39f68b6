"""Training: the loop, and what it logs. run.py makes it safe to kill.

K sources, B pairs in a step, D width.
"""

import json
import math
import signal
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor

from .data.pairs import Source, load_source
from .data.sampling import batch_size_of, epoch_steps
from .engine.host import available_memory, pinned
from .engine.objective import NonFiniteGradient, NonFiniteLoss, RewardObjective
from .engine.optim import AdamW, replace_parameter
from .engine.plan import RunOptions, choose, parse_memory, workload_of
from .engine.recipe import Recipe
from .engine.streamed import open_engine
from .evaluate import evaluate_sources, table
from .files import write_json, write_text
from .model.checkpoint import Checkpoint, model_tensors, saved_config, write_config
from .model.tensors import STORAGE, write_sharded
from .more import MOST_SOURCES, WEIGHTINGS, bradley_terry_losses, head_gradients
from .options import MOST, InputError, check_ranges, option, parse_sources
from .reward import RewardModel, check_length, compute_type, device_of, load_reward_model
from .run import (
    Lock,
    Saver,
    check_recipe,
    check_whole,
    checkpoints,
    cut_metrics,
    load_state,
    open_run,
    remove,
    start_run,
    stored_recipe,
)


@dataclass(frozen=True, kw_only=True)
class TrainOptions(RunOptions):
    """Learning rate, epochs, length and batch are the paper's; l2 and the linear schedule the authors' code's; the rest is ours."""

    output: str = option(
        value="RUN", help="run directory to make; must not exist, except with --resume"
    )
    resume: bool = option(
        False, help="continue the run in --output: the same command again, plus this"
    )
    method: str = option(
        "more",
        choices=tuple(WEIGHTINGS),
        help="how the sources' losses are weighted; proportional is the "
        "share of each source in the batch, so uniform under equal sampling",
    )
    normalize: str = option(
        "l2",
        choices=("none", "l2", "loss", "loss+"),
        help="more: scaling of the head gradients before the solve (with two sources, l2 makes the weights uniform)",
    )
    gradient_average: float = option(
        1.0,
        help="more: weight of the newest head gradient in its running average; 1 keeps no average",
    )
    lambda_scope: str = option(
        "step",
        choices=("step", "group"),
        help="solve the weights over the whole step (the paper; with several "
        "micro-batches one more forward), or per group of one pair a source (the authors' code)",
    )
    learning_rate: float = option(1e-6, help="peak learning rate")
    warmup: float = option(
        0.0, help="share of the steps in which the learning rate rises linearly from 0"
    )
    schedule: str = option(
        "linear", choices=("linear", "cosine", "constant"), help="learning rate after warmup"
    )
    weight_decay: float = option(0.0, help="AdamW's decoupled weight decay")
    label_smoothing: float = option(
        0.0,
        help="share of labels taken as the wrong way round; metrics.jsonl has the losses of sources without it",
    )
    save_steps: int = option(500, help="steps between checkpoints")
    keep: int = option(1, help="checkpoints to keep, the newest ones")
    eval_steps: int | None = option(
        None, help="steps between evaluations on the TEST files (default: only at the end)"
    )
    log_steps: int = option(1, help="steps between printed lines; metrics.jsonl has every step")
    save_dtype: str = option(
        "float32", choices=tuple(STORAGE), help="type in which the finished model is stored"
    )


# ---- what a step is told and what it tells --------------------------------------------------------------------------


def learning_rate_at(step: int, steps: int, options: TrainOptions) -> float:
    """Learning rate of step 0, 1, ..., steps - 1: linear warmup, then the schedule, which would reach 0 at `steps`."""
    warm = math.ceil(options.warmup * steps)
    if step < warm:
        return options.learning_rate * (step + 1) / warm
    done = (step - warm) / max(1, steps - warm)
    falling = {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, "constant": 1.0}
    return options.learning_rate * falling[options.schedule]


@torch.no_grad()
def step_metrics(head, z_chosen, z_rejected, source, weights, loss, names) -> dict:
    """What metrics.jsonl says of one step: per source loss, accuracy, weight; cosines of the head gradients."""
    K, margins = len(names), (z_chosen - z_rejected) @ head
    losses = bradley_terry_losses(head, z_chosen, z_rejected, source, K)
    gradients = head_gradients(head, z_chosen, z_rejected, source, K)
    units = gradients / gradients.norm(dim=1, keepdim=True)
    cosines, right = (units @ units.T).tolist(), (margins > 0).double() + 0.5 * (margins == 0)
    number = lambda x: float(x) if math.isfinite(x) else None  # a source without a pair: null
    return {
        "loss": float(loss),
        "sources": {
            name: {
                "pairs": int((source == k).sum()),
                "loss": number(losses[k]),
                "accuracy": number(right[source == k].mean()),
                "weight": float(weights[k]),
                "gradient_norm": number(gradients[k].norm()),
            }
            for k, name in enumerate(names)
        },
        "cosines": {
            f"{names[i]} ~ {names[j]}": number(cosines[i][j])
            for i in range(K)
            for j in range(i + 1, K)
        },
    }


def progress_line(record: dict, steps: int, seconds_left: float) -> str:
    """One readable line: per source loss, accuracy and weight; the range of the cosines; time left."""
    cells = [
        f"{name} {r['loss']:.3f} {r['accuracy']:4.0%} w{r['weight']:.2f}"
        if r["pairs"]
        else f"{name} none"
        for name, r in record["sources"].items()
    ]
    cosines = [c for c in record["cosines"].values() if c is not None]
    cells += [f"cosines {min(cosines):.2f} to {max(cosines):.2f}"] if cosines else []
    hours, rest = divmod(int(seconds_left), 3600)
    return f"step {record['step']}/{steps}  loss {record['loss']:.4f}  {'  '.join(cells)}  {hours}:{rest // 60:02d}:{rest % 60:02d} left"


@contextmanager
def stop_requests():
    """Ctrl-C and SIGTERM set a flag that the loop reads after each step; a second Ctrl-C interrupts at once."""
    received = []

    def handler(number, frame):
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)
        print(f"\n{signal.Signals(number).name}: finishing this step, then saving", flush=True)

    before = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, old in before.items():
            signal.signal(number, old)


# ---- the loop --------------------------------------------------------------------------------------------------------


def check_options(options: TrainOptions, K: int) -> int:
    """Refuse what cannot be run (InputError); returns the batch size."""
    check_ranges(options)
    batch = batch_size_of(options, K)
    refuse = [
        (
            options.lambda_scope == "group" and options.sampling != "equal",
            "--lambda-scope group needs --sampling equal: a group is one pair of every source",
        ),
        (
            options.method == "more" and K > MOST_SOURCES,
            f"--method more: {K} sources, but the exact solver takes at most {MOST_SOURCES}; merge some",
        ),
        (
            not 0 < options.gradient_average <= 1,
            f"--gradient-average {options.gradient_average}: expected more than 0, at most 1",
        ),
        (
            not 0 <= options.warmup <= 1,
            f"--warmup {options.warmup}: expected a share of the steps, from 0 to 1",
        ),
        (
            options.method != "more"
            and (options.normalize != "l2" or options.gradient_average != 1),
            "--normalize and --gradient-average go with --method more",
        ),
        (
            options.learning_rate <= 0,
            f"--learning-rate {options.learning_rate}: expected more than 0",
        ),
        (
            not 0 <= options.label_smoothing < 0.5,
            f"--label-smoothing {options.label_smoothing}: expected from 0 to less than 0.5",
        ),
        (options.weight_decay < 0, f"--weight-decay {options.weight_decay}: expected 0 or more"),
    ]
    for name in ("save_steps", "keep", "log_steps", "eval_steps"):
        value = getattr(options, name)
        refuse.append(
            (
                value is not None and not 1 <= value <= MOST,
                f"--{name.replace('_', '-')} {value}: expected 1 to {MOST}",
            )
        )
    for wrong, message in refuse:
        if wrong:
            raise InputError(message)
    if options.memory is None:
        Recipe(**options.chosen_recipe(options.micro_tokens)).check()
    else:
        parse_memory(options.memory)
    return batch


def load_sources(options, tokenizer) -> tuple[list[Source], list[Source]]:
    """Training sources and the test sources that were given; every one is described on a line."""
    train_sources, test_sources = [], []
    for name, (train_path, test_path) in parse_sources(options.source).items():
        train_sources.append(
            load_source(name, train_path, tokenizer, options.max_length, options.truncate)
        )
        print(train_sources[-1].line(), flush=True)
        if test_path:
            test_sources.append(
                load_source(name, test_path, tokenizer, options.max_length, options.truncate)
            )
            print(f"  test {test_sources[-1].line()}", flush=True)
    if options.eval_steps and not test_sources:
        raise InputError(
            "--eval-steps: no source has a TEST file; expected NAME=TRAIN.jsonl,TEST.jsonl"
        )
    return train_sources, test_sources


def recipe_of(
    options: TrainOptions, checkpoint: Checkpoint, sources: list[Source], batch: int
) -> Recipe:
    """The recipe as given; with --memory, what was not given is chosen so that the largest step fits.

    A run that is continued keeps the storage of numbers that it began with.
    """
    given = options.chosen_recipe(
        options.micro_tokens, stored_recipe(Path(options.output)) if options.resume else None
    )
    if options.memory is not None:
        return choose(
            checkpoint.config,
            workload_of(options, sources, batch),
            given,
            parse_memory(options.memory),
            device_of(options),
            compute_type(options),
            available_memory() or math.inf,
        )
    return Recipe(**given)


def open_trainable(
    options: TrainOptions, checkpoint: Checkpoint, recipe: Recipe
) -> tuple[RewardModel, AdamW]:
    """The model with its parameters stored as the recipe says, and the optimizer that holds its states."""
    optimizer = AdamW(recipe.parameters, recipe.moments, options.weight_decay, seed=options.seed)
    home = pinned if "states" in recipe.offload else lambda tensor: tensor
    return load_reward_model(
        checkpoint, options, lambda name, value: optimizer.adopt(name, value, home)
    ), optimizer


def train(
    options: TrainOptions, watch: Callable[[int, int, RewardModel], None] | None = None
) -> int:
    """Train a reward model; returns the exit code (0 finished, 128 + signal when asked to stop).

    watch: called after every step with its number, the number of steps and the model.
    """
    batch_size = check_options(options, len(parse_sources(options.source)))
    run = open_run(options)
    if run is None:
        return 0
    with Lock(run) as lock:
        return train_in(run, lock, options, batch_size, watch)


def train_in(
    run: Path, lock: Lock, options: TrainOptions, batch_size: int, watch: Callable | None
) -> int:
    """Open, or continue, what is in a run directory of our own, and take its steps."""
    names = list(parse_sources(options.source))
    K = len(names)
    last = checkpoints(run)[-1:]
    state = check_whole(last[0]) if last else None
    checkpoint = Checkpoint(str(last[0]) if last else options.model)
    check_length(checkpoint.config, options.max_length, checkpoint.directory)
    sources, tests = load_sources(options, checkpoint.tokenizer)
    saved_config(checkpoint)  # what cannot be saved in the end is refused now
    recipe = recipe_of(options, checkpoint, sources, batch_size)
    check_recipe(run, recipe)
    model, optimizer = open_trainable(options, checkpoint, recipe)
    engine = open_engine(model, optimizer, recipe)
    if K == 1 and options.method == "more":
        print("one source: its weight is always 1, so MORE is plain Bradley-Terry here")
    if K == 2 and options.method == "more" and options.normalize == "l2":
        print(
            "two sources and --normalize l2: two gradients of equal length always get weights 1/2, so MORE is uniform here"
        )
    digests = {s.name: s.digest() for s in sources}
    lock.take()
    start_run(run, options, recipe)

    memory: dict[str, Tensor] = {}  # the weighting's own state
    extra = (
        {"normalize": options.normalize, "average": options.gradient_average}
        if options.method == "more"
        else {}
    )
    how = RewardObjective(
        K,
        partial(WEIGHTINGS[options.method], state=memory, **extra),
        options.method,
        options.lambda_scope,
        options.sampling,
        options.label_smoothing,
    )
    done = load_state(last[0], state, optimizer, memory, digests, model.head.device) if last else 0
    cut_metrics(run / "metrics.jsonl", done)

    sizes = [len(s.pairs) for s in sources]
    epoch_of = lru_cache(maxsize=1)(
        lambda e: epoch_steps(
            sizes, options.sampling, options.pairs_per_source, batch_size, options.seed, e
        )
    )
    per_epoch = len(epoch_of(0))
    began, first, steps = time.monotonic(), done, per_epoch * options.epochs
    if done > steps:
        raise InputError(
            f"{last[0]}: comes after the last of this run's {steps} steps; remove it to start again from step 0"
        )
    print(
        f"{steps} steps of {batch_size} pairs, {options.method}, {sum(p.numel() for p in model.parameters()):,} parameters on {model.head.device}"
        + (f", continuing after step {done}" if done else ""),
        flush=True,
    )
    saver = Saver(run, checkpoint, digests, options.keep)
    with (
        stop_requests() as stop,
        open(run / "metrics.jsonl", "a", encoding="utf-8") as metrics,
        saver,
    ):
        for done in range(done + 1, steps + 1):
            chosen = epoch_of((done - 1) // per_epoch)[(done - 1) % per_epoch]
            pairs = [sources[k].pairs[i] for k, i in chosen]
            optimizer.learning_rate = learning_rate_at(done - 1, steps, options)
            head = model.head.detach().clone()
            try:
                z_chosen, z_rejected, weights, loss = engine.step(pairs, chosen[:, 0].tolist(), how)
            except (NonFiniteLoss, NonFiniteGradient) as error:
                engine.settle()
                saver.wait()
                kept = checkpoints(run)
                what = (
                    f"the loss of source {names[error.source]!r}"
                    if isinstance(error, NonFiniteLoss)
                    else "a gradient"
                )
                raise FloatingPointError(
                    f"step {done}: {what} is not finite; {kept[-1] if kept else 'no checkpoint'} is kept; try a smaller --learning-rate"
                ) from None
            record = {
                "step": done,
                "learning_rate": optimizer.learning_rate,
                "tokens": sum(p.tokens for p in pairs),
            }
            record |= step_metrics(
                head,
                z_chosen,
                z_rejected,
                torch.tensor(chosen[:, 0], device=z_chosen.device),
                weights,
                loss,
                names,
            )
            if watch:
                watch(done, steps, model)
            if options.eval_steps and done % options.eval_steps == 0:
                record["evaluation"] = evaluate_sources(model, tests, options.micro_tokens)[0]
            record["seconds"] = round(time.monotonic() - began, 3)
            metrics.write(json.dumps(record, allow_nan=False) + "\n")
            metrics.flush()
            if done % options.log_steps == 0 or done == steps:
                print(
                    progress_line(
                        record, steps, (time.monotonic() - began) / (done - first) * (steps - done)
                    ),
                    flush=True,
                )
            if saver.error:
                saver.wait()
            if done % options.save_steps == 0 or done == steps or stop:
                engine.settle()
                saver.save(model, optimizer, memory)
            if stop:
                saver.wait()
                print(
                    f"stopped after step {done} of {steps}, saved; the same command with --resume continues"
                )
                return 128 + stop[0]
    finish(run, options, checkpoint, model, optimizer, sources, tests)
    return 0


def model_card(options: TrainOptions, sources: list[Source], report: dict | None) -> str:
    """README.md of a finished run: what it is, on which data, with which options, how good."""
    given = "\n".join(
        f"| `--{k.replace('_', '-')}` | `{v}` |"
        for k, v in asdict(options).items()
        if k not in ("source", "output", "resume", "model")
    )
    counts = "\n".join(f"- {s.line()}" for s in sources)
    results = f"```\n{table(report)}\n```" if report else "No test file was given."
    return (
        f"---\ntags: [reward-model, minimore]\npipeline_tag: text-classification\n---\n\n# Reward model trained with minimore\n\n"
        f"Made from `{options.model}`. The reward is the one logit of `AutoModelForSequenceClassification`, read at the last token; "
        f"sigmoid(difference of two rewards) is the probability that people prefer the first.\n\n## Data\n\n{counts}\n\n"
        f"## Results on the test files\n\n{results}\n\n## Options\n\n| option | value |\n|---|---|\n{given}\n"
    )


def finish(
    run: Path,
    options: TrainOptions,
    checkpoint: Checkpoint,
    model: RewardModel,
    optimizer: AdamW,
    sources: list[Source],
    tests: list[Source],
):
    """Evaluate, write the finished model (config.json last: its presence means finished), remove the checkpoints."""
    stored = STORAGE[options.save_dtype]
    write_sharded(
        run,
        model_tensors(
            checkpoint,
            model.trunk,
            model.head,
            options.save_dtype,
            lambda name, p: optimizer.value(f"trunk.{name}", p),
        ),
    )
    for name in list(
        optimizer.state
    ):  # what is evaluated is what is stored, held as `evaluate` holds it; one at a time gives way
        p = model.get_parameter(name)
        value = optimizer.value(name, p).to(stored)
        del optimizer.state[name]
        replace_parameter(
            model, name, value.to(model.trunk.compute_dtype if p.ndim > 1 else torch.float32)
        )
    report = evaluate_sources(model, tests, options.micro_tokens)[0] if tests else None
    if report:
        print(table(report))
        write_json(run / "evaluation.json", report)
    write_text(run / "README.md", model_card(options, sources, report))
    write_config(run, checkpoint, options.save_dtype)
    for old in checkpoints(run):
        remove(old)
    print(f"finished: {run}")
