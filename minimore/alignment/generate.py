"""Sampling: a language model writes, token by token, and every block remembers keys and values.

    prompts     P P P | Q Q          one stream, computed once, however many samples each has
    cache       P P P  x y .         a row a sample: keys and values of its prompt and of what it
                P P P  z . .         has written so far
                Q Q    u v w
    a step      y, z, w              one new token of every sample that is not finished; it sees its
                                     own row

A sample has a seed of its own. What it draws at its t-th token is a function of seed and t, so that
it is the same alone and in any company.

S samples that are being written, T places of the cache, D width, H heads, G key/value heads, C head
width, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.pairs import split_by_tokens
from ..model.attention import attend, pack
from ..model.rotation import at_least_fp32, rotations
from ..model.trunk import Block
from .policy import LanguageModel


@dataclass(frozen=True)
class Sampling:
    """How a next token is drawn.

    temperature: the logits are divided by it; 0 takes the likeliest token. top_k: only so many
    tokens, the likeliest ones; 0 is all. top_p: of these only the fewest that have this share of
    the probability. max_new_tokens: of one sample. eos: ids that end a sample.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 256
    eos: frozenset[int] = frozenset()


@dataclass
class Sample:
    """One continuation: of which prompt, drawn with which seed, and its ids so far, EOS included.

    is_finished: it ended by itself, by EOS or by a stop string.
    """

    prompt: int
    seed: int
    tokens: list[int]
    is_finished: bool = False


Stop = Callable[[Sample], bool]  # whether a sample ends with the token that it got last


# ---- the loop ------------------------------------------------------------------------------------


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[Sequence[int]],
    sampling: Sampling,
    stop: Stop | None = None,
    micro_tokens: int = 8192,
) -> list[Sample]:
    """Continuations of prompts; seeds: those of each prompt's samples.

    The prompts have at least one id each. stop: asked after every token. micro_tokens: tokens of
    prompts computed at a time. Returns the samples in the order of prompts and seeds.
    """
    samples = [Sample(prompt, seed, []) for prompt, own in enumerate(seeds) for seed in own]
    if not samples or not sampling.max_new_tokens:
        return samples
    prompt_of = [sample.prompt for sample in samples]
    cache, states = Cache.of_prompts(model, prompts, prompt_of, micro_tokens)
    writing = list(samples)
    while True:
        next_tokens = draw(model.logits(states), writing, sampling)
        for sample, token in zip(writing, next_tokens):
            sample.tokens.append(token)
            sample.is_finished = token in sampling.eos or (stop is not None and stop(sample))
        goes_on = [
            not sample.is_finished and len(sample.tokens) < sampling.max_new_tokens
            for sample in writing
        ]
        writing = [sample for sample, stays in zip(writing, goes_on) if stays]
        if not writing:
            return samples
        if not all(goes_on):
            cache.keep([row for row, stays in enumerate(goes_on) if stays])
        states = cache.step([sample.tokens[-1] for sample in writing])


# ---- the memory of the blocks --------------------------------------------------------------------


