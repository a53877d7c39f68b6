"""Log-probabilities of responses by the references: computed once, stored beside the run.

    reference r, source k  ->  portions of some pairs  ->  RUN/reference/r.k.portion.safetensors

A file says of which reference and of which responses its numbers are, and has a checksum. A killed
command goes on behind its last whole file. A reference is in memory for as long as something of it
is missing, and the policy is opened after it.

N pairs, S responses of a pair, R references.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..data.pairs import batches_by_length
from ..engine.plain import computed_with
from ..files import make_directory
from ..model.checkpoint import Checkpoint
from ..model.tensors import require_as_written, write_tensors
from ..options import InputError, require
from ..reward import ModelOptions, compute_type
from .language import Responses, pack_responses
from .policy import LanguageModel, open_policy
from .preference import response_log_probabilities
from .responses import digest_of

PORTION = 1024  # pairs of a file


@torch.no_grad()
def log_probabilities(
    model: LanguageModel, items: Sequence[Responses], micro_tokens: int = 8192
) -> Tensor:
    """log π(y|x) of every response, the sum over its tokens, in nats: (N, S), on the CPU.

    They are computed as a step of training computes them, so that both agree to rounding.
    """
    result = torch.empty(len(items), len(items[0].responses))
    unembedding = computed_with(model)
    for places in batches_by_length([item.tokens for item in items], micro_tokens):
        part = [items[place] for place in places]
        batch = pack_responses(part)
        states = model.trunk.states_at(
            batch.stream.to(unembedding.device), batch.reads.to(unembedding.device)
        )
        lengths = [len(response) for item in part for response in item.responses]
        values = response_log_probabilities(
            states, unembedding, batch.targets.to(unembedding.device), lengths
        )
        result[places] = values.view(len(part), -1).to(result)
    return result


class Reference:
    """A fixed policy, which is opened when it is first asked."""

    def __init__(self, checkpoint: Checkpoint, options: ModelOptions):
        self.checkpoint, self.options = checkpoint, options
        self.model: LanguageModel | None = None

    def identity(self, items: Sequence[Responses]) -> str:
        """What log-probabilities of these items depend on."""
        return f"{self.checkpoint.identity()} {compute_type(self.options)} {digest_of(items)}"

    def log_probabilities(self, items: Sequence[Responses]) -> Tensor:
        """Those of every response (N, S). Raises FloatingPointError if one is not finite."""
        if self.model is None:
            self.model = open_policy(self.checkpoint, self.options)
        result = log_probabilities(self.model, items, self.options.micro_tokens)
        if not result.isfinite().all():
            raise FloatingPointError(
                f"{self.checkpoint.directory}: a log-probability is not finite; is it damaged?"
            )
        return result


def stored_log_probabilities(
    directory: Path,
    references: Sequence[Checkpoint],
    items_of_sources: Mapping[str, Sequence[Responses]],
    options: ModelOptions,
) -> dict[str, Tensor]:
    """Log-probabilities (R, N, S) of the items of every source, read or else computed and stored.

    Raises InputError for a file that holds those of other responses, or by another reference.
    """
    make_directory(directory)
    values: dict[str, list[Tensor]] = {name: [] for name in items_of_sources}
    for r, checkpoint in enumerate(references):
        reference = Reference(checkpoint, options)
        for k, (name, items) in enumerate(items_of_sources.items()):
            values[name].append(_of_source(directory, f"{r}.{k:02d}", items, reference))
    return {name: torch.stack(by_reference) for name, by_reference in values.items()}


def _of_source(
    directory: Path, number: str, items: Sequence[Responses], reference: Reference
) -> Tensor:
    """The log-probabilities (N, S) of a source by one reference, portion by portion."""
    portions = []
    for p, start in enumerate(range(0, len(items), PORTION)):
        path = directory / f"{number}.{p:05d}.safetensors"
        portions.append(_of_portion(path, items[start : start + PORTION], reference))
    return torch.cat(portions)


def _of_portion(path: Path, items: Sequence[Responses], reference: Reference) -> Tensor:
    """The log-probabilities (N, S) of a portion, which is computed if its file is not whole."""
    identity = reference.identity(items)
    stored = _read(path)
    if stored is None:
        values = reference.log_probabilities(items)
        write_tensors(path, {"log_probabilities": values}, {"of": identity})
        return values
    require(
        stored[0] == identity,
        f"{path}: holds log-probabilities of other responses, or by another reference; restore what"
        " this run began with, or start a new one",
    )
    return stored[1]


def _read(path: Path) -> tuple[str, Tensor] | None:
    """What a file is of, and its log-probabilities; None if it is missing or damaged."""
    try:
        require_as_written(path, is_ours=True)
        with safe_open(path, framework="pt") as file:
            return file.metadata()["of"], file.get_tensor("log_probabilities")
    except (SafetensorError, OSError, InputError):
        return None
