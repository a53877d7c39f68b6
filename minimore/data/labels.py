"""Labels: what annotators say of a pair besides which response they prefer.

A record with one "chosen" and one "rejected" response may also hold

    "votes": [3, 1]    how many annotators prefer "chosen", and how many "rejected"
    "margin": 1.5      by how much the chosen reward should be the higher one
    "weight": 2.0      how much the pair counts in training

A plain record is one vote for "chosen". Votes are used unless `LabelRules` says otherwise, margins
and weights only where they are asked for. What is used and cannot be read is refused by line.
"""

from dataclasses import dataclass
from typing import NamedTuple

from ..options import MOST, option, require
from .records import Record
from .values import is_number, keys_of, shown

VOTES = ("soft", "majority", "ignore")
TIES = ("out", "half")
LARGEST = 1e6  # margin or weight


class Label(NamedTuple):
    """What annotators say of a pair; by default one annotator prefers the chosen response.

    share: of the votes, those for the chosen response. votes: how many there are. margin: by how
    much the chosen reward should be the higher one, 0 if nothing is said. weight: of the pair in
    training.
    """

    share: float = 1.0
    votes: float = 1.0
    margin: float = 0.0
    weight: float = 1.0


ONE_VOTE = Label()


class LabelRules(NamedTuple):
    """What is read of the labels in a file.

    votes: "soft" uses the share of votes, "majority" only which side has more of them, and "ignore"
    leaves "chosen" as it is written. ties: label ties are left "out", or count one "half" for each
    side. margins, weights: whether they are used.
    """

    votes: str = "soft"
    ties: str = "out"
    margins: bool = False
    weights: bool = False


AS_WRITTEN = LabelRules(votes="ignore")
MAJORITY = LabelRules(votes="majority")  # for what knows one preference a pair


@dataclass(frozen=True, kw_only=True)
class LabelOptions:
    """The options of a command that reads labels."""

    votes: str = option(
        "soft",
        choices=VOTES,
        help='of records with "votes", use the share for each side, only which side has more, or '
        'nothing, so that "chosen" stays as it is written',
    )
    ties: str = option(
        "out",
        choices=TIES,
        help="leave label ties out, or let them count one half for each side, as WebGPT's authors "
        "did",
    )
    source_field: str | None = option(
        None,
        value="KEY",
        help="make a source NAME/VALUE of the records with each value of this key, such as "
        "annotator",
    )

    @property
    def label_rules(self) -> LabelRules:
        """What is read of the labels."""
        return LabelRules(self.votes, self.ties)


# ---- of a record ---------------------------------------------------------------------------------


def read_label(record: Record, where: str, rules: LabelRules) -> Label:
    """The label of a record, with the share of "chosen" as it is written there, 0 to 1.

    Raises InputError for a number that cannot be what it is called.
    """
    share, votes = _read_votes(record, where) if rules.votes != "ignore" else (1.0, 1.0)
    margin = _read_number(record, "margin", where) if rules.margins else None
    weight = _read_number(record, "weight", where) if rules.weights else None
    return Label(share, votes, margin or 0.0, weight or 1.0)


def _read_votes(record: Record, where: str) -> tuple[float, float]:
    """The share of votes for "chosen", and how many votes there are."""
    votes = record.get("votes")
    if votes is None:
        return 1.0, 1.0
    are_counts = (
        isinstance(votes, list)
        and len(votes) == 2
        and all(is_number(count) and 0 <= count <= MOST for count in votes)
        and sum(votes) > 0
    )
    require(
        are_counts,
        f'{where}: "votes" is {shown(votes)}; expected two numbers of at least 0, not both 0: how'
        ' many prefer "chosen", and how many "rejected" (--votes ignore reads none)',
    )
    return votes[0] / sum(votes), float(sum(votes))


def _read_number(record: Record, key: str, where: str) -> float | None:
    """record[key] as a positive number; None if it is not there."""
    value = record.get(key)
    if value is None:
        return None
    require(
        is_number(value) and 0 < value <= LARGEST,
        f'{where}: "{key}" is {shown(value)}; expected a number above 0, at most {LARGEST:,.0f}',
    )
    return float(value)


def refuse_votes(record: Record, where: str, rules: LabelRules) -> None:
    """Refuse votes in a record that makes several pairs, since they may be of any of them."""
    require(
        rules.votes == "ignore" or record.get("votes") is None,
        f'{where}: "votes" beside several responses; expected one "chosen" and one "rejected"'
        " (--votes ignore reads none)",
    )


def source_name(name: str, field: str | None, record: Record, where: str) -> str:
    """The name of the source to which a record belongs: its file's, or NAME/VALUE of a field.

    Raises InputError for a value that cannot be a part of a name.

    >>> source_name("safer", "annotator", {"annotator": "ana"}, "x:1")
    'safer/ana'
    """
    if field is None:
        return name
    require(
        field in record,
        f'{where}: "{field}" is missing, which --source-field asks for; found keys:'
        f" {keys_of(record)}",
    )
    value = record[field]
    is_name = type(value) in (int, str) and str(value).strip() and str(value).isprintable()
    require(
        is_name and len(str(value)) <= 100,
        f'{where}: "{field}" is {shown(value)}; expected a short string, which --source-field'
        f" {field} makes the name of a source",
    )
    return f"{name}/{value}"
