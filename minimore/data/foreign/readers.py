"""Readers: for shapes that are one record a line, the functions that turn it into comparisons.

Each takes a record and "file:line", and gives items (comparisons.py). The names of the fields are
those of the public files; shapes.py has the table of them. house.py and annotators.py have more.
"""

import html
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

from ...options import require
from ..records import Record
from ..values import (
    MOST_RESPONSES,
    choice_at,
    is_absent,
    keys_of,
    list_of,
    number_of,
    number_or_none,
    object_of,
    string_of,
    text_at,
    value_of,
)
from .comparisons import (
    Item,
    LeftOut,
    apart,
    carried,
    preferred,
    rated,
    scored,
    voted,
    votes_of,
)
from .house import with_input

LINE_BREAK = "<br/>"  # of HTML; spaces around it go with it
PREFERENCES = (-3, -2, -1, 0, 1, 2, 3)  # of HelpSteer; below 0 the first response is better

# The aspects that UltraFeedback rates one by one.
ASPECTS = ("instruction_following", "honesty", "truthfulness", "helpfulness")

# Who wins a judgement of an arena, and whether it is the first.
WINNERS = {
    "model_a": True,
    "model_b": False,
    "tie": None,
    "tie (bothbad)": None,
    "tie (inconsistent)": None,
}


# ---- two responses and who prefers which ---------------------------------------------------------


def webgpt(record: Record, where: str) -> Iterator[Item]:
    """WebGPT comparisons: two answers with graded scores, which sum to 0."""
    question = record["question"]
    if isinstance(question, dict):
        question = text_at(question, "full_text", f'{where}: "question"')
    answers, scores = [], []
    for side in "01":
        answers.append(text_at(record, f"answer_{side}", where))
        score = value_of(record, f"score_{side}", where)
        if is_absent(score):
            yield LeftOut("no score")
            return
        scores.append(number_of(score, f'{where}: "score_{side}"'))
    yield scored(string_of(question, f'{where}: "question"'), answers, scores)


def summaries(record: Record, where: str) -> Iterator[Item]:
    """Comparisons of two summaries (summarize from feedback)."""
    info = object_of(record["info"], f'{where}: "info"')
    two = list_of(record["summaries"], f'{where}: "summaries"', 2)
    require(len(two) == 2, f'{where}: "summaries" holds {len(two)}; expected two')
    texts = [
        text_at(object_of(value, f'{where}: "summaries"[{i}]'), "text", f"{where}: summaries[{i}]")
        for i, value in enumerate(two)
    ]
    choice = choice_at(record, "choice", where, (0, 1))
    if choice is None:
        yield LeftOut("no label", taste=str(record.get("split") or ""))
        return
    named = carried(record, annotator="worker", split="split")
    yield preferred(_post(info, where), texts, choice == 0) | named


def _post(info: Record, where: str) -> str:
    """What is to be summarised, as the authors write it: subreddit and title, post, TL;DR."""
    parts = []
    for key, begins in (
        ("subreddit", "SUBREDDIT: r/"),
        ("title", "TITLE: "),
        ("post", "POST: "),
        ("article", ""),
    ):
        if info.get(key):
            parts.append(begins + text_at(info, key, f'{where}: "info"'))
    require(
        info.get("post") or info.get("article"),
        f'{where}: "info" has no "post" and no "article"; found keys: {keys_of(info)}',
    )
    return "\n\n".join([*parts, "TL;DR:"])


def shp(record: Record, where: str) -> Iterator[Item]:
    """Stanford Human Preferences: two comments on a post; label 1 prefers A."""
    first, second = (text_at(record, f"human_ref_{side}", where) for side in "AB")
    label = choice_at(record, "labels", where, (0, 1))
    if label is None:
        yield LeftOut("no label")
        return
    prompt = text_at(record, "history", where)
    yield preferred(prompt, [first, second], label == 1) | carried(record, domain="domain")


