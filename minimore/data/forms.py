"""Forms: what a record of preferences looks like, and the texts and pairs that come of it.

A record is one of

    {"prompt": ..., "chosen": ..., "rejected": ...}
    {"chosen": ..., "rejected": ...}        whole dialogues; their prompt is what they share up to
                                            the last assistant mark, as in Anthropic HH
    {"prompt": ..., "responses": [...], "scores": [...]}
    {"text": [...], "score": [...]}         k responses with scores: every ordered pair of unequal
                                            scores

`prompt`, `chosen` and `rejected` may be strings or messages (messages.py). `chosen` and `rejected`
may be lists of several responses, which make all their pairs. prompt_keys.py finds a prompt under
another name, and labels.py says what annotators say of a pair besides. Other keys are tolerated.
Every error names the file, the line and what was found there.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

from ..model.tokenizer import Tokenizer
from ..options import InputError, require
from .dialogues import prompt_end
from .labels import AS_WRITTEN, ONE_VOTE, Label, LabelRules, read_label, refuse_votes
from .messages import PLAIN_TURNS, Messages, is_conversation, is_response, messages_of
from .prompt_keys import with_prompt
from .records import Record
from .values import MOST_RESPONSES, is_score, shown, string_of, value_of

MOST_CHARACTERS = 100_000_000  # of all pairs of one record; a long prompt counts in each of them

Places = list[tuple[int, int]]  # of two responses each


class Pair(NamedTuple):
    """One preference as texts; the model reads prompt + response, joined with nothing between.

    rendered: the texts were written by a chat template, so the markers in them are special tokens.
    said: what each response says where a template writes more than that. is_split: the prompt ends
    where the responses begin; it does not if a template writes it otherwise in front of them.
    label: what annotators say of it. is_turned: most prefer the response that the record rejects,
    so it stands here as the chosen one.
    """

    prompt: str
    chosen: str
    rejected: str
    rendered: bool = False
    said: tuple[str, str] | None = None
    is_split: bool = True
    label: Label = ONE_VOTE
    is_turned: bool = False

    def turned(self) -> "Pair":
        """The same pair with the other response as the chosen one; its label stays."""
        return self._replace(
            chosen=self.rejected,
            rejected=self.chosen,
            said=self.said[::-1] if self.said else None,
            is_turned=not self.is_turned,
        )

    @property
    def blank(self) -> tuple[bool, bool]:
        """Of each response, whether it has no visible character."""
        chosen, rejected = self.said or (self.chosen, self.rejected)
        return not chosen.strip(), not rejected.strip()

    @property
    def is_blank(self) -> bool:
        """Whether a response has no visible character."""
        return any(self.blank)


class Named(NamedTuple):
    """A value of a record, and what an error calls it."""

    where: str
    value: Any


# ---- texts ---------------------------------------------------------------------------------------


def texts_of(record: Record, where: str) -> list[str]:
    """record["text"]: two or more whole texts."""
    texts = record["text"]
    if not isinstance(texts, list) or not 2 <= len(texts) <= MOST_RESPONSES:
        raise InputError(
            f'{where}: "text" is {shown(texts)}; expected a list of two or more strings,'
            f" at most {MOST_RESPONSES}"
        )
    return [string_of(text, f'{where}: "text"[{i}]') for i, text in enumerate(texts)]


# ---- pairs of a record ---------------------------------------------------------------------------


def record_pairs(
    record: Record,
    where: str,
    tokenizer: Tokenizer = PLAIN_TURNS,
    chat: bool = False,
    rules: LabelRules = AS_WRITTEN,
) -> tuple[list[Pair], int]:
    """The pairs of one line, and how many label ties it has that are left out.

    A label tie is a pair with equal scores, or under votes="majority" with as many votes for each
    side. tokenizer: whose chat template writes messages. chat: prompts and responses that are
    strings are messages, too. Raises InputError for a record of no known form.
    """
    if "text" in record and "chosen" not in record:  # beside "chosen" it is a key like any other
        return _scored_texts(record, where, rules)
    if "responses" in record and "chosen" not in record:
        return _scored_responses(record, where, tokenizer, chat, rules)
    record = with_prompt(record, where, chat)
    chosen, rejected = (_responses(record, key, where) for key in ("chosen", "rejected"))
    prompt = Named(f'{where}: "prompt"', record["prompt"]) if "prompt" in record else None
    values = [named.value for named in (*chosen, *rejected)]
    are_messages = any(map(is_conversation, [record.get("prompt"), *values]))

    def all_pairs() -> Iterator[Pair]:
        for one, other in product(chosen, rejected):
            if chat or are_messages:
                yield _conversation_pair(prompt, one, other, where, tokenizer)
            else:
                yield _text_pair(prompt, one, other)

    pairs = _not_too_many(all_pairs(), where)
    if len(pairs) > 1:
        refuse_votes(record, where, rules)
    return _labelled(pairs, read_label(record, where, rules), rules)


def _not_too_many(pairs: Iterable[Pair], where: str) -> list[Pair]:
    """The pairs of a record. Raises InputError as soon as they have more than MOST_CHARACTERS."""
    characters, result = 0, []
    for pair in pairs:
        characters += sum(map(len, pair[:3]))
        require(
            characters <= MOST_CHARACTERS,
            f"{where}: makes pairs of more than {MOST_CHARACTERS / 1e6:.0f} million characters;"
            " expected fewer responses, or shorter ones",
        )
        result.append(pair)
    return result


def _labelled(pairs: list[Pair], label: Label, rules: LabelRules) -> tuple[list[Pair], int]:
    """The pairs with their label, and how many label ties are left out.

    The response with more votes becomes the chosen one. Of evenly split votes neither should be
    ahead, so there is no margin.
    """
    if label.share < 1 / 2:
        pairs, label = [pair.turned() for pair in pairs], label._replace(share=1 - label.share)
    is_even = label.share == 1 / 2
    if is_even:
        label = label._replace(margin=0.0)
    if rules.votes == "majority":
        if is_even and rules.ties == "out":
            return [], len(pairs)
        label = label._replace(share=1 / 2 if is_even else 1.0, votes=1.0)
    if label == ONE_VOTE:
        return pairs, 0
    return [pair._replace(label=label) for pair in pairs], 0


def _responses(record: Record, key: str, where: str) -> list[Named]:
    """The responses under a key, of which each is a string or a conversation."""
    value = value_of(record, key, where)
    are_several = isinstance(value, list) and bool(value) and not isinstance(value[0], dict)
    if not are_several:
        return [Named(f'{where}: "{key}"', value)]
    require(
        len(value) <= MOST_RESPONSES,
        f'{where}: "{key}" holds {len(value)} responses; expected at most {MOST_RESPONSES}',
    )
    return [Named(f'{where}: "{key}"[{i}]', response) for i, response in enumerate(value)]


def _text_pair(prompt: Named | None, chosen_value: Named, rejected_value: Named) -> Pair:
    """A pair of strings: two responses to a prompt, or whole dialogues."""
    chosen, rejected = (
        string_of(named.value, named.where, "a string, or messages")
        for named in (chosen_value, rejected_value)
    )
    if prompt is not None:
        return Pair(string_of(prompt.value, prompt.where), chosen, rejected)
    end = prompt_end([chosen, rejected])  # whole dialogues begin with their prompt
    return Pair(chosen[:end], chosen[end:], rejected[end:])


# ---- responses with scores -----------------------------------------------------------------------


def _scored_texts(record: Record, where: str, rules: LabelRules) -> tuple[list[Pair], int]:
    """Every ordered pair of unequal scores; pairs of equal scores are label ties."""
    texts = texts_of(record, where)
    ordered, tied = _ordered(_scores(record, "score", len(texts), where))
    end = prompt_end(texts)
    prompt, responses = texts[0][:end], [text[end:] for text in texts]

    def pair_of(i: int, j: int) -> list[Pair]:
        """Text i as the chosen one, text j as the rejected one."""
        return [Pair(prompt, responses[i], responses[j])]

    return _scored_pairs(pair_of, ordered, tied, record, where, rules)


def _scored_pairs(
    pair_of: Callable[[int, int], list[Pair]],
    ordered: Places,
    tied: Places,
    record: Record,
    where: str,
    rules: LabelRules,
) -> tuple[list[Pair], int]:
    """The pairs of ordered places, and how many label ties are left out.

    pair_of: makes the pair of two places. tied: the places of label ties, each of which makes a
    pair with the share 1/2 under ties="half". What the record says of margin and weight is said of
    all its pairs.
    """
    refuse_votes(record, where, rules)
    label = read_label(record, where, rules)
    half = label._replace(share=1 / 2)

    def all_pairs() -> Iterator[Pair]:
        for i, j in ordered:
            yield from _labelled(pair_of(i, j), label, rules)[0]
        for i, j in tied if rules.ties == "half" else ():
            yield from _labelled(pair_of(i, j), half, rules)[0]

    return _not_too_many(all_pairs(), where), len(tied) if rules.ties == "out" else 0


def _scored_responses(
    record: Record, where: str, tokenizer: Tokenizer, chat: bool, rules: LabelRules
) -> tuple[list[Pair], int]:
    """The pairs of several responses to one prompt that have unequal scores.

    Returns also how many label ties are left out, as `_scored_pairs` does.
    """
    responses = record["responses"]
    if not isinstance(responses, list) or not 2 <= len(responses) <= MOST_RESPONSES:
        raise InputError(
            f'{where}: "responses" is {shown(responses)}; expected a list of two or more'
            f" responses, at most {MOST_RESPONSES}"
        )
    record = with_prompt(record, where, chat)
    require("prompt" in record, f'{where}: "responses" without "prompt"; expected both')
    ordered, tied = _ordered(_scores(record, "scores", len(responses), where))

    def pair_of(i: int, j: int) -> list[Pair]:
        """Response i as the chosen one, response j as the rejected one."""
        single = record | {"chosen": responses[i], "rejected": responses[j]}
        pairs, _ = record_pairs(single, where, tokenizer, chat)
        return pairs

    return _scored_pairs(pair_of, ordered, tied, record, where, rules)


def _scores(record: Record, key: str, count: int, where: str) -> list[float]:
    """As many numbers as there are responses."""
    scores = record.get(key)
    if not isinstance(scores, list) or len(scores) != count or not all(map(is_score, scores)):
        what = f"is {shown(scores)}" if key in record else "is missing"
        raise InputError(
            f'{where}: "{key}" {what}; expected a list of {count} numbers, one a response'
        )
    return scores


def _ordered(scores: Sequence[float]) -> tuple[Places, Places]:
    """All (i, j) of which i has the higher score, and all with i < j of equal scores."""
    places = range(len(scores))
    ordered = [(i, j) for i in places for j in places if scores[i] > scores[j]]
    tied = [(i, j) for i in places for j in places if i < j and scores[i] == scores[j]]
    return ordered, tied


# ---- conversations -------------------------------------------------------------------------------


def _conversation_pair(
    prompt: Named | None,
    chosen_value: Named,
    rejected_value: Named,
    where: str,
    tokenizer: Tokenizer,
) -> Pair:
    """A pair as conversations; a string among the three becomes a single message.

    Responses that are conversations with their prompt in them are read as they are, and must agree
    with the prompt where there is one, too.
    """
    chosen = messages_of(chosen_value.value, chosen_value.where, tokenizer, "assistant")
    rejected = messages_of(rejected_value.value, rejected_value.where, tokenizer, "assistant")
    for messages, named in ((chosen, chosen_value), (rejected, rejected_value)):
        _refuse_several_messages(messages, named.where)
    are_responses = is_response(chosen) and is_response(rejected)
    end = _shared_turns(chosen, rejected)  # of the prompt
    if prompt is None:
        require(
            are_responses or end > 0,
            f'{where}: "chosen" and "rejected" do not begin with the same turn; expected two'
            " answers to the same prompt",
        )
    else:
        asked = _prompt_messages(prompt, tokenizer)
        if are_responses:
            return _render(asked, chosen, rejected, tokenizer)
        ends = [_beginning(asked, chosen), _beginning(asked, rejected)]
        require(
            None not in ends,
            f'{where}: "chosen" and "rejected" are conversations that do not both begin with'
            ' "prompt"; expected responses alone, or conversations that begin with it',
        )
        end = min(end, *(turns for turns in ends if turns is not None))
    return _render(chosen[:end], chosen[end:], rejected[end:], tokenizer)


def _refuse_several_messages(messages: Messages, where: str) -> None:
    """Refuse a response of several messages: nobody can tell whether it is one or several."""
    are_several = len(messages) > 1 and all(m["role"] == "assistant" for m in messages)
    require(
        not are_several,
        f"{where}: {len(messages)} messages of the assistant; expected one response, or"
        " several as a list of strings or of lists",
    )


def _prompt_messages(prompt: Named, tokenizer: Tokenizer) -> Messages:
    """A prompt as messages, of which the last asks for an answer."""
    messages = messages_of(prompt.value, prompt.where, tokenizer, "user")
    require(
        messages[-1]["role"] != "assistant",
        f"{prompt.where}: ends with a turn of the assistant; expected the turn before it",
    )
    return messages


def whole_conversation(prompt: Messages, response: Messages, where: str) -> Messages:
    """A prompt with its response, or a response that is a conversation and begins with the prompt.

    Raises InputError if it begins with another.
    """
    if is_response(response):
        return prompt + response
    require(
        _beginning(prompt, response) is not None,
        f'{where}: the response is a conversation that does not begin with "prompt"; expected the'
        " response alone, or a conversation that begins with it",
    )
    return response


def _beginning(prompt: Messages, conversation: Messages) -> int | None:
    """How many messages of a conversation are its prompt; None if it begins with another.

    A system message may stand in front of it, and white space around a text does not count.
    """
    for start in (0, 1):
        if start == 1 and conversation[0]["role"] != "system":
            continue
        end = start + len(prompt)
        said = [(m["role"], m["content"].strip()) for m in conversation[start:end]]
        if said == [(m["role"], m["content"].strip()) for m in prompt] and end < len(conversation):
            return end
    return None


def _shared_turns(chosen: Messages, rejected: Messages) -> int:
    """How many messages two dialogues share at their beginning; each keeps at least its last."""
    shortest = min(len(chosen), len(rejected))
    for i in range(shortest):
        if chosen[i] != rejected[i]:
            return i
    return shortest - 1


def _render(prompt: Messages, chosen: Messages, rejected: Messages, tokenizer: Tokenizer) -> Pair:
    """Messages as a Pair.

    Where its prompt ends matters little to a reward, since tokens are shared by what they are.
    """
    texts = [tokenizer.render(prompt + response) for response in (chosen, rejected)]
    beginning = tokenizer.render(prompt, prompt=True) if prompt else ""
    is_split = all(text.startswith(beginning) for text in texts)
    end = len(beginning if is_split else os.path.commonprefix(texts))
    said = ["".join(message["content"] for message in side) for side in (chosen, rejected)]
    return Pair(
        prompt=texts[0][:end],
        chosen=texts[0][end:],
        rejected=texts[1][end:],
        rendered=tokenizer.template is not None,
        said=(said[0], said[1]),
        is_split=is_split,
    )