class Cache:
    """Keys and values of every block, a row a sample.

    keys, values: of each block (S, G, T, C), of which row s holds `lengths[s]` places.
    """

    def __init__(self, model: LanguageModel, lengths: Tensor):
        self.model, self.c = model, model.trunk.c
        self.lengths = lengths  # (S,)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    @classmethod
    def of_prompts(
        cls,
        model: LanguageModel,
        prompts: Sequence[Sequence[int]],
        prompt_of: Sequence[int],
        micro_tokens: int = 8192,
    ) -> tuple["Cache", Tensor]:
        """The cache of samples that have read their prompts, and the state of the last tokens.

        prompt_of: of every sample, the number of its prompt. Every prompt is computed once, with
        others of up to micro_tokens tokens, and its keys and values are copied to all its samples.
        The states are (S, D), after the final norm.
        """
        device = model.unembedding.device
        lengths = [len(prompt) for prompt in prompts]
        of_samples = torch.tensor(prompt_of, device=device)  # (S,)
        cache = cls(model, torch.tensor(lengths, device=device)[of_samples])
        keys: list[list[Tensor]] = [[] for _ in cache.blocks]  # of every block, by prompt
        values: list[list[Tensor]] = [[] for _ in cache.blocks]
        parts = split_by_tokens(lengths, micro_tokens)
        last = [cache._read(prompts[part.start : part.stop], keys, values) for part in parts]
        for stored, by_prompt in ((cache.keys, keys), (cache.values, values)):
            while by_prompt:  # what was copied is forgotten
                stored.append(rows_of(by_prompt.pop(0)).index_select(0, of_samples))
        states = model.trunk.final_norm(at_least_fp32(torch.cat(last)))
        return cache, states.index_select(0, of_samples)

    def _read(
        self,
        prompts: Sequence[Sequence[int]],
        keys: Sequence[list[Tensor]],
        values: Sequence[list[Tensor]],
    ) -> Tensor:
        """What the blocks leave at the last token of some prompts: (prompts, D).

        Appends the keys and values (N, G, C) of each prompt to those of every block.
        """
        stream = pack([([], [prompt]) for prompt in prompts]).to(self.lengths.device)
        lengths = [len(prompt) for prompt in prompts]
        x, angles = self.model.trunk.embed(stream), rotations(self.c, stream.positions)
        for block, rotation, block_keys, block_values in zip(self.blocks, angles, keys, values):
            q, k, v = block.before_attention(x, *rotation)
            x = after(block, x, attend(q, k, v, stream, block.attention.window))
            block_keys += k.split(lengths)
            block_values += v.split(lengths)
        return x.index_select(0, stream.last)

    @property
    def blocks(self) -> Sequence[Block]:
        """The blocks of the trunk."""
        return list(self.model.trunk.blocks)  # type: ignore[arg-type]

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Let every sample read its newest token; returns the states (S, D) behind it."""
        trunk, positions = self.model.trunk, self.lengths
        self.lengths = self.lengths + 1
        longest = int(self.lengths.max())
        self._make_room(longest)
        newest = torch.tensor(tokens, device=positions.device)
        x = trunk.embed_tokens(newest, positions)
        angles = rotations(self.c, positions)
        windows = {block.attention.window for block in self.blocks}
        visible = {window: self._visible(longest, window) for window in windows}
        rows = torch.arange(len(tokens), device=positions.device)
        for block, rotation, keys, values in zip(self.blocks, angles, self.keys, self.values):
            q, k, v = block.before_attention(x, *rotation)
            keys[rows, :, positions] = k
            values[rows, :, positions] = v
            attended = attend_rows(
                q, keys[:, :, :longest], values[:, :, :longest], visible[block.attention.window]
            )
            x = after(block, x, attended)
        return trunk.final_norm(at_least_fp32(x))

    def _visible(self, longest: int, window: int | None) -> Tensor:
        """Which places of its row a sample's newest token sees: (S, 1, 1, longest)."""
        place = torch.arange(longest, device=self.lengths.device)
        visible = place < self.lengths[:, None]
        if window is not None:
            visible &= place >= self.lengths[:, None] - window
        return visible[:, None, None]

    def _make_room(self, places: int) -> None:
        """Let every row have so many places, and some more, so that this is seldom needed."""
        if places <= self.keys[0].shape[2]:
            return
        more = places + places // 4 + 16 - self.keys[0].shape[2]
        self._replace_each(lambda rows: F.pad(rows, (0, 0, 0, more)))

    def keep(self, rows: Sequence[int]) -> None:
        """Forget all samples but these rows."""
        row = torch.tensor(rows, device=self.lengths.device)
        self.lengths = self.lengths[row]
        self._replace_each(lambda rows: rows.index_select(0, row))

    def _replace_each(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change keys and values, one block's after the other's, so that few are there twice."""
        for stored in (self.keys, self.values):
            for number, rows in enumerate(stored):
                stored[number] = change(rows)


def attend_rows(q: Tensor, keys: Tensor, values: Tensor, visible: Tensor) -> Tensor:
    """Attention of one query a sample (S, H, C) over its own row (S, G, T, C): (S, H, C).

    visible: (S, 1, 1, T). The H / G queries that share a key head stand in line, as if they were
    queries of one head.
    """
    in_groups = q.unflatten(1, (keys.shape[1], -1))  # (S, G, H / G, C)
    attended = F.scaled_dot_product_attention(in_groups, keys, values, attn_mask=visible)
    return attended.flatten(1, 2)


def after(block: Block, x: Tensor, attended: Tensor) -> Tensor:
    """What a block does behind its attention: (N, D) and (N, H, C) -> (N, D)."""
    return block.last_product(*block.after_attention(x, attended))


def rows_of(texts: Sequence[Tensor]) -> Tensor:
    """Texts (N, G, C), each of its own N -> a row a text, padded: (texts, G, longest N, C)."""
    return torch.nn.utils.rnn.pad_sequence(list(texts), batch_first=True).transpose(1, 2)


# ---- drawing a token -----------------------------------------------------------------------------


def draw(logits: Tensor, samples: Sequence[Sample], sampling: Sampling) -> list[int]:
    """The next token of every sample, from its logits (S, V).

    It is the first one whose probability, with that of all ids below it, reaches a random share of
    the sum. Raises FloatingPointError for logits that are not finite.
    """
    lowest, highest = logits.aminmax()  # one pass; both are NaN if any logit is
    if not (lowest.isfinite() and highest.isfinite()):
        raise FloatingPointError("a logit is not finite; try --compute-dtype float32")
    if sampling.temperature == 0:
        return logits.argmax(1).tolist()
    cumulative = probabilities_of(logits, sampling).cumsum(1)
    # In (0, 1]: at 0, a first token of probability zero would be drawn.
    share = [1 - uniform(sample.seed, len(sample.tokens)) for sample in samples]
    random = torch.tensor(share, dtype=torch.float64).to(cumulative.device)
    return torch.searchsorted(cumulative, random[:, None] * cumulative[:, -1:])[:, 0].tolist()


def probabilities_of(logits: Tensor, sampling: Sampling) -> Tensor:
    """What tokens are drawn by: (S, V) float64, zero where top-k or top-p cuts off.

    What is left does not sum to 1.
    """
    probabilities = logits.double().div_(sampling.temperature).softmax(1)
    if sampling.top_k or sampling.top_p < 1:
        # A token as likely as the last one that stays, stays, too.
        probabilities *= probabilities >= least_likely(probabilities, sampling)
    return probabilities


def least_likely(probabilities: Tensor, sampling: Sampling) -> Tensor:
    """The smallest of the probabilities (S, V) that top-k and top-p leave: (S, 1)."""
    vocabulary = probabilities.shape[1]
    if sampling.top_k:
        likeliest = probabilities.topk(min(sampling.top_k, vocabulary)).values  # falling
        total = likeliest.sum(1, keepdim=True)
    else:
        # All tokens below (1 - p) / V have less than 1 - p together, so top-p needs none of them.
        is_likely = probabilities >= (1 - sampling.top_p) / vocabulary
        likeliest = probabilities.topk(max(1, int(is_likely.sum(1).max()))).values
        total = probabilities.sum(1, keepdim=True)
    if sampling.top_p == 1:
        return likeliest[:, -1:]
    before = likeliest.cumsum(1) - likeliest  # what all likelier ones have
    needed = (before < sampling.top_p * total).sum(1, keepdim=True)
    return likeliest.gather(1, needed - 1)


def uniform(seed: int, t: int) -> float:
    """A number in [0, 1) that is a function of a sample's seed and of the place of a token."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=t)).random())
