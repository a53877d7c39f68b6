"""Which point of a finished grid do you want? `minimore choose GRID` asks until it knows.

    points of the grid -> those that none beats (points.py)
        -> A or B? -> taste (taste.py) -> the next comparison (asking.py) -> A or B? -> ... -> best

Answers are typed, or read from a file. What is typed is stored after every answer, so that the same
command goes on where it was left. Source: Giovanelli et al. 2023, arXiv 2309.03581, whose idea this
is: a person compares, and what they want is learned. Differs, by its abstract: they compare whole
Pareto fronts, learn a ranking by a support vector machine, and go on to search for parameters.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...checksums import read_checked_json, write_checked_json
from ...data.records import read_records
from ...files import refuse_existing
from ...options import InputError, option, require
from ...tables import Table, number
from ..grid import REGIMES
from .asking import CLEAR, Comparison, Standing, most_informative, standing_of
from .points import CRITERIA, Point, pareto, points_of, standardised


@dataclass(frozen=True, kw_only=True)
class ChooseOptions:
    """What `choose` takes."""

    grid: str = option(
        value="GRID", positional=True, help="directory of a finished grid: of table2, or of methods"
    )
    regime: str = option(
        "conflict", choices=tuple(REGIMES), help="which regime of a grid of methods"
    )
    answers: str | None = option(
        None,
        value="FILE",
        help='answers that are there already, JSON lines {"chosen": POINT, "rejected": POINT}',
    )
    output: str | None = option(
        None, value="FILE", help="where typed answers are stored; the same command goes on"
    )


def choose(options: ChooseOptions) -> int:
    """Ask which point of a grid is wanted; returns the exit code."""
    points = points_of(Path(options.grid), options.regime)
    front = pareto(points)
    print_front(points, front)
    names = [point.name for point in front]
    read = list(answers_in_file(options.answers, names)) if options.answers else []
    typed = stored_answers(options.output, names) if options.output else []  # of earlier calls
    criteria = standardised(front)
    while True:
        standing = standing_of(criteria, [*read, *typed])
        if standing.is_over:
            break
        answer = ask(front, most_informative(standing), len(read) + len(typed) + 1)
        if answer is None:
            break
        typed.append(answer)
        if options.output:
            require_alone(options.output, names, typed[:-1])
            store_answers(options.output, names, typed)
    print_end(front, standing, len(read) + len(typed))
    return 0


# ---- answers -------------------------------------------------------------------------------------


def ask(front: Sequence[Point], pair: Comparison, number_asked: int) -> Comparison | None:
    """Ask which of two points is preferred, until A, B or enough is typed.

    Returns the preferred point and the other one; None for enough, or where the input ends.
    """
    table = Table(f"comparison {number_asked}", *CRITERIA)
    for letter, place in zip("AB", pair):
        table.add(f"{letter}: {front[place].name}", *cells_of(front[place]))
    print(f"\n{table}")
    while sys.stdin is not None:  # else it was closed, and nobody can answer
        try:
            typed = input("A or B, or enough? ").strip().lower()
        except EOFError:
            return None
        except UnicodeDecodeError:
            raise InputError(
                "standard input: holds bytes that are no text; expected A, B or enough in a line"
            ) from None
        if typed in ("a", "b"):
            return pair if typed == "a" else pair[::-1]
        if typed in ("e", "enough", "q"):
            return None
    return None


def answers_in_file(path: str, names: Sequence[str]) -> Iterator[Comparison]:
    """The answers in a file of JSON lines. Raises InputError for points of other names."""
    for where, record in read_records(path):
        yield comparison_of(record.get("chosen"), record.get("rejected"), names, where)


def comparison_of(chosen: object, rejected: object, names: Sequence[str], where: str) -> Comparison:
    """Two points by name as their places, the preferred one first."""
    for name in (chosen, rejected):
        require(
            name in names,
            f'{where}: {name!r} is none of the points to choose from; expected "chosen" and'
            f' "rejected" to be of {", ".join(names)}',
        )
    require(chosen != rejected, f"{where}: compares {chosen!r} with itself; expected two points")
    return names.index(str(chosen)), names.index(str(rejected))


def stored_answers(path: str, names: Sequence[str]) -> list[Comparison]:
    """What was typed before, if anything was."""
    if not Path(path).exists():
        refuse_existing(path)  # a place where no file can be made is refused before any question
        return []
    stored = read_checked_json(path)
    require(
        stored.get("points") == list(names),
        f"{path}: holds answers about other points; choose another --output",
    )
    try:
        return [comparison_of(a, b, names, path) for a, b in stored["answers"]]
    except InputError:
        raise
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{path}: holds no answers of `choose`; choose another name") from None


def require_alone(path: str, names: Sequence[str], typed: Sequence[Comparison]) -> None:
    """Refuse to store where another process has stored answers meanwhile: it would lose them."""
    require(
        stored_answers(path, names) == list(typed),
        f"{path}: another process has changed it since it was read; the same command goes on from"
        " what it holds now",
    )


def store_answers(path: str, names: Sequence[str], answers: Sequence[Comparison]) -> None:
    """Write what was typed so far."""
    by_name = [[names[chosen], names[rejected]] for chosen, rejected in answers]
    write_checked_json(path, {"points": list(names), "answers": by_name})


# ---- what is printed -----------------------------------------------------------------------------


def cells_of(point: Point) -> list[str]:
    """The criteria of a point as they are printed."""
    return [number(float(value), 3) for value in point.criteria]


def print_front(points: Sequence[Point], front: Sequence[Point]) -> None:
    """Print the points that may be the best, and how many others are beaten everywhere."""
    table = Table("point", *CRITERIA)
    for point in front:
        table.add(point.name, *cells_of(point))
    print(
        f"{len(points)} points; {len(points) - len(front)} of them are left out, since another is"
        f" as good in everything and better in something\n\n{table}"
    )


def print_end(front: Sequence[Point], standing: Standing, answers: int) -> None:
    """Print the best point, and how sure that is."""
    if standing.is_clear:
        verdict = "that is clear"
    elif standing.is_over:
        verdict = f"no comparison is left that would say much more, though below {CLEAR:.0%}"
    else:
        verdict = f"it would be clear at {CLEAR:.0%}"
    best = front[standing.best]
    print(
        f"\nyour choice after {answers} comparisons: {best.name}"
        f" (probability {standing.probabilities.max():.2f}; {verdict})"
    )
