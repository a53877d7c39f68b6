"""Rewards of a file: the `score` verb.

read     a record -> its texts: of a pair, of a prompt with a response, or of a list
encode   texts -> token ids, cut to the length with which the model was trained
reward   token ids -> rewards; pairs share their prompt
write    the record with its rewards, in input order
"""

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .calibration import probability
from .checksums import records_written_whole
from .data.dialogues import prompt_end
from .data.foreign.shapes import read_house_records
from .data.forms import (
    MOST_CHARACTERS,
    record_pairs,
    texts_of,
    whole_conversation,
)
from .data.messages import Messages, is_conversation, messages_of
from .data.pairs import CHARACTERS_AT_ONCE, TextRules, encode, refuse_doubled_bos
from .data.prompt_keys import refuse_unread_system, with_prompt
from .data.records import Record, json_line
from .data.values import MOST_RESPONSES, keys_of, shown, text_at
from .files import refuse_existing
from .model.checkpoint import Checkpoint
from .model.tokenizer import Tokenizer
from .options import InputError, check_ranges, option, require
from .reward import (
    DEFAULT_MAX_LENGTH,
    ReadingOptions,
    RewardModel,
    check_length,
    group_rewards,
    open_reward_model,
    print_how_texts_end,
    run_of,
)
from .temperature import stored_temperature

RECORDS_AT_ONCE = 256

# What is added to a record of each kind.
ADDED_KEYS = {
    "pair": ("chosen_reward", "rejected_reward", "probability"),
    "response": ("reward",),
    "texts": ("rewards",),
    "responses": ("rewards",),
}
BEST_KEYS = ("response", "reward", "margin")  # what is kept of several responses with --best


@dataclass(frozen=True, kw_only=True)
class ScoreOptions(ReadingOptions):
    """What `score` takes."""

    input: str = option(
        value="IN.jsonl",
        help="JSON lines (.gz too) of pairs, of prompt and response, or of text lists",
    )
    output: str = option(value="OUT.jsonl", help="JSON lines file to write; must not exist")
    best: bool = option(
        False,
        help="of a record with several responses, keep the one with the highest reward, and its "
        "margin over the second",
    )


def score(options: ScoreOptions) -> None:
    """Add rewards to every line of a file, as a stream, in input order.

    A pair gets chosen_reward, rejected_reward and probability = sigmoid(their difference / T), with
    the temperature T that is stored in the run, else 1. A prompt
    with a response gets reward. A prompt with a list of responses, and a list of texts, gets the
    list rewards; with --best the best of the responses remains. A record of a foreign shape
    (data/foreign/shapes.py) is written as the house records that it becomes.
    """
    check_ranges(options)
    refuse_existing(options.output)
    unlabelled: Counter[str] = Counter()
    # The input may be a pipe, so it is opened once.
    with closing(read_house_records(options.input, unlabelled)) as records:
        first = next(records, None)
        if first is None:
            lack = "has no comparison with a label" if unlabelled else "is empty"
            raise InputError(f"{options.input}: {lack}; expected at least one line")
        model, checkpoint = open_reward_model(options)
        rules = options.rules(checkpoint)
        temperature = stored_temperature(run_of(checkpoint))
        print_how_texts_end(checkpoint, rules)
        scorer = Scorer(model, checkpoint, rules, options.micro_tokens, temperature)
        with records_written_whole(options.output) as file:
            for where, record in scorer.scored(chain([first], records)):
                if options.best:
                    record = best_of_record(record, where)
                file.write(json_line(record, where) + "\n")
    print(f"{options.output}: {scorer.counts.line(rules.max_length)}")
    if temperature != 1:
        print(f"probabilities are sigmoid(margin / {temperature:.3f}), the run's temperature")
    for reason, count in sorted(unlabelled.items()):
        print(f"{count} comparisons without a label are not scored: {reason}")
    if not checkpoint.has_head:
        print(
            f"{options.model}: no score.weight, so the rewards are those of an untrained head",
            file=sys.stderr,
        )


