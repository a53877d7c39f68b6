"""How likely a policy finds the responses of a file: the step `minimore align perplexity`.

    loss of a response    -Σ log p(token | everything before it), over its tokens
    perplexity            exp(sum of the losses / number of their tokens)

Both sides of every pair are measured. A policy that moved away from text that people prefer shows
it in the perplexity of the chosen responses.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data.forms import record_pairs
from ..data.pairs import batches_by_length
from ..data.records import read_records
from ..files import refuse_existing, write_json
from ..model.checkpoint import Checkpoint
from ..model.tokenizer import Tokenizer
from ..options import COUNT, InputError, check_ranges, option
from ..reward import ModelOptions, PositionOptions, check_length
from ..tables import Table, number
from .language import Responses, pack_responses, perplexity_of
from .policy import LanguageModel, open_policy
from .responses import (
    ResponseTexts,
    cut_to_length,
    encoded,
    in_portions,
    require_length,
    require_split,
)

SIDES = ("chosen", "rejected")


@dataclass(frozen=True, kw_only=True)
class PerplexityOptions(PositionOptions, ModelOptions):
    """What `align perplexity` takes."""

    input: str = option(value="PAIRS.jsonl", help="a file of preference pairs (.gz too)")
    max_length: int = option(
        512,
        within=COUNT,
        help="tokens of prompt and response; the prompt is cut on the left, a longer response on "
        "the right",
    )
    chat: bool = option(False, help="read prompts and responses that are strings as messages")
    json: str | None = option(None, value="FILE", help="write all figures here; must not exist")


def perplexity(options: PerplexityOptions) -> None:
    """Print the perplexity of the chosen and of the rejected responses."""
    check_ranges(options)
    refuse_existing(options.json, "--json")
    checkpoint = Checkpoint(options.model)
    check_length(
        checkpoint.config, options.max_length, checkpoint.directory, beyond=options.beyond_positions
    )
    items = read_sides(options, checkpoint.tokenizer)
    model = open_policy(checkpoint, options)
    losses = response_losses(model, items, options.micro_tokens)
    table = Table("responses", "number", "tokens", "loss a token", "perplexity")
    figures: dict[str, Any] = {"model": options.model, "file": options.input}
    for side, name in enumerate(SIDES):
        total = sum(float(row[side]) for row in losses)
        tokens = sum(len(item.responses[side]) for item in items)
        if not math.isfinite(total):
            raise FloatingPointError(f"{options.model}: a loss is not finite; is it damaged?")
        value, shown = perplexity_of(total / tokens)
        figures[name] = {"number": len(items), "tokens": tokens, "loss": total, "perplexity": value}
        table.add(name, len(items), tokens, number(total / tokens), shown)
    print(table)
    if options.json:
        write_json(options.json, figures)


def read_sides(options: PerplexityOptions, tokenizer: Tokenizer) -> list[Responses]:
    """The prompt of every pair with its chosen and its rejected response, as ids without an end."""
    require_length(options.max_length, tokenizer)
    bos = len(tokenizer.bos)
    items, dropped, truncated = [], 0, 0
    for portion in in_portions(_both_sides(options, tokenizer)):
        for prompt, *sides in encoded(portion, tokenizer):
            item, was_cut = cut_to_length(prompt, sides, [None, None], bos, options.max_length)
            truncated += was_cut
            if item is None:
                dropped += 1
            else:
                items.append(item)
    if not items:
        raise InputError(f"{options.input}: has no usable pair; expected at least one")
    if dropped:
        print(f"{dropped} pairs left out: a response has no token of its own, or no prompt")
    if truncated:
        print(f"{truncated} pairs truncated to {options.max_length} tokens")
    return items


def _both_sides(options: PerplexityOptions, tokenizer: Tokenizer) -> Iterator[ResponseTexts]:
    """The prompt of every pair with both of its responses, as texts."""
    for where, record in read_records(options.input):
        for pair in record_pairs(record, where, tokenizer, options.chat)[0]:
            require_split(pair, where)
            sides = [pair.chosen, pair.rejected]
            yield ResponseTexts(pair.prompt, sides, pair.rendered, [False, False], [*pair.blank])


@torch.no_grad()
def response_losses(
    model: LanguageModel, items: Sequence[Responses], micro_tokens: int = 8192
) -> list[Tensor]:
    """The loss of every response, summed over its tokens, in nats: of each item (responses,)."""
    losses: list[Tensor] = [torch.empty(0)] * len(items)
    for places in batches_by_length([item.tokens for item in items], micro_tokens):
        part = [items[place] for place in places]
        batch = pack_responses(part)
        device = model.unembedding.device
        states = model.trunk.states_at(batch.stream.to(device), batch.reads.to(device))
        by_token = model.losses(states, batch.targets.to(device)).cpu()
        lengths = [len(response) for item in part for response in item.responses]
        sums = torch.stack([tokens.sum() for tokens in by_token.split(lengths)])
        for place, row in zip(places, sums.split([len(item.responses) for item in part])):
            losses[place] = row
    return losses
