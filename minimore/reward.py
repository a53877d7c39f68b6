"""The reward model: a trunk and one linear head in fp32, read at the last token of a text.

S texts, B pairs, D width.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .checksums import CHECKSUM, read_checked_json
from .data.pairs import (
    TRUNCATE,
    PairBatch,
    TextRules,
    TokenPair,
    batches_by_length,
    eos_to_append,
    pack_pairs,
    shared_length,
)
from .files import read_json
from .model.attention import Stream, pack
from .model.checkpoint import Checkpoint, Hold, Top, reward_top
from .model.families import Family
from .model.model_config import ModelConfig
from .model.trunk import Trunk
from .options import Range, check_ranges, option, require

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
        within=Range(least=0, most=2**63 - 1, words="a whole number from 0 to 2^63 - 1"),
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
        within=Range(least=1),
        help="unique tokens computed at a time; bounds memory, changes no result beyond rounding",
    )


class RewardModel(nn.Module):
    """A trunk and a linear head: reward = z . head, with z the hidden state at a text's last token.

    trunk: tokens -> z (S, D). head: (D,) fp32. No EOS is appended, and no token is padding.
    """

    kind = "reward"  # of model/checkpoint.py's KINDS

    def __init__(self, trunk: Trunk, head: Tensor):
        super().__init__()
        self.trunk = trunk
        self.head = nn.Parameter(head)

    @property
    def top(self) -> Tensor:
        """The parameter on top of the trunk."""
        return self.head

    def saved_top(self, family: Family) -> Top:
        """What a checkpoint of this model holds besides the trunk."""
        return reward_top(self.head)

    def features(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """Last hidden states of the chosen and of the rejected texts: two (B, D), fp32."""
        z = self.trunk(batch.stream.to(self.head.device))
        return z[0::2], z[1::2]

    def rewards(self, stream: Stream) -> Tensor:
        """Reward of each text: (S,) fp32."""
        return self.trunk(stream.to(self.head.device)) @ self.head


def fresh_head(width: int, seed: int) -> Tensor:
    """An untrained head (D,): normal(0, 1 / sqrt(D + 1)), from its own seeded generator."""
    return torch.randn(width, generator=torch.Generator().manual_seed(seed)) / math.sqrt(width + 1)


# ---- opening -------------------------------------------------------------------------------------


def open_reward_model(options: ModelOptions) -> tuple[RewardModel, Checkpoint]:
    """Open options.model as a reward model; one without a head gets a fresh, seeded one."""
    checkpoint = Checkpoint(options.model)
    return load_reward_model(checkpoint, options), checkpoint


def load_reward_model(
    checkpoint: Checkpoint, options: ModelOptions, hold: Hold | None = None
) -> RewardModel:
    """The weights of an opened checkpoint, on the device and in the compute type asked for.

    hold: what the model is to hold of each parameter as it is loaded. By default it holds matrices
    in the compute type, in which they would be used anyway, and vectors as they are. Training holds
    what its optimizer gives back.
    """
    check_ranges(options)
    device, compute = device_of(options), compute_type(options)
    hold = hold or held_in(compute)
    trunk, head = checkpoint.load(
        device=device, hold=lambda name, value: hold(f"trunk.{name}", value)
    )
    if head is None:
        head = fresh_head(checkpoint.config.width, options.seed).to(device)
    trunk.compute_dtype = compute
    return RewardModel(trunk, hold("head", head))


def held_in(compute: torch.dtype) -> Hold:
    """Holds matrices in the compute type, in which they would be used anyway; vectors as they are.

    It is what a model holds that is not trained.
    """

    def hold(name: str, value: Tensor) -> Tensor:
        return value.to(compute) if value.ndim > 1 else value

    return hold


def device_of(options: Any) -> str:
    """The device asked for. Raises InputError where it is not there."""
    has_gpu = torch.cuda.is_available()
    require(
        options.device != "cuda" or has_gpu,
        "--device cuda: torch sees no CUDA device; use --device cpu",
    )
    if options.device != "auto":
        return options.device
    return "cuda" if has_gpu else "cpu"


def compute_type(options: ModelOptions) -> torch.dtype:
    """The type of activations and matrix products."""
    name = options.compute_dtype
    if name == "auto":
        name = "bfloat16" if device_of(options) == "cuda" else "float32"
    return getattr(torch, name)


@dataclass(frozen=True, kw_only=True)
class PositionOptions:
    """What every command takes that reads texts of a length that one chooses."""

    beyond_positions: bool = option(
        False,
        help="texts of more tokens than the max_position_embeddings of a model with rotary "
        "positions are meant: do not refuse them",
    )


@dataclass(frozen=True, kw_only=True)
class ReadingOptions(PositionOptions, ModelOptions):
    """What the commands that read pairs with a finished model take besides.

    None means: as the run was trained.
    """

    max_length: int | None = option(
        None,
        within=Range(least=1),
        help="tokens a text, cut on the left (default: the run's own, else 512)",
    )
    truncate: str | None = option(
        None,
        choices=TRUNCATE,
        help="cut each side on its own or both alike (default: the run's own, else each)",
    )

    chat: bool = option(
        False,
        help="read prompts and responses that are strings as messages (default: the run's own)",
    )

    append_eos: str = option(
        "auto",
        choices=("auto", "yes", "no"),
        help="end every text with the EOS token: as the run was trained; a model of TRL's reward "
        "trainer, by its model card, was trained so",
    )

    def rules(self, checkpoint: Checkpoint) -> TextRules:
        """How texts become token ids: as asked, else as the run was trained, else as by default."""
        check_ranges(self)
        path = run_of(checkpoint) / "options.json"
        stored = run_options(checkpoint)
        max_length = stored.get("max_length", DEFAULT_MAX_LENGTH)
        truncate = stored.get("truncate", "each")
        require(
            type(max_length) is int and max_length >= 1 and truncate in TRUNCATE,
            f'{path}: "max_length" or "truncate" is not that of a run; restore it, or give'
            " --max-length and --truncate in a directory without it",
        )
        was_trained_so = bool(stored) and (self.max_length or 0) <= max_length
        max_length = self.max_length or max_length
        check_length(
            checkpoint.config,
            max_length,
            Path(os.path.realpath(checkpoint.directory)),
            beyond=self.beyond_positions or was_trained_so,
        )
        chat = self.chat or stored.get("chat") is True
        append_eos = self.append_eos == "yes"
        if self.append_eos == "auto":
            append_eos = was_trained_with_eos(checkpoint)
        if append_eos:
            eos_to_append(checkpoint.tokenizer)  # refused before anything is written
        return TextRules(max_length, self.truncate or truncate, chat, append_eos)


def run_of(checkpoint: Checkpoint) -> Path:
    """The directory of the run that made a checkpoint: its own, or that in which it was saved."""
    directory = Path(os.path.realpath(checkpoint.directory))
    return directory.parent if directory.name.startswith("checkpoint-") else directory


def run_options(checkpoint: Checkpoint) -> dict[str, Any]:
    """The options of the run that made a checkpoint; {} if no run of ours made it."""
    path = run_of(checkpoint) / "options.json"
    stored = read_json(path) if path.is_file() else {}
    if CHECKSUM in stored:  # runs of before there were checksums have none
        stored = read_checked_json(path)
    return stored


def was_trained_with_eos(checkpoint: Checkpoint) -> bool:
    """Whether the texts of a model's training ended with the EOS token.

    A run of ours says so itself. TRL's reward trainer appends it to every text, except to rendered
    conversations; a model that comes from there has its tags in its model card.
    """
    stored = run_options(checkpoint)
    if stored or not checkpoint.has_head:
        return stored.get("append_eos") == "yes"
    card = checkpoint.directory / "README.md"
    if not card.is_file():
        return False
    with card.open("rb") as file:
        beginning = file.read(10_000)
    return b"- reward-trainer" in beginning and b"- trl" in beginning


def print_how_texts_end(checkpoint: Checkpoint, rules: TextRules) -> None:
    """Say that texts are read at an EOS token, where that is not how minimore trains by default."""
    if not rules.append_eos:
        return
    by_card = "" if run_options(checkpoint) else ", as TRL trains; --append-eos no reads without it"
    print(f"{checkpoint.directory}: texts are read at an EOS token behind them{by_card}")


def check_length(
    config: ModelConfig,
    max_length: int,
    directory: Path,
    options: str = "--max-length",
    beyond: bool | None = False,
) -> None:
    """Refuse texts that are longer than a model can read, or than it was made for.

    options: what set their length. beyond: texts of more than the model's max_position_embeddings
    are meant; None where they cannot be. Rotation has an angle for any position, but of such a one
    the model has learned nothing. Learned positions end, so nobody can mean more of them.
    """
    longest, named = config.longest, config.named_positions
    what = "learned positions" if config.learned_positions else "a rope scaling that stays the same"
    require(
        longest is None or max_length <= longest,
        f"{options} {max_length}: {directory} has {what} for {longest} tokens only",
    )
    way_out = "" if beyond is None else ", or --beyond-positions if more are meant"
    require(
        beyond or not named or max_length <= named,
        f"{options} {max_length}: {directory} was made for {named} tokens (its"
        f" max_position_embeddings); expected at most that{way_out}",
    )


# ---- rewards -------------------------------------------------------------------------------------


@torch.no_grad()
def pair_rewards(
    model: RewardModel, pairs: Sequence[TokenPair], micro_tokens: int = 8192, share: bool = True
) -> Tensor:
    """Rewards of both sides of every pair: (B, 2) fp32 on the CPU, chosen first.

    share: compute a prompt once for both sides.
    """
    rewards = torch.empty(len(pairs), 2)
    for places in batches_by_length([pair.tokens for pair in pairs], micro_tokens):
        batch = pack_pairs([pairs[place] for place in places], share=share)
        chosen, rejected = model.features(batch)
        sides = torch.stack([chosen @ model.head, rejected @ model.head], 1)
        rewards[places] = sides.cpu()
    return _finite(rewards)


@torch.no_grad()
def text_rewards(
    model: RewardModel, texts: Sequence[Sequence[int]], micro_tokens: int = 8192
) -> Tensor:
    """Rewards of whole texts given as token ids: (S,) fp32 on the CPU."""
    rewards = torch.empty(len(texts))
    for places in batches_by_length([len(text) for text in texts], micro_tokens):
        stream = pack([([], [list(texts[place])]) for place in places])
        rewards[places] = model.rewards(stream).cpu()
    return _finite(rewards)


@torch.no_grad()
def group_rewards(
    model: RewardModel, groups: Sequence[Sequence[np.ndarray]], micro_tokens: int = 8192
) -> list[Tensor]:
    """Rewards of groups of texts, such as the responses to one prompt: (n,) each, fp32 on the CPU.

    What all texts of a group share at their beginning is computed once.
    """
    items = [beginning_and_rests(texts) for texts in groups]
    sizes = [len(beginning) + sum(map(len, rests)) for beginning, rests in items]
    rewards = [torch.empty(0)] * len(groups)
    for places in batches_by_length(sizes, micro_tokens):
        stream = pack([items[place] for place in places])
        parts = model.rewards(stream).cpu().split([len(groups[place]) for place in places])
        for place, part in zip(places, parts):
            rewards[place] = _finite(part)
    return rewards


def beginning_and_rests(texts: Sequence[np.ndarray]) -> tuple[list[int], list[list[int]]]:
    """Texts as what all of them share, and the rest of each, which has at least one id.

    >>> beginning_and_rests([np.array([1, 2, 3]), np.array([1, 2, 4, 5]), np.array([1, 2])])
    ([1], [[2, 3], [2, 4, 5], [2]])
    """
    shared = min([shared_length(texts[0], text) for text in texts])
    return texts[0][:shared].tolist(), [text[shared:].tolist() for text in texts]


def _finite(rewards: Tensor) -> Tensor:
    if not rewards.isfinite().all():
        raise FloatingPointError(
            "a reward is not finite: the model's numbers overflowed; check how it was trained"
        )
    return rewards
