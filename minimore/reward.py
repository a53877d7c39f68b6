"""The reward model: trunk + one bias-free linear head in fp32, read at the last content token. And `score`.

S texts, B pairs, D width.
"""

import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .calibration import probability
from .data.pairs import (
    PairBatch,
    TokenPair,
    encode,
    pack_pairs,
    refuse_doubled_bos,
    shared_length,
    split_by_tokens,
)
from .data.records import (
    is_conversation,
    messages_of,
    prompt_end,
    read_records,
    record_pairs,
    text_of,
    texts_of,
)
from .model.attention import Stream, pack
from .model.checkpoint import Checkpoint
from .model.trunk import ModelConfig, Trunk
from .options import InputError, beside, option, read_json, refuse_existing

DEFAULT_MAX_LENGTH = 512  # the paper's
TRUNCATE = ("each", "together")


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """What every command that opens a model takes."""

    model: str = option(
        value="DIR|HUB",
        help="checkpoint directory or hub name: a causal LM (fresh head) or a saved reward model",
    )
    seed: int = option(
        0, help="seeds a fresh head and, in training, the order of the data and random rounding"
    )
    device: str = option(
        "auto",
        choices=("auto", "cpu", "cuda"),
        help="where to compute; auto takes a GPU if there is one",
    )
    compute_dtype: str = option(
        "auto",
        choices=("auto", "float32", "bfloat16"),
        help="type of activations and matrix products; auto is bfloat16 on CUDA, float32 elsewhere",
    )
    micro_tokens: int = option(
        8192,
        help="unique tokens computed at a time; bounds memory, changes no result beyond rounding",
    )


