"""Is agreement among samples a calibrated confidence? `minimore reproduce agreement`.

    pairs of all annotators -> reward model            σ(|margin|)
                            -> judge (judge.py)        the probability of its likelier letter
                                -> n letters a pair    the three measures of consistency.py

An answer is the response that is called better, and it is right with the probability with which the
annotator of the pair prefers that response: the world knows it exactly, so that no label adds noise
to an ECE. Both models have the same size and see the same pairs as often, and everything is asked
twice: of models that saw all pairs, and of models that know a tenth of them by heart.

N pairs, n answers to each, K annotators.
"""

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..alignment.policy import LanguageModel, open_policy
from ..calibration import expected_calibration_error, probability
from ..data.forms import Pair
from ..data.pairs import Source, load_source
from ..data.world import World
from ..engine.objective import RewardObjective
from ..files import make_directory
from ..model.checkpoint import Checkpoint
from ..model.tokenizer import Tokenizer
from ..more import WEIGHTINGS
from ..options import check_ranges, require
from ..report import source_margins
from ..reward import ModelOptions, open_reward_model
from ..tables import Table
from ..units import in_time
from .cells import prepare_world
from .consistency import MEASURES, counts_of, most_frequent
from .drift import true_pairs
from .grid import REGIMES, Home, ReproduceOptions, home_of
from .judge import NO_LETTER, Questions, drawn_answers, letter_probabilities, questions_of
from .policies import MAX_LENGTH, Fitting, fitted
from .scheme_tables import cell_text, difference_text
from .stored import stored_or_made, write_report

AMOUNTS = {"all pairs": 1.0, "a tenth, by heart": 0.1}  # shares of every annotator's pairs
SAMPLES = (5, 25)  # answers to a question; odd, so that both letters are never as frequent
FULL, QUICK = Fitting(500, 80, 3e-3), Fitting(40, 20, 3e-3)
MICRO_TOKENS = 8192
BASELINE = "reward model"
RATES = ("accuracy", "confidence", "ece")

Figures = dict[str, dict[str, float]]  # of every confidence: RATES


def check_agreement(options: ReproduceOptions) -> None:
    """Refuse options that this experiment has no use for, or decides itself (InputError)."""
    check_ranges(options)
    require(
        not options.model and not options.source,
        "agreement: exists in the world only, where it is known what is right",
    )
    require(
        not options.says_how_cells_train() and options.protocol == "clean",
        "agreement: trains one judge and one reward model; expected no --scheme, --width,"
        " --protocol, --learning-rate or --batch-size",
    )
    regimes = [name for name, fields in REGIMES.items() if "reveal" not in fields]
    require(
        options.regime in regimes,
        f"agreement: a judge sees no prompt, so none may name its annotator; got --regime"
        f" {options.regime}, expected one of {', '.join(regimes)}",
    )
    least = round(1 / min(AMOUNTS.values()))
    require(
        options.training_pairs() >= least,
        f"--pairs {options.training_pairs()}: agreement takes a tenth of them; expected at least"
        f" {least}",
    )


# ---- one world -----------------------------------------------------------------------------------


def figures_of_world(home: Home, share: float, fitting: Fitting) -> Figures:
    """RATES of every confidence, of models that saw this share of a world's training pairs."""
    prepare_world(home.directory, home.world)
    paths = home.world.paths(home.directory).values()
    tests = [true_pairs(path) for _, path in paths]
    p_chosen = true_probabilities(home.world, tests)
    train = [pair for path, _ in paths for pair in first_of(share, true_pairs(path))]
    judge, tokenizer = fitted_judge(home, train, fitting)
    test = [pair for own in tests for pair in own]
    questions = questions_of(test, tokenizer, home.world.seed + 1)
    return {
        BASELINE: rates_of_margins(reward_margins(home, share, fitting), p_chosen),
        **judge_rates(judge, questions, p_chosen, home.world.seed),
    }


def fitted_judge(
    home: Home, pairs: Sequence[Pair], fitting: Fitting
) -> tuple[LanguageModel, Tokenizer]:
    """A judge that learned these pairs, and its tokenizer."""
    checkpoint = Checkpoint(str(home.directory / "model"))
    options = ModelOptions(model=str(checkpoint.directory), device="cpu", compute_dtype="float32")
    questions = questions_of(pairs, checkpoint.tokenizer, home.world.seed)
    policy = open_policy(checkpoint, options)
    return fitted(policy, questions.items(), fitting, home.world.seed), checkpoint.tokenizer


def judge_rates(
    judge: LanguageModel, questions: Questions, p_chosen: np.ndarray, seed: int
) -> Figures:
    """RATES of the judge's own probability, and of agreement among its answers.

    p_chosen: (N,), with which probability the annotator prefers the chosen response.
    """
    # Of each answer, how probable it is that the annotator would give it; no letter never: (N, 3).
    p_first = np.where(questions.chosen_first, p_chosen, 1 - p_chosen)
    p_right = np.stack([p_first, 1 - p_first, np.zeros(len(p_first))], 1)
    own = letter_probabilities(judge, questions)
    rates = {"judge": rates_of(own.max(1), at(p_right, own.argmax(1)))}
    answers = drawn_answers(judge, questions, max(SAMPLES), seed)
    for n in SAMPLES:
        counts = counts_of(answers[:, :n], NO_LETTER + 1)
        right = at(p_right, most_frequent(counts))
        for name, measure in MEASURES.items():
            rates[f"{name} of {n}"] = rates_of(measure(counts), right)
    return rates


