"""What the functions of calibration.py and uncertainty.py must do: slow loops and exact binomials.

Each check takes the function and raises WrongAnswer for the first case in which it is wrong.
"""

import math
from collections.abc import Callable, Iterable

import numpy as np

from .expect import expect, expect_close, expect_refused


def sigmoid(margin: float) -> float:
    """1 / (1 + exp(-margin)), of a margin that is not large."""
    return 1 / (1 + math.exp(-margin))


# ---- bins ----------------------------------------------------------------------------------------


def members_of_bins(p: Iterable[float], bins: int) -> list[list[int]]:
    """Which predictions lie in each bin ((m - 1) / M, m / M], 0 in the first: a slow loop."""
    members: list[list[int]] = [[] for _ in range(bins)]
    for i, probability in enumerate(p):
        m = 0
        while probability > (m + 1) / bins:
            m += 1
        members[m].append(i)
    return members


def check_reliability(reliability: Callable) -> None:
    """Bins of equal width by a loop, with predictions on their edges; bins of equal count."""
    random = np.random.default_rng(0)
    p, y = random.random(40), (random.random(40) < 0.5).astype(float)
    on_edges = np.array([1.0, 0.5, 0.0, 0.25, 0.3, 0.5, 0.2, 0.26, 0.5])
    shares = np.array([1.0, 0.0, 0.25, 1.0, 0.5, 1.0, 0.0, 1.0, 0.75])
    cases = [
        ("9 predictions, some on the edges of 4 bins", on_edges, shares, 4),
        ("40 random predictions in 10 bins", p, y, 10),
        ("predictions .1 and .3 in 10 bins", np.array([0.1, 0.3]), np.array([0.0, 1.0]), 10),
    ]
    for case, probabilities, outcomes, bins in cases:
        members = members_of_bins(probabilities, bins)
        expect_bins(
            case, reliability(probabilities, outcomes, bins), members, probabilities, outcomes
        )
        edges = reliability(probabilities, outcomes, bins).edges
        expect_close(f"{case}: edges", edges, [m / bins for m in range(bins + 1)])
    order = sorted(range(40), key=lambda i: p[i])
    members = [list(part) for part in np.array_split(order, 7)]
    result = reliability(p, y, 7, "quantile")
    expect_bins("40 random predictions in 7 quantile bins", result, members, p, y)
    expect_close(
        "the upper edges of 7 quantile bins", result.edges[1:], [max(p[m]) for m in members]
    )
    tied = np.array([0.5, 0.2, 0.5, 0.5])
    result = reliability(tied, [1, 0, 0, 0], 2, "quantile")
    expect_close("two quantile bins of .5, .2, .5, .5: accuracy", result.accuracy, [0.5, 0.0])
    expect_refused("2 predictions and 1 outcome", lambda: reliability([0.5, 0.6], [1.0]))
    expect_refused("a probability of 1.5", lambda: reliability([1.5], [1.0]))


def expect_bins(
    case: str, result: tuple, members: list[list[int]], p: np.ndarray, y: np.ndarray
) -> None:
    """Raise WrongAnswer unless the bins hold these members, and NaN where they hold none."""
    count, confidence, accuracy = result[:3]
    expect_close(f"{case}: count", count, [len(m) for m in members])
    means = [float(np.mean(p[m])) if m else math.nan for m in members]
    expect_close(f"{case}: confidence", confidence, means)
    means = [float(np.mean(y[m])) if m else math.nan for m in members]
    expect_close(f"{case}: accuracy", accuracy, means)


def check_pair_ece(pair_ece: Callable) -> None:
    """Margins of one size by hand; then random ones, both orders of every pair in a loop."""
    sure = math.log(3)  # sigmoid is 3/4
    expect_close("margins of log 3, 3 of 4 right", pair_ece([sure, sure, sure, -sure]), 0.0)
    expect_close("margins of log 3, all right", pair_ece([sure, sure, sure]), 0.25)
    half = math.log(9)  # sigmoid is .9, and no share of votes is
    expect_close("margins of log 9 and 3 of 4 votes", pair_ece([half, half], outcomes=0.75), 0.15)
    random = np.random.default_rng(1)
    for N, bins in ((7, 10), (60, 10), (60, 4)):
        margins = random.normal(0.7, 1.5, N)
        # Too sure in every other tenth, not sure enough in between: other bins have another ECE.
        shares = np.array([(int(10 * sigmoid(m)) % 2 + random.random()) / 2 for m in margins])
        p = [sigmoid(m) for m in margins] + [sigmoid(-m) for m in margins]
        y = np.concatenate([shares, 1 - shares])
        gaps = [abs(sum(y[i] - p[i] for i in members)) for members in members_of_bins(p, bins)]
        result = pair_ece(margins, bins, shares)
        expect_close(
            f"{N} random pairs with shares of votes, {bins} bins", result, sum(gaps) / (2 * N)
        )


