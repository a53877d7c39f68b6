"""One response to every prompt, of the several that a policy wrote: the step `align select`.

Best of n takes the response with the highest reward. Its controls take the lowest one, any one, or
the longest one. Several reward models can decide together, each with its own tokenizer.

M models, n responses to a prompt.
"""

import hashlib
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..checksums import file_checksum, records_written_whole
from ..data.messages import is_conversation
from ..data.prompt_keys import with_prompt
from ..data.records import Record, json_line, read_records
from ..data.values import shown
from ..files import refuse_existing
from ..model.checkpoint import Checkpoint
from ..options import COUNT, Range, check_ranges, option, require
from ..reward import ReadingOptions, load_reward_model
from ..score import Scorer, best_of_rewards, check_responses, with_one_response
from .portions import Unfinished, alone, begin_or_continue

RESPONSES_AT_ONCE = 256  # scored between two writes to the disk
BY_REWARD = ("best", "worst")
WITHOUT_MODEL = ("random", "longest")

Rewards = list[list[float]]  # of every response to every prompt


class Choice(NamedTuple):
    """The place of the response that is selected, its reward and its margin, if it has them."""

    place: int
    reward: float | None
    margin: float | None


@dataclass(frozen=True, kw_only=True)
class SelectOptions(ReadingOptions):
    """What `align select` takes."""

    model: tuple[str, ...] = option(  # type: ignore[assignment]  # several, where others take one
        (),
        repeat=True,
        value="DIR|HUB",
        help="reward model, for best and worst. Repeat it to let several decide together: each "
        "one's rewards, less their mean over a prompt, are divided by their standard deviation "
        "over the file, and the mean over models is the reward",
    )
    input: str = option(
        value="IN.jsonl",
        help="JSON lines (.gz too) of prompt and responses, such as align sample writes",
    )
    output: str = option(value="OUT.jsonl", help="JSON lines file to write; must not exist")
    by: str = option(
        "best",
        choices=(*BY_REWARD, *WITHOUT_MODEL),
        help="the response to keep: of the highest or the lowest reward, any one, or the one with "
        "the most characters; of equal ones the first",
    )
    pessimism: float = option(
        0.0,
        within=Range(least=0),
        help="with several models: so many standard deviations of a response's rewards over the "
        "models are taken off their mean; of two models, 1 takes the lower reward",
    )
    first: int | None = option(
        None, within=COUNT, help="use only so many responses of every prompt, the first ones"
    )
    seed: int = option(
        0, within=Range(least=0), help="seeds the choice of random, a function of it and the prompt"
    )
    resume: bool = option(
        False, help="continue a command that was killed: the same command again, plus this"
    )


def select(options: SelectOptions) -> None:
    """Write {"prompt", "response", "reward", "margin", "finished"} for every line of a file.

    The margin is that over the second best, or under the second worst; it is null where there is no
    second. Without a model there is no reward either. `score`, `compare` and fine-tuning read such
    files.
    """
    check_ranges(options)
    check_models(options)
    refuse_existing(options.output)
    checkpoints = reward_models(options)
    records = samples_of(options)
    if checkpoints:
        path = Path(f"{options.output}.unfinished")
        with alone(path):
            work = scored_in_portions(path, records, checkpoints, options)
            rewards = combined(stored_rewards(work, options), options.pessimism)
            choices = [by_reward(of_prompt, options.by) for of_prompt in rewards]
            write_selected(records, choices, options.output)
            work.remove()
    else:
        choices = [without_reward(record, options) for _, record in records]
        write_selected(records, choices, options.output)
    print(f"{options.output}: {options.by} of the responses to each of {len(records)} prompts")


def write_selected(
    records: Sequence[tuple[str, Record]], choices: Sequence[Choice], output: str
) -> None:
    """Write every record with the response that was chosen, in the place of all its responses."""
    with records_written_whole(output) as file:
        for (where, record), choice in zip(records, choices, strict=True):
            file.write(json_line(with_one_response(record, *choice), where) + "\n")


