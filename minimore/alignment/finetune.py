"""Fine-tuning a policy on responses: the step `minimore align finetune`.

On the best of several samples it is the paper's rejection sampling (Eq. 3):

    L = -log π(y_best | x),    y_best the sample with the highest reward

On the chosen responses of preference pairs it is plain fine-tuning, the paper's Alpaca-SFT.

    main -> finetune -> loop -> engine.step -> objective.loss

The run is a directory like any other: safe to kill, continued with --resume, and in the end a
checkpoint that transformers' AutoModelForCausalLM opens.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..engine.cost import in_whole_time
from ..engine.streamed import open_engine
from ..engine.workload import EPOCHS, Workload
from ..files import write_text
from ..metrics import finite
from ..model.checkpoint import Checkpoint, files_to_save
from ..options import COUNT, Range, check_ranges, option, require
from ..reward import check_length
from ..run import Lock, check_recipe, open_run
from ..training import (
    LoopOptions,
    Schedule,
    Training,
    begin,
    check_recipe_options,
    choose_recipe,
    loop,
    open_optimizer,
    open_origin,
    stop_requests,
    table_of_options,
    write_finished,
    write_weights,
)
from .language import LanguageObjective, LanguageResult, Responses, perplexity_of
from .policy import open_policy, require_language_model
from .responses import WHICH, ResponseFile, eos_of, read_responses


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(LoopOptions):
    """What `align finetune` takes; batch, length, learning rate and schedule are the paper's."""

    input: tuple[str, ...] = option(
        value="FILE.jsonl",
        repeat=True,
        help="once per file: prompts with a response or responses, pairs, or messages",
    )
    responses: str = option(
        "chosen",
        choices=WHICH,
        help="of preference pairs, learn the chosen responses, or all; of other records all are "
        "learned",
    )
    max_length: int = option(
        512,
        within=COUNT,
        help="tokens of prompt and response; the prompt is cut on the left, a longer response on "
        "the right",
    )
    chat: bool = option(False, help="read prompts and responses that are strings as messages")
    epochs: int = option(1, within=COUNT, help="passes over the responses")
    batch_size: int = option(64, within=COUNT, help="prompts a step, with their responses")
    warmup: float = option(
        0.05,
        within=Range(least=0, most=1),
        help="share of the steps in which the learning rate rises linearly from 0",
    )
    schedule: str = option(
        "cosine",
        choices=("linear", "cosine", "constant"),
        help="learning rate after warmup",
    )


def finetune(options: FinetuneOptions) -> int:
    """Fine-tune a policy; return the exit code: 0 finished, 128 + signal when asked to stop."""
    check_options(options)
    run = open_run(options)
    if run is None:
        return 0
    with Lock(run) as lock:
        training = prepare(options, run, lock)
        with stop_requests() as signals:
            exit_code = loop(training, signals)
        if exit_code == 0:
            finish(training)
    return exit_code


@dataclass(kw_only=True)
class PolicyTraining(Training):
    """The fine-tuning of a policy on the responses of some files."""

    options: FinetuneOptions
    files: list[ResponseFile]

    def batch_at(self, step: int) -> tuple[list[Responses], list[int]]:
        """The prompts of a step with their responses, and the file of each."""
        sampled = self.schedule.sampled_at(step)  # (B, 2): file, item in the file
        return [self.files[k].items[i] for k, i in sampled], sampled[:, 0].tolist()

    def record_of(
        self, step: int, items: Sequence[Responses], source: list[int], result: LanguageResult
    ) -> dict[str, Any]:
        """What metrics.jsonl says of a step: the mean loss of its targets, before its update."""
        return {
            "step": step,
            "learning_rate": self.optimizer.learning_rate,
            "tokens": sum(item.tokens for item in items),
            "targets": result.targets,
            "loss": finite(result.loss),
        }

    def progress_line(self, record: dict[str, Any], seconds_left: float) -> str:
        """Loss, perplexity, the time left."""
        line = (
            f"step {record['step']}/{self.schedule.steps}  loss {record['loss']:.4f}"
            f"  perplexity {perplexity_of(record['loss'])[1]}"
        )
        return line + (f"  {in_whole_time(seconds_left)} left" if seconds_left > 0 else "")

    def what_begins(self) -> str:
        """Prompts a step, and how many responses there are."""
        responses = sum(len(item.responses) for file in self.files for item in file.items)
        return f"{self.schedule.batch_size} prompts, {responses} responses in all"