# ---- temperature ---------------------------------------------------------------------------------


def check_fit_temperature(fit_temperature: Callable) -> None:
    """Cases with a formula, and random ones, where the slope of the loss in 1 / T must be 0."""
    expect_close(
        "margins 2, 2, 2, -2", fit_temperature([2.0, 2.0, 2.0, -2.0]), 2 / math.log(3), 1e-6
    )
    expect_close(
        "margins 2, 2 with 3 of 4 votes", fit_temperature([2.0, 2.0], 0.75), 2 / math.log(3), 1e-6
    )
    expect_close("margins 1, 2, 3, all right", fit_temperature([1.0, 2.0, 3.0]), 0.0)
    expect_close("margins 1, -2, 0.5, mean below 0", fit_temperature([1.0, -2.0, 0.5]), math.inf)
    random = np.random.default_rng(2)
    for scale in (0.1, 1.0, 1e6):
        margins = scale * random.normal(0.8, 1.0, 50)
        right = 1 / root_of_slope(margins)
        case = f"50 random margins of about {scale:g}"
        expect_close(f"{case}, in units of T", fit_temperature(margins) / right, 1.0, 1e-6)


def root_of_slope(margins: np.ndarray) -> float:
    """The t at which sum m sigmoid(-t m) is 0: an interval of ratio 2^200, halved 200 times."""
    low, high = 2.0**-100, 2.0**100
    for _ in range(200):
        middle = math.sqrt(low * high)
        with np.errstate(over="ignore"):
            slope = np.sum(margins / (1 + np.exp(middle * margins)))
        low, high = (middle, high) if slope > 0 else (low, middle)
    return low


# ---- the noise floor -----------------------------------------------------------------------------


def deviations(trials: int, p: float) -> tuple[np.ndarray, np.ndarray]:
    """|X / n - p| for X = 0 .. n of a binomial, and their probabilities: exact."""
    x = np.arange(trials + 1)
    log_choose = [
        math.lgamma(trials + 1) - math.lgamma(k + 1) - math.lgamma(trials - k + 1) for k in x
    ]
    chances = np.exp(np.array(log_choose) + x * math.log(p) + (trials - x) * math.log(1 - p))
    return np.abs(x / trials - p), chances


def quantile_of(values: np.ndarray, chances: np.ndarray, share: float) -> float:
    """The smallest value that is not exceeded with the chance `share`."""
    order = np.argsort(values)
    return float(values[order][np.searchsorted(np.cumsum(chances[order]), share)])


def check_noise_floor(noise_floor: Callable) -> None:
    """Margins of one size lie in one bin and its mirror image: their ECE is |X / N - p|, exactly.

    The mean of 1,000 replicates may be 5 standard errors away, the quantile two steps of 1 / N.
    """
    N, replicates = 400, 1000
    for p, votes in ((0.75, 1), (0.95, 1), (0.75, 4)):
        margins = np.full(N, math.log(p / (1 - p)))
        margins[::2] *= -1  # which side is called chosen plays no part
        sizes, chances = deviations(N * votes, p)
        mean = float(sizes @ chances)
        error = math.sqrt((sizes**2 @ chances - mean**2) / replicates)
        of_votes = None if votes == 1 else np.full(N, votes)
        floor = noise_floor(margins, replicates=replicates, votes=of_votes)
        case = f"{N} pairs of probability {p:g}, votes {votes}"
        expect_close(f"{case}: mean (tolerance {5 * error:.2g})", floor[0], mean, 5 * error)
        high = quantile_of(sizes, chances, 0.95)
        step = 1 / (N * votes)
        expect_close(f"{case}: 95% quantile (tolerance {2 * step:g})", floor[1], high, 2 * step)
    check_floor_of_two_bins(noise_floor)


def check_floor_of_two_bins(noise_floor: Callable) -> None:
    """The deviations of two bins add up, and cannot cancel each other; a seed repeats itself."""
    margins = np.repeat([math.log(0.65 / 0.35), math.log(0.95 / 0.05)], 100)
    right = sum(float(np.dot(*deviations(100, p))) / 2 for p in (0.65, 0.95))
    mean = noise_floor(margins, replicates=1000)[0]
    case = "100 pairs of probability .65 and 100 of .95: mean (tolerance .0025)"
    expect_close(case, mean, right, 0.0025)
    first, again, other = (noise_floor(margins, replicates=20, seed=seed) for seed in (0, 0, 1))
    expect(first[0] == again[0], "seed 0 twice", "equal floors", "others")
    expect(first[0] != other[0], "seeds 0 and 1", "different floors", "equal ones")
