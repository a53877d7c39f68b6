"""Responses as a policy learns them: prompt and responses as token ids, each with its end.

Files of preference pairs, of samples, of conversations are read; data/forms.py says what a record
looks like. The loss of a response is the sum of the losses of its tokens (language.py).
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from ..data.forms import (
    Named,
    Pair,
    record_pairs,
    whole_conversation,
)
from ..data.messages import Messages, is_conversation, messages_of
from ..data.pairs import CHARACTERS_AT_ONCE, refuse_doubled_bos
from ..data.prompt_keys import refuse_unread_system, with_prompt
from ..data.records import Record, read_records
from ..data.values import MOST_RESPONSES, shown, string_of
from ..model.checkpoint import Checkpoint
from ..model.tokenizer import Tokenizer
from ..options import InputError, require
from .language import Responses

WHICH = ("chosen", "all")  # of a pair, the responses that are learned
ENCODED_AT_ONCE = 512  # records
PROBE = "\ue000"  # nobody writes it; it shows what a chat template puts behind a response


class ResponseTexts(NamedTuple):
    """A prompt and responses to it as texts, joined with nothing between.

    is_rendered: the texts were written by a chat template. ends: of each response, whether it ended
    by itself, so that its end is learned, too. blank: of each, whether it says nothing visible.
    """

    prompt: str
    responses: list[str]
    is_rendered: bool
    ends: list[bool]
    blank: list[bool]

    @property
    def characters(self) -> int:
        """Of all texts that are encoded: the prompt stands in front of each."""
        return len(self.prompt) * (1 + len(self.responses)) + sum(map(len, self.responses))


@dataclass
class ResponseFile:
    """The responses of a file as token ids, and counts of what was cut or left out.

    items: each prompt with its responses. truncated: how many of them were cut. blank: responses
    left out because they have no visible character. dropped: those left out because they, or their
    prompt, have no token of their own. ties: records that prefer no response to another, so that
    there is none to learn.
    """

    path: str
    items: list[Responses] = field(default_factory=list)
    truncated: int = 0
    blank: int = 0
    dropped: int = 0
    ties: int = 0

    def line(self) -> str:
        """One line for the log."""
        responses = sum(len(item.responses) for item in self.items)
        tokens = sum(len(response) for item in self.items for response in item.responses)
        line = (
            f"{self.path}: {responses} responses to {len(self.items)} prompts,"
            f" {tokens / responses:.0f} mean tokens, {self.truncated} truncated,"
            f" {self.blank} blank and {self.dropped} without a token left out"
        )
        return line + (f"; {self.ties} records prefer no response" if self.ties else "")

    def digest(self) -> str:
        """That of its items; see `digest_of`."""
        return digest_of(self.items)


def digest_of(items: Iterable[Responses]) -> str:
    """SHA-256 over the ids, in order: items of equal digest are the same training data."""
    digest = hashlib.sha256()
    for prompt, responses in items:
        lengths = [len(prompt), *map(len, responses)]
        ids = chain(prompt, *responses)
        digest.update(np.array([len(lengths), *lengths, *ids]).tobytes())
    return digest.hexdigest()


# ---- from a file to ids --------------------------------------------------------------------------


def read_responses(
    path: str, checkpoint: Checkpoint, max_length: int, which: str = "chosen", chat: bool = False
) -> ResponseFile:
    """The responses of a file as ids; those that ended by themselves have the model's EOS behind.

    which: of WHICH. max_length: tokens of prompt and response; a prompt is cut on the left, and a
    response that is longer than all of it on the right. Raises InputError for a line that cannot be
    read, or if nothing usable is left.
    """
    tokenizer, eos = checkpoint.tokenizer, eos_of(checkpoint)
    require_length(max_length, tokenizer)
    file = ResponseFile(path)
    for portion in in_portions(_texts_of_file(file, tokenizer, which, chat)):
        _add_as_ids(file, portion, tokenizer, eos, max_length)
    if not file.items:
        raise InputError(
            f"{path}: has no usable response ({file.blank} blank, {file.dropped} without a token,"
            f" {file.ties} records that prefer none); expected at least one"
        )
    return file


def require_length(max_length: int, tokenizer: Tokenizer) -> None:
    """Refuse a length that has no room for any response (InputError)."""
    shortest = len(tokenizer.bos) + 2
    require(
        max_length >= shortest,
        f"--max-length {max_length}: expected at least {shortest}, for what begins every text and a"
        " token each of prompt and response",
    )


def _texts_of_file(
    file: ResponseFile, tokenizer: Tokenizer, which: str, chat: bool
) -> Iterator[ResponseTexts]:
    """What is learned of every record; records without a preference are counted."""
    for where, record in read_records(file.path):
        of_record = texts_to_learn(record, where, tokenizer, which, chat)
        file.ties += not of_record
        for texts in of_record:
            for response in texts.responses:
                whole = texts.prompt + response
                refuse_doubled_bos(whole, texts.is_rendered, where, tokenizer)
            yield texts


def in_portions(all_texts: Iterable[ResponseTexts]) -> Iterator[list[ResponseTexts]]:
    """Texts in lists that can be encoded at once: not too many, and not too many characters."""
    portion: list[ResponseTexts] = []
    characters = 0
    for texts in all_texts:
        portion.append(texts)
        characters += texts.characters
        if len(portion) >= ENCODED_AT_ONCE or characters >= CHARACTERS_AT_ONCE:
            yield portion
            portion, characters = [], 0
    if portion:
        yield portion


def eos_of(checkpoint: Checkpoint) -> int | None:
    """The id that ends what a model writes: the tokenizer's, or the first of config.json.

    None if neither names one that is a row of the embedding.
    """
    named = checkpoint.tokenizer.eos
    if named is not None:
        return named
    stored = checkpoint.json.get("eos_token_id")
    ids = stored if isinstance(stored, list) else [stored]
    rows = range(checkpoint.config.vocabulary)
    return next((id for id in ids if type(id) is int and id in rows), None)


def _add_as_ids(
    file: ResponseFile,
    portion: Sequence[ResponseTexts],
    tokenizer: Tokenizer,
    eos: int | None,
    max_length: int,
) -> None:
    """Add responses to a file as ids, or count why they are left out."""
    for texts, (prompt, *wholes) in zip(portion, encoded(portion, tokenizer)):
        visible = [i for i, is_blank in enumerate(texts.blank) if not is_blank]
        file.blank += len(texts.responses) - len(visible)
        if not visible:
            continue
        item, was_cut = cut_to_length(
            prompt,
            [wholes[i] for i in visible],
            [eos if texts.ends[i] else None for i in visible],
            len(tokenizer.bos),
            max_length,
        )
        if item is None:
            file.dropped += len(visible)
        else:
            file.items.append(item)
            file.truncated += was_cut


def encoded(all_texts: Sequence[ResponseTexts], tokenizer: Tokenizer) -> list[list[list[int]]]:
    """The ids of each prompt alone, and behind them the ids of prompt and response, for each one.

    Texts that a template wrote are encoded apart from others: the markers in them are tokens.
    """
    ids: list[list[list[int]]] = [[] for _ in all_texts]
    for is_rendered in (False, True):
        strings, owners = [], []
        for i, texts in enumerate(all_texts):
            if texts.is_rendered == is_rendered:
                strings += [
                    texts.prompt,
                    *(texts.prompt + response for response in texts.responses),
                ]
                owners += [i] * (1 + len(texts.responses))
        for i, string_ids in zip(owners, tokenizer.encode(strings, is_rendered)):
            ids[i].append(string_ids)
    return ids


def cut_to_length(
    prompt: list[int],
    wholes: Sequence[list[int]],
    ends: Sequence[int | None],
    bos: int,
    max_length: int,
) -> tuple[Responses | None, bool]:
    """A prompt and its responses, cut to max_length tokens, and whether anything was cut.

    wholes: ids of the prompt with each response; the prompt of the item is what all of them share
    with it. ends: the id that is put behind each response, if it has none. bos: how many ids stand
    in front of every text. None if a response or the prompt has no token of its own.

    >>> cut_to_length([7, 8, 9], [[7, 8, 9, 1], [7, 8, 9, 2, 3]], [0, None], 0, 4)
    (Responses(prompt=[8, 9], responses=[[1, 0], [2, 3]]), True)
    """
    shared = min(_common_length(prompt, whole) for whole in wholes)
    bos = min(bos, shared)
    most = max_length - bos - 1  # tokens of a response, behind BOS and a token of the prompt
    if most < 1 or not shared or any(len(whole) <= shared for whole in wholes):
        return None, False
    responses = [with_end(whole[shared:], end) for whole, end in zip(wholes, ends)]
    cut_responses = [response[:most] for response in responses]
    own_prompt = prompt[bos:shared]  # without BOS, which is never cut away
    room = max_length - bos - max(map(len, cut_responses))
    was_cut = cut_responses != responses or len(own_prompt) > room
    return Responses(prompt[:bos] + own_prompt[-room:], cut_responses), was_cut


def with_end(response: list[int], end: int | None) -> list[int]:
    """A response with the id of its end behind it, unless it has it: a template may write it.

    What stands there may be "<|end|>\\n", so the last two ids are looked at.

    >>> with_end([5, 6], 2), with_end([5, 2, 9], 2), with_end([5, 6], None)
    ([5, 6, 2], [5, 2, 9], [5, 6])
    """
    return response if end is None or end in response[-2:] else [*response, end]


def _common_length(a: list[int], b: list[int]) -> int:
    """How many ids two texts share at their beginning."""
    different = [i for i, (x, y) in enumerate(zip(a, b)) if x != y]
    return different[0] if different else min(len(a), len(b))


# ---- from a record to texts ----------------------------------------------------------------------


def texts_to_learn(
    record: Record, where: str, tokenizer: Tokenizer, which: str = "chosen", chat: bool = False
) -> list[ResponseTexts]:
    """The prompts of a record, mostly one, each with the responses to it that are to be learned.

    Of pairs these are the chosen ones, which no other response beats, or all; a label tie has none.
    Of samples it is every response. Of messages it is the last one, which is the assistant's.
    """
    others = {"prompt", "chosen", "rejected", "response", "responses"}  # beside them it is a prompt
    if is_conversation(record.get("messages")) and not others & set(record):
        refuse_unread_system(record, where, "messages")
        messages = messages_of(record["messages"], f'{where}: "messages"', tokenizer, "user")
        require(
            len(messages) > 1 and messages[-1]["role"] == "assistant",
            f'{where}: "messages" does not end with an answer of the assistant; expected one',
        )
        return [_rendered([messages], [True], where, tokenizer)]
    has_scores = "scores" in record or "score" in record
    is_sample = "response" in record or ("responses" in record and not has_scores)
    if "chosen" not in record and is_sample:
        return [_sampled(with_prompt(record, where, chat), where, tokenizer, chat)]
    _refuse_unread_finished(record, where)
    pairs, _ = record_pairs(record, where, tokenizer, chat)
    for pair in pairs:
        require_split(pair, where)
    return _of_pairs(pairs, which)


def _refuse_unread_finished(record: Record, where: str) -> None:
    """Refuse "finished" beside "scores" if it says that a response was cut (InputError)."""
    finished = record.get("finished")
    was_cut = finished is False or (isinstance(finished, list) and False in finished)
    require(
        not was_cut or "responses" not in record,
        f'{where}: "finished" is not read beside "scores"; select the responses to learn, or remove'
        " it",
    )


def require_split(pair: Pair, where: str) -> None:
    """Refuse a pair of which it cannot be told where the prompt ends (InputError)."""
    require(
        pair.is_split,
        f"{where}: the chat template writes the prompt otherwise when a response follows it, so"
        " that it cannot be told where a response begins; give strings instead of messages",
    )


def _of_pairs(pairs: Sequence[Pair], which: str) -> list[ResponseTexts]:
    """The chosen or all responses of the pairs of a record, each once."""
    rejected = {(pair.prompt, pair.rejected) for pair in pairs}
    to_learn: dict[str, dict[str, bool]] = {}  # of every prompt: response -> whether it is blank
    for pair in pairs:
        responses = to_learn.setdefault(pair.prompt, {})
        sides = list(zip((pair.chosen, pair.rejected), pair.blank))
        if which == "all":
            responses.update(sides)
        elif (pair.prompt, pair.chosen) not in rejected:
            responses.update(sides[:1])
    texts = []
    for prompt, is_blank in to_learn.items():
        if is_blank:
            ends, blank = [True] * len(is_blank), list(is_blank.values())
            texts.append(ResponseTexts(prompt, list(is_blank), pairs[0].rendered, ends, blank))
    return texts


def _sampled(record: Record, where: str, tokenizer: Tokenizer, chat: bool) -> ResponseTexts:
    """What a policy wrote: one response, or several."""
    require("prompt" in record, f'{where}: "prompt" is missing; found keys: {", ".join(record)}')
    prompt, responses = record["prompt"], _responses_with_names(record, where)
    ends = _ends(record, len(responses), where)
    if chat or any(map(is_conversation, [prompt, *(value for _, value in responses)])):
        turns = messages_of(prompt, f'{where}: "prompt"', tokenizer, "user")
        wholes = [
            whole_conversation(turns, messages_of(value, name, tokenizer, "assistant"), where)
            for name, value in responses
        ]
        return _rendered(wholes, ends, where, tokenizer)
    texts = [string_of(value, name, "a string, or messages") for name, value in responses]
    blank = [not text.strip() for text in texts]
    return ResponseTexts(string_of(prompt, f'{where}: "prompt"'), texts, False, ends, blank)


def _responses_with_names(record: Record, where: str) -> list[Named]:
    """The responses of a sample, or the only one, each with what an error calls it."""
    if "responses" not in record:
        return [Named(f'{where}: "response"', record["response"])]
    responses = record["responses"]
    require(
        isinstance(responses, list) and 1 <= len(responses) <= MOST_RESPONSES,
        f'{where}: "responses" is {shown(responses)}; expected a list of responses,'
        f" at most {MOST_RESPONSES}",
    )
    return [Named(f'{where}: "responses"[{i}]', value) for i, value in enumerate(responses)]


def _ends(record: Record, count: int, where: str) -> list[bool]:
    """Whether each of so many responses ended by itself: all of them, if "finished" is missing."""
    finished: Any = record.get("finished", True)
    ends = finished if isinstance(finished, list) else [finished] * count
    require(
        len(ends) == count and all(type(end) is bool for end in ends),
        f'{where}: "finished" is not true or false for each response; expected that, or no such'
        " key",
    )
    return ends


def _rendered(
    conversations: Sequence[Messages], ends: list[bool], where: str, tokenizer: Tokenizer
) -> ResponseTexts:
    """Conversations with one prompt as texts, by the chat template; the last turns are learned."""
    prompt = conversations[0][:-1]
    require(
        all(messages[-1]["role"] == "assistant" for messages in conversations),
        f"{where}: a conversation does not end with an answer of the assistant; expected one",
    )
    require(
        all(messages[:-1] == prompt for messages in conversations),
        f"{where}: the responses are conversations with different prompts; expected one prompt",
    )
    beginning = tokenizer.render(prompt, prompt=True)
    texts = [
        tokenizer.render(messages) if ends_itself else _without_its_end(messages, tokenizer)
        for messages, ends_itself in zip(conversations, ends)
    ]
    require(
        all(text.startswith(beginning) for text in texts),
        f"{where}: the chat template writes the prompt otherwise when a response follows it, so"
        " that it cannot be told which tokens to learn; give strings instead of messages",
    )
    rests = [text[len(beginning) :] for text in texts]
    blank = [not messages[-1]["content"].strip() for messages in conversations]
    return ResponseTexts(beginning, rests, tokenizer.template is not None, ends, blank)


def _without_its_end(messages: Messages, tokenizer: Tokenizer) -> str:
    """A conversation as text that ends with what its last message says.

    What a template writes behind that, such as <|im_end|>, was not written by a response that was
    cut. It is what stands behind a character that is put at the end of the message.
    """
    last = messages[-1]
    probed = [*messages[:-1], {**last, "content": last["content"] + PROBE}]
    _, _, behind = tokenizer.render(probed).rpartition(PROBE)
    return tokenizer.render(messages).removesuffix(behind)
