"""The reward model: trunk + one bias-free linear head in fp32, read at the last content token. And `score`.

S texts, B pairs, D width.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .data.pairs import (
    TRUNCATE,
    PairBatch,
    TokenPair,
    pack_pairs,
    split_by_tokens,
)
from .files import read_json
from .model.attention import Stream, pack
from .model.checkpoint import Checkpoint
from .model.trunk import ModelConfig, Trunk
from .options import InputError, Range, option

DEFAULT_MAX_LENGTH = 512  # the paper's


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """What every command that opens a model takes."""

    model: str = option(
        value="DIR|HUB",
        help="checkpoint directory or hub name: a causal LM (fresh head) or a saved reward model",
    )
    seed: int = option(
        0,
        within=Range(least=0, most=2**63 - 1),
        help="seeds a fresh head and, in training, the order of the data and random rounding",
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