class RewardModel(nn.Module):
    """trunk: (tokens) -> z (S, D); head: (D,) fp32, reward = z . head. No EOS is appended, no token is padding."""

    def __init__(self, trunk: Trunk, head: Tensor):
        super().__init__()
        self.trunk = trunk
        self.head = nn.Parameter(head)

    def features(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """Last hidden states of the chosen and the rejected texts: two (B, D), fp32."""
        z = self.trunk(batch.stream.to(self.head.device))
        return z[0::2], z[1::2]

    def rewards(self, stream: Stream) -> Tensor:
        """Reward of each text: (S,) fp32."""
        return self.trunk(stream.to(self.head.device)) @ self.head


def fresh_head(width: int, seed: int) -> Tensor:
    """An untrained head (D,): normal(0, 1 / sqrt(D + 1)), from its own seeded generator."""
    return torch.randn(width, generator=torch.Generator().manual_seed(seed)) / math.sqrt(width + 1)


def open_reward_model(options: ModelOptions) -> tuple[RewardModel, Checkpoint]:
    """Open options.model as a reward model; a checkpoint without a head gets a fresh, seeded one."""
    checkpoint = Checkpoint(options.model)
    return load_reward_model(checkpoint, options), checkpoint


def device_of(options) -> str:
    """The device asked for, or an InputError where it is not there."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no CUDA device; use --device cpu")
    return (
        options.device
        if options.device != "auto"
        else ("cuda" if torch.cuda.is_available() else "cpu")
    )


def compute_type(options: ModelOptions) -> torch.dtype:
    """The type of activations and matrix products."""
    kind = (
        options.compute_dtype
        if options.compute_dtype != "auto"
        else ("bfloat16" if device_of(options) == "cuda" else "float32")
    )
    return getattr(torch, kind)


def load_reward_model(
    checkpoint: Checkpoint,
    options: ModelOptions,
    hold: Callable[[str, Tensor], Tensor] | None = None,
) -> RewardModel:
    """The weights of an opened checkpoint, on the device and in the compute type asked for.

    hold: name and value of each parameter -> what the model is to hold of it; by default matrices in the compute type, in which
    they would be used anyway, and vectors as they are.
    """
    if options.micro_tokens < 1:
        raise InputError(f"--micro-tokens {options.micro_tokens}: expected at least 1")
    device, compute = device_of(options), compute_type(options)
    if not 0 <= options.seed < 2**63:
        raise InputError(f"--seed {options.seed}: expected a whole number from 0 to 2^63 - 1")
    hold = hold or (lambda name, value: value.to(compute) if value.ndim > 1 else value)
    trunk, head = checkpoint.load(
        device=device, hold=lambda name, value: hold(f"trunk.{name}", value)
    )
    head = fresh_head(checkpoint.config.width, options.seed).to(device) if head is None else head
    trunk.compute_dtype = compute
    return RewardModel(trunk, hold("head", head))


@dataclass(frozen=True, kw_only=True)
class ReadingOptions(ModelOptions):
    """What the commands that read pairs with a finished model take besides; None means as the run was trained."""

    max_length: int | None = option(
        None, help="tokens a text, cut on the left (default: the run's own, else 512)"
    )
    truncate: str | None = option(
        None,
        choices=TRUNCATE,
        help="cut each side on its own or both alike (default: the run's own, else each)",
    )

    def limits(self, checkpoint: Checkpoint) -> tuple[int, str]:
        """max_length and truncate: as asked, else the run's own, else 512 and "each"."""
        if self.max_length is not None and self.max_length < 1:
            raise InputError(f"--max-length {self.max_length}: expected at least 1")
        directory = checkpoint.directory
        path = (
            directory.parent if directory.name.startswith("checkpoint-") else directory
        ) / "options.json"
        stored = read_json(path) if path.is_file() else {}
        length, truncate = stored.get("max_length"), stored.get("truncate")
        length = self.max_length or (
            length if type(length) is int and length > 0 else DEFAULT_MAX_LENGTH
        )
        check_length(checkpoint.config, length, directory)
        return length, self.truncate or (truncate if truncate in TRUNCATE else "each")


def check_length(c: ModelConfig, max_length: int, directory: Path):
    """Refuse texts longer than a learned position embedding."""
    most = c.learned_positions - c.position_offset
    if c.learned_positions and max_length > most:
        raise InputError(
            f"--max-length {max_length}: {directory} has learned positions for {most} tokens only"
        )


@torch.no_grad()
def pair_rewards(
    model: RewardModel, pairs: Sequence[TokenPair], micro_tokens: int = 8192, share: bool = True
) -> Tensor:
    """Rewards of both sides of every pair: (B, 2) fp32 on the CPU, chosen first."""
    order = sorted(range(len(pairs)), key=lambda i: pairs[i].tokens)  # similar lengths waste least
    out = torch.empty(len(pairs), 2)
    for part in split_by_tokens([pairs[i].tokens for i in order], micro_tokens):
        chosen, rejected = model.features(pack_pairs([pairs[order[i]] for i in part], share=share))
        out[[order[i] for i in part]] = torch.stack(
            [chosen @ model.head, rejected @ model.head], 1
        ).cpu()
    return _finite(out)


@torch.no_grad()
def text_rewards(
    model: RewardModel, texts: Sequence[Sequence[int]], micro_tokens: int = 8192
) -> Tensor:
    """Rewards of whole texts given as token ids: (S,) fp32 on the CPU."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    out = torch.empty(len(texts))
    for part in split_by_tokens([len(texts[i]) for i in order], micro_tokens):
        out[[order[i] for i in part]] = model.rewards(
            pack([([], [list(texts[order[i]])]) for i in part])
        ).cpu()
    return _finite(out)


def _finite(rewards: Tensor) -> Tensor:
    if not rewards.isfinite().all():
        raise FloatingPointError(
            "a reward is not finite: the model's numbers overflowed; check how it was trained"
        )
    return rewards


# ---- the verb --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ScoreOptions(ReadingOptions):
    """What `score` takes."""

    input: str = option(
        value="IN.jsonl",
        help="JSON lines (.gz too) of pairs, of prompt and response, or of text lists",
    )
    output: str = option(value="OUT.jsonl", help="JSON lines file to write; must not exist")


def score(options: ScoreOptions):
    """Add rewards to every line of a file, streaming, in input order.

    A pair gets chosen_reward, rejected_reward and probability = sigmoid(difference); a prompt with a response gets reward; a
    list of texts gets the list rewards.
    """
    refuse_existing(options.output)
    with closing(read_records(options.input)) as records:  # opened once: it may be a pipe
        first = next(records, None)
        if first is None:
            raise InputError(f"{options.input}: is empty; expected at least one line")
        model, checkpoint = open_reward_model(options)
        limit, truncate = options.limits(checkpoint)
        counts = _write_scored(options, model, checkpoint, chain([first], records), limit, truncate)
    print(
        f"{options.output}: {counts['lines']} lines scored, {counts['truncated']} truncated to {limit} tokens, {counts['blank']} with a blank response"
        + (
            f", {counts['named']} with names of special tokens, read as text"
            if counts["named"]
            else ""
        )
        + (f", {counts['replaced']} had such a key already, replaced" if counts["replaced"] else "")
    )
    if not checkpoint.has_head:
        print(
            f"{options.model}: no score.weight, so the rewards are those of an untrained head",
            file=sys.stderr,
        )


def _write_scored(options, model, checkpoint, records, limit, truncate):
    """Score the records, 256 at a time, into a file beside the output, then rename it; returns the counts."""
    output, counts = (
        Path(options.output),
        {"lines": 0, "truncated": 0, "blank": 0, "named": 0, "replaced": 0},
    )
    unfinished = beside(output)
    try:
        with open(unfinished, "x", encoding="utf-8") as out:
            while chunk := list(islice(records, 256)):
                for record in _scored(model, checkpoint, chunk, options, limit, truncate, counts):
                    out.write(_json_line(record) + "\n")
        os.replace(unfinished, output)
    finally:
        unfinished.unlink(missing_ok=True)
    return counts


def _json_line(record):
    text = json.dumps(record, ensure_ascii=False)
    return (
        text if text.encode("utf-8", "replace").decode() == text else json.dumps(record)
    )  # half a surrogate pair


class Readable(NamedTuple):
    """The texts of one record, whole; what: "pair", "response" or "texts"."""

    texts: list[str]
    rendered: bool
    blank: bool
    what: str


def _readable(record, where, tokenizer) -> Readable:
    if "response" in record and "chosen" not in record:
        prompt, response = record.get("prompt"), record["response"]
        if is_conversation(prompt) or is_conversation(response):
            turns = messages_of(prompt, f'{where}: "prompt"', tokenizer, "user") + messages_of(
                response, f'{where}: "response"', tokenizer, "assistant"
            )
            return Readable(
                [tokenizer.render(turns)],
                tokenizer.template is not None,
                not turns[-1]["content"].strip(),
                "response",
            )
        prompt, response = text_of(record, "prompt", where), text_of(record, "response", where)
        return Readable([prompt + response], False, not response.strip(), "response")
    if "chosen" in record or "rejected" in record:
        pairs = record_pairs(record, where, tokenizer)[0]
        if len(pairs) != 1:
            raise InputError(
                f'{where}: "rejected" is a list of {len(pairs)} responses; give score one pair a line'
            )
        pair = pairs[0]
        return Readable(
            [pair.prompt + pair.chosen, pair.prompt + pair.rejected],
            pair.rendered,
            pair.is_blank,
            "pair",
        )
    if "text" in record:
        texts = texts_of(record, where)
        cut = prompt_end(texts)
        return Readable(texts, False, not all(t[cut:].strip() for t in texts), "texts")
    raise InputError(
        f'{where}: expected "chosen" and "rejected", "prompt" and "response", or a list "text"; '
        f"found keys: {', '.join(map(str, record)) or 'none'}"
    )


ADDED = {
    "pair": ("chosen_reward", "rejected_reward", "probability"),
    "response": ("reward",),
    "texts": ("rewards",),
}


def _scored(model, checkpoint, chunk, options, limit, truncate, counts):
    """The records of one chunk with their rewards."""
    read = [_readable(record, where, checkpoint.tokenizer) for where, record in chunk]
    for (where, _), r in zip(chunk, read):
        for text in r.texts:
            refuse_doubled_bos(text, r.rendered, where, checkpoint.tokenizer)
    rewards = [None] * len(read)
    for together in (
        True,
        False,
    ):  # pairs first: their sides may have to be cut alike, and share their prompt
        mine = [i for i, r in enumerate(read) if (r.what == "pair") == together]
        ids, cut = encode(
            [t for i in mine for t in read[i].texts],
            checkpoint.tokenizer,
            limit,
            [read[i].rendered for i in mine for _ in read[i].texts],
            together and truncate == "together",
        )
        places = list(accumulate((len(read[i].texts) for i in mine), initial=0))
        for i, start, end in zip(mine, places, places[1:]):
            if not all(map(len, ids[start:end])):
                raise InputError(
                    f"{chunk[i][0]}: a text is empty and the tokenizer adds no BOS: nothing to score"
                )
            counts["truncated"] += any(cut[start:end])
        if together:
            pairs = [TokenPair(c, r, shared_length(c, r), 0) for c, r in zip(ids[0::2], ids[1::2])]
            found = (
                pair_rewards(model, pairs, options.micro_tokens).flatten().tolist() if mine else []
            )
        else:
            found = (
                text_rewards(model, [t.tolist() for t in ids], options.micro_tokens).tolist()
                if mine
                else []
            )
        for i, start, end in zip(mine, places, places[1:]):
            rewards[i] = found[start:end]
    for (_, record), r, values in zip(chunk, read, rewards):
        counts["lines"] += 1
        counts["blank"] += r.blank
        counts["named"] += not r.rendered and any(map(checkpoint.tokenizer.names_special, r.texts))
        counts["replaced"] += any(key in record for key in ADDED[r.what])
        values = (
            [*values, float(probability(values[0] - values[1]))]
            if r.what == "pair"
            else [values]
            if r.what == "texts"
            else values
        )
        yield record | dict(zip(ADDED[r.what], values))
