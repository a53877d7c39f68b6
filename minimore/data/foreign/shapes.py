"""Shapes: the table of record shapes that people's files have, and which one a record has.

A shape is known by its keys. Its reader turns a record into house records (comparisons.py), which
are the forms of forms.py. A new shape is a reader and one line of SHAPES.
"""

from collections import Counter
from collections.abc import Callable, Generator, Iterable
from typing import NamedTuple

from ...options import InputError, require
from ..columns import read_rows
from ..prompt_keys import PROMPT_KEYS, is_whole
from ..records import Record
from ..values import keys_of
from . import house, readers
from .annotators import MULTIPREF_GROUPS, multipref, pandalm, prism
from .comparisons import Item, LeftOut
from .trees import items_of_tree

Reader = Callable[[Record, str], Iterable[Item]]


class Shape(NamedTuple):
    """One shape of records.

    keys: all that a record of it has. read: its reader; None if only all records of a file together
    make comparisons. fits: what else must be true. is_house: training reads such records as they
    are, without the reader.
    """

    name: str
    what: str
    keys: tuple[str, ...]
    read: Reader | None
    fits: Callable[[Record], bool] = lambda record: True
    is_house: bool = False

    @property
    def is_foreign(self) -> bool:
        """Whether forms.py reads no record of it, whatever its values."""
        return not self.is_house and "chosen" not in self.keys

    def holds(self, record: Record) -> bool:
        """Whether a record has this shape."""
        return all(key in record for key in self.keys) and self.fits(record)


def _is_prompt_in(*keys: str) -> Callable[[Record], bool]:
    """Tells whether the prompt of a record is in these fields, and in no other one."""

    def fits(record: Record) -> bool:
        others = [key for key in PROMPT_KEYS if key not in keys and record.get(key)]
        return "prompt" not in record and not others and not is_whole(record)

    return fits


def _is_three_by_three(record: Record) -> bool:
    """Whether there are three responses on each side, and it is no record of RewardBench 2."""
    sides = (record["chosen"], record["rejected"])
    return "num_correct" not in record and all(
        isinstance(side, list) and len(side) == 3 for side in sides
    )


def _holds_object(key: str) -> Callable[[Record], bool]:
    """Tells whether the value of a key is an object."""
    return lambda record: isinstance(record[key], dict)


# In the order in which they are tried. The last ones have the fewest keys.
SHAPES = (
    Shape(
        "oasst-tree",
        "OASST trees, one a line",
        ("message_tree_id", "prompt"),
        items_of_tree,
        _holds_object("prompt"),
    ),
    Shape(
        "oasst-messages",
        "OASST flat messages",
        ("message_id", "parent_id", "text", "role"),
        None,
    ),
    Shape(
        "webgpt",
        "WebGPT comparisons",
        ("question", "answer_0", "answer_1", "score_0", "score_1"),
        readers.webgpt,
    ),
    Shape(
        "summarize",
        "summarize-from-feedback comparisons",
        ("info", "summaries", "choice"),
        readers.summaries,
    ),
    Shape(
        "domains",
        "a query with a response by domain (DSP)",
        ("query", "responses"),
        readers.domains,
        _holds_object("responses"),
    ),
    Shape(
        "shp",
        "Stanford Human Preferences",
        ("history", "human_ref_A", "human_ref_B", "labels"),
        readers.shp,
    ),
    Shape(
        "pku-saferlhf",
        "PKU-SafeRLHF, better and safer",
        ("prompt", "response_0", "response_1", "better_response_id", "safer_response_id"),
        readers.pku_saferlhf,
    ),
    Shape(
        "ultrafeedback",
        "UltraFeedback's rated completions",
        ("instruction", "completions"),
        readers.ultrafeedback,
    ),
    Shape(
        "helpsteer2-preference",
        "HelpSteer2 preferences",
        ("prompt", "response_1", "response_2", "preference_strength"),
        readers.helpsteer2,
    ),
    Shape(
        "helpsteer3",
        "HelpSteer3 preferences",
        ("context", "response1", "response2", "overall_preference"),
        readers.helpsteer3,
    ),
    Shape(
        "multipref",
        "MultiPref, votes of four annotators",
        ("text", "completion_a", "completion_b", *MULTIPREF_GROUPS),
        multipref,
    ),
    Shape(
        "prism",
        "PRISM conversations, rated turn by turn",
        ("conversation_history", "user_id"),
        prism,
    ),
    Shape(
        "helpsteer",
        "HelpSteer and HelpSteer2, a rated response a row",
        ("prompt", "response", "helpfulness"),
        None,
    ),
    Shape(
        "unpaired",
        "TRL's unpaired preferences, a good or a bad completion a row",
        ("prompt", "completion", "label"),
        None,
    ),
    Shape(
        "pandalm",
        "PandaLM, labels of several annotators",
        ("instruction", "response1", "response2", "annotator1"),
        pandalm,
    ),
    Shape(
        "two-outputs",
        "AlpacaFarm and AlpacaEval",
        ("instruction", "output_1", "output_2", "preference"),
        readers.two_outputs,
    ),
    Shape(
        "arena",
        "judgements of Chatbot Arena and MT-bench",
        ("conversation_a", "conversation_b", "winner"),
        readers.arena,
    ),
    Shape(
        "openai",
        "OpenAI's preference tuning",
        ("input", "preferred_output", "non_preferred_output"),
        house.openai,
    ),
    Shape("ukp", "UKPConvArg", ("#id", "label", "a1", "a2"), readers.ukp),
    Shape(
        "alpaca",
        "an instruction with an input",
        ("instruction", "input", "chosen", "rejected"),
        house.alpaca,
        _is_prompt_in("instruction", "input"),
    ),
    Shape(
        "orca",
        "a question with a system text",
        ("system", "question", "chosen", "rejected"),
        house.orca,
        _is_prompt_in("question"),
    ),
    Shape(
        "rm-bench",
        "RM-Bench, three by three",
        ("prompt", "chosen", "rejected", "domain"),
        house.rm_bench,
        _is_three_by_three,
        is_house=True,
    ),
    Shape(
        "pairs",
        "chosen and rejected, as HH, RewardBench and many others",
        ("chosen", "rejected"),
        house.pairs,
        is_house=True,
    ),
    Shape(
        "scored",
        "a prompt with responses and scores",
        ("responses", "scores"),
        house.scored_responses,
        is_house=True,
    ),
    Shape(
        "text-score",
        "texts with scores",
        ("text", "score"),
        house.scored_texts,
        is_house=True,
    ),
)
BY_NAME = {shape.name: shape for shape in SHAPES}