def best_of_record(record: Record, where: str) -> Record:
    """A scored record with the best of its responses."""
    check_responses(record, where, "--best")
    return with_one_response(record, *best_of_rewards(record["rewards"]))


def check_responses(record: Record, where: str, step: str) -> None:
    """Refuse a record without a list of responses, or with others beside it."""
    require(
        "responses" in record and not {"chosen", "rejected", "response"} & set(record),
        f'{where}: {step} needs a list "responses" and no other; this record has none such',
    )
    responses, finished = responses_of(record, where), record.get("finished")
    require(
        not isinstance(finished, list) or len(finished) == len(responses),
        f'{where}: "finished" and "responses" are lists of different lengths; expected a value'
        " for each response",
    )


class Best(NamedTuple):
    """The place of the best of several responses, its reward, and its margin over the second.

    The margin is None where there is no second.
    """

    place: int
    reward: float
    margin: float | None


def best_of_rewards(rewards: Sequence[float]) -> Best:
    """The highest of one or more rewards; of equal ones the first.

    >>> best_of_rewards([0.5, 2.0, 1.5])
    Best(place=1, reward=2.0, margin=0.5)
    """
    place = max(range(len(rewards)), key=rewards.__getitem__)
    others = [*rewards[:place], *rewards[place + 1 :]]
    return Best(place, rewards[place], rewards[place] - max(others) if others else None)


def with_one_response(
    record: Record, place: int, reward: float | None, margin: float | None
) -> Record:
    """A record with one of its responses instead of all, and "finished" of that one."""
    of_all = ("responses", "rewards", "finished")
    others = {key: value for key, value in record.items() if key not in of_all}
    chosen = others | dict(zip(BEST_KEYS, (record["responses"][place], reward, margin)))
    if "finished" in record:
        finished = record["finished"]
        chosen["finished"] = finished[place] if isinstance(finished, list) else finished
    return chosen


# ---- read ----------------------------------------------------------------------------------------


class Texts(NamedTuple):
    """The whole texts of one record. kind: a key of ADDED_KEYS."""

    kind: str
    texts: list[str]
    is_rendered: bool
    is_blank: bool


def texts_of_record(record: Record, where: str, tokenizer: Tokenizer, chat: bool = False) -> Texts:
    """The texts that a record asks to score.

    Raises InputError for a record of no known form, and for a text that begins with a second BOS.
    """
    texts = _texts_of_form(record, where, tokenizer, chat)
    for text in texts.texts:
        refuse_doubled_bos(text, texts.is_rendered, where, tokenizer)
    return texts


def _texts_of_form(record: Record, where: str, tokenizer: Tokenizer, chat: bool) -> Texts:
    if "response" in record and "chosen" not in record:
        return _response(with_prompt(record, where, chat), where, tokenizer, chat)
    if "chosen" in record or "rejected" in record:
        return _pair(record, where, tokenizer, chat)
    if "responses" in record:
        return _several_responses(with_prompt(record, where, chat), where, tokenizer, chat)
    if is_conversation(record.get("messages")):
        refuse_unread_system(record, where, "messages")
        turns = messages_of(record["messages"], f'{where}: "messages"', tokenizer, "user")
        return _conversation(turns, tokenizer)
    if "text" in record:
        texts = texts_of(record, where)
        end = prompt_end(texts)
        is_blank = not all(text[end:].strip() for text in texts)
        return Texts("texts", texts, False, is_blank)
    raise InputError(
        f'{where}: expected "chosen" and "rejected", "prompt" and "response", or a list "text";'
        f" found keys: {keys_of(record)}"
    )


