"""How soon `minimore choose` finds the point that a person likes best, whose taste is known.

    python tests/bench/choosing.py [--people 200] [--points 12]

Every person has other points, none of which beats another in everything. Prints how often the best
point is taken for it after so many comparisons, then how many are asked until the search is over; ±
is half a 95% interval over people. About 12 minutes on one core.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from minimore.lab.choosing.asking import most_informative, standing_of
from minimore.tables import Table

sys.path.insert(0, str(Path(__file__).parents[1] / "lab"))
from people import SimulatedPerson, asked_until_over, at_random, random_front

AFTER = (3, 5, 8, 11)  # comparisons


def is_right(person, point):
    return float(point == person.values.argmax())


def after_comparisons(points, person, choose):
    """Whether the best point is taken for it after AFTER comparisons."""
    answers, right = [], []
    for count in range(1, max(AFTER) + 1):
        standing = standing_of(points, answers)
        if standing.unasked:
            answers.append(person.answer(choose(standing)))
        if count in AFTER:
            right.append(is_right(person, standing_of(points, answers).best))
    return right


def winner_that_stays(points, person):
    """The last winner, if every point meets the winner so far once."""
    winner = 0
    for challenger in range(1, len(points)):
        winner = person.answer((winner, challenger))[0]
    return winner


def text_of(values):
    return f"{np.mean(values):.2f} ± {1.96 * np.std(values, ddof=1) / len(values) ** 0.5:.2f}"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--people", type=int, default=200)
    parser.add_argument("--points", type=int, default=12)
    options = parser.parse_args()
    names = ("the most informative ones", "at random")
    early, late, stays = {n: [] for n in names}, {n: [] for n in names}, []
    for seed in range(options.people):
        random = np.random.default_rng([7, seed])
        points = random_front(random, options.points)
        person = SimulatedPerson(points, random)
        for name, choose in zip(names, (most_informative, at_random(random))):
            early[name].append(after_comparisons(points, person, choose))
            answers, standing = asked_until_over(points, person, choose)
            late[name].append(
                [len(answers), is_right(person, standing.best), float(standing.is_clear)]
            )
        stays.append(is_right(person, winner_that_stays(points, person)))
    table = Table("right after comparisons", *map(str, AFTER), "asked in all", "right", "clear")
    for name in names:
        table.add(
            name, *map(text_of, np.array(early[name]).T), *map(text_of, np.array(late[name]).T)
        )
    print(f"{table}\nthe winner stays: right {text_of(stays)}")


if __name__ == "__main__":
    main()
