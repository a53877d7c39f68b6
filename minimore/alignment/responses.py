"""Responses as a policy learns them: prompt and responses as token ids, each with its end.

Files of preference pairs, of samples, of conversations are read; data/forms.py says what a record
looks like. The loss of a response is the sum of the losses of its tokens (language.py).
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ..data.forms import (
    MOST_RESPONSES,
    Pair,
    record_pairs,
    refuse_unread_system,
    whole_conversation,
    with_prompt,
)
from ..data.messages import Messages, is_conversation, messages_of, shown, string_of
from ..data.pairs import CHARACTERS_AT_ONCE, refuse_doubled_bos
from ..data.records import Record, read_records
from ..model.checkpoint import Checkpoint, named_id
from ..model.tokenizer import Tokenizer
from ..options import InputError, require
from .language import Responses

WHICH = ("chosen", "all")  # of a pair, the responses that are learned
ENCODED_AT_ONCE = 512  # records
PROBE = (
    "\ue000"  # a character that nobody uses, to see what a chat template writes behind a response
)


class Answers(NamedTuple):
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
    """The responses of a file as token ids, with counts of what is not used as it came.

    truncated: a text was cut. blank: a response has no visible character. dropped: a prompt or a
    response has no token of its own. Blank and dropped responses are left out. ties: a record of
    which no response is preferred to another, so that there is none to learn.
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
        """sha256 over the ids, in order: the same digest, the same training data."""
        digest = hashlib.sha256()
        for prompt, responses in self.items:
            lengths = [len(prompt), *map(len, responses)]
            ids = [id for ids in (prompt, *responses) for id in ids]
            digest.update(np.array([len(lengths), *lengths, *ids]).tobytes())
        return digest.hexdigest()


# ---- from a file to ids --------------------------------------------------------------------------


def read_responses(
    path: str, checkpoint: Checkpoint, max_length: int, which: str = "chosen", chat: bool = False
) -> ResponseFile:
    """The responses of a file as ids; each that ended by itself has the model's EOS at its end.

    which: of WHICH. max_length: tokens of prompt and response; a prompt is cut on the left, and a
    response that is longer than all of it on the right. Raises InputError for a line that cannot be
    read, or if nothing usable is left.
    """
    tokenizer, eos = checkpoint.tokenizer, eos_of(checkpoint)
    require_length(max_length, tokenizer)
    file = ResponseFile(path)
    for waiting in in_portions(_answers_of_file(file, tokenizer, which, chat)):
        _encode(file, waiting, tokenizer, eos, max_length)
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


def _answers_of_file(
    file: ResponseFile, tokenizer: Tokenizer, which: str, chat: bool
) -> Iterator[Answers]:
    """What is learned of every record; records without a preference are counted."""
    for where, record in read_records(file.path):
        of_record = answers_of(record, where, tokenizer, which, chat)
        file.ties += not of_record
        for answers in of_record:
            for response in answers.responses:
                text = answers.prompt + response
                refuse_doubled_bos(text, answers.is_rendered, where, tokenizer)
            yield answers


def in_portions(answers: Iterable[Answers]) -> Iterator[list[Answers]]:
    """Answers in lists that can be encoded at once: not too many, and not too many characters."""
    waiting: list[Answers] = []
    characters = 0
    for one in answers:
        waiting.append(one)
        characters += one.characters
        if len(waiting) >= ENCODED_AT_ONCE or characters >= CHARACTERS_AT_ONCE:
            yield waiting
            waiting, characters = [], 0
    if waiting:
        yield waiting


def eos_of(checkpoint: Checkpoint) -> int | None:
    """The id that ends what a model writes: the tokenizer's, or the first of config.json.

    None if neither names one that is a row of the embedding.
    """
    named = named_id(checkpoint.tokenizer, "eos_token")
    if named is not None:
        return named
    stored = checkpoint.json.get("eos_token_id")
    ids = stored if isinstance(stored, list) else [stored]
    rows = range(checkpoint.config.vocabulary)
    return next((id for id in ids if type(id) is int and id in rows), None)


