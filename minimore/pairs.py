"""Preference pairs: JSON lines -> checked texts -> token pairs -> one packed batch. Sampling orders, too.

A line is one of

    {"prompt": ..., "chosen": ..., "rejected": ...}
    {"chosen": ..., "rejected": ...}                whole dialogues; the prompt is their common beginning (Anthropic HH)
    {"text": [...], "score": [...]}                 k responses with scores: every ordered pair of unequal scores

Instead of a string, `prompt`, `chosen` and `rejected` may be lists of messages {"role": ..., "content": ...}, which go through the
checkpoint's chat template; `rejected` may be a list of several responses. Other keys are tolerated. Nothing is skipped silently: see
`Source.line`.
"""

import gzip
import hashlib
import json
import os
import zlib
from dataclasses import dataclass, field
from typing import Iterator, NamedTuple, Sequence

import numpy as np
import torch
from torch import Tensor

from .attention import Stream, pack
from .options import InputError
from .tokenizer import Tokenizer

ASSISTANT = ("\n\nAssistant:", "## Assistant:")      # what ends the prompt of a dialogue that is given whole
MOST_RESPONSES = 100                                 # to one prompt: they make up to 4,950 pairs
CHUNK = 512                                          # pairs tokenised at a time


class Pair(NamedTuple):
    """One preference as texts; the model reads prompt + response, joined with nothing between.

    rendered: the texts were written by a chat template, so the markers in them are special tokens. blank: a response without
    a visible character; None means look.
    """
    prompt: str
    chosen: str
    rejected: str
    rendered: bool = False
    blank: bool | None = None

    @property
    def is_blank(self) -> bool:
        return not (self.chosen.strip() and self.rejected.strip()) if self.blank is None else self.blank


class TokenPair(NamedTuple):
    """One preference as token ids (int32), each side at most max_length long; the first `shared` ids are the same."""
    chosen: np.ndarray
    rejected: np.ndarray
    shared: int
    longer: int                                      # characters of the chosen response minus the rejected one's

    @property
    def tokens(self) -> int:
        """Tokens that are computed: the shared prefix counts once."""
        return len(self.chosen) + len(self.rejected) - self.shared


@dataclass
class Source:
    """One preference dataset, tokenised, with a count of everything that was not used as it came."""
    name: str
    pairs: list[TokenPair] = field(default_factory=list)
    label_ties: int = 0                              # annotators scored both alike: no preference to learn
    identical: int = 0                               # the model would see the same tokens on both sides
    truncated: int = 0                               # at least one side was cut on the left
    dropped: int = 0                                 # nothing to read: no token at all
    blank: int = 0                                   # a response without a visible character; kept

    def line(self) -> str:
        """One line for the log; pairs are those in use, after ties, identical and dropped ones."""
        mean = sum(p.tokens for p in self.pairs) / len(self.pairs)
        return (f"{self.name}: {len(self.pairs)} pairs, {self.label_ties} label ties, {self.identical} identical, "
                f"{self.truncated} truncated, {self.blank} blank, {self.dropped} dropped, {mean:.0f} mean tokens")

    def digest(self) -> str:
        """sha256 over the token pairs, in order: the same digest, the same training data."""
        h = hashlib.sha256()
        for p in self.pairs:
            h.update(np.array([len(p.chosen), len(p.rejected)]).tobytes() + p.chosen.tobytes() + p.rejected.tobytes())
        return h.hexdigest()


@dataclass(eq=False)
class PairBatch:
    """B pairs as one stream, chosen and rejected text in turn; source: (B,) int64, the source of each pair."""
    stream: Stream
    source: Tensor


# ---- reading ---------------------------------------------------------------------------------------------------------

def read_records(path: str) -> Iterator[tuple[str, dict]]:
    """("file:line", object) for each line of a JSON lines file, plain or .gz; blank lines are passed over.

    A file that begins with [ is one JSON list, and "file:item" is yielded. A directory stands for the data files in it, in order
    of name. Raises InputError, naming file and line, for anything that is not UTF-8 JSON objects.
    """
    if os.path.isdir(path):
        for file in _data_files(path):
            yield from read_records(file)
        return
    line = 0
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rb") as file:
            for line, raw in enumerate(file, 1):
                text = raw.decode("utf-8-sig" if line == 1 else "utf-8")
                if line == 1 and text.lstrip().startswith("["):
                    yield from _list_items(text + file.read().decode("utf-8"), path)
                    return
                if text.strip():
                    yield f"{path}:{line}", _object(_parse(text, f"{path}:{line}", "one object a line"), f"{path}:{line}")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}:{line}: not UTF-8 ({error.reason} at byte {error.start})") from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None


