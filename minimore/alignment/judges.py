"""Judges: which of two responses to one prompt is better.

    reward      a reward model: the response with the higher reward
    world       the true reward of a synthetic world: r*, or what one annotator values
    verdicts    a file of verdicts, by people for example; several on the same responses are votes
    endpoint    a language model behind an address, which is asked: questions.py

They are not equally good. Only the world knows the truth, and a reward model that has chosen the
responses is no judge of them.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ..data.forms import Named
from ..data.messages import messages_of
from ..data.prompt_keys import with_prompt
from ..data.records import Record, read_records
from ..data.values import shown, value_of
from ..data.world import World
from ..model.checkpoint import Checkpoint
from ..options import InputError, require
from ..reward import ReadingOptions, load_reward_model
from ..score import Scorer

VERDICTS = {"first": 1, "tie": 0, "second": -1}


class Contest(NamedTuple):
    """Two different responses to one prompt: strings or messages, as they are in the files."""

    prompt: Any
    first: Named
    second: Named


class Judge(Protocol):
    """What decides contests. gives_rewards: whether its margins are differences of rewards."""

    gives_rewards: bool

    def margins(self, contests: Sequence[Contest]) -> list[float]:
        """Above 0 where the first response is better, below 0 where the second is, 0 for a tie."""

    def counts(self) -> dict[str, int]:
        """Numbers that say what the margins rest on, by name: they are printed and stored."""


# ---- a reward model ------------------------------------------------------------------------------


@dataclass
class RewardJudge:
    """The response with the higher reward is better."""

    scorer: Scorer
    gives_rewards = True

    @classmethod
    def open(cls, directory: str, options: ReadingOptions) -> "RewardJudge":
        """The reward model of a directory. Raises InputError for a model without a head.

        options: all but the model, which is this one.
        """
        options = replace(options, model=directory)
        checkpoint = Checkpoint(directory)
        require(
            checkpoint.has_head,
            f"{directory}: no score.weight, so it is no reward model and cannot judge",
        )
        rules = options.rules(checkpoint)
        model = load_reward_model(checkpoint, options)
        return cls(Scorer(model, checkpoint, rules, options.micro_tokens))

    def margins(self, contests: Sequence[Contest]) -> list[float]:
        """First minus second reward."""
        first = self._rewards([(contest.prompt, contest.first) for contest in contests])
        second = self._rewards([(contest.prompt, contest.second) for contest in contests])
        return [a - b for a, b in zip(first, second)]

    def _rewards(self, responses: Sequence[tuple[Any, Named]]) -> list[float]:
        """The reward of every response; responses of one line share the work for their prompt."""
        records = []
        for where, of_line in groupby(responses, key=lambda response: response[1].where):
            prompts, named = zip(*of_line)
            values = [response.value for response in named]
            records.append((where, {"prompt": prompts[0], "responses": values}))
        scored = self.scorer.scored(records)
        return [reward for _, record in scored for reward in record["rewards"]]

    def counts(self) -> dict[str, int]:
        """Lines of which a text was longer than the model reads."""
        return {"truncated_lines": self.scorer.counts.truncated}


# ---- the world -----------------------------------------------------------------------------------


@dataclass
class WorldJudge:
    """The response with the higher true reward is better.

    annotator: the place of the annotator who judges; None is r*.
    """

    world: World
    annotator: int | None
    gives_rewards = True

    @classmethod
    def open(cls, name: str) -> "WorldJudge":
        """The judge that DIR or DIR:ANNOTATOR names. A directory may have a colon in its name."""
        directory, _, annotator = name.rpartition(":")
        if not directory or Path(name).is_dir():
            return cls(World.read(Path(name)), None)
        world = World.read(Path(directory))
        require(
            annotator in world.annotators,
            f"--judge world:{name}: no annotator {annotator!r};"
            f" expected one of {', '.join(world.annotators)}, or none for r*",
        )
        return cls(world, world.annotators.index(annotator))

    def margins(self, contests: Sequence[Contest]) -> list[float]:
        """First minus second true reward. Source: `World.true_rewards`."""
        first = self._rewards([contest.first for contest in contests])
        second = self._rewards([contest.second for contest in contests])
        return [float(a - b) for a, b in zip(first, second)]

    def _rewards(self, responses: Sequence[Named]) -> Sequence[float]:
        rewards = self.world.true_rewards([text_of_response(named) for named in responses])
        values = rewards.shared if self.annotator is None else rewards.annotators[:, self.annotator]
        return values.tolist()

    def counts(self) -> dict[str, int]:
        """Nothing: the truth has no footnotes."""
        return {}


def text_of_response(response: Named) -> str:
    """What a response says: the string that it is, or the last of its messages."""
    if isinstance(response.value, str):
        return response.value
    return messages_of(response.value, response.where, None, "assistant")[-1]["content"]


# ---- a file of verdicts --------------------------------------------------------------------------


@dataclass
class VerdictJudge:
    """The verdicts in a file; the mean counts where several are on the same two responses.

    votes: by `contest_key`, 1 for the first response, -1 for the second, 0 for a tie. used: how
    many of them are on contests that were judged.
    """

    path: str
    votes: dict[str, list[int]]
    used: int = 0
    gives_rewards = False

    @classmethod
    def open(cls, path: str) -> "VerdictJudge":
        """Read {"prompt", "first", "second", "verdict": "first", "second" or "tie"} a line."""
        votes: dict[str, list[int]] = {}
        for where, record in read_records(path):
            key, vote = vote_of(with_prompt(record, where), where)
            votes.setdefault(key, []).append(vote)
        require(votes, f"{path}: is empty; expected at least one line")
        return cls(path, votes)

    def margins(self, contests: Sequence[Contest]) -> list[float]:
        """The mean vote on every contest, in whichever order the file names the responses."""
        votes = [self._votes_on(contest) for contest in contests]
        missing = [contest for contest, cast in zip(contests, votes) if not cast]
        if missing:
            raise InputError(
                f"{self.path}: has no verdict on {len(missing)} of {len(contests)} pairs of"
                f" responses, such as those to {json.dumps(missing[0].prompt)[:60]}"
                f" ({missing[0].first.where}, {missing[0].second.where}); add them"
            )
        self.used = sum(map(len, votes))
        return [sum(cast) / len(cast) for cast in votes]

    def _votes_on(self, contest: Contest) -> list[int]:
        prompt, first, second = contest.prompt, contest.first.value, contest.second.value
        in_order = self.votes.get(contest_key(prompt, first, second), [])
        swapped = self.votes.get(contest_key(prompt, second, first), [])
        return in_order + [-vote for vote in swapped]

    def counts(self) -> dict[str, int]:
        """Votes that count, and those on other responses."""
        return {"votes": self.used, "unused_votes": sum(map(len, self.votes.values())) - self.used}


def vote_of(record: Record, where: str) -> tuple[str, int]:
    """The `contest_key` of a line of verdicts, and the number of its verdict in VERDICTS."""
    for key in ("prompt", "first", "second", "verdict"):
        value_of(record, key, where)
    verdict = record["verdict"]
    if not isinstance(verdict, str) or verdict not in VERDICTS:
        raise InputError(
            f'{where}: "verdict" is {shown(verdict)}; expected "first", "second" or "tie"'
        )
    return contest_key(record["prompt"], record["first"], record["second"]), VERDICTS[verdict]


def contest_key(prompt: Any, first: Any, second: Any) -> str:
    """A name of a contest: the same for the same prompt and responses in the same order."""
    return json.dumps([prompt, first, second], sort_keys=True)