def _encode(
    file: ResponseFile,
    waiting: Sequence[Answers],
    tokenizer: Tokenizer,
    eos: int | None,
    max_length: int,
) -> None:
    """Add answers to a file as ids, or count why they are not added."""
    for answers, ids in zip(waiting, encoded(waiting, tokenizer)):
        file.blank += answers.blank.count(True)
        prompt, *texts = ids
        ends = [eos if ends else None for ends in answers.ends]
        places = [i for i, is_blank in enumerate(answers.blank) if not is_blank]
        if not places:
            continue
        own_texts, own_ends = [texts[i] for i in places], [ends[i] for i in places]
        item, was_cut = fitted(prompt, own_texts, own_ends, len(tokenizer.bos), max_length)
        if item is None:
            file.dropped += len(places)
        else:
            file.items.append(item)
            file.truncated += was_cut


def encoded(answers: Sequence[Answers], tokenizer: Tokenizer) -> list[list[list[int]]]:
    """Of all answers the ids of the prompt, and of the prompt with each response."""
    ids: list[list[list[int]]] = [[] for _ in answers]
    for is_rendered in (False, True):
        places = [i for i, one in enumerate(answers) if one.is_rendered == is_rendered]
        texts, owners = [], []
        for i in places:
            prompt, responses = answers[i].prompt, answers[i].responses
            texts += [prompt, *(prompt + response for response in responses)]
            owners += [i] * (1 + len(responses))
        for i, text_ids in zip(owners, tokenizer.encode(texts, is_rendered)):
            ids[i].append(text_ids)
    return ids


def fitted(
    prompt: list[int],
    texts: Sequence[list[int]],
    ends: Sequence[int | None],
    bos: int,
    max_length: int,
) -> tuple[Responses | None, bool]:
    """A prompt and its responses, cut to max_length tokens, and whether anything was cut.

    texts: ids of prompt and response together; the prompt of the item is what all of them share
    with it. ends: the id that is put behind each response, if it has none. bos: how many ids stand
    in front of every text. None if a response or the prompt has no token of its own.

    >>> fitted([7, 8, 9], [[7, 8, 9, 1], [7, 8, 9, 2, 3]], [0, None], 0, 4)
    (Responses(prompt=[8, 9], responses=[[1, 0], [2, 3]]), True)
    """
    common = min(_common_length(prompt, text) for text in texts)
    bos = min(bos, common)
    room = max_length - bos - 1  # for a response, behind a BOS and a token of the prompt
    if room < 1 or not common or any(len(text) <= common for text in texts):
        return None, False
    responses = [text[common:] for text in texts]
    for response, end in zip(responses, ends):
        if end is not None and end not in response[-2:]:  # a template may end "<|end|>\n"
            response.append(end)
    was_cut = any(len(response) > room for response in responses)
    responses = [response[:room] for response in responses]
    own = prompt[bos:common]
    keep = max_length - bos - max(map(len, responses))
    was_cut = was_cut or len(own) > keep
    return Responses(prompt[:bos] + own[-keep:], responses), was_cut


def _common_length(a: list[int], b: list[int]) -> int:
    """How many ids two texts share at their beginning."""
    different = [i for i, (x, y) in enumerate(zip(a, b)) if x != y]
    return different[0] if different else min(len(a), len(b))


# ---- from a record to texts ----------------------------------------------------------------------