def check_options(options: FinetuneOptions) -> None:
    """Refuse options that cannot be run (InputError)."""
    check_ranges(options)
    require(options.input, "--input: expected at least one file")
    files = [os.path.realpath(path) for path in options.input]
    for path, file in zip(options.input, files):
        require(
            files.count(file) == 1,
            f"--input {path}: is given twice; for more passes use --epochs",
        )
    check_recipe_options(options)


def prepare(options: FinetuneOptions, run: Path, lock: Lock) -> PolicyTraining:
    """Open the policy, or continue from the last checkpoint; read the files; choose the recipe.

    Nothing is written before everything that can be refused has been accepted.
    """
    origin, facts = open_origin(options, run)
    require_language_model(origin)
    check_length(origin.config, options.max_length, origin.directory)
    files = read_files(options, origin)
    files_to_save(origin, "language")  # what cannot be saved in the end is refused now
    sizes = tuple(len(file.items) for file in files)
    schedule = Schedule(options, options.epochs, sizes, options.batch_size)
    recipe = choose_recipe(options, origin, lambda: workload_of(schedule, files, origin))
    check_recipe(run, recipe)
    optimizer, adopt = open_optimizer(options, recipe)
    model = open_policy(origin, options, adopt)
    training = PolicyTraining(
        options=options,
        run=run,
        origin=origin,
        files=files,
        schedule=schedule,
        objective=LanguageObjective(),
        model=model,
        optimizer=optimizer,
        engine=open_engine(model, optimizer, recipe),
        digests={file.path: file.digest() for file in files},
    )
    begin(training, recipe, facts, lock)
    return training


def read_files(options: FinetuneOptions, checkpoint: Checkpoint) -> list[ResponseFile]:
    """The responses of every file; a line describes each."""
    files = []
    for path in options.input:
        files.append(
            read_responses(path, checkpoint, options.max_length, options.responses, options.chat)
        )
        print(files[-1].line(), flush=True)
    if eos_of(checkpoint) is None:
        print(
            f"{checkpoint.directory}: names no EOS, so the policy does not learn where a response"
            " ends; name one in tokenizer_config.json",
            flush=True,
        )
    return files


def workload_of(schedule: Schedule, files: Sequence[ResponseFile], origin: Checkpoint) -> Workload:
    """The shapes of the step with the most tokens, and the tokens of all steps.

    At most EPOCHS epochs are counted; each later one is taken to be like their mean.
    """
    counted_steps = schedule.steps // schedule.epochs * min(schedule.epochs, EPOCHS)
    largest: list[Responses] = []
    most_tokens = tokens = 0
    for step in range(1, counted_steps + 1):
        items = [files[k].items[i] for k, i in schedule.sampled_at(step)]
        tokens_of_step = sum(item.tokens for item in items)
        tokens += tokens_of_step
        if tokens_of_step > most_tokens:
            largest, most_tokens = items, tokens_of_step
    shapes = tuple((len(prompt), *map(len, responses)) for prompt, responses in largest)
    tokens = tokens * schedule.steps // counted_steps
    return Workload(shapes, schedule.steps, tokens, "tied" if origin.is_tied else "untied")


def finish(training: PolicyTraining) -> None:
    """Write the finished policy."""
    write_weights(training)
    write_text(training.run / "README.md", model_card(training))
    write_finished(training)


def model_card(training: PolicyTraining) -> str:
    """README.md of a finished run: what it is, on which responses, with which options."""
    options = training.options
    options_table = table_of_options(options, ("input", "output", "resume", "model"))
    counts = "\n".join(f"- {file.line()}" for file in training.files)
    return f"""---
tags: [minimore]
pipeline_tag: text-generation
---

# Policy fine-tuned with minimore

Made from `{options.model}`; `AutoModelForCausalLM` opens it.

## Data

{counts}

## Options

{options_table}
"""