def _response(record: Record, where: str, tokenizer: Tokenizer, chat: bool) -> Texts:
    prompt, response = record.get("prompt"), record["response"]
    if chat or is_conversation(prompt) or is_conversation(response):
        turns = messages_of(prompt, f'{where}: "prompt"', tokenizer, "user")
        answer = messages_of(response, f'{where}: "response"', tokenizer, "assistant")
        return _conversation(whole_conversation(turns, answer, where), tokenizer)
    prompt, response = (
        text_at(record, key, where, "a string, or messages") for key in ("prompt", "response")
    )
    return Texts("response", [prompt + response], False, not response.strip())


def _several_responses(record: Record, where: str, tokenizer: Tokenizer, chat: bool) -> Texts:
    responses = responses_of(record, where)
    each: list[Texts] = []
    characters = 0
    for i, response in enumerate(responses):
        single = record | {"response": response}
        each.append(_response(single, f'{where}: "responses"[{i}]', tokenizer, chat))
        characters += len(each[-1].texts[0])
        require(
            characters <= MOST_CHARACTERS,
            f"{where}: makes texts of more than {MOST_CHARACTERS / 1e6:.0f} million characters;"
            " expected fewer responses, or shorter ones",
        )
    kinds = {texts.is_rendered for texts in each}
    require(len(kinds) == 1, f'{where}: "responses" holds strings and messages; expected one kind')
    texts = [texts.texts[0] for texts in each]
    return Texts("responses", texts, kinds.pop(), any(texts.is_blank for texts in each))


def responses_of(record: Record, where: str) -> list:
    """record["responses"]: a list of one or more, or an InputError."""
    responses = record["responses"]
    if not isinstance(responses, list) or not 1 <= len(responses) <= MOST_RESPONSES:
        raise InputError(
            f'{where}: "responses" is {shown(responses)}; expected a list of responses,'
            f" at most {MOST_RESPONSES}"
        )
    return responses


def _conversation(turns: Messages, tokenizer: Tokenizer) -> Texts:
    text, is_rendered = tokenizer.render(turns), tokenizer.template is not None
    return Texts("response", [text], is_rendered, not turns[-1]["content"].strip())


def _pair(record: Record, where: str, tokenizer: Tokenizer, chat: bool) -> Texts:
    pairs, _ = record_pairs(record, where, tokenizer, chat)
    require(
        len(pairs) == 1,
        f"{where}: holds {len(pairs)} pairs, of several responses; give score one pair a line",
    )
    pair = pairs[0]
    texts = [pair.prompt + pair.chosen, pair.prompt + pair.rejected]
    return Texts("pair", texts, pair.rendered, pair.is_blank)


# ---- encode, reward, write -----------------------------------------------------------------------


def rewards_of_texts(
    model: RewardModel,
    tokenizer: Tokenizer,
    rules: TextRules,
    micro_tokens: int,
    wheres: Sequence[str],
    texts: Sequence[Texts],
) -> tuple[list[Tensor], int]:
    """The rewards of every text of every record, (n,) each, and how many records were cut.

    Pairs are cut apart from the rest, since both of their sides may have to be cut alike. The texts
    of a record share their beginning, which is computed once.
    """
    ids: list[list[np.ndarray]] = [[] for _ in texts]
    truncated = 0
    for are_pairs in (True, False):
        places = [i for i, t in enumerate(texts) if (t.kind == "pair") == are_pairs]
        if not places:
            continue
        places_of_ids = [i for i in places for _ in texts[i].texts]
        encoded, was_cut = encode(
            [text for i in places for text in texts[i].texts],
            tokenizer,
            rules.max_length,
            [texts[i].is_rendered for i in places_of_ids],
            are_pairs and rules.truncate == "together",
            rules.append_eos,
        )
        for i, text_ids in zip(places_of_ids, encoded):
            require(
                len(text_ids),
                f"{wheres[i]}: a text is empty and the tokenizer adds no BOS: nothing to score",
            )
            ids[i].append(text_ids)
        truncated += len({i for i, cut in zip(places_of_ids, was_cut) if cut})
    return group_rewards(model, ids, micro_tokens), truncated