def shape_of(record: Record) -> Shape | None:
    """The shape of a record; None if it has no known one.

    What has "chosen" has it for its pairs, whatever other keys stand beside it.
    """
    has_chosen = "chosen" in record
    shapes = [shape for shape in SHAPES if not has_chosen or "chosen" in shape.keys]
    return next((shape for shape in shapes if shape.holds(record)), None)


def shape_named(name: str) -> Shape:
    """The shape of this name; InputError if there is none."""
    require(name in BY_NAME, f"shape {name!r}: expected one of {', '.join(BY_NAME)}")
    return BY_NAME[name]


def require_shape(shape: Shape, record: Record, where: str) -> None:
    """Refuse a record of another shape (InputError)."""
    require(
        shape.holds(record),
        f"{where}: has not the shape {shape.name!r} ({shape.what}); expected the keys"
        f" {', '.join(shape.keys)}; found keys: {keys_of(record)}",
    )


def refuse_part_of_pair(record: Record, where: str) -> None:
    """Refuse a record that makes pairs only together with others of its file (InputError)."""
    shape = shape_of(record)
    if shape is not None and shape.read is None:
        raise InputError(
            f"{where}: has the shape {shape.name!r}, of which several records make a pair;"
            " `minimore data convert` the file first"
        )


def house_records(record: Record, where: str) -> list[Record]:
    """The house records of one record of any shape, as forms.py reads them.

    A record that is a house record already, or that has no known shape, comes back as it is.
    Comparisons without a label are no part of the list; `items_of` has them, too. Raises InputError
    for a record that cannot be read.
    """
    shape = shape_of(record)
    if shape is None or shape.is_house or shape.read is None:
        return [record]
    return [item for item in items_of(shape, record, where) if isinstance(item, dict)]


def items_of(shape: Shape, record: Record, where: str) -> list[Item]:
    """The comparisons of a record of this shape, and what is said instead of others."""
    require_shape(shape, record, where)
    return list(shape.read(record, where)) if shape.read else [record]


def read_house_records(
    path: str, left_out: Counter[str]
) -> Generator[tuple[str, Record], None, None]:
    """("file:line", house record) of a file, for training and scoring without a conversion.

    If the first record has a foreign shape, all others must have it, too. If not, every record has
    a shape of its own, and none of a foreign shape is read. left_out: counts comparisons without a
    label, by reason. Raises InputError for a line that cannot be read, and for one that holds
    several tastes.
    """
    of_file: Shape | None = None  # the foreign shape of all its records
    for number, (where, record) in enumerate(read_rows(path)):
        shape = shape_of(record)
        if number == 0 and shape is not None and shape.is_foreign and shape.read is not None:
            of_file = shape
        if of_file is not None:
            shape = of_file
        elif shape is None or shape.is_house or shape.is_foreign:
            yield where, record  # as it is; forms.py refuses what it cannot read
            continue
        items = items_of(shape, record, where)
        refuse_several_tastes(items, shape, where)
        for item in items:
            if isinstance(item, dict):
                yield where, item
            elif isinstance(item, LeftOut):
                left_out[item.reason] += item.comparisons


def refuse_several_tastes(items: list[Item], shape: Shape, where: str) -> None:
    """Refuse a record with labels of several kinds, which would be learned as if they were one."""
    tastes = dict.fromkeys(
        item["taste"] for item in items if isinstance(item, dict) and "taste" in item
    )
    require(
        len(tastes) < 2,
        f"{where}: {shape.name} records hold several tastes ({', '.join(tastes)}); give each its"
        f" file with `minimore data convert {where.rpartition(':')[0]} --output DIR`",
    )