def pku_saferlhf(record: Record, where: str) -> Iterator[Item]:
    """PKU-SafeRLHF: two responses, of which one is better, and one is safer."""
    prompt = text_at(record, "prompt", where)
    first, second = (text_at(record, f"response_{side}", where) for side in "01")
    for taste in ("better", "safer"):
        label = choice_at(record, f"{taste}_response_id", where, (0, 1))
        if label is None:
            yield LeftOut("no label", taste=taste)
        else:
            yield preferred(prompt, [first, second], label == 0) | {"taste": taste}


def helpsteer2(record: Record, where: str) -> Iterator[Item]:
    """HelpSteer2 preferences, from -3 (the first response is much better) to 3."""
    prompt = value_of(record, "prompt", where)
    first, second = record["response_1"], record["response_2"]
    strength = choice_at(record, "preference_strength", where, PREFERENCES)
    yield _by_strength(prompt, first, second, strength)


def helpsteer3(record: Record, where: str) -> Iterator[Item]:
    """HelpSteer3 preferences, from -3 (the first response is much better) to 3, and the votes."""
    strength = choice_at(record, "overall_preference", where, PREFERENCES)
    item = _by_strength(record["context"], record["response1"], record["response2"], strength)
    if isinstance(item, dict):
        if "chosen" in item:
            item |= _individual_votes(record, where, strength or 0)
        item |= carried(record, domain="domain", language="language")
    yield item


def _by_strength(prompt: Any, first: Any, second: Any, strength: float | None) -> Item:
    if strength is None:
        return LeftOut("no label")
    if strength == 0:
        return preferred(prompt, [first, second], None)
    return preferred(prompt, [first, second], strength < 0) | {"margin": abs(strength)}


def _individual_votes(record: Record, where: str, overall: float) -> Record:
    """How many annotators agree with the overall preference and how many do not, if it is known.

    One who prefers neither (0) is half a vote for each side.
    """
    named = f'{where}: "individual_preference"'
    individual = record.get("individual_preference")
    if not individual:
        return {}
    scores = [
        choice_at(object_of(value, named), "score", named, PREFERENCES)
        for value in list_of(individual, named)
    ]
    opinions: list[bool | None] = []
    for score in scores:
        if score is not None:
            opinions.append(None if score == 0 else score * overall > 0)
    return {"votes": votes_of(opinions)} if opinions else {}


def two_outputs(record: Record, where: str) -> Iterator[Item]:
    """AlpacaFarm and AlpacaEval: preference 1 is the first output, 2 the second, 0 or 1.5 neither.

    A preference between 1 and 2 is 1 plus the probability of the second, and becomes votes.
    """
    first, second = (text_at(record, f"output_{side}", where) for side in "12")
    value = value_of(record, "preference", where)
    if is_absent(value):
        yield LeftOut("no label")
        return
    preference = number_of(value, f'{where}: "preference"')
    require(
        preference == 0 or 1 <= preference <= 2,
        f'{where}: "preference" is {value}; expected 1 to 2, or 0 for a tie',
    )
    prompt = with_input(record, where)
    if preference in (0, 1.5):
        item = preferred(prompt, [first, second], None)
    elif preference in (1, 2):
        item = preferred(prompt, [first, second], preference == 1)
    else:
        item = voted(prompt, [first, second], [2 - preference, preference - 1])
    yield item | carried(record, annotator="annotator")


def arena(record: Record, where: str) -> Iterator[Item]:
    """Judgements of two conversations (Chatbot Arena, MT-bench), up to the turn that was judged."""
    winner = value_of(record, "winner", where)
    if is_absent(winner):
        yield LeftOut("no label")
        return
    is_known = isinstance(winner, str) and winner in WINNERS
    require(is_known, f'{where}: "winner" is {winner}; expected one of {", ".join(WINNERS)}')
    turn = record.get("turn")
    if not is_absent(turn):
        turn = number_of(turn, f'{where}: "turn"')
    both = [
        _up_to_turn(list_of(record[key], f'{where}: "{key}"'), turn)
        for key in ("conversation_a", "conversation_b")
    ]
    prompt, (first, second) = apart(both, where)
    item = preferred(prompt, [first, second], WINNERS[winner])
    yield item | carried(record, annotator="judge", language="language")


