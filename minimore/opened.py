"""A reward model in one call: `minimore.load`.

model = minimore.load("runs/more")
model.score("2 + 2 =", " 4")                # a reward
model.score("2 + 2 =", [" 4", " 5"])        # rewards; the prompt is computed once
model.score([{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}])
model.prefers("2 + 2 =", " 4", " 5")        # P(the first response is better)
"""

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .calibration import probability
from .data.messages import is_conversation
from .data.pairs import TextRules
from .data.values import shown
from .model.checkpoint import Checkpoint
from .options import check_types, require
from .reward import ReadingOptions, RewardModel, open_reward_model, run_of
from .score import score_texts
from .temperature import stored_temperature


def load(model: str | os.PathLike[str], **options: Any) -> "OpenedRewardModel":
    """Open a reward model: the directory of a run or of a checkpoint, or a name on the hub.

    options: those of `minimore score`, with its defaults: device, compute_dtype, max_length,
    truncate, chat, append_eos, beyond_positions, micro_tokens, seed (of the head, where there is
    none). Texts are read as the run was trained. Raises InputError as the command does, and
    TypeError for an option that is not there.
    """
    if isinstance(model, os.PathLike):
        model = os.fspath(model)
    chosen = ReadingOptions(model=model, **options)
    check_types(chosen)
    opened, checkpoint = open_reward_model(chosen)
    if not checkpoint.has_head:
        warnings.warn(
            f"{model}: no score.weight, so the rewards are those of an untrained head", stacklevel=2
        )
    return OpenedRewardModel(
        opened,
        checkpoint,
        chosen.rules(checkpoint),
        chosen.micro_tokens,
        stored_temperature(run_of(checkpoint)),
    )


@dataclass(frozen=True)
class OpenedRewardModel:
    """What `load` opens. Its rewards are those of `minimore score`; several threads may ask.

    A prompt or a response is a string, or messages: a list of {"role": ..., "content": ...}, and of
    a response also one such message. temperature: T in P = sigmoid(margin / T), the one that is
    stored in the run, else 1. has_head: whether the checkpoint has one; without, the head is drawn
    at random.
    """

    model: RewardModel
    checkpoint: Checkpoint
    rules: TextRules
    micro_tokens: int
    temperature: float = 1.0

    @property
    def has_head(self) -> bool:
        """Whether the checkpoint holds a reward head."""
        return self.checkpoint.has_head

    def score(self, prompt: Any, response: Any = None) -> Any:
        """The reward of a response, a float; of several, a list of them.

        score(prompt, response)              a float
        score(prompt, [response, ...])       a list; the prompt is computed once
        score([prompt, ...], [response, ...])            a list
        score([prompt, ...], [[response, ...], ...])     a list of lists
        score(messages)                      a float, of a conversation that ends with a response
        score([messages, ...])               a list

        Nothing to score gives an empty list. Raises InputError for anything else.
        """
        if response is None:
            return self._score_conversations(prompt)
        if is_several(prompt):
            return self._rewards(prompt, response)
        if is_several(response):
            (rewards,) = self._rewards([prompt], [[as_messages(each) for each in response]])
            return rewards
        (reward,) = self._rewards([prompt], [as_messages(response)])
        return reward

    def prefers(self, prompt: Any, first: Any, second: Any) -> float:
        """The probability that the first response is better than the second, by this model."""
        (rewards,) = self._rewards([prompt], [[as_messages(first), as_messages(second)]])
        return float(probability((rewards[0] - rewards[1]) / self.temperature))

    def _score_conversations(self, conversations: Any) -> Any:
        """Whole conversations, one or several; of each the last turn is the response."""
        if is_conversation(conversations):
            (reward,) = self._score_conversations([conversations])
            return reward
        require(
            isinstance(conversations, (list, tuple))
            and all(is_conversation(each) and len(each) > 1 for each in conversations),
            f"{shown(conversations)}: expected a prompt and a response, or a conversation: a list"
            " of messages that ends with a response",
        )
        prompts = [list(each[:-1]) for each in conversations]
        return self._rewards(prompts, [[each[-1]] for each in conversations])

    def _rewards(self, prompts: Any, responses: Any) -> list[Any]:
        """The rewards of every prompt's response or responses, as floats."""
        rewards = score_texts(
            self.model,
            self.checkpoint.tokenizer,
            prompts,
            responses,
            self.rules.max_length,
            self.rules.chat,
            self.micro_tokens,
            self.rules.append_eos,
            beyond_positions=True,  # or `load` has refused the length
        )
        return [each.tolist() for each in rewards]


def is_several(value: Any) -> bool:
    """Whether a value is a list of prompts or of responses, and not one of them."""
    return isinstance(value, (list, tuple)) and not is_conversation(value)


def as_messages(response: Any) -> Sequence[Any] | Any:
    """A single message as a list of one; anything else as it is."""
    return [response] if isinstance(response, Mapping) else response