@dataclass
class Counts:
    """What was scored, and what was not as it came."""

    lines: int = 0
    truncated: int = 0
    blank: int = 0
    named: int = 0
    replaced: int = 0

    def line(self, max_length: int) -> str:
        """One line for the log."""
        line = (
            f"{self.lines} lines scored, {self.truncated} truncated to {max_length} tokens,"
            f" {self.blank} with a blank response"
        )
        if self.named:
            line += f", {self.named} with names of special tokens, read as text"
        if self.replaced:
            line += f", {self.replaced} had such a key already, replaced"
        return line


@dataclass
class Scorer:
    """Scores records with one model, some at a time, and counts what it meets."""

    model: RewardModel
    checkpoint: Checkpoint
    rules: TextRules
    micro_tokens: int
    temperature: float = 1.0
    counts: Counts = field(default_factory=Counts)

    def scored(self, records: Iterable[tuple[str, Record]]) -> Iterator[tuple[str, Record]]:
        """The records ("file:line", record) with their rewards, in input order."""
        tokenizer, rules = self.checkpoint.tokenizer, self.rules
        for portion in self._in_portions(records):
            wheres = [where for where, _, _ in portion]
            texts = [record_texts for _, _, record_texts in portion]
            rewards, truncated = rewards_of_texts(
                self.model, tokenizer, rules, self.micro_tokens, wheres, texts
            )
            self.counts.truncated += truncated
            for (where, record, record_texts), values in zip(portion, rewards):
                self._count(record, record_texts)
                yield where, record | added(record_texts.kind, values.tolist(), self.temperature)

    def _in_portions(
        self, records: Iterable[tuple[str, Record]]
    ) -> Iterator[list[tuple[str, Record, Texts]]]:
        """Records with their texts, as many as are scored together."""
        portion: list[tuple[str, Record, Texts]] = []
        characters = 0
        for where, record in records:
            texts = texts_of_record(record, where, self.checkpoint.tokenizer, self.rules.chat)
            portion.append((where, record, texts))
            characters += sum(map(len, texts.texts))
            if len(portion) >= RECORDS_AT_ONCE or characters >= CHARACTERS_AT_ONCE:
                yield portion
                portion, characters = [], 0
        if portion:
            yield portion

    def _count(self, record: Record, texts: Texts) -> None:
        tokenizer = self.checkpoint.tokenizer
        self.counts.lines += 1
        self.counts.blank += texts.is_blank
        if not texts.is_rendered:
            self.counts.named += any(map(tokenizer.names_special, texts.texts))
        self.counts.replaced += any(key in record for key in ADDED_KEYS[texts.kind])


def added(kind: str, rewards: list[float], temperature: float) -> Record:
    """What a record of this kind gets."""
    if kind == "pair":
        chosen, rejected = rewards
        values: list = [chosen, rejected, float(probability((chosen - rejected) / temperature))]
    elif kind == "response":
        values = rewards
    else:
        values = [rewards]
    return dict(zip(ADDED_KEYS[kind], values))


# ---- from Python ---------------------------------------------------------------------------------


