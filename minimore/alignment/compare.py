"""Which of two policies answers better, by a judge: the step `minimore align compare`.

Both have answered the same prompts. A judge says for every two responses which one is better
(judges.py); equal ones are a tie. Responses to one prompt are no independent evidence, so whole
prompts are resampled.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..data.forms import Named
from ..data.messages import is_conversation
from ..data.prompt_keys import with_prompt
from ..data.records import Record, read_records
from ..data.values import MOST_RESPONSES, shown, string_of
from ..files import refuse_existing, write_json
from ..options import COUNT, InputError, check_ranges, flag_of, option, require
from ..reward import ReadingOptions
from ..tables import Table, number, with_interval
from ..uncertainty import intervals
from .endpoint import ADDRESS, KEY, Endpoint
from .judges import Contest, Judge, RewardJudge, VerdictJudge, WorldJudge
from .questions import QUESTIONS, EndpointJudge

JUDGES = ("reward:DIR|HUB", "world:DIR[:ANNOTATOR]", "verdicts:FILE.jsonl", "endpoint:MODEL")
OF_ENDPOINTS = ("question", "base_url", "max_calls", "answers")  # options of no other judge
MAX_CALLS = 1000
ANSWERS = "answers.jsonl"


@dataclass(frozen=True, kw_only=True)
class CompareOptions(ReadingOptions):
    """What `align compare` takes."""

    model: str | None = option(  # type: ignore[assignment]  # a judge need not be a model
        None, value="DIR|HUB", help="a reward model that judges: the same as --judge reward:DIR"
    )
    judge: str | None = option(
        None,
        value="KIND:NAME",
        help="reward:DIR|HUB, a reward model; world:DIR[:ANNOTATOR], the true reward of a "
        "synthetic world, r* or an annotator's; verdicts:FILE.jsonl, verdicts such as people's, "
        "lines of prompt, first, second and verdict (first, second or tie); endpoint:MODEL, a "
        "language model behind an OpenAI-compatible address",
    )
    input: str = option(
        value="A.jsonl", help="JSON lines of prompt and response, or responses: of one policy"
    )
    other: str = option(value="B.jsonl", help="the same of the other policy, on the same prompts")
    json: str | None = option(None, value="FILE", help="write all figures here; must not exist")
    question: str | None = option(
        None,
        choices=tuple(QUESTIONS),
        help="what an endpoint is asked: which response is more helpful, or which is less harmful "
        "(default: helpful)",
    )
    base_url: str | None = option(
        None,
        value="URL",
        help="address of the endpoint, such as http://localhost:8000/v1 (default: that in "
        f"{ADDRESS}); its key is read from {KEY}, and from nowhere else",
    )
    max_calls: int | None = option(
        None,
        within=COUNT,
        help="requests sent to the endpoint at most; the same command again goes on "
        f"(default: {MAX_CALLS})",
    )
    answers: str | None = option(
        None,
        value="FILE",
        help="file of the endpoint's answers, to which every new one is added; an answer in it is "
        f"not asked for again (default: {ANSWERS})",
    )


def compare(options: CompareOptions) -> None:
    """Print how often the first policy's responses win, tie and lose."""
    check_ranges(options)
    refuse_existing(options.json, "--json")
    kind, name = kind_and_name(options)
    first, second = (responses_by_prompt(path) for path in (options.input, options.other))
    contests, prompts = matched(first, second, options)
    judge = open_judge(kind, name, options)
    margins, equal = margins_of(judge, contests)
    counts = {"equal_responses": equal} | judge.counts()
    figures = verdict_of(margins, prompts)
    figures |= {"mean_difference": float(margins.mean()) if judge.gives_rewards else None}
    figures |= {"judge": f"{kind}:{name}", "first": options.input, "second": options.other}
    if kind == "endpoint":
        figures["question"] = options.question or "helpful"
    print(table_of(figures))
    print(", ".join(f"{count} {words.replace('_', ' ')}" for words, count in counts.items()))
    if options.json:
        write_json(options.json, figures | {"counts": counts})


# ---- the judge -----------------------------------------------------------------------------------