def _up_to_turn(conversation: list[Any], turn: float | None) -> list[Any]:
    """A conversation up to the answer of this turn, counted from 1; all of it without a turn."""
    if not turn:
        return conversation
    answers = [
        i
        for i, message in enumerate(conversation)
        if isinstance(message, dict) and message.get("role") == "assistant"
    ]
    return conversation[: answers[int(turn) - 1] + 1] if 1 <= turn <= len(answers) else conversation


def ukp(record: Record, where: str) -> Iterator[Item]:
    """UKPConvArg: two arguments for one side of a debate; both stand in the name of the file."""
    name = PurePath(where.rpartition(":")[0]).name.partition(".")[0]
    topic, _, side = name.replace("-", " ").partition("_")
    require(
        topic and side,
        f"{where}: the topic and its side stand in the file's name; expected TOPIC_SIDE.csv, not"
        f" {name}",
    )
    prompt = f"Debate: {topic}. Side: {side}. Give an argument."
    first, second = (_plain_text(text_at(record, key, where)) for key in ("a1", "a2"))
    label = text_at(record, "label", where)
    require(label in ("a1", "a2", "equal"), f'{where}: "label" is {label!r}; expected a1 or a2')
    yield preferred(prompt, [first, second], None if label == "equal" else label == "a1")


def _plain_text(text: str) -> str:
    """Without HTML: line breaks and entities as the characters that they stand for."""
    first, *rest = text.split(LINE_BREAK)
    if rest:
        *middle, last = rest
        lines = [first.rstrip(" "), *(line.strip(" ") for line in middle), last.lstrip(" ")]
        text = "\n".join(lines)
    return html.unescape(text)


# ---- more than two responses ---------------------------------------------------------------------


def domains(record: Record, where: str) -> Iterator[Item]:
    """Domain-specific preferences (DSP): in each taste its own response is better than any other.

    The response called "normal" is nobody's own.
    """
    responses = object_of(record["responses"], f'{where}: "responses"')
    require(len(responses) > 1, f'{where}: "responses" holds {len(responses)}; expected several')
    require(
        len(responses) <= MOST_RESPONSES,
        f'{where}: "responses" holds {len(responses)}; expected at most {MOST_RESPONSES}',
    )
    prompt = text_at(record, "query", where)
    for taste in responses:
        if taste == "normal":
            continue
        for other in responses:
            if other != taste:
                yield preferred(prompt, [responses[taste], responses[other]], True) | {
                    "taste": taste
                }


def ultrafeedback(record: Record, where: str) -> Iterator[Item]:
    """UltraFeedback as it was published: rated completions; a taste for every aspect, and overall.

    Overall is the mean of the aspects ("fine-grained_score"). A completion without a rating (N/A)
    is not compared.
    """
    named = f'{where}: "completions"'
    completions = record["completions"]
    if completions == []:
        return
    completions = [object_of(completion, named) for completion in list_of(completions, named)]
    prompt = text_at(record, "instruction", where)
    responses = [text_at(completion, "response", named) for completion in completions]
    for taste in ("overall", *ASPECTS):
        scores = [_rating(completion, taste, named) for completion in completions]
        yield from rated(prompt, responses, scores, "no rating", taste=taste)


def _rating(completion: Record, taste: str, where: str) -> float | None:
    """A completion's rating in one taste; None if it has none."""
    if taste == "overall":
        rating = value_of(completion, "fine-grained_score", where)
    else:
        annotations = object_of(value_of(completion, "annotations", where), f"{where}: annotations")
        aspect = object_of(value_of(annotations, taste, where), f"{where}: {taste}")
        rating = value_of(aspect, "Rating", f"{where}: {taste}")
    return None if rating == "N/A" else number_or_none(rating, f"{where}: {taste}")
