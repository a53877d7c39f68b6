"""Which of two policies answers better, by a judge: the step `minimore align compare`.

Both have answered the same prompts. A reward model judges: the response with the higher reward
wins. Responses to one prompt are no independent evidence, so whole prompts are resampled.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..data.forms import with_prompt
from ..data.records import Record, read_records
from ..files import refuse_existing, write_json
from ..model.checkpoint import Checkpoint
from ..options import InputError, check_ranges, option, require
from ..reward import ReadingOptions, load_reward_model
from ..score import Scorer
from ..tables import Table, number, with_interval
from ..uncertainty import intervals


@dataclass(frozen=True, kw_only=True)
class CompareOptions(ReadingOptions):
    """What `align compare` takes; the model is the judge."""

    input: str = option(
        value="A.jsonl", help="JSON lines of prompt and response, or responses: of one policy"
    )
    other: str = option(value="B.jsonl", help="the same of the other policy, on the same prompts")
    json: str | None = option(None, value="FILE", help="write all figures here; must not exist")


def compare(options: CompareOptions) -> None:
    """Print how often the first policy's responses win, tie and lose."""
    check_ranges(options)
    refuse_existing(options.json, "--json")
    checkpoint = Checkpoint(options.model)
    require(
        checkpoint.has_head,
        f"{options.model}: no score.weight, so it is no reward model and cannot judge",
    )
    rules = options.rules(checkpoint)
    model = load_reward_model(checkpoint, options)
    first, second = (
        rewards_by_prompt(
            path, Scorer(model, checkpoint, rules, options.micro_tokens).scored(responses_in(path))
        )
        for path in (options.input, options.other)
    )
    figures = verdict_of(*matched(first, second, options))
    figures |= {"judge": options.model, "first": options.input, "second": options.other}
    print(table_of(figures))
    if options.json:
        write_json(options.json, figures)


def responses_in(path: str) -> Iterator[tuple[str, Record]]:
    """The prompts and responses of a file, without anything else, such as older rewards."""
    for where, record in read_records(path):
        record = with_prompt(record, where)
        key = "responses" if "responses" in record else "response"
        require(
            "prompt" in record and key in record,
            f'{where}: expected "prompt" with "response" or "responses"',
        )
        yield where, {"prompt": record["prompt"], key: record[key]}


def rewards_by_prompt(path: str, scored: Iterator[tuple[str, Record]]) -> dict[str, list[float]]:
    """The rewards of the responses to every prompt."""
    rewards: dict[str, list[float]] = {}
    for _, record in scored:
        values = record["rewards"] if "rewards" in record else [record["reward"]]
        rewards.setdefault(json.dumps(record["prompt"]), []).extend(values)
    require(rewards, f"{path}: is empty; expected at least one line")
    return rewards


def matched(
    first: dict[str, list[float]], second: dict[str, list[float]], options: CompareOptions
) -> tuple[np.ndarray, np.ndarray]:
    """First minus second reward of every pair of responses, in order, and its prompt's number."""
    for here, there, path in ((first, second, options.other), (second, first, options.input)):
        missing = [prompt for prompt in here if prompt not in there]
        if missing:
            raise InputError(
                f"{path}: has no response to {len(missing)} of the other file's prompts, such as"
                f" {missing[0][:60]}; compare answers to the same prompts"
            )
    margins, prompts = [], []
    for number_of_prompt, (prompt, rewards) in enumerate(first.items()):
        others = second[prompt]
        require(
            len(rewards) == len(others),
            f"{options.other}: {len(others)} responses to {prompt[:60]}, and {len(rewards)} in"
            f" {options.input}; expected as many",
        )
        margins += [a - b for a, b in zip(rewards, others)]
        prompts += [number_of_prompt] * len(rewards)
    return np.array(margins), np.array(prompts)


def verdict_of(margins: np.ndarray, prompts: np.ndarray) -> dict[str, Any]:
    """Wins, ties and losses, and the share of wins, of which a tie is half a one, at 95%.

    "tie" is the verdict if the interval holds 1/2.
    """
    rate, _ = intervals(margins, prompts)
    verdict = "tie"
    if rate.low > 0.5:
        verdict = "win"
    elif rate.high < 0.5:
        verdict = "lose"
    return {
        "pairs": len(margins),
        "prompts": len(np.unique(prompts)),
        "win": int((margins > 0).sum()),
        "tie": int((margins == 0).sum()),
        "lose": int((margins < 0).sum()),
        "win_rate": rate.value,
        "win_rate_interval": None if np.isnan(rate.low) else [rate.low, rate.high],
        "mean_difference": float(margins.mean()),
        "verdict": verdict,
    }


def table_of(figures: dict[str, Any]) -> Table:
    """The verdict as text."""
    table = Table("prompts", "pairs", "win", "tie", "lose", "win rate [95%]", "reward", "verdict")
    ends = figures["win_rate_interval"] or (None, None)
    table.add(
        figures["prompts"],
        *(figures[name] for name in ("pairs", "win", "tie", "lose")),
        with_interval(figures["win_rate"], ends),
        number(figures["mean_difference"]),
        figures["verdict"],
    )
    return table
