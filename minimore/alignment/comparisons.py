"""Preference pairs as a policy learns from them: chosen, rejected, and what a loss adds to them.

    dpo, mrpo    chosen  rejected
    bapo         chosen  rejected  what the reference wrote itself
    spo          chosen  rejected  the chosen one without a third of its tokens, and without two

S responses of a pair.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..data.foreign.shapes import read_house_records
from ..data.forms import Pair, record_pairs
from ..data.pairs import Source, TokenPair, refuse_doubled_bos
from ..data.records import read_records
from ..model.checkpoint import Checkpoint
from ..model.tokenizer import Tokenizer
from ..options import require
from .language import Responses
from .responses import (
    ResponseTexts,
    cut_to_length,
    encoded,
    eos_of,
    in_portions,
    require_length,
    require_split,
    texts_to_learn,
)

REMOVED = (1 / 3, 2 / 3)  # shares of a chosen response's tokens that spo takes away

Written = Mapping[str, tuple[str, bool]]  # a prompt -> a response to it, and whether it ended


@dataclass
class Comparisons:
    """The pairs of a file. source: as a report reads them, and counts; items: as they are learned.

    Both have the same pairs in the same order.
    """

    source: Source
    items: list[Responses] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The source's."""
        return self.source.name


def read_comparisons(
    name: str,
    path: str,
    checkpoint: Checkpoint,
    max_length: int,
    chat: bool = False,
    written: Written | None = None,
) -> Comparisons:
    """The pairs of a file as ids; every response has the model's EOS behind it.

    written: responses that are added to the two of a pair, by prompt. max_length: tokens of prompt
    and response; a prompt is cut on the left, and a response that is longer than all of it on the
    right. Raises InputError for a line that cannot be read, for a prompt without a written
    response, or if nothing usable is left.
    """
    require_length(max_length, checkpoint.tokenizer)
    comparisons = Comparisons(Source(name))
    texts = _texts_of_file(comparisons.source, path, checkpoint.tokenizer, chat, written)
    for portion in in_portions(texts):
        _add_as_ids(comparisons, portion, checkpoint, max_length)
    source = comparisons.source
    require(
        source.pairs,
        f"{path}: has no usable pair ({source.label_ties} label ties, {source.identical} identical,"
        f" {source.dropped} without a token of their own); source {name!r} needs at least one",
    )
    return comparisons


def _texts_of_file(
    source: Source, path: str, tokenizer: Tokenizer, chat: bool, written: Written | None
) -> Iterator[ResponseTexts]:
    """Prompt, chosen and rejected response of every pair, and what was written to its prompt."""
    unlabelled: Counter[str] = Counter()
    source.unlabelled = unlabelled
    for where, record in read_house_records(path, unlabelled):
        pairs, label_ties = record_pairs(record, where, tokenizer, chat)
        source.label_ties += label_ties
        for pair in pairs:
            require_split(pair, where)
            for response in (pair.chosen, pair.rejected):
                refuse_doubled_bos(pair.prompt + response, pair.rendered, where, tokenizer)
            yield _with_written(pair, written, where)


def _with_written(pair: Pair, written: Written | None, where: str) -> ResponseTexts:
    """A pair as texts, with what was written to its prompt as a third response."""
    responses, ends, blank = [pair.chosen, pair.rejected], [True, True], [*pair.blank]
    if written is not None:
        require(
            pair.prompt in written,
            f"{where}: --base-responses has no response to this prompt; write one to every prompt"
            " of the training files with `minimore align sample`",
        )
        response, has_ended = written[pair.prompt]
        responses, ends, blank = [*responses, response], [*ends, has_ended], [*blank, False]
    return ResponseTexts(pair.prompt, responses, pair.rendered, ends, blank)


def _add_as_ids(
    comparisons: Comparisons, portion: Sequence[ResponseTexts], checkpoint: Checkpoint, most: int
) -> None:
    """Add pairs as ids, or count why they are left out."""
    source, tokenizer, eos = comparisons.source, checkpoint.tokenizer, eos_of(checkpoint)
    for texts, (prompt, *wholes) in zip(portion, encoded(portion, tokenizer)):
        source.read += 1
        ends = [eos if has_ended else None for has_ended in texts.ends]
        item, was_cut = cut_to_length(prompt, wholes, ends, len(tokenizer.bos), most)
        if item is None:
            source.dropped += 1
            continue
        if item.responses[0] == item.responses[1]:
            source.identical += 1
            continue
        source.truncated += was_cut
        source.blank += any(texts.blank)
        source.named += not texts.is_rendered and tokenizer.names_special(
            texts.prompt + "".join(texts.responses)
        )
        chosen, rejected = (np.array([*item.prompt, *ids], np.int32) for ids in item.responses[:2])
        source.pairs.append(
            TokenPair(
                chosen,
                rejected,
                shared=len(item.prompt),
                longer=len(texts.responses[0]) - len(texts.responses[1]),
                prompt=source.prompts.setdefault(texts.prompt, len(source.prompts)),
                index=source.read - 1,
            )
        )
        comparisons.items.append(item)


def read_written(path: str, tokenizer: Tokenizer, chat: bool = False) -> Written:
    """The first response to each prompt of a file of samples. Raises InputError."""
    written: dict[str, tuple[str, bool]] = {}
    for where, record in read_records(path):
        for texts in texts_to_learn(record, where, tokenizer, "all", chat):
            written.setdefault(texts.prompt, (texts.responses[0], texts.ends[0]))
    return written


def with_degrees(items: Sequence[Responses], eos: int | None, seed: int) -> list[Responses]:
    """The same items, with less and less of the chosen response as further responses."""
    result = []
    for i, item in enumerate(items):
        degrees = [
            thinned(item.responses[0], share, eos, np.random.default_rng([seed, i, j]))
            for j, share in enumerate(REMOVED)
        ]
        result.append(item._replace(responses=item.responses + degrees))
    return result


def thinned(
    response: list[int], share: float, eos: int | None, random: np.random.Generator
) -> list[int]:
    """A response without a share of its tokens, chosen at random; its end stays.

    At least one token is removed and one remains, so a response of a single token stays as it is.

    >>> thinned([5, 6, 7, 2], 2 / 3, 2, np.random.default_rng(0))
    [6, 2]
    """
    has_end = len(response) > 1 and response[-1] == eos
    body = response[:-1] if has_end else response
    removed = min(len(body) - 1, max(1, round(share * len(body))))
    places = random.permutation(len(body))[removed:]  # that remain
    return [body[place] for place in sorted(places.tolist())] + response[len(body) :]