def answers_of(
    record: Record, where: str, tokenizer: Tokenizer, which: str = "chosen", chat: bool = False
) -> list[Answers]:
    """The prompt of a record with the responses that are to be learned; none of a label tie.

    Of pairs these are the chosen ones, which no other response beats, or all. Of samples it is
    every response. Of messages it is the last one, which is the assistant's.
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
    finished = record.get("finished")
    is_cut = finished is False or (isinstance(finished, list) and False in finished)
    require(
        not is_cut or "responses" not in record,
        f'{where}: "finished" is not read beside "scores"; select the responses to learn, or remove'
        " it",
    )
    pairs, _ = record_pairs(record, where, tokenizer, chat)
    for pair in pairs:
        require_split(pair, where)
    return _of_pairs(pairs, which)


def require_split(pair: Pair, where: str) -> None:
    """Refuse a pair of which it cannot be told where the prompt ends (InputError)."""
    require(
        pair.is_split,
        f"{where}: the chat template writes the prompt otherwise when a response follows it, so"
        " that it cannot be told where a response begins; give strings instead of messages",
    )


def _of_pairs(pairs: Sequence[Pair], which: str) -> list[Answers]:
    """The chosen or all responses of the pairs of a record, each once."""
    rejected = {(pair.prompt, pair.rejected) for pair in pairs}
    prompts: dict[str, dict[str, bool]] = {}  # of every prompt: response -> whether it is blank
    for pair in pairs:
        responses = prompts.setdefault(pair.prompt, {})
        is_blank, other_is_blank = pair.blank
        if which == "all" or (pair.prompt, pair.chosen) not in rejected:
            responses[pair.chosen] = is_blank
        if which == "all":
            responses[pair.rejected] = other_is_blank
    is_rendered = bool(pairs) and pairs[0].rendered
    return [
        Answers(
            prompt, list(responses), is_rendered, [True] * len(responses), [*responses.values()]
        )
        for prompt, responses in prompts.items()
        if responses
    ]


def _sampled(record: Record, where: str, tokenizer: Tokenizer, chat: bool) -> Answers:
    """What a policy wrote: one response, or several."""
    require("prompt" in record, f'{where}: "prompt" is missing; found keys: {", ".join(record)}')
    are_several = "responses" in record
    responses = record["responses"] if are_several else [record["response"]]
    require(
        isinstance(responses, list) and 1 <= len(responses) <= MOST_RESPONSES,
        f'{where}: "responses" is {shown(responses)}; expected a list of responses,'
        f" at most {MOST_RESPONSES}",
    )
    ends = record.get("finished", True)
    ends = ends if isinstance(ends, list) else [ends] * len(responses)
    require(
        len(ends) == len(responses) and all(type(end) is bool for end in ends),
        f'{where}: "finished" is not true or false for each response; expected that, or no such'
        " key",
    )
    values = [record["prompt"], *responses]
    if chat or any(map(is_conversation, values)):
        prompt = messages_of(values[0], f'{where}: "prompt"', tokenizer, "user")
        answers = [
            messages_of(response, f'{where}: "responses"[{i}]', tokenizer, "assistant")
            for i, response in enumerate(responses)
        ]
        wholes = [whole_conversation(prompt, answer, where) for answer in answers]
        return _rendered(wholes, ends, where, tokenizer)
    texts = [
        string_of(response, f'{where}: "responses"[{i}]', "a string, or messages")
        for i, response in enumerate(responses)
    ]
    blank = [not text.strip() for text in texts]
    return Answers(string_of(values[0], f'{where}: "prompt"'), texts, False, ends, blank)


def _rendered(
    conversations: Sequence[Messages], ends: list[bool], where: str, tokenizer: Tokenizer
) -> Answers:
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
    return Answers(beginning, rests, tokenizer.template is not None, ends, blank)


def _without_its_end(messages: Messages, tokenizer: Tokenizer) -> str:
    """A conversation as text that ends with what its last message says.

    What a template writes behind that, such as <|im_end|>, was not written by a response that was
    cut. It is what stands behind a character that is put at the end of the message.
    """
    last = messages[-1]
    probed = [*messages[:-1], {**last, "content": last["content"] + PROBE}]
    _, _, behind = tokenizer.render(probed).rpartition(PROBE)
    return tokenizer.render(messages).removesuffix(behind)