def _data_files(directory):
    names = sorted(n for n in os.listdir(directory) if n.endswith((".jsonl", ".jsonl.gz", ".json", ".json.gz")))
    if not names:
        raise InputError(f"{directory}: a directory without a .jsonl or .json file (.gz too)")
    if any("train" in n for n in names) and any("test" in n for n in names):
        raise InputError(f"{directory}: holds training and test files ({', '.join(names[:4])}); name the files")
    return [os.path.join(directory, n) for n in names]


def _list_items(text, path):
    for item, value in enumerate(_parse(text, path, "a list of objects, or one object a line"), 1):
        yield f"{path}:{item}", _object(value, f"{path}:{item}")


def _parse(text, where, expected):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error}); expected {expected}") from None


def _object(value, where):
    if not isinstance(value, dict):
        raise InputError(f"{where}: a JSON {type(value).__name__}; expected an object")
    return value


def text_of(record: dict, key: str, where: str) -> str:
    """record[key] as a string that can be encoded, or an InputError that shows the keys found."""
    if key not in record:
        raise InputError(f'{where}: "{key}" is missing; found keys: {", ".join(map(str, record)) or "none"}')
    return _text(record[key], f'{where}: "{key}"')


def _text(value, where):
    if not isinstance(value, str):
        raise InputError(f"{where} is {json.dumps(value)[:60]}; expected a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(f"{where} holds half of a surrogate pair; expected valid Unicode") from None
    return value


def record_pairs(record: dict, where: str, tokenizer: Tokenizer | None = None) -> tuple[list[Pair], int]:
    """The pairs of one line and the number of its label ties. tokenizer: needed for messages only."""
    if "text" in record and "chosen" not in record:
        return _scored_pairs(record, where)
    if tokenizer is not None and is_conversation(record.get("chosen")):
        return _conversation_pairs(record, where, tokenizer), 0
    chosen, several = text_of(record, "chosen", where), record.get("rejected")
    if not isinstance(several, list) or not several or not isinstance(several[0], str):
        several = [text_of(record, "rejected", where)]
    several = [_text(r, f'{where}: "rejected"[{i}]') for i, r in enumerate(several)]
    if "prompt" in record:
        return [Pair(text_of(record, "prompt", where), chosen, rejected) for rejected in several], 0
    cut = prompt_end([chosen, *several])
    return [Pair(chosen[:cut], chosen[cut:], rejected[cut:]) for rejected in several], 0


def is_conversation(value) -> bool:
    """Whether a value is meant as messages."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def messages_of(value, where: str, tokenizer: Tokenizer, role: str) -> list[dict]:
    """A list of {"role", "content"}, checked; a string is one message of the given role.

    Where a chat template will render it, a content that holds one of its markers is refused: it could end its own turn.
    """
    value = [{"role": role, "content": value}] if isinstance(value, str) else value
    if not is_conversation(value):
        raise InputError(f"{where} is {json.dumps(value)[:60]}; expected a list of messages with role and content")
    found = []
    for i, message in enumerate(value):
        if not isinstance(message, dict):
            raise InputError(f"{where}[{i}] is {json.dumps(message)[:60]}; expected a message with role and content")
        found.append({key: text_of(message, key, f"{where}[{i}]") for key in ("role", "content")})
        marker = next((m for m in tokenizer.markers if m in found[-1]["content"]), None) if tokenizer.template else None
        if marker is not None:
            raise InputError(f"{where}[{i}]: the content holds {marker!r}, a marker of the chat template; remove it")
    return found


def _conversation_pairs(record, where, tokenizer):
    chosen = messages_of(record["chosen"], f'{where}: "chosen"', tokenizer, "assistant")
    if "rejected" not in record:
        text_of(record, "rejected", where)                                       # says that it is missing
    several = record["rejected"]
    nested = isinstance(several, list) and several and not isinstance(several[0], dict)
    several = [messages_of(r, f'{where}: "rejected"', tokenizer, "assistant") for r in (several if nested else [several])]
    if "prompt" in record:
        prompt = messages_of(record["prompt"], f'{where}: "prompt"', tokenizer, "user")
        return [_render(prompt, chosen, rejected, tokenizer) for rejected in several]
    pairs = []
    for rejected in several:
        turns = next((i for i, (a, b) in enumerate(zip(chosen, rejected)) if a != b), min(len(chosen), len(rejected)) - 1)
        pairs.append(_render(chosen[:turns], chosen[turns:], rejected[turns:], tokenizer))
    return pairs


def _render(prompt, chosen, rejected, tokenizer):
    """Messages as a Pair; where its prompt ends matters for counts only, since tokens are shared by what they are."""
    texts = [tokenizer.render(prompt + response) for response in (chosen, rejected)]
    head = tokenizer.render(prompt, prompt=True) if prompt else ""
    cut = len(head) if all(t.startswith(head) for t in texts) else len(os.path.commonprefix(texts))
    blank = not all(any(m["content"].strip() for m in response) for response in (chosen, rejected))
    return Pair(texts[0][:cut], texts[0][cut:], texts[1][cut:], tokenizer.template is not None, blank)


def texts_of(record: dict, where: str) -> list[str]:
    """record["text"]: two or more whole texts."""
    texts = record["text"]
    if not isinstance(texts, list) or not 2 <= len(texts) <= MOST_RESPONSES:
        raise InputError(f'{where}: "text" is {json.dumps(texts)[:60]}; expected a list of two or more strings, at most {MOST_RESPONSES}')
    return [_text(t, f'{where}: "text"[{i}]') for i, t in enumerate(texts)]


def _scored_pairs(record, where):
    texts, scores = texts_of(record, where), record.get("score")
    if not isinstance(scores, list) or len(scores) != len(texts) or \
            not all(type(s) in (int, float) and abs(s) < 1e300 for s in scores):
        found = "is missing" if "score" not in record else f"is {json.dumps(scores)[:60]}"
        raise InputError(f'{where}: "score" {found}; expected a list of {len(texts)} numbers, one a text')
    cut = prompt_end(texts)
    k = range(len(texts))
    pairs = [Pair(texts[0][:cut], texts[i][cut:], texts[j][cut:]) for i in k for j in k if scores[i] > scores[j]]
    return pairs, sum(scores[i] == scores[j] for i in k for j in k if i < j)


def prompt_end(texts: Sequence[str]) -> int:
    """Where the shared prompt of whole dialogues ends: after the last assistant mark inside their common beginning.

    Without such a mark the whole texts are responses. (Sharing of tokens is found later, from the tokens.)

    >>> prompt_end(["\\n\\nHuman: hi\\n\\nAssistant: yes", "\\n\\nHuman: hi\\n\\nAssistant: yo"])
    23
    """
    common = os.path.commonprefix(list(texts))
    return max((common.rfind(mark) + len(mark) for mark in ASSISTANT if mark in common), default=0)


# ---- tokens ----------------------------------------------------------------------------------------------------------

def load_source(name: str, path: str, tokenizer: Tokenizer, max_length: int, truncate: str = "each") -> Source:
    """Read, check and tokenise a file of pairs; truncate: "each" or "together". Raises InputError if no usable pair is left."""
    source, waiting, records = Source(name), [], 0
    for where, record in read_records(path):
        records += 1
        pairs, ties = record_pairs(record, where, tokenizer)
        source.label_ties += ties
        for pair in pairs:
            refuse_doubled_bos(pair.prompt + pair.chosen, pair.rendered, where, tokenizer)
        waiting += pairs
        if len(waiting) >= CHUNK:
            _tokenise(source, waiting, tokenizer, max_length, truncate)
            waiting = []
    _tokenise(source, waiting, tokenizer, max_length, truncate)
    if not source.pairs:
        why = "is empty" if not records else (f"has no usable pair: of {records} records, {source.label_ties} label ties, "
                                              f"{source.identical} identical and {source.dropped} dropped pairs")
        raise InputError(f"{path}: {why}; source {name!r} needs at least one pair")
    return source


def _tokenise(source, waiting, tokenizer, max_length, truncate):
    texts = [p.prompt + response for p in waiting for response in (p.chosen, p.rejected)]
    ids, cut = encode(texts, tokenizer, max_length, [p.rendered for p in waiting for _ in range(2)], truncate == "together")
    for i, pair in enumerate(waiting):
        chosen, rejected = ids[2 * i], ids[2 * i + 1]
        if not len(chosen) or not len(rejected):
            source.dropped += 1
        elif np.array_equal(chosen, rejected):
            source.identical += 1
        else:
            source.truncated += cut[2 * i] or cut[2 * i + 1]
            source.blank += pair.is_blank
            source.pairs.append(TokenPair(chosen, rejected, shared_length(chosen, rejected),
                                          len(pair.chosen) - len(pair.rejected)))


def refuse_doubled_bos(text: str, rendered: bool, where: str, tokenizer: Tokenizer):
    """A text that already begins with the BOS that the tokenizer adds would be read as it never was in training."""
    if not rendered and tokenizer.is_doubled(text):
        raise InputError(f"{where}: the text begins with {tokenizer.bos_text!r}, which the tokenizer adds itself; remove it")


def encode(texts: list[str], tokenizer: Tokenizer, max_length: int, rendered: list[bool] | None = None,
           together: bool = False) -> tuple[list[np.ndarray], list[bool]]:
    """Ids of each text, cut on the left to max_length tokens, BOS kept; and which texts were cut.

    rendered: which texts were written by the chat template; by default none. together: texts come two by two, and both of a pair
    lose as many tokens as the longer one must (the shorter keeps one), so that what they share stays aligned. Differs from the
    authors' code, whose left truncation drops the BOS.
    """
    bos = len(tokenizer.bos)
    if max_length <= bos:
        raise InputError(f"--max-length {max_length}: expected more than the {bos} tokens that begin every text")
    rendered = rendered or [False] * len(texts)
    read = {flag: iter(tokenizer.encode([t for t, r in zip(texts, rendered) if r == flag], flag)) for flag in (False, True)}
    encoded = [next(read[flag]) for flag in rendered]
    excess = [max(0, len(t) - max_length) for t in encoded]
    if together:
        excess = [min(max(excess[i & ~1], excess[i | 1]), max(0, len(t) - bos - 1)) for i, t in enumerate(encoded)]
    return [np.array(t[:bos] + t[bos + e:], dtype=np.int32) for t, e in zip(encoded, excess)], [e > 0 for e in excess]


def shared_length(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the longest common prefix of two id lists that leaves each at least one token of its own."""
    most = min(len(a), len(b)) - 1
    different = np.flatnonzero(a[:most] != b[:most])
    return int(different[0]) if len(different) else most


# ---- batches ---------------------------------------------------------------------------------------------------------

def pack_pairs(pairs: Sequence[TokenPair], source: Sequence[int] | None = None, share: bool = True) -> PairBatch:
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
        size = sum(tokens[first:first + unit])
        if filled and filled + size > budget:
            ranges.append(range(start, first))
            start, filled = first, 0
        filled += size
    return ranges + [range(start, len(tokens))]


def epoch_steps(sizes: Sequence[int], sampling: str, per_source: int | None, batch_size: int, seed: int,
                epoch: int) -> list[np.ndarray]:
    """The pairs of every optimizer step of one epoch: a list of (B, 2) arrays of (source, index in the source).

    `equal`: per_source pairs of every source (by default all pooled pairs / K; a smaller source is repeated, a larger one
    sampled), B / K of each source in every step, one of each in turn. `proportional`: a random mix of everything, each
    source resampled first if per_source is given. A pure function of its arguments, so a resumed run continues in place.
    """
    K = len(sizes)
    each = [per_source or max(1, sum(sizes) // K)] * K if sampling == "equal" or per_source else list(sizes)
    orders = []
    for k, (size, count) in enumerate(zip(sizes, each)):
        random = np.random.default_rng([seed, epoch, k])
        rounds = [random.permutation(size) for _ in range(-(-count // size))]
        orders.append(np.stack([np.full(count, k), np.concatenate(rounds)[:count]], 1))              # (count, 2)
    if sampling == "equal":
        pool = np.stack(orders, 1).reshape(-1, 2)                                                    # one of each in turn
    else:
        pool = np.concatenate(orders)[np.random.default_rng([seed, epoch, K]).permutation(sum(each))]
    return [pool[start:start + batch_size] for start in range(0, len(pool), batch_size)]