def kind_and_name(options: CompareOptions) -> tuple[str, str]:
    """The two parts of --judge. Raises InputError for a judge that does not exist."""
    expected = f"expected {', '.join(JUDGES[:-1])} or {JUDGES[-1]}"
    require(
        options.judge is None or options.model is None,
        "--judge and --model: name two judges; expected one",
    )
    require(options.judge or options.model, f"--judge is missing: {expected}")
    kind, _, name = (options.judge or f"reward:{options.model}").partition(":")
    is_known = kind in [judge.partition(":")[0] for judge in JUDGES]
    require(is_known and name, f"--judge {options.judge}: {expected}")
    for field in OF_ENDPOINTS:
        is_idle = kind != "endpoint" and getattr(options, field) is not None
        require(not is_idle, f"{flag_of(field)}: is for --judge endpoint:MODEL only; leave it out")
    return kind, name


def open_judge(kind: str, name: str, options: CompareOptions) -> Judge:
    """The judge of a kind and a name that `kind_and_name` has checked."""
    if kind == "reward":
        return RewardJudge.open(name, options)
    if kind == "world":
        return WorldJudge.open(name)
    if kind == "verdicts":
        return VerdictJudge.open(name)
    path, most = options.answers or ANSWERS, options.max_calls or MAX_CALLS
    endpoint = Endpoint.open(name, options.base_url, path, most)
    return EndpointJudge(endpoint, QUESTIONS[options.question or "helpful"])


def margins_of(judge: Judge, contests: Sequence[Contest]) -> tuple[np.ndarray, int]:
    """The margin of every contest: (N,), and how many are about equal responses, so 0.

    Those the judge is not asked about.
    """
    margins = np.zeros(len(contests))
    places = [
        i for i, contest in enumerate(contests) if contest.first.value != contest.second.value
    ]
    margins[places] = judge.margins([contests[place] for place in places])
    return margins, len(contests) - len(places)


# ---- the two files -------------------------------------------------------------------------------


def responses_by_prompt(path: str) -> dict[str, list[Named]]:
    """The responses of a file by their prompt, which is written as JSON."""
    responses: dict[str, list[Named]] = {}
    for where, record in read_records(path):
        record = with_prompt(record, where)
        values = responses_of(record, where)
        responses.setdefault(json.dumps(record["prompt"]), []).extend(values)
    require(responses, f"{path}: is empty; expected at least one line")
    return responses


def responses_of(record: Record, where: str) -> list[Named]:
    """The responses of one line, and nothing else of it, such as older rewards."""
    key = "responses" if "responses" in record else "response"
    require(
        "prompt" in record and key in record,
        f'{where}: expected "prompt" with "response" or "responses"',
    )
    values = record[key] if key == "responses" else [record[key]]
    if not isinstance(values, list) or not 1 <= len(values) <= MOST_RESPONSES:
        raise InputError(
            f'{where}: "responses" is {shown(values)}; expected a list of responses,'
            f" at most {MOST_RESPONSES}"
        )
    for name, value in (("prompt", record["prompt"]), *((key, value) for value in values)):
        if not is_conversation(value):
            string_of(value, f'{where}: "{name}"', "a string, or messages")
    return [Named(where, value) for value in values]


def matched(
    first: dict[str, list[Named]], second: dict[str, list[Named]], options: CompareOptions
) -> tuple[list[Contest], np.ndarray]:
    """Every response with its counterpart, in order, and the number of the prompt of each: (N,)."""
    for here, there, path in ((first, second, options.other), (second, first, options.input)):
        missing = [prompt for prompt in here if prompt not in there]
        if missing:
            raise InputError(
                f"{path}: has no response to {len(missing)} of the other file's prompts, such as"
                f" {missing[0][:60]}; compare answers to the same prompts"
            )
    contests, prompts = [], []
    for number_of_prompt, (prompt, responses) in enumerate(first.items()):
        others = second[prompt]
        require(
            len(responses) == len(others),
            f"{options.other}: {len(others)} responses to {prompt[:60]}, and {len(responses)} in"
            f" {options.input}; expected as many",
        )
        value = json.loads(prompt)
        contests += [Contest(value, one, other) for one, other in zip(responses, others)]
        prompts += [number_of_prompt] * len(responses)
    return contests, np.array(prompts)


# ---- the verdict ---------------------------------------------------------------------------------


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
        "verdict": verdict,
    }


def table_of(figures: dict[str, Any]) -> Table:
    """The verdict as text."""
    difference = figures["mean_difference"]  # None where the judge gives no rewards
    rewards = {} if difference is None else {"reward": number(difference)}
    counts = ("prompts", "pairs", "win", "tie", "lose")
    table = Table(*counts, "win rate [95%]", *rewards, "verdict")
    table.add(
        *(figures[name] for name in counts),
        with_interval(figures["win_rate"], figures["win_rate_interval"] or (None, None)),
        *rewards.values(),
        figures["verdict"],
    )
    return table
