"""Preference pairs: checked texts, then token pairs, then one packed batch.

Nothing is skipped silently: see `Source.line`.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..model.attention import Stream, pack
from ..model.tokenizer import Tokenizer
from ..options import InputError, require
from .foreign.shapes import read_house_records, refuse_part_of_pair
from .forms import Pair, record_pairs
from .labels import AS_WRITTEN, ONE_VOTE, Label, LabelRules, source_name
from .records import Record

TRUNCATE = ("each", "together")
TOKENISED_AT_ONCE = 512  # pairs
CHARACTERS_AT_ONCE = 8_000_000  # of all pairs that wait to be tokenised
MOST_SOURCES_OF_A_FILE = 1000
NO_PROMPT = "\0"  # begins what stands for the prompt of a pair that has none
ROLE_MARKS = (":", ">", "]")  # with one of these a prompt may end that a response follows at once


class TextRules(NamedTuple):
    """How texts become token ids, the same in training and afterwards.

    max_length: tokens of a text, cut on the left. truncate: "each" side of a pair on its own, or
    both "together". chat: strings are messages, too. append_eos: texts that no chat template has
    written end with the EOS token, at which they are then read.
    """

    max_length: int
    truncate: str = "each"
    chat: bool = False
    append_eos: bool = False


class TokenPair(NamedTuple):
    """One preference as token ids (int32), each side at most max_length long.

    shared: how many ids at the beginning are the same. longer: characters of the chosen response
    minus those of the rejected one. prompt: pairs of one prompt have the same number. index: the
    place among all pairs of its file, unused ones counted. label: what annotators say of it.
    """

    chosen: np.ndarray
    rejected: np.ndarray
    shared: int
    longer: int
    prompt: int = 0
    index: int = 0  # type: ignore[assignment]  # it stands in the place of tuple.index
    label: Label = ONE_VOTE

    @property
    def tokens(self) -> int:
        """Tokens that are computed: the shared prefix counts once."""
        return len(self.chosen) + len(self.rejected) - self.shared


@dataclass
class Source:
    """One preference dataset, tokenised, with counts of everything not used as it came.

    label_ties: annotators scored both alike, so there is no preference to learn. identical: the
    model would see the same tokens on both sides. dropped: there is no token at all. These are left
    out. truncated: a side was cut on the left. blank: a response has no visible character. named: a
    text holds the name of a special token, read as text. turned: more votes are for the response
    that the file calls rejected, so it is the chosen one here. These are kept. glued: the prompt
    runs into the response, as in "What is 2+2?4". repeated: both responses begin with their prompt.

    unlabelled: comparisons of a foreign shape (shapes.py) that have no label, by reason.

    read: all pairs of the file so far, used or not. prompts: the number of each prompt.
    """

    name: str
    pairs: list[TokenPair] = field(default_factory=list)
    label_ties: int = 0
    identical: int = 0
    truncated: int = 0
    dropped: int = 0
    blank: int = 0
    named: int = 0
    glued: int = 0
    repeated: int = 0
    turned: int = 0
    read: int = 0
    prompts: dict[str, int] = field(default_factory=dict)
    unlabelled: Counter[str] = field(default_factory=Counter)
    example: str = ""  # of a prompt that runs into its response

    @property
    def shares(self) -> np.ndarray:
        """The share of votes for the chosen response of each pair: (N,) float64."""
        return np.array([pair.label.share for pair in self.pairs])

    @property
    def votes(self) -> np.ndarray:
        """How many votes each pair has: (N,) float64."""
        return np.array([pair.label.votes for pair in self.pairs])

    def line(self) -> str:
        """One line for the log; pairs are those in use, after ties, identical and dropped ones."""
        mean_tokens = sum(pair.tokens for pair in self.pairs) / len(self.pairs)
        line = (
            f"{self.name}: {len(self.pairs)} pairs, {self.label_ties} label ties,"
            f" {self.identical} identical, {self.truncated} truncated, {self.blank} blank,"
            f" {self.dropped} dropped, {mean_tokens:.0f} mean tokens"
        )
        line += self._line_of_labels()
        for reason, count in sorted(self.unlabelled.items()):
            line += f"; {count} comparisons left out: {reason}"
        if self.named:
            line += f"; {self.named} pairs hold names of special tokens, which are read as text"
        if self.glued > self.read / 2:
            line += (
                f"; {self.glued} prompts run into their responses with nothing between, as in"
                f" {self.example!r}: if they are turns of a conversation, give --chat"
            )
        if self.repeated > self.read / 2:
            line += (
                f"; {self.repeated} prompts stand again at the beginning of both responses: if"
                ' those are whole texts, leave out "prompt"'
            )
        return line

    def _line_of_labels(self) -> str:
        """What the line says of labels that are more than one vote for the chosen response."""
        labels = self._labels
        counts = {
            "with several votes": sum(label.votes != 1 for label in labels),
            "evenly split": sum(label.share == 1 / 2 for label in labels),
            "turned round, since more votes are for the rejected response": self.turned,
            "with margins": sum(label.margin > 0 for label in labels),
            "with weights": sum(label.weight != 1 for label in labels),
        }
        parts = [f"{count} {words}" for words, count in counts.items() if count]
        return f"; of these pairs {', '.join(parts)}" if parts else ""

    @property
    def _labels(self) -> list[Label]:
        return [pair.label for pair in self.pairs]

    def digest(self) -> str:
        """sha256 over the token pairs, in order: the same digest, the same training data."""
        digest = hashlib.sha256()
        for pair in self.pairs:
            lengths = np.array([len(pair.chosen), len(pair.rejected)])
            digest.update(lengths.tobytes() + pair.chosen.tobytes() + pair.rejected.tobytes())
        if any(label != ONE_VOTE for label in self._labels):
            digest.update(np.array(self._labels).tobytes())
        return digest.hexdigest()


@dataclass(eq=False)
class PairBatch:
    """B pairs as one stream, the chosen and the rejected text of each in turn.

    source: (B,) int64, the source of each pair. labels: what annotators say of each.
    """

    stream: Stream
    source: Tensor
    labels: list[Label]

    @property
    def reads(self) -> Tensor:
        """(2B,) the last token of every text."""
        return self.stream.last

    @property
    def size(self) -> int:
        """How many pairs it has."""
        return len(self.source)


# ---- from a file to token pairs ------------------------------------------------------------------


def load_source(
    name: str,
    path: str,
    tokenizer: Tokenizer,
    max_length: int,
    truncate: str = "each",
    chat: bool = False,
    labels: LabelRules = AS_WRITTEN,
) -> Source:
    """Read, check and tokenise a file of pairs, of any shape that is one record a line.

    max_length, truncate, chat: see `TextRules`. labels: what is read besides "chosen", by default
    nothing. Raises InputError for a line that cannot be read, or if no usable pair is left.
    """
    rules = TextRules(max_length, truncate, chat)
    (source,) = load_sources(name, path, tokenizer, rules, labels)
    return source


def load_sources(
    name: str,
    path: str,
    tokenizer: Tokenizer,
    rules: TextRules,
    labels: LabelRules,
    field: str | None = None,
) -> list[Source]:
    """The sources of a file, in order of name: one, or one for every value of a field.

    See `labels.source_name`. A value without a usable pair makes no source, which is said. Raises
    InputError as `load_source` does.
    """
    readers: dict[str, SourceReader] = {}
    unlabelled: Counter[str] = Counter()
    for where, record in read_house_records(path, unlabelled):
        own_name = source_name(name, field, record, where)
        if own_name not in readers:
            readers[own_name] = SourceReader(Source(own_name), tokenizer, rules, labels)
        require(
            len(readers) <= MOST_SOURCES_OF_A_FILE,
            f"{path}: --source-field {field} makes more than {MOST_SOURCES_OF_A_FILE} sources",
        )
        readers[own_name].add(record, where)
    require(readers or unlabelled, f"{path}: is empty; source {name!r} needs at least one pair")
    if field is None:
        readers.setdefault(name, SourceReader(Source(name), tokenizer, rules, labels))
        readers[name].source.unlabelled = unlabelled
    for reason, count in sorted(unlabelled.items()) if field else ():
        print(f"{path}: {count} comparisons left out: {reason}", flush=True)
    for reader in readers.values():
        reader.tokenise()
    in_order = [readers[own_name] for own_name in sorted(readers)]
    usable = [reader for reader in in_order if reader.source.pairs]
    unusable = [reader.source.name for reader in in_order if not reader.source.pairs]
    if usable and unusable:
        print(f"{path}: no usable pair, so no source: {', '.join(unusable)}", flush=True)
    return [reader.finished(path) for reader in usable or in_order]


@dataclass
class SourceReader:
    """A source that is being read, and its pairs that wait to be tokenised together."""

    source: Source
    tokenizer: Tokenizer
    rules: TextRules
    labels: LabelRules
    waiting: list[Pair] = field(default_factory=list)
    characters: int = 0  # of those that wait
    records: int = 0

    def add(self, record: Record, where: str) -> None:
        """Take the pairs of one record."""
        self.records += 1
        refuse_part_of_pair(record, where)
        pairs, label_ties = record_pairs(
            record, where, self.tokenizer, self.rules.chat, self.labels
        )
        self.source.label_ties += label_ties
        for pair in pairs:
            for response in (pair.chosen, pair.rejected):
                text = pair.prompt + response
                refuse_doubled_bos(text, pair.rendered, where, self.tokenizer)
            self.waiting.append(pair)
            self.characters += 2 * len(pair.prompt) + len(pair.chosen) + len(pair.rejected)
            if len(self.waiting) >= TOKENISED_AT_ONCE or self.characters >= CHARACTERS_AT_ONCE:
                self.tokenise()

    def finished(self, path: str) -> Source:
        """The source, once nothing waits. Raises InputError if no pair is usable."""
        source, without_label = self.source, ""
        if source.unlabelled:
            without_label = f", {source.unlabelled.total()} comparisons without a label"
        require(
            source.pairs,
            f"{path}: has no usable pair: of {self.records} records, {source.label_ties} label"
            f" ties, {source.identical} identical and {source.dropped} dropped pairs"
            + without_label
            + f"; source {source.name!r} needs at least one pair",
        )
        if self.labels.weights:
            source.pairs = with_mean_weight(source.pairs)
        return source

    def tokenise(self) -> None:
        """Tokenise the pairs that wait."""
        _tokenise(self.source, self.waiting, self.tokenizer, self.rules)
        self.waiting, self.characters = [], 0


def with_mean_weight(pairs: list[TokenPair]) -> list[TokenPair]:
    """The pairs with weights divided by their mean, so that only their ratios matter.

    The loss of a source then has the size that it has without weights, and so has its gradient.
    """
    mean = float(np.mean([pair.label.weight for pair in pairs]))
    return [
        pair._replace(label=pair.label._replace(weight=pair.label.weight / mean)) for pair in pairs
    ]


def _tokenise(source: Source, pairs: list[Pair], tokenizer: Tokenizer, rules: TextRules) -> None:
    """Add pairs to a source, or count why they are not added."""
    texts = [pair.prompt + text for pair in pairs for text in (pair.chosen, pair.rejected)]
    rendered = [pair.rendered for pair in pairs for _ in range(2)]
    together = rules.truncate == "together"
    ids, was_cut = encode(texts, tokenizer, rules.max_length, rendered, together, rules.append_eos)
    for i, pair in enumerate(pairs):
        source.read += 1
        sides = slice(2 * i, 2 * i + 2)
        chosen, rejected = ids[sides]
        if not len(chosen) or not len(rejected):
            source.dropped += 1
            continue
        if np.array_equal(chosen, rejected):
            source.identical += 1
            continue
        source.truncated += any(was_cut[sides])
        source.blank += pair.is_blank
        source.turned += pair.is_turned
        source.named += not pair.rendered and tokenizer.names_special("".join(texts[sides]))
        _count_joints(source, pair)
        prompt = pair.prompt or f"{NO_PROMPT}{source.read}"
        token_pair = TokenPair(
            chosen=chosen,
            rejected=rejected,
            shared=shared_length(chosen, rejected),
            longer=len(pair.chosen) - len(pair.rejected),
            prompt=source.prompts.setdefault(prompt, len(source.prompts)),
            index=source.read - 1,
            label=pair.label,
        )
        source.pairs.append(token_pair)


def _count_joints(source: Source, pair: Pair) -> None:
    """Count what may be wrong where a prompt and its responses meet."""
    if pair.rendered or not pair.prompt:
        return
    responses = (pair.chosen, pair.rejected)
    ends_open = not pair.prompt[-1].isspace() and not pair.prompt.endswith(ROLE_MARKS)
    if ends_open and all(text and not text[0].isspace() for text in responses):
        source.glued += 1
        source.example = source.example or pair.prompt[-20:] + pair.chosen[:20]
    source.repeated += all(text.startswith(pair.prompt) for text in responses)


def refuse_doubled_bos(text: str, rendered: bool, where: str, tokenizer: Tokenizer) -> None:
    """Refuse a text that already begins with the BOS that the tokenizer adds.

    The model would read it as it never did in training.
    """
    if not rendered and tokenizer.is_doubled(text):
        raise InputError(
            f"{where}: the text begins with {tokenizer.bos_text!r}, which the tokenizer adds"
            " itself; remove it"
        )


def encode(
    texts: list[str],
    tokenizer: Tokenizer,
    max_length: int,
    rendered: list[bool] | None = None,
    together: bool = False,
    append_eos: bool = False,
) -> tuple[list[np.ndarray], list[bool]]:
    """Ids of each text, cut on the left to max_length tokens, BOS kept; and which texts were cut.

    rendered: which texts were written by the chat template; by default none. together: texts come
    two by two, and both of a pair lose as many tokens as the longer one must (the shorter keeps
    one), so that what they share stays aligned. append_eos: the EOS token follows every text that
    is not rendered, once if the text ends with its name. Differs from the authors' code, whose left
    truncation drops the BOS.
    """
    bos = len(tokenizer.bos)
    if max_length <= bos:
        raise InputError(
            f"--max-length {max_length}: expected at least {bos + 1}, for what begins every text"
            " and one token more"
        )
    rendered = rendered or [False] * len(texts)
    if append_eos:
        encoded = _encode_with_eos(texts, tokenizer, rendered)
    else:
        encoded = _encode_each(texts, tokenizer, rendered)
    excess = [max(0, len(ids) - max_length) for ids in encoded]
    if together:
        for i in range(0, len(excess), 2):
            most = max(excess[i], excess[i + 1])
            for side in (i, i + 1):
                excess[side] = min(most, max(0, len(encoded[side]) - bos - 1))
    cut = [np.concatenate([ids[:bos], ids[bos + count :]]) for ids, count in zip(encoded, excess)]
    return cut, [count > 0 for count in excess]


def eos_to_append(tokenizer: Tokenizer) -> int:
    """The id of the EOS token. Raises InputError for a tokenizer that names none."""
    if tokenizer.eos is None:
        raise InputError(
            f"--append-eos yes: {tokenizer.directory} names no EOS token; expected an"
            ' "eos_token" in tokenizer_config.json'
        )
    return tokenizer.eos


def _encode_with_eos(
    texts: list[str], tokenizer: Tokenizer, rendered: list[bool]
) -> list[np.ndarray]:
    """The same with the EOS token behind every text that is not rendered."""
    eos = eos_to_append(tokenizer)
    name = tokenizer.special["eos_token"]
    bare = [t if is_rendered else t.removesuffix(name) for t, is_rendered in zip(texts, rendered)]
    return [
        ids if is_rendered else np.append(ids, np.int32(eos))
        for ids, is_rendered in zip(_encode_each(bare, tokenizer, rendered), rendered)
    ]


def _encode_each(texts: list[str], tokenizer: Tokenizer, rendered: list[bool]) -> list[np.ndarray]:
    """Ids (int32) of texts of both kinds, in order; those of each kind go together."""
    ids: list[np.ndarray] = [np.empty(0, dtype=np.int32)] * len(texts)
    for is_rendered in (False, True):
        places = [place for place, flag in enumerate(rendered) if flag == is_rendered]
        lengths = [len(texts[place]) for place in places]
        for part in split_by_tokens(lengths, CHARACTERS_AT_ONCE) if places else ():
            some = [places[i] for i in part]
            encoded = tokenizer.encode([texts[place] for place in some], is_rendered)
            for place, text_ids in zip(some, encoded):
                ids[place] = np.array(text_ids, dtype=np.int32)
    return ids


def shared_length(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the longest common prefix that leaves each id list at least one of its own."""
    most = min(len(a), len(b)) - 1
    different = np.flatnonzero(a[:most] != b[:most])
    return int(different[0]) if len(different) else most


