"""Reward heads trained on stored states in seconds, seed after seed: the `probe` verb.

All of more.py lives at the head, so the paper's mechanism can be tried here with statistical power.
It is a linear probe, not the paper's Table 2, where the whole model is trained. Beside the
weightings of more.py stand the rewards of neighbouring work (methods/).

K sources, B pairs in a step, N pairs of a source, D width, S seeds.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..calibration import accuracy
from ..data.sampling import PAIRS_PER_SOURCE, epoch_steps
from ..engine.optim import AdamW
from ..files import refuse_existing, write_json
from ..more import (
    MOST_SOURCES,
    NORMALIZATIONS,
    WEIGHTINGS,
    bradley_terry_losses,
    head_gradients,
)
from ..options import Range, check_ranges, option, require
from ..reward import fresh_head
from ..tables import Table
from ..uncertainty import over_seeds
from .features import PROBE, Stored, load_features, load_states
from .methods.by_name import METHODS
from .methods.solve import Parameters
from .methods.states import StatePairs
from .saved_head import BestHead, best_head, open_origin, save_head
from .solved import Runs, print_notes, rates_of, solved_runs

DEFAULT_METHODS = ("uniform", "more")  # unless others are asked for
ROWS_AT_ONCE = 4096  # of stored states, widened to fp32


@dataclass(frozen=True, kw_only=True)
class ProbeOptions:
    """What `probe` takes."""

    features: str = option(value="DIR", help="what `minimore features` stored")
    method: tuple[str, ...] = option(
        (),
        repeat=True,
        choices=(*WEIGHTINGS, *METHODS),
        help="once per weighting, or per method of neighbouring work; others are compared with the"
        " first (default: uniform and more)",
    )
    seeds: int = option(
        20,
        within=Range(least=1, most=1000),
        help="heads a method; a seed sets the head's start and the order of the data",
    )
    normalize: str = option(
        "l2",
        choices=NORMALIZATIONS,
        help="more: scaling of the head gradients before the solve",
    )
    sampling: str = option(
        "equal",
        choices=("equal", "proportional"),
        help="equal shares of every source in every step, or a random mix",
    )
    pairs_per_source: int | None = option(
        None, within=PAIRS_PER_SOURCE, help="resample every source to this many pairs an epoch"
    )
    epochs: int = option(1, within=Range(least=1, most=10**6), help="passes over the sampled pairs")
    batch_size: int | None = option(
        None, within=Range(least=1, most=10**6), help="pairs a step (default: 16 x sources)"
    )
    learning_rate: float = option(
        1e-2,
        within=Range(above=0),
        help="peak learning rate of Adam, falling linearly; states are scaled to unit variance "
        "first",
    )
    label_smoothing: float = option(
        0.0,
        within=Range(least=0, below=0.5),
        help="share of labels taken as the wrong way round",
    )
    save: str | None = option(
        None,
        value="DIR",
        help="write the head with the lowest mean NLL on the test pairs, of all weightings and "
        "seeds, as a reward model on the trunk whose states were stored; must not exist",
    )
    model: str | None = option(
        None,
        value="DIR|HUB",
        help="with --save: the model whose states were stored (default: where it was then)",
    )
    json: str | None = option(None, value="OUT.json", help="write all figures here; must not exist")


# ---- one head ------------------------------------------------------------------------------------


def train_head(
    train: Sequence[Tensor], method: str, options: ProbeOptions, seed: int, scale: float = 1.0
) -> tuple[Tensor, np.ndarray]:
    """A head (D,) trained on differences of states, and the weights of every step (steps, K).

    train: one (N, D) tensor a source, divided by scale. The gradient of the weighted loss with
    respect to the head is the weighted sum of the sources' closed-form gradients, so there is no
    autograd.
    """
    K, D = len(train), train[0].shape[1]
    batch_size, sizes = options.batch_size or 16 * K, [len(source) for source in train]
    steps = [
        step
        for epoch in range(options.epochs)
        for step in epoch_steps(
            sizes, options.sampling, options.pairs_per_source, batch_size, seed, epoch
        )
    ]
    weigh: Callable[..., Tensor] = WEIGHTINGS[method]
    if method == "more":
        weigh = partial(weigh, normalize=options.normalize)
    weighting_state: dict[str, Tensor] = {}
    optimizer = AdamW()
    head = optimizer.adopt("head", fresh_head(D, seed))
    history = []
    nothing = torch.zeros(1, D)  # to take off: the states are differences already
    for t, sampled in enumerate(steps):  # (B, 2): source, pair in the source
        z = rows_of(train, sampled).float() / scale  # (B, D)
        source = torch.from_numpy(sampled[:, 0])  # (B,)
        batch = (head, z, nothing, source, K, options.label_smoothing)
        losses = bradley_terry_losses(*batch)  # (K,)  Eq. 1
        gradients = head_gradients(*batch)  # (K, D)  Eq. 8
        pairs = torch.bincount(source, minlength=K)  # (K,) how many of each source
        weights = weigh(losses, gradients, pairs, weighting_state)  # (K,)
        # The gradient of a source without a pair is NaN, and its weight 0.
        gradient = weights.to(gradients) @ gradients.nan_to_num()  # (D,) of Eq. 7
        optimizer.learning_rate = options.learning_rate * (1 - t / len(steps))
        optimizer.update("head", head, gradient)
        optimizer.steps += 1
        history.append(weights.double().numpy())
    return head, np.stack(history)


def rows_of(train: Sequence[Tensor], sampled: np.ndarray) -> Tensor:
    """The states of the sampled pairs (B, 2), each a source and a pair in it: (B, D)."""
    z = train[0].new_empty(len(sampled), train[0].shape[1])
    for k, states in enumerate(train):
        places = np.flatnonzero(sampled[:, 0] == k)
        z[places] = states[sampled[places, 1]]
    return z


def scale_of(train: Sequence[Tensor]) -> float:
    """The root mean square of all states, each source counting the same; 1 if they are all 0."""
    squares = [
        float(np.mean([part.float().square().mean() for part in states.split(ROWS_AT_ONCE)]))
        for states in train
    ]
    return math.sqrt(np.mean(squares)) or 1.0


def margins_of(head: Tensor, states: Tensor, scale: float) -> np.ndarray:
    """Margins of a head on differences of states (N, D): (N,)."""
    parts = [part.float() @ head for part in states.split(ROWS_AT_ONCE)]
    return torch.cat(parts).double().numpy() / scale


@dataclass(frozen=True)
class Weighting:
    """A weighting of more.py as one of methods/: a shared head that is trained in steps."""

    name: str
    options: ProbeOptions

    def fit(self, train: StatePairs, seed: int) -> Parameters:
        """head: (D,)."""
        parts = [train.difference[train.source == k].float() for k in range(train.sources)]
        scale = scale_of(parts)
        head, _ = train_head(parts, self.name, self.options, seed, scale)
        return {"head": head / scale}

    def margins(self, parameters: Parameters, pairs: StatePairs, knows_source: bool) -> Tensor:
        """The same for every source."""
        return pairs.difference @ parameters["head"].to(pairs.chosen)


# ---- many heads ----------------------------------------------------------------------------------


def probe(options: ProbeOptions) -> None:
    """Train heads by every method and seed.

    Print accuracy, ECE and NLL per source over seeds, of the worst source, and the differences.
    """
    check_ranges(options)
    refuse_existing(options.json, "--json")
    refuse_existing(options.save, "--save")
    require(options.save or not options.model, "--model: goes with --save")
    description, stored = load_features(options.features)
    names, methods = list(stored), tuple(dict.fromkeys(options.method)) or DEFAULT_METHODS
    check_methods(options, methods, len(names))
    origin = open_origin(options.model, description) if options.save else None
    states = load_states(options.features) if set(methods) & set(METHODS) else {}
    runs: Runs = {}
    for method in methods:
        if method in WEIGHTINGS:
            runs[method] = runs_of(method, stored, options)
        else:
            runs |= solved_runs(method, states, options.seeds)
    print_notes(methods, states)
    print(f"{PROBE}: {description['model']}, {options.seeds} seeds")
    print(probe_table(names, runs))
    if options.save and origin:
        head, best = trained_again(runs, stored, options)
        save_head(options.save, head, best, origin, description)
    if options.json:
        report = {
            "note": PROBE,
            "options": asdict(options),
            "sources": names,
            "methods": runs,
            "length_accuracy": {name: accuracy(stored[name]["test"].longer) for name in names},
        }
        write_json(options.json, report)


def trained_again(
    runs: Runs, stored: Mapping[str, Mapping[str, Stored]], options: ProbeOptions
) -> tuple[Tensor, BestHead]:
    """The best head (D,) of all weightings and seeds, and which it is.

    Heads are not kept while they are compared; the same seed makes the same one.
    """
    best = best_head({method: rates for method, rates in runs.items() if method in WEIGHTINGS})
    train = [parts["train"].difference for parts in stored.values()]
    scale = scale_of(train)
    head, _ = train_head(train, best.method, options, best.seed, scale)
    return head / scale, best


def check_methods(options: ProbeOptions, methods: Sequence[str], sources: int) -> None:
    """Refuse what cannot be run with so many sources."""
    batch_size = options.batch_size
    require(
        options.sampling != "equal" or not batch_size or batch_size % sources == 0,
        f"--batch-size {batch_size}: under equal sampling expected a multiple of the {sources}"
        " sources",
    )
    require(
        not options.save or set(methods) & set(WEIGHTINGS),
        f"--save: expected a --method with one head, one of {', '.join(WEIGHTINGS)}",
    )
    require(
        "more" not in methods or sources <= MOST_SOURCES,
        f"--method more: {sources} sources, but the exact solver takes at most {MOST_SOURCES};"
        " merge some",
    )


def runs_of(
    method: str, stored: Mapping[str, Mapping[str, Stored]], options: ProbeOptions
) -> dict[str, list]:
    """Accuracy, ECE, NLL and mean weights of every seed and source: {rate: (S, K)}."""
    train = [parts["train"].difference for parts in stored.values()]
    test = [parts["test"].difference for parts in stored.values()]
    scale = scale_of(train)
    runs: dict[str, list] = {"accuracy": [], "ece": [], "nll": [], "weights": []}
    for seed in range(options.seeds):
        head, weights = train_head(train, method, options, seed, scale)
        margins = [margins_of(head, states, scale) for states in test]
        if not all(np.isfinite(m).all() for m in margins):
            raise FloatingPointError(
                f"{method}, seed {seed}: a margin is not finite; try a smaller --learning-rate"
            )
        for rate, values in rates_of(margins).items():
            runs[rate].append(values)
        runs["weights"].append(weights.mean(0).tolist())
    return runs


# ---- the table -----------------------------------------------------------------------------------


def probe_table(names: Sequence[str], runs: Runs) -> str:
    """Per method and source, the mean over seeds with half the width of its 95% interval.

    Then the differences from the first method, seed by seed.
    """
    worst_of: dict[str, Callable[..., Any]] = {"accuracy": np.min, "ece": np.max, "nll": np.max}
    tables = [str(rate_table(rate, names, runs, worst)) for rate, worst in worst_of.items()]
    weighted = {method: rates for method, rates in runs.items() if "weights" in rates}
    if weighted:
        tables.append(str(rate_table("weights", names, weighted, None)))
    tables.append(
        "± is half a 95% interval over seeds, the test pairs held fixed;"
        " a difference is taken seed by seed"
    )
    return "\n".join(tables)


def rate_table(
    rate: str, names: Sequence[str], runs: Runs, worst: Callable[..., Any] | None
) -> Table:
    """One rate of every method and source; with `worst`, of their mean and the worst one, too."""
    table = Table(rate, *names, *(("mean", "worst") if worst else ()))
    values = {}  # method -> (S, columns)
    for method, rates in runs.items():
        by_source = np.array(rates[rate])  # (S, K)
        columns = [by_source]
        if worst:
            columns += [by_source.mean(1, keepdims=True), worst(by_source, 1)[:, None]]
        values[method] = np.concatenate(columns, 1)
    first, *others = runs
    for method in runs:
        table.add(method, *map(mean_over_seeds, values[method].T))
    for method in others:
        differences = values[method] - values[first]
        table.add(f"{method} - {first}", *map(mean_over_seeds, differences.T))
    return table


def mean_over_seeds(values: np.ndarray) -> str:
    """The mean with half of its interval: "0.7301 ± 0.0042"."""
    mean, half = over_seeds(values)
    return f"{mean:.4f} ± {half:.4f}"
