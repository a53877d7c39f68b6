"""Rewards of a file: the `score` verb."""

import json
import os
import sys
from contextlib import closing
from dataclasses import dataclass
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import NamedTuple

from .calibration import probability
from .data.pairs import (
    TokenPair,
    encode,
    refuse_doubled_bos,
    shared_length,
)
from .data.records import (
    is_conversation,
    messages_of,
    prompt_end,
    read_records,
    record_pairs,
    text_of,
    texts_of,
)
from .files import beside, refuse_existing
from .options import InputError, option
from .reward import ReadingOptions, open_reward_model, pair_rewards, text_rewards


@dataclass(frozen=True, kw_only=True)
class ScoreOptions(ReadingOptions):
    """What `score` takes."""

    input: str = option(
        value="IN.jsonl",
        help="JSON lines (.gz too) of pairs, of prompt and response, or of text lists",
    )
    output: str = option(value="OUT.jsonl", help="JSON lines file to write; must not exist")


def score(options: ScoreOptions):
    """Add rewards to every line of a file, streaming, in input order.

    A pair gets chosen_reward, rejected_reward and probability = sigmoid(difference); a prompt with a response gets reward; a
    list of texts gets the list rewards.
    """
    refuse_existing(options.output)
    with closing(read_records(options.input)) as records:  # opened once: it may be a pipe
        first = next(records, None)
        if first is None:
            raise InputError(f"{options.input}: is empty; expected at least one line")
        model, checkpoint = open_reward_model(options)
        limit, truncate = options.limits(checkpoint)
        counts = _write_scored(options, model, checkpoint, chain([first], records), limit, truncate)
    print(
        f"{options.output}: {counts['lines']} lines scored, {counts['truncated']} truncated to {limit} tokens, {counts['blank']} with a blank response"
        + (
            f", {counts['named']} with names of special tokens, read as text"
            if counts["named"]
            else ""
        )
        + (f", {counts['replaced']} had such a key already, replaced" if counts["replaced"] else "")
    )
    if not checkpoint.has_head:
        print(
            f"{options.model}: no score.weight, so the rewards are those of an untrained head",
            file=sys.stderr,
        )


def _write_scored(options, model, checkpoint, records, limit, truncate):
    """Score the records, 256 at a time, into a file beside the output, then rename it; returns the counts."""
    output, counts = (
        Path(options.output),
        {"lines": 0, "truncated": 0, "blank": 0, "named": 0, "replaced": 0},
    )
    unfinished = beside(output)
    try:
        with open(unfinished, "x", encoding="utf-8") as out:
            while chunk := list(islice(records, 256)):
                for record in _scored(model, checkpoint, chunk, options, limit, truncate, counts):
                    out.write(_json_line(record) + "\n")
        os.replace(unfinished, output)
    finally:
        unfinished.unlink(missing_ok=True)
    return counts


def _json_line(record):
    text = json.dumps(record, ensure_ascii=False)
    return (
        text if text.encode("utf-8", "replace").decode() == text else json.dumps(record)
    )  # half a surrogate pair


class Readable(NamedTuple):
    """The texts of one record, whole; what: "pair", "response" or "texts"."""

    texts: list[str]
    rendered: bool
    blank: bool
    what: str


def _readable(record, where, tokenizer) -> Readable:
    if "response" in record and "chosen" not in record:
        prompt, response = record.get("prompt"), record["response"]
        if is_conversation(prompt) or is_conversation(response):
            turns = messages_of(prompt, f'{where}: "prompt"', tokenizer, "user") + messages_of(
                response, f'{where}: "response"', tokenizer, "assistant"
            )
            return Readable(
                [tokenizer.render(turns)],
                tokenizer.template is not None,
                not turns[-1]["content"].strip(),
                "response",
            )
        prompt, response = text_of(record, "prompt", where), text_of(record, "response", where)
        return Readable([prompt + response], False, not response.strip(), "response")
    if "chosen" in record or "rejected" in record:
        pairs = record_pairs(record, where, tokenizer)[0]
        if len(pairs) != 1:
            raise InputError(
                f'{where}: "rejected" is a list of {len(pairs)} responses; give score one pair a line'
            )
        pair = pairs[0]
        return Readable(
            [pair.prompt + pair.chosen, pair.prompt + pair.rejected],
            pair.rendered,
            pair.is_blank,
            "pair",
        )
    if "text" in record:
        texts = texts_of(record, where)
        cut = prompt_end(texts)
        return Readable(texts, False, not all(t[cut:].strip() for t in texts), "texts")
    raise InputError(
        f'{where}: expected "chosen" and "rejected", "prompt" and "response", or a list "text"; '
        f"found keys: {', '.join(map(str, record)) or 'none'}"
    )


ADDED = {
    "pair": ("chosen_reward", "rejected_reward", "probability"),
    "response": ("reward",),
    "texts": ("rewards",),
}


def _scored(model, checkpoint, chunk, options, limit, truncate, counts):
    """The records of one chunk with their rewards."""
    read = [_readable(record, where, checkpoint.tokenizer) for where, record in chunk]
    for (where, _), r in zip(chunk, read):
        for text in r.texts:
            refuse_doubled_bos(text, r.rendered, where, checkpoint.tokenizer)
    rewards = [None] * len(read)
    for together in (
        True,
        False,
    ):  # pairs first: their sides may have to be cut alike, and share their prompt
        mine = [i for i, r in enumerate(read) if (r.what == "pair") == together]
        ids, cut = encode(
            [t for i in mine for t in read[i].texts],
            checkpoint.tokenizer,
            limit,
            [read[i].rendered for i in mine for _ in read[i].texts],
            together and truncate == "together",
        )
        places = list(accumulate((len(read[i].texts) for i in mine), initial=0))
        for i, start, end in zip(mine, places, places[1:]):
            if not all(map(len, ids[start:end])):
                raise InputError(
                    f"{chunk[i][0]}: a text is empty and the tokenizer adds no BOS: nothing to score"
                )
            counts["truncated"] += any(cut[start:end])
        if together:
            pairs = [TokenPair(c, r, shared_length(c, r), 0) for c, r in zip(ids[0::2], ids[1::2])]
            found = (
                pair_rewards(model, pairs, options.micro_tokens).flatten().tolist() if mine else []
            )
        else:
            found = (
                text_rewards(model, [t.tolist() for t in ids], options.micro_tokens).tolist()
                if mine
                else []
            )
        for i, start, end in zip(mine, places, places[1:]):
            rewards[i] = found[start:end]
    for (_, record), r, values in zip(chunk, read, rewards):
        counts["lines"] += 1
        counts["blank"] += r.blank
        counts["named"] += not r.rendered and any(map(checkpoint.tokenizer.names_special, r.texts))
        counts["replaced"] += any(key in record for key in ADDED[r.what])
        values = (
            [*values, float(probability(values[0] - values[1]))]
            if r.what == "pair"
            else [values]
            if r.what == "texts"
            else values
        )
        yield record | dict(zip(ADDED[r.what], values))
