"""People whose taste is known, and points that they choose among."""

import numpy as np

from minimore.calibration import probability
from minimore.lab.choosing.asking import standing_of


def random_front(random, points=12):
    """Points on a sphere, none of which is better than another in everything, standardised."""
    directions = np.abs(random.standard_normal((points, 4)))
    front = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    return (front - front.mean(0)) / front.std(0)


class SimulatedPerson:
    """Somebody with a known taste, who is as unsure as Bradley-Terry says."""

    def __init__(self, points, random):
        weights = np.abs(random.standard_normal(4))
        self.values = points @ (10 * weights / np.linalg.norm(weights))
        self.shares = random.random((len(points), len(points)))

    def prefers_first(self, pair):
        a, b = pair
        return self.shares[a, b] < probability(self.values[a] - self.values[b])

    def answer(self, pair):
        """The pair with the preferred point first."""
        return pair if self.prefers_first(pair) else pair[::-1]


def at_random(random):
    """Asks any comparison that was not asked."""
    return lambda standing: standing.unasked[int(random.integers(len(standing.unasked)))]


def asked_until_over(points, person, choose):
    """All answers, and where they lead, when one point is clear or no question is worth asking."""
    answers = []
    while not (standing := standing_of(points, answers)).is_over:
        answers.append(person.answer(choose(standing)))
    return answers, standing