def check_models(options: SelectOptions) -> None:
    """Refuse models where none is used, and fewer of them than the options need."""
    models = options.model
    if options.by in BY_REWARD:
        require(models, f"--by {options.by}: expected at least one --model, a reward model")
    else:
        require(not models, f"--by {options.by}: uses no --model; leave it out")
    require(len(set(models)) == len(models), "--model: expected every model once")
    require(
        options.pessimism == 0 or len(models) > 1,
        f"--pessimism {options.pessimism}: expected more than one --model, which can disagree",
    )


def reward_models(options: SelectOptions) -> list[Checkpoint]:
    """The checkpoints that decide. Raises InputError for one without a reward head."""
    checkpoints = [Checkpoint(name) for name in options.model]
    for name, checkpoint in zip(options.model, checkpoints):
        require(
            checkpoint.has_head,
            f"{name}: no score.weight, so it is no reward model and cannot select",
        )
    return checkpoints


# ---- read ----------------------------------------------------------------------------------------


def samples_of(options: SelectOptions) -> list[tuple[str, Record]]:
    """The records ("file:line", record) of a file, with the responses from which to select."""
    records = []
    for where, record in read_records(options.input):
        check_responses(record, where, "align select")
        prompt_of(record, where)  # refuses a record without one
        json_line(record, where)  # refuses what cannot be written again, whichever is chosen
        first = with_first_responses(record, where, options.first)
        check_kind(record["responses"], where, options.by)
        records.append((where, first))
    require(records, f"{options.input}: is empty; expected at least one line")
    return records


def prompt_of(record: Record, where: str) -> Any:
    """What stands in front of the responses of a record."""
    record = with_prompt(record, where, chat=True)
    require("prompt" in record, f'{where}: "prompt" is missing; expected it with "responses"')
    return record["prompt"]


def with_first_responses(record: Record, where: str, count: int | None) -> Record:
    """A record with so many of its responses, or all. Raises InputError where there are fewer."""
    if count is None:
        return record
    responses = record["responses"]
    require(
        count <= len(responses),
        f"--first {count}: {where} has {len(responses)} responses; expected at least as many",
    )
    first = record | {"responses": responses[:count]}
    if isinstance(record.get("finished"), list):
        first["finished"] = record["finished"][:count]
    return first


def check_kind(responses: Sequence[Any], where: str, by: str) -> None:
    """Refuse responses that are neither strings nor messages; messages have no one length."""
    for response in responses:
        require(
            isinstance(response, str) or (by != "longest" and is_conversation(response)),
            f'{where}: "responses" holds {shown(response)}; expected strings, or messages unless'
            " --by longest",
        )


# ---- rewards -------------------------------------------------------------------------------------


