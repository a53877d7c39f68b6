"""Preference pairs: checked texts -> token pairs -> one packed batch. Sampling orders, too.

Nothing is skipped silently: see `Source.line`.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..model.attention import Stream, pack
from ..model.tokenizer import Tokenizer
from ..options import InputError
from .records import read_records, record_pairs

TRUNCATE = ("each", "together")
CHUNK = 512  # pairs tokenised at a time


class TokenPair(NamedTuple):
    """One preference as token ids (int32), each side at most max_length long; the first `shared` ids are the same."""

    chosen: np.ndarray
    rejected: np.ndarray
    shared: int
    longer: int  # characters of the chosen response minus the rejected one's
    prompt: int = 0  # pairs of one prompt have the same number
    index: int = 0  # place among all the pairs of its file, unused ones counted

    @property
    def tokens(self) -> int:
        """Tokens that are computed: the shared prefix counts once."""
        return len(self.chosen) + len(self.rejected) - self.shared


@dataclass
class Source:
    """One preference dataset, tokenised, with a count of everything that was not used as it came."""

    name: str
    pairs: list[TokenPair] = field(default_factory=list)
    label_ties: int = 0  # annotators scored both alike: no preference to learn
    identical: int = 0  # the model would see the same tokens on both sides
    truncated: int = 0  # at least one side was cut on the left
    dropped: int = 0  # nothing to read: no token at all
    blank: int = 0  # a response without a visible character; kept
    named: int = 0  # a text holds the name of a special token, read as text; kept
    read: int = 0  # all pairs of the file so far, used or not
    prompts: dict[str, int] = field(default_factory=dict)  # number of each prompt

    def line(self) -> str:
        """One line for the log; pairs are those in use, after ties, identical and dropped ones."""
        mean = sum(p.tokens for p in self.pairs) / len(self.pairs)
        return (
            f"{self.name}: {len(self.pairs)} pairs, {self.label_ties} label ties, {self.identical} identical, "
            f"{self.truncated} truncated, {self.blank} blank, {self.dropped} dropped, {mean:.0f} mean tokens"
            + (
                f"; {self.named} pairs hold names of special tokens, which are read as text"
                if self.named
                else ""
            )
        )

    def digest(self) -> str:
        """sha256 over the token pairs, in order: the same digest, the same training data."""
        h = hashlib.sha256()
        for p in self.pairs:
            h.update(
                np.array([len(p.chosen), len(p.rejected)]).tobytes()
                + p.chosen.tobytes()
                + p.rejected.tobytes()
            )
        return h.hexdigest()


@dataclass(eq=False)
class PairBatch:
    """B pairs as one stream, chosen and rejected text in turn; source: (B,) int64, the source of each pair."""

    stream: Stream
    source: Tensor


# ---- tokens ----------------------------------------------------------------------------------------------------------


def load_source(
    name: str, path: str, tokenizer: Tokenizer, max_length: int, truncate: str = "each"
) -> Source:
    """Read, check and tokenise a file of pairs; truncate: "each" or "together". Raises InputError if no usable pair is left."""
    source, waiting, records = Source(name), [], 0
    for where, record in read_records(path):
        records += 1
        pairs, ties = record_pairs(record, where, tokenizer)
        source.label_ties += ties
        for pair in pairs:
            for response in (pair.chosen, pair.rejected):
                refuse_doubled_bos(pair.prompt + response, pair.rendered, where, tokenizer)
        waiting += pairs
        if len(waiting) >= CHUNK:
            _tokenise(source, waiting, tokenizer, max_length, truncate)
            waiting = []
    _tokenise(source, waiting, tokenizer, max_length, truncate)
    if not source.pairs:
        why = (
            "is empty"
            if not records
            else (
                f"has no usable pair: of {records} records, {source.label_ties} label ties, "
                f"{source.identical} identical and {source.dropped} dropped pairs"
            )
        )
        raise InputError(f"{path}: {why}; source {name!r} needs at least one pair")
    return source


def _tokenise(source, waiting, tokenizer, max_length, truncate):
    texts = [p.prompt + response for p in waiting for response in (p.chosen, p.rejected)]
    ids, cut = encode(
        texts,
        tokenizer,
        max_length,
        [p.rendered for p in waiting for _ in range(2)],
        truncate == "together",
    )
    for i, pair in enumerate(waiting):
        source.read += 1
        chosen, rejected = ids[2 * i], ids[2 * i + 1]
        if not len(chosen) or not len(rejected):
            source.dropped += 1
        elif np.array_equal(chosen, rejected):
            source.identical += 1
        else:
            source.truncated += cut[2 * i] or cut[2 * i + 1]
            source.blank += pair.is_blank
            source.named += not pair.rendered and tokenizer.names_special(
                texts[2 * i] + texts[2 * i + 1]
            )
            prompt = source.prompts.setdefault(
                pair.prompt or f"none {source.read}", len(source.prompts)
            )
            source.pairs.append(
                TokenPair(
                    chosen,
                    rejected,
                    shared_length(chosen, rejected),
                    len(pair.chosen) - len(pair.rejected),
                    prompt,
                    source.read - 1,
                )
            )


def refuse_doubled_bos(text: str, rendered: bool, where: str, tokenizer: Tokenizer):
    """A text that already begins with the BOS that the tokenizer adds would be read as it never was in training."""
    if not rendered and tokenizer.is_doubled(text):
        raise InputError(
            f"{where}: the text begins with {tokenizer.bos_text!r}, which the tokenizer adds itself; remove it"
        )


def encode(
    texts: list[str],
    tokenizer: Tokenizer,
    max_length: int,
    rendered: list[bool] | None = None,
    together: bool = False,
) -> tuple[list[np.ndarray], list[bool]]:
    """Ids of each text, cut on the left to max_length tokens, BOS kept; and which texts were cut.

    rendered: which texts were written by the chat template; by default none. together: texts come two by two, and both of a pair
    lose as many tokens as the longer one must (the shorter keeps one), so that what they share stays aligned. Differs from the
    authors' code, whose left truncation drops the BOS.
    """
    bos = len(tokenizer.bos)
    if max_length <= bos:
        raise InputError(
            f"--max-length {max_length}: expected at least {bos + 1}, for what begins every text and one token more"
        )
    rendered = rendered or [False] * len(texts)
    read = {
        flag: iter(tokenizer.encode([t for t, r in zip(texts, rendered) if r == flag], flag))
        for flag in (False, True)
    }
    encoded = [next(read[flag]) for flag in rendered]
    excess = [max(0, len(t) - max_length) for t in encoded]
    if together:
        excess = [
            min(max(excess[i & ~1], excess[i | 1]), max(0, len(t) - bos - 1))
            for i, t in enumerate(encoded)
        ]
    return [np.array(t[:bos] + t[bos + e :], dtype=np.int32) for t, e in zip(encoded, excess)], [
        e > 0 for e in excess
    ]


def shared_length(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the longest common prefix of two id lists that leaves each at least one token of its own."""
    most = min(len(a), len(b)) - 1
    different = np.flatnonzero(a[:most] != b[:most])
    return int(different[0]) if len(different) else most


# ---- batches ---------------------------------------------------------------------------------------------------------


def pack_pairs(
    pairs: Sequence[TokenPair], source: Sequence[int] | None = None, share: bool = True
) -> PairBatch:
    """Lay out pairs as one stream, the prompt stored once (`share=False`: twice, for comparison)."""
    items = []
    for p in pairs:
        c, r, n = p.chosen.tolist(), p.rejected.tolist(), p.shared
        items += [(c[:n], [c[n:], r[n:]])] if share else [([], [c]), ([], [r])]
    return PairBatch(pack(items), torch.tensor(source if source is not None else [0] * len(pairs)))


def split_by_tokens(tokens: Sequence[int], budget: int, unit: int = 1) -> list[range]:
    """Cut a sequence of items into consecutive ranges of at most `budget` tokens, never inside a unit of items.

    A unit larger than the budget makes a range of its own.
    """
    ranges, start, filled = [], 0, 0
    for first in range(0, len(tokens), unit):
        size = sum(tokens[first : first + unit])
        if filled and filled + size > budget:
            ranges.append(range(start, first))
            start, filled = first, 0
        filled += size
    return ranges + [range(start, len(tokens))]
