"""What the training of a reward model consists of: its options, and its state while it runs.

K sources, B pairs in a step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .best import FIGURES, Best, better_of, validation_line
from .data.labels import LabelRules
from .data.pairs import Source, TokenPair
from .engine.objective import RewardObjective, StepResult, labels_of
from .engine.workload import RunOptions
from .metrics import lines_of_test_files, progress_line, step_metrics, what_is_wrong
from .more import NORMALIZATIONS, WEIGHTINGS, Labels
from .options import COUNT, Range, option
from .report import evaluate_sources
from .schedule import LoopOptions
from .training import Training

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
        if self.options.lambda_gradients == "all":
            # A micro-batch is of one source, so fewer are needed if every source stands together.
            sampled = sampled[np.argsort(sampled[:, 0], kind="stable")]
        pairs = [self.sources[k].pairs[i] for k, i in sampled]
        return pairs, sampled[:, 0].tolist()

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
        """Under --keep-best, remember a step whose report on the validation sources is the best."""
        figure = self.options.keep_best
        if figure:
            self.best = better_of(self.best, Best(step, figure, report["mean"][figure]))

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