def first_of(share: float, items: Sequence[Any]) -> Sequence[Any]:
    """So large a share of the items, the first ones; one at least."""
    return items[: max(1, round(share * len(items)))]


def true_probabilities(world: World, tests: Sequence[Sequence[Pair]]) -> np.ndarray:
    """With which probability each annotator prefers the chosen response of its own pairs: (N,)."""
    betas = np.broadcast_to(world.decisiveness, len(world.annotators))
    margins = [betas[k] * world.true_margins(list(own))[:, k] for k, own in enumerate(tests)]
    return probability(np.concatenate(margins))


def reward_margins(home: Home, share: float, fitting: Fitting) -> np.ndarray:
    """Margins on all test pairs of a reward model that saw what the judge saw: (N,)."""
    world = home.world
    options = ModelOptions(
        model=str(home.directory / "model"),
        device="cpu",
        compute_dtype="float32",
        seed=world.seed,
    )
    model, checkpoint = open_reward_model(options)

    def read(name: str, path: str) -> Source:
        return load_source(name, path, checkpoint.tokenizer, MAX_LENGTH)

    files = home.files()
    train = [first_of(share, read(name, path).pairs) for name, (path, _) in files.items()]
    items = [pair for own in train for pair in own]
    source = [k for k, own in enumerate(train) for _ in own]
    weigh = partial(WEIGHTINGS["proportional"], state={})  # every pair counts the same
    objective = RewardObjective(len(files), weigh, "proportional")
    model = fitted(model, items, fitting, world.seed, objective, source)
    tests = [read(name, path) for name, (_, path) in files.items()]
    return np.concatenate([source_margins(model, test, MICRO_TOKENS) for test in tests])


def rates_of_margins(margins: np.ndarray, p_chosen: np.ndarray) -> dict[str, float]:
    """RATES of a reward model, which is as sure as its margins (N,) are large."""
    right = np.where(margins > 0, p_chosen, 1 - p_chosen)
    return rates_of(probability(np.abs(margins)), right)


def rates_of(confidence: np.ndarray, right: np.ndarray) -> dict[str, float]:
    """RATES of N answers: how sure they are, and how probably each is right."""
    return {
        "accuracy": float(right.mean()),
        "confidence": float(confidence.mean()),
        "ece": expected_calibration_error(confidence, right),
    }


def at(values: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The value of every row (N, A) at its place: (N,)."""
    return np.take_along_axis(values, places[:, None], 1)[:, 0]


# ---- all worlds ----------------------------------------------------------------------------------


def run_agreement(options: ReproduceOptions, output: Path) -> dict[str, list[Figures]]:
    """Figures by amount, of every seed: read where they are stored, else made and stored."""
    make_directory(output / "rates")
    results: dict[str, list[Figures]] = {amount: [] for amount in AMOUNTS}
    for number, seed in enumerate(options.seed_range(), 1):
        began = time.monotonic()
        pairs, test_pairs = options.training_pairs(), options.test_pair_count()
        home = home_of(options, options.regime, pairs, test_pairs, seed)
        for amount, share in AMOUNTS.items():
            path = output / "rates" / f"{share:g}-{seed}.json"
            fitting = QUICK if options.quick else FULL
            results[amount].append(
                stored_or_made(path, partial(figures_of_world, home, share, fitting))
            )
        print(f"[{number}/{options.seed_count()}] {in_time(time.monotonic() - began)}", flush=True)
    return results


def report_agreement(
    options: ReproduceOptions, output: Path, results: dict[str, list[Figures]]
) -> None:
    """Print a table for each amount of pairs, and write them and every figure."""
    parts = [
        f"{options.seed_count()} seeds, each another world; ± is half a 95% interval over seeds"
        " (t). accuracy: how probably the annotator agrees with the answer. ECE: of that"
        " probability in ten bins of confidence. ! a difference whose interval excludes 0"
    ]
    for amount, worlds in results.items():
        parts.append(f"{amount}\n{confidence_table(worlds)}")
    write_report(output, results, "\n\n".join(parts))


def confidence_table(worlds: Sequence[Figures]) -> Table:
    """A row a confidence: RATES, and its ECE minus that of the reward model in the same world."""
    table = Table(
        *("confidence", "accuracy", "mean confidence", "ECE", f"| ECE minus {BASELINE}"),
    )
    for name in worlds[0]:
        rates = {rate: np.array([world[name][rate] for world in worlds]) for rate in RATES}
        base = np.array([world[BASELINE]["ece"] for world in worlds])
        table.add(
            name,
            *(cell_text(values) for values in rates.values()),
            None if name == BASELINE else difference_text(rates["ece"] - base),
        )
    return table
