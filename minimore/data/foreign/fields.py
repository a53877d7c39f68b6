"""Fields: how a file of no known shape is read, by the names of its fields.

--chosen-field A --rejected-field B                     A is better than B in every record
--chosen-field A --rejected-field B --winner-field W    W says which of the two is better
--chosen-field A --rejected-field B --score-field S,T   S and T are the scores of A and B
--chosen-field A --score-field S                        A and S are a list of responses and one
                                                        of scores; or every record is one
                                                        response with its score, compared with
                                                        the others to the same prompt
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from ...options import InputError, require
from ..messages import is_conversation
from ..records import Record
from ..values import grade_of, is_absent, shown, value_of
from .comparisons import Item, LeftOut, apart, preferred, scored
from .rows import Keys

FIRST = ("a", "model_a", "response_a", "first")  # what a winner field says without being asked
SECOND = ("b", "model_b", "response_b", "second")
TIES = ("tie", "tie (bothbad)", "both", "neither")


class Fields(NamedTuple):
    """The names of the fields that hold the parts of a comparison; of a winner also its values.

    scores: none, one or two. winner: its field, then what it says for the first response, for the
    second and, if it is named, for neither.
    """

    prompt: str | None
    chosen: str
    rejected: str | None
    scores: tuple[str, ...] = ()
    winner: tuple[str, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        """All that a record must have."""
        named = (self.prompt, self.chosen, self.rejected, *self.scores, *self.winner[:1])
        return tuple(name for name in named if name is not None)

    def rows(self) -> Keys:
        """The same for a file of one response a row. Raises InputError if no prompt is named."""
        if self.prompt is None:
            raise InputError("--score-field: rows of one response need --prompt-field as well")
        return Keys(self.prompt, self.chosen, self.scores)

    def items(self, record: Record, where: str) -> Iterator[Item]:
        """The comparisons of one record."""
        prompt = None if self.prompt is None else value_of(record, self.prompt, where)
        first = self._response_at(self.chosen, record, where)
        if self.rejected is None:
            yield self._scored_list(record, prompt, first, where)
            return
        responses = [first, self._response_at(self.rejected, record, where)]
        if prompt is None:
            prompt, responses = apart(responses, where)
        if self.scores:
            yield self._scored_two(record, prompt, responses, where)
        elif self.winner:
            yield self._won(record, prompt, responses, where)
        else:
            yield preferred(prompt, responses, True)

    def _response_at(self, key: str, record: Record, where: str) -> Any:
        """A response, which is not the name of another one."""
        value = value_of(record, key, where)
        require(
            not is_name_of_field(value, record),
            f'{where}: "{key}" is {shown(value)}, the name of another field; expected a response.'
            f" If it says which one is better, give --winner-field {key}",
        )
        return value

    def _scored_list(self, record: Record, prompt: Any, responses: Any, where: str) -> Item:
        """A list of responses, and one of as many scores."""
        key = self.scores[0]
        scores = value_of(record, key, where)
        are_lists = all(isinstance(value, list) for value in (responses, scores))
        require(
            are_lists and len(responses) == len(scores),
            f'{where}: "{self.chosen}" and "{key}" are {shown(responses)} and {shown(scores)};'
            " expected two lists of the same length",
        )
        scores = [grade_of(score, f'{where}: "{key}"') for score in scores]
        if prompt is None:
            require(responses, f'{where}: "{self.chosen}" is empty; expected responses')
            prompt, responses = apart(responses, where)
        return scored(prompt, responses, scores)

    def _scored_two(self, record: Record, prompt: Any, responses: list[Any], where: str) -> Item:
        """Two responses, each with its score."""
        scores = [value_of(record, key, where) for key in self.scores]
        if any(map(is_absent, scores)):
            return LeftOut("no score")
        named = zip(scores, self.scores)
        return scored(
            prompt, responses, [grade_of(score, f'{where}: "{key}"') for score, key in named]
        )

    def _won(self, record: Record, prompt: Any, responses: list[Any], where: str) -> Item:
        """Two responses of which a field names the better one."""
        key = self.winner[0]
        value = value_of(record, key, where)
        if is_absent(value):
            return LeftOut("no label")
        says = value.strip().lower() if isinstance(value, str) else shown(value)
        outcomes = self._outcomes()
        require(
            says in outcomes,
            f'{where}: "{key}" is {shown(value)}, which may mean either response; say what it is'
            f" for the first, the second and neither, as in --winner-field {key}=1,2,0",
        )
        return preferred(prompt, responses, outcomes[says])

    def _outcomes(self) -> dict[str, bool | None]:
        """What the winner's field may say, and whether the first response is then the better one.

        None is neither. Where no values are named, it is one of the usual words, or the name of the
        field that holds the better response.
        """
        if len(self.winner) > 1:
            return dict(zip(self.winner[1:], (True, False, None)))
        outcomes: dict[str, bool | None] = dict.fromkeys(TIES)
        outcomes |= dict.fromkeys(FIRST, True) | dict.fromkeys(SECOND, False)
        return outcomes | {self.chosen.lower(): True, str(self.rejected).lower(): False}


def fields_of_options(
    prompt: str | None,
    chosen: str | None,
    rejected: str | None,
    score: str | None,
    winner: str | None,
) -> Fields | None:
    """The fields that options name; None if they name none. InputError if they fit no file."""
    if not any((prompt, chosen, rejected, score, winner)):
        return None
    require(chosen, "--chosen-field is missing: it names the response, or the first of two")
    require(
        not (score and winner), "--score-field and --winner-field both say who is better; give one"
    )
    scores = tuple(score.split(",")) if score else ()
    require(
        rejected or (score and not winner),
        "--rejected-field is missing: it names the second response; without one, --score-field"
        " names the scores",
    )
    require(
        not score or (all(scores) and len(scores) == (2 if rejected else 1)),
        f"--score-field {score}: expected a field for every response field, as in S or S,T",
    )
    return Fields(prompt, chosen or "", rejected, scores, _winner(winner))


def _winner(option: str | None) -> tuple[str, ...]:
    """KEY or KEY=FIRST,SECOND[,NEITHER] as its parts."""
    if not option:
        return ()
    key, equals, values = option.partition("=")
    if not equals:
        return (key,)
    says = [value.strip().lower() for value in values.split(",")]
    require(
        key and 2 <= len(says) <= 3 and all(says) and len(set(says)) == len(says),
        f"--winner-field {option}: expected KEY, or KEY=FIRST,SECOND,NEITHER with what it says for"
        " the first response, the second and neither",
    )
    return (key, *says)


def are_rows(fields: Fields, record: Record) -> bool:
    """Whether a file that begins with this record has one response a row."""
    response = record.get(fields.chosen)
    is_list = isinstance(response, list) and not is_conversation(response)
    return fields.rejected is None and not is_list


def is_name_of_field(value: Any, record: Record) -> bool:
    """Whether a value is the name of a field of its own record: a label, and no response."""
    return isinstance(value, str) and value.strip() in record
