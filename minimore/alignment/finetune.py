"""Fine-tuning a policy on responses: the step `minimore align finetune`.

On the best of several samples it is the paper's rejection sampling (Eq. 3):

    L = -log π(y_best | x),    y_best the sample with the highest reward

On the chosen responses of preference pairs it is plain fine-tuning, the paper's Alpaca-SFT. What
learns from pairs themselves, without a reward model, is in preference_training.py.

    main -> finetune -> loop -> engine.step -> objective.loss

The run is a directory like any other: safe to kill, continued with --resume, and in the end a
checkpoint that transformers' AutoModelForCausalLM opens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..engine.streamed import open_engine
from ..files import write_text
from ..metrics import finite, position_and_loss
from ..model.checkpoint import Checkpoint, files_to_save
from ..run import Lock, check_recipe, open_run
from ..schedule import Schedule
from ..training import (
    Training,
    begin,
    choose_recipe,
    loop,
    open_optimizer,
    stop_requests,
    write_finished,
    write_weights,
)
from ..units import in_whole_time
from . import preference_training
from .language import LanguageObjective, LanguageResult, Responses, perplexity_of
from .policy import open_policy
from .responses import ResponseFile, eos_of, read_responses
from .tuning import (
    LIKELIHOOD,
    FinetuneOptions,
    check_options,
    model_card,
    open_language_origin,
    workload_of,
)


def finetune(options: FinetuneOptions) -> int:
    """Fine-tune a policy; return the exit code: 0 finished, 128 + signal when asked to stop."""
    check_options(options)
    with Lock(Path(options.output)) as lock:
        run = open_run(options)
        if run is None:
            return 0
        training: Training
        if options.loss == LIKELIHOOD:
            training = prepare(options, run, lock)
        else:
            training = preference_training.prepare(options, run, lock)
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

    def progress_line(
        self, record: dict[str, Any], means: dict[str, Any] | None, seconds_left: float
    ) -> str:
        """Loss, perplexity, the time left."""
        line = position_and_loss(record, means, self.schedule.steps)
        line += f"  perplexity {perplexity_of(record['loss'])[1]}"
        return line + (f"  {in_whole_time(seconds_left)} left" if seconds_left > 0 else "")

    def what_begins(self) -> str:
        """Prompts a step, and how many responses there are."""
        responses = sum(len(item.responses) for file in self.files for item in file.items)
        return f"{self.schedule.batch_size} prompts, {responses} responses in all"


def prepare(options: FinetuneOptions, run: Path, lock: Lock) -> PolicyTraining:
    """Open the policy, or continue from the last checkpoint; read the files; choose the recipe.

    Nothing is written before everything that can be refused has been accepted.
    """
    origin, facts = open_language_origin(options, run)
    files = read_files(options, origin)
    files_to_save(origin, "language")  # what cannot be saved in the end is refused now
    sizes = tuple(len(file.items) for file in files)
    schedule = Schedule(options, options.epochs, sizes, options.batch_size)
    recipe = choose_recipe(options, origin, lambda: workload_of(schedule, files, origin))
    check_recipe(run, recipe)
    optimizer, adopt = open_optimizer(options, recipe, origin.config.blocks)
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


def finish(training: Training) -> None:
    """Write the finished policy, and what is said of it."""
    if isinstance(training, preference_training.PreferenceTraining):
        preference_training.finish(training)
        return
    assert isinstance(training, PolicyTraining)
    write_weights(training)
    lines = [file.line() for file in training.files]
    write_text(training.run / "README.md", model_card(training.options, lines))
    write_finished(training)