# ---- from pairs to batches -----------------------------------------------------------------------


def pack_pairs(
    pairs: Sequence[TokenPair], source: Sequence[int] | None = None, share: bool = True
) -> PairBatch:
    """Lay out pairs as one stream, the prompt stored once.

    source: of each pair, by default 0. share=False stores the prompt twice, for comparison.
    """
    items: list[tuple[list[int], list[list[int]]]] = []  # (prefix, continuations)
    for pair in pairs:
        chosen, rejected, n = pair.chosen.tolist(), pair.rejected.tolist(), pair.shared
        if share:
            items.append((chosen[:n], [chosen[n:], rejected[n:]]))
        else:
            items += [([], [chosen]), ([], [rejected])]
    return PairBatch(
        pack(items),
        torch.tensor(source if source is not None else [0] * len(pairs)),
        [pair.label for pair in pairs],
    )


def split_by_tokens(tokens: Sequence[int], budget: int, unit: int = 1) -> list[range]:
    """Cut a sequence of items into consecutive ranges of at most `budget` tokens.

    tokens: of each item. A range never ends inside a unit of items. A unit larger than the budget
    makes a range of its own.
    """
    ranges, start, filled = [], 0, 0
    for first in range(0, len(tokens), unit):
        size = sum(tokens[first : first + unit])
        if filled and filled + size > budget:
            ranges.append(range(start, first))
            start, filled = first, 0
        filled += size
    return ranges + [range(start, len(tokens))]


def batches_by_length(tokens: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Places of items of similar length, which waste least, at most `budget` tokens together.

    A result that is stored at these places comes out in the order of the input.

    >>> list(batches_by_length([7, 2, 8, 3], 10))
    [[1, 3], [0], [2]]
    """
    order = sorted(range(len(tokens)), key=tokens.__getitem__)
    for part in split_by_tokens([tokens[place] for place in order], budget):
        yield [order[i] for i in part]
