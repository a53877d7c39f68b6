"""Fine-tuning a policy on preference pairs, without a reward model: `align finetune --loss dpo`.

    pairs of K sources -> log-probabilities of the references, stored -> steps -> report on TEST

    main -> finetune -> loop -> engine.step -> objective.loss

A policy is a reward model, too: its implicit reward of a response (preference_losses.py) has an
accuracy and a calibration on test pairs, which are reported as those of `train`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.pairs import Source
from ..engine.streamed import open_engine
from ..files import write_json, write_text
from ..metrics import cosines_between, finite, progress_line
from ..model.checkpoint import Checkpoint, files_to_save
from ..more import WEIGHTINGS
from ..options import parse_sources, require
from ..report import Margins, report_of, table
from ..reward import check_length
from ..run import Lock, check_recipe, start_run
from ..schedule import Schedule
from ..training import (
    Training,
    begin,
    choose_recipe,
    hold_as_stored,
    open_optimizer,
    write_finished,
    write_weights,
)
from .comparisons import Comparisons, Written, read_comparisons, read_written, with_degrees
from .policy import open_policy, require_language_model
from .preference import Comparison, PreferenceObjective, PreferenceResult
from .preference_losses import PreferenceLoss
from .references import log_probabilities, stored_log_probabilities
from .responses import digest_of, eos_of
from .tuning import FinetuneOptions, model_card, open_language_origin, workload_of

REFERENCE = "reference"  # directory of a run
PROBED = 64  # prompts of a source with which tokenizers are compared


@dataclass(kw_only=True)
class PreferenceTraining(Training):
    """The fine-tuning of a policy on the pairs of some sources.

    reference: log-probabilities of each source's items by the references, (R, N, S); those of the
    test sources, too.
    """

    options: FinetuneOptions
    objective: PreferenceObjective
    sources: list[Comparisons]
    test_sources: list[Comparisons]
    reference: list[Tensor]
    test_reference: list[Tensor]

    def batch_at(self, step: int) -> tuple[list[Comparison], list[int]]:
        """The pairs of a step, and the source of each."""
        sampled = self.schedule.sampled_at(step)  # (B, 2): source, pair in the source
        items = [Comparison(self.sources[k].items[i], self.reference[k][:, i]) for k, i in sampled]
        return items, sampled[:, 0].tolist()

    def record_of(
        self, step: int, items: Sequence[Comparison], source: list[int], result: PreferenceResult
    ) -> dict[str, Any]:
        """What metrics.jsonl says of a step: things as they were before its update."""
        names = [own.name for own in self.sources]
        lengths = result.gradients.norm(dim=1, keepdim=True)  # (K, 1)
        return {
            "step": step,
            "learning_rate": self.optimizer.learning_rate,
            "tokens": sum(item.tokens for item in items),
            "loss": float(result.loss),
            "sources": by_source(result, source, names),
            "cosines": cosines_between(result.gradients / lengths, names),
        }

    def progress_line(
        self, record: dict[str, Any], means: dict[str, Any] | None, seconds_left: float
    ) -> str:
        """Loss, accuracy and weight of each source; cosines of their gradients; the time left."""
        return progress_line(record, means, self.schedule.steps, seconds_left)

    def what_begins(self) -> str:
        """Pairs a step, and the loss."""
        return f"{self.schedule.batch_size} pairs, {self.options.loss}"

    def name_of_loss(self, source: int) -> str:
        """The loss of a source, in words."""
        return f"the loss of source {self.sources[source].name!r}"


def by_source(
    result: PreferenceResult, source: list[int], names: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Of every source: pairs, loss, accuracy, mean implicit margin, weight; None without a pair."""
    of_pair = torch.tensor(source, device=result.margins.device)
    is_right = (result.margins > 0).double() + 0.5 * (result.margins == 0)
    figures = {}
    for k, name in enumerate(names):
        mine = of_pair == k
        figures[name] = {
            "pairs": int(mine.sum()),
            "loss": finite(result.losses[mine].mean()),
            "accuracy": finite(is_right[mine].mean()),
            "margin": finite(result.margins[mine].mean()),
            "weight": float(result.weights[k]),
        }
    return figures


# ---- prepare -------------------------------------------------------------------------------------