def score_texts(
    model: RewardModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Any],
    responses: Sequence[Any],
    max_length: int = DEFAULT_MAX_LENGTH,
    chat: bool = False,
    micro_tokens: int = 8192,
    append_eos: bool = False,
    beyond_positions: bool = False,
) -> Tensor | list[Tensor]:
    """Rewards of responses to prompts: those that `minimore score` gives to the same texts.

    prompts: N, each a string or messages. responses: one to each prompt, a string or messages, or a
    list of responses to each prompt, which is then computed once. max_length: tokens of a text, cut
    on the left, at best those of the training. chat: strings are messages, too. append_eos: strings
    end with the EOS token. `minimore.load` knows both of a run. beyond_positions: a max_length
    above the max_position_embeddings of a rotary model is meant.

    Returns the rewards (N,), or for lists of responses N tensors (n,), all fp32 on the CPU. Without
    prompts they are empty, and so are those of an empty list of responses. Raises InputError for
    anything that is no prompt or no response.

        model, checkpoint = open_reward_model(ModelOptions(model="runs/more"))
        score_texts(model, checkpoint.tokenizer, ["2 + 2 ="], [" 4"])  # (1,)
        score_texts(model, checkpoint.tokenizer, ["2 + 2 ="], [[" 4", " 5", " 22"]])  # [(3,)]
    """
    _check_types(model, tokenizer, prompts, responses)
    check_length(model.trunk.c, max_length, tokenizer.directory, beyond=beyond_positions)
    are_lists = _are_lists(responses)
    key = "responses" if are_lists else "response"
    texts, wheres = [], []
    for i, (prompt, response) in enumerate(zip(prompts, responses)):
        if are_lists and not response:
            continue  # nothing to score
        record = {"prompt": prompt, key: list(response) if are_lists else response}
        wheres.append(f"prompts[{i}]")
        texts.append(texts_of_record(record, wheres[-1], tokenizer, chat))
    rules = TextRules(max_length, chat=chat, append_eos=append_eos)
    rewards: list[Tensor] = []
    for start in range(0, len(texts), RECORDS_AT_ONCE):
        part = slice(start, start + RECORDS_AT_ONCE)
        values, _ = rewards_of_texts(
            model, tokenizer, rules, micro_tokens, wheres[part], texts[part]
        )
        rewards += values
    if not are_lists:
        return torch.cat(rewards or [torch.empty(0)])
    remaining = iter(rewards)
    return [next(remaining) if response else torch.empty(0) for response in responses]


def best_of(
    model: RewardModel,
    tokenizer: Tokenizer,
    prompt: Any,
    responses: Sequence[Any],
    max_length: int = DEFAULT_MAX_LENGTH,
    chat: bool = False,
    micro_tokens: int = 8192,
) -> Best:
    """Place, reward and margin of the best of the responses to a prompt; of equal ones the first.

    responses: one or more, each a string or messages. The other arguments are those of
    `score_texts`, and so are the errors.

        place, reward, margin = best_of(model, checkpoint.tokenizer, "2 + 2 =", [" 4", " 5"])
    """
    require(
        isinstance(responses, (list, tuple)) and responses,
        f"responses is {shown(responses)}; expected a list of one or more responses",
    )
    each = [[response] if isinstance(response, dict) else response for response in responses]
    arguments = (model, tokenizer, [prompt], [each], max_length, chat, micro_tokens)
    (rewards,) = score_texts(*arguments)
    return best_of_rewards(rewards.tolist())


def _are_lists(responses: Sequence[Any]) -> bool:
    """Whether there is a list of responses to each prompt, not one response."""
    kinds = {isinstance(each, (list, tuple)) and not is_conversation(each) for each in responses}
    require(
        len(kinds) <= 1, "responses holds single responses and lists of them; expected one kind"
    )
    return True in kinds


def _check_types(model: Any, tokenizer: Any, prompts: Any, responses: Any) -> None:
    require(
        isinstance(model, RewardModel),
        f"model is of type {type(model).__name__}; expected what open_reward_model opens",
    )
    require(
        isinstance(tokenizer, Tokenizer),
        f"tokenizer is a {type(tokenizer).__name__} of {type(tokenizer).__module__};"
        " expected the tokenizer of a Checkpoint",
    )
    for name, values in (("prompts", prompts), ("responses", responses)):
        require(
            isinstance(values, (list, tuple)),
            f"{name} is of type {type(values).__name__}; expected a list with one for each prompt",
        )
    require(
        len(prompts) == len(responses),
        f"{len(prompts)} prompts and {len(responses)} responses; expected as many",
    )