def scored_in_portions(
    path: Path,
    records: Sequence[tuple[str, Record]],
    checkpoints: Sequence[Checkpoint],
    options: SelectOptions,
) -> Unfinished:
    """The unfinished file with all rewards: every portion of one model, then of the next.

    A record of it is {"rewards": those of every response to some prompts, "truncated": to how many
    of these prompts a response was cut}. What is there already is not scored again.
    """
    work = begin_or_continue(path, identity_of(options, checkpoints), options.resume)
    most = max(len(record["responses"]) for _, record in records)
    portion = max(1, RESPONSES_AT_ONCE // most)
    starts = range(0, len(records), portion)
    for number, checkpoint in enumerate(checkpoints):
        stored = max(0, work.records - number * len(starts))  # portions of this model
        parts = [records[start : start + portion] for start in starts[stored:]]
        if parts:
            add_rewards(work, parts, checkpoint, options)
    return work


def identity_of(options: SelectOptions, checkpoints: Sequence[Checkpoint]) -> dict[str, Any]:
    """What the rewards and the choice depend on."""
    named = {key: value for key, value in asdict(options).items() if key != "resume"}
    depends_on = {
        "models": [checkpoint.identity() for checkpoint in checkpoints],
        "rules": [options.rules(checkpoint) for checkpoint in checkpoints],
        "input": file_checksum(Path(options.input)),
    }
    return json.loads(json.dumps(named | {"of": depends_on}))


def add_rewards(
    work: Unfinished,
    parts: Sequence[Sequence[tuple[str, Record]]],
    checkpoint: Checkpoint,
    options: SelectOptions,
) -> None:
    """Add the rewards of one model, which is in memory no longer than this takes."""
    model, rules = load_reward_model(checkpoint, options), options.rules(checkpoint)
    left = sum(map(len, parts))
    for part in parts:
        scorer = Scorer(model, checkpoint, rules, options.micro_tokens)
        rewards = [record["rewards"] for _, record in scorer.scored(part)]
        work.append([{"rewards": rewards, "truncated": scorer.counts.truncated}])
        left -= len(part)
        print(f"{checkpoint.directory}: {left} prompts left", file=sys.stderr, flush=True)


def stored_rewards(work: Unfinished, options: SelectOptions) -> list[Rewards]:
    """The rewards of each model, from the whole file; a line says of each what it had to cut."""
    portions = list(work.stored())
    a_model = len(portions) // len(options.model)  # so many portions
    rewards = []
    for number, name in enumerate(options.model):
        own = portions[number * a_model : (number + 1) * a_model]
        truncated = sum(portion["truncated"] for portion in own)
        if truncated:
            print(f"{name}: the responses to {truncated} prompts were truncated")
        rewards.append([of_prompt for portion in own for of_prompt in portion["rewards"]])
    return rewards


def combined(rewards: Sequence[Rewards], pessimism: float = 0.0) -> Rewards:
    """One reward for every response, from those of M models on the same responses.

    Those of a single model stay as they are. Of several, with z of `on_one_scale`:

        reward = mean z - pessimism · std z,    mean and std (divided by M) over the models

    The deviation of two models is half their difference, so that a pessimism of 1 takes the lower
    reward. Differs from arXiv 2310.02743, which takes off a multiple of the variance.
    """
    if len(rewards) == 1:
        return rewards[0]
    by_model = [on_one_scale(of_model) for of_model in rewards]
    by_prompt = [np.stack(z) for z in zip(*by_model)]  # (M, n) each
    return [(z.mean(0) - pessimism * z.std(0)).tolist() for z in by_prompt]


def on_one_scale(rewards: Rewards) -> list[np.ndarray]:
    """The rewards of a model on a scale that all models share: (n,) for every prompt.

    Models have rewards of different offset and scale, and only differences within a prompt count.
    So each reward r becomes

        z = (r - mean of r over the prompt's responses) / s
        s² = mean of (r - mean of r over its prompt's responses)² over all responses of the file

    A model that finds all responses to a prompt alike, for every prompt, has z = 0.

    >>> on_one_scale([[1.0, 3.0], [12.0, 10.0]])
    [array([-1.,  1.]), array([ 1., -1.])]
    """
    centred = [np.array(of_prompt) - np.mean(of_prompt) for of_prompt in rewards]
    deviation = math.sqrt(np.mean(np.concatenate(centred) ** 2))
    return [of_prompt / (deviation or 1) for of_prompt in centred]


# ---- choose --------------------------------------------------------------------------------------


def by_reward(rewards: Sequence[float], by: str) -> Choice:
    """The best or the worst of some responses.

    >>> by_reward([0.5, 2.0, 0.25], "worst")
    Choice(place=2, reward=0.25, margin=0.25)
    """
    sign = 1 if by == "best" else -1
    place, _, margin = best_of_rewards([sign * reward for reward in rewards])
    return Choice(place, rewards[place], margin)


def without_reward(record: Record, options: SelectOptions) -> Choice:
    """Any one of the responses, or the longest one, as --by says."""
    responses = record["responses"]
    if options.by == "random":
        place = random_place(options.seed, prompt_of(record, ""), len(responses))
    else:
        place = best_of_rewards([len(response) for response in responses]).place
    return Choice(place, None, None)


def random_place(seed: int, prompt: Any, count: int) -> int:
    """A place among so many, the same wherever the prompt stands in a file."""
    digest = hashlib.sha256(json.dumps([seed, prompt]).encode()).digest()
    return int.from_bytes(digest[:8], "little") % count