def prepare(options: FinetuneOptions, run: Path, lock: Lock) -> PreferenceTraining:
    """Read the pairs, choose the recipe, ask the references, open the policy or continue it.

    Nothing is written before everything that can be refused has been accepted. The references are
    asked before the policy is in memory.
    """
    origin, facts = open_language_origin(options, run)
    sources, test_sources = read_sources(options, origin)
    references = open_references(options, origin, sources)
    files_to_save(origin, "language")  # what cannot be saved in the end is refused now
    sizes = tuple(len(source.items) for source in sources)
    schedule = Schedule(options, options.epochs, sizes, options.batch_size)
    recipe = choose_recipe(options, origin, lambda: workload_of(schedule, sources, origin))
    check_recipe(run, recipe)
    lock.take()
    if facts is None:  # else `begin` does it, when the run's own state has been accepted
        start_run(run, options, recipe)
    items = {f"train {source.name}": source.items for source in sources}
    items |= {f"test {source.name}": source.items for source in test_sources}
    stored = stored_log_probabilities(run / REFERENCE, references, items, options)
    optimizer, adopt = open_optimizer(options, recipe, origin.config.blocks)
    model = open_policy(origin, options, adopt)
    weighting_state: dict[str, Tensor] = {}
    training = PreferenceTraining(
        options=options,
        run=run,
        origin=origin,
        sources=sources,
        test_sources=test_sources,
        reference=[stored[f"train {source.name}"] for source in sources],
        test_reference=[stored[f"test {source.name}"] for source in test_sources],
        schedule=schedule,
        objective=open_objective(options, len(sources), weighting_state),
        weighting_state=weighting_state,
        model=model,
        optimizer=optimizer,
        engine=open_engine(model, optimizer, recipe),
        digests={source.name: digest_of(source.items) for source in sources},
    )
    begin(training, recipe, facts, lock)
    return training


def read_sources(
    options: FinetuneOptions, checkpoint: Checkpoint
) -> tuple[list[Comparisons], list[Comparisons]]:
    """The training and the test sources; a line describes each."""
    written: Written | None = None
    if options.base_responses:
        written = read_written(options.base_responses, checkpoint.tokenizer, options.chat)
    read = partial(
        read_comparisons, checkpoint=checkpoint, max_length=options.max_length, chat=options.chat
    )
    sources, test_sources = [], []
    for k, (name, (train_path, test_path)) in enumerate(parse_sources(options.source).items()):
        source = read(name, train_path, written=written)
        if options.loss == "spo":
            source.items = with_degrees(source.items, eos_of(checkpoint), options.seed + k)
        sources.append(source)
        print(source.source.line(), flush=True)
        if test_path:
            test_sources.append(read(name, test_path))
            print(f"  test {test_sources[-1].source.line()}", flush=True)
    return sources, test_sources


def open_references(
    options: FinetuneOptions, origin: Checkpoint, sources: Sequence[Comparisons]
) -> list[Checkpoint]:
    """The checkpoints of the references: --model as it is, unless others are named.

    Raises InputError for one that cannot write, or that reads prompts as other ids than the policy.
    """
    references = [Checkpoint(path) for path in options.reference or (options.model,)]
    prompts = [prompt for own in sources for prompt in [*own.source.prompts][:PROBED]]
    expected = origin.tokenizer.encode(prompts)
    for reference in references:
        require_language_model(reference)
        check_length(
            reference.config,
            options.max_length,
            reference.directory,
            beyond=options.beyond_positions,
        )
        require(
            reference.tokenizer.encode(prompts) == expected,
            f"--reference {reference.directory}: its tokenizer reads the prompts as other ids than"
            " that of --model; expected the same tokenizer",
        )
    return references


def open_objective(
    options: FinetuneOptions, sources: int, weighting_state: dict[str, Tensor]
) -> PreferenceObjective:
    """The preference objective with the loss and the weighting that were asked for."""
    loss = PreferenceLoss(options.loss, options.beta, options.clip, options.anchor, options.degree)
    weigh = partial(WEIGHTINGS[options.method], state=weighting_state)
    if options.method == "more":
        weigh = partial(weigh, normalize=options.normalize)
    return PreferenceObjective(sources, loss, weigh, options.method)


# ---- finish --------------------------------------------------------------------------------------


def finish(training: PreferenceTraining) -> None:
    """Write the finished policy, and evaluate its implicit rewards on the test sources."""
    write_weights(training)
    results = ""
    if training.test_sources:
        hold_as_stored(training)
        report = report_of(test_margins(training), test_pairs(training))
        print(table(report))
        write_json(training.run / "evaluation.json", report)
        results = f"\n## Implicit rewards on the test files\n\n```\n{table(report)}\n```\n"
    lines = [source.source.line() for source in training.sources]
    write_text(training.run / "README.md", model_card(training.options, lines, results))
    write_finished(training)


def test_pairs(training: PreferenceTraining) -> list[Source]:
    """The test pairs as a report reads them."""
    return [source.source for source in training.test_sources]


@torch.no_grad()
def test_margins(training: PreferenceTraining) -> Margins:
    """Implicit margins of the test pairs of every source, (N,) float64: those are log-odds."""
    loss, micro_tokens = training.objective.loss_of_pairs, training.options.micro_tokens
    margins = {}
    for source, reference in zip(training.test_sources, training.test_reference):
        policy = log_probabilities(training.model, source.items, micro_tokens)
        margins[source.name] = loss.margins(policy.double(), reference.double()).numpy()
    return margins
