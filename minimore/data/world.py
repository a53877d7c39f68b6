"""A synthetic world of annotators whose shared reward and drift are known exactly.

A response y is a bag of n words. Annotator k values it at

    r*(y) + drift_k(y),    each a sum of word values / √n

Over the world's own pairs the drifts are orthogonal to r*, equally strong, and sum to zero over the
annotators: they are the corners of a regular simplex. Labels are drawn:

    P(a over b) = σ(β_k (margin of annotator k)),    β_k the annotator's decisiveness

An annotator may be a crowd of equal taste, of which several vote on every pair.

Everything is written as real files: JSON lines, a tokenizer trained here, a checkpoint directory.

W words, K annotators, N pairs or responses.
"""

import gzip
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ..calibration import probability
from ..checksums import file_checksum, read_checked_json, write_checked_json, write_checksums
from ..files import make_directory, write_bytes, written_whole
from ..model.checkpoint import random_checkpoint
from ..options import InputError, require
from .forms import Pair

WORDS = [
    *("amber", "anchor", "basil", "bridge", "candle", "canyon", "cedar", "copper"),
    *("coral", "cotton", "ember", "falcon", "fennel", "garnet", "ginger", "hazel"),
    *("indigo", "ivory", "jasper", "juniper", "lantern", "lemon", "linen", "maple"),
    *("marble", "meadow", "nectar", "olive", "onyx", "orchard", "pebble", "pepper"),
    *("quartz", "raven", "saffron", "silver", "thistle", "timber", "velvet", "willow"),
]
ANNOTATORS = ("ana", "ben", "cleo", "dov", "eve")
PAIRS_PER_ANNOTATOR = 10**6  # at most; all prompts differ, and there are 40^6 of six words
MOST_VOTES = 1000  # of a pair
TOKENIZER_LINES = 200  # of each annotator, on which the tokenizer is trained

Line = dict[str, Any]
Paths = dict[str, tuple[Path, Path]]  # annotator -> training and test file


@dataclass(frozen=True)
class World:
    """Annotators, how much they differ, and how many pairs each labels.

    conflict: share of an annotator's taste that is drift, 0 to 1. decisiveness: beta of each
    annotator, or one for all. train_pairs: of each annotator, or one for all. ties: share of pairs
    that are labelled a tie. votes: on every pair; one is a plain label. reveal: whether the prompt
    names the annotator. reversed: an annotator who wants the opposite of r*, whose drift is no
    longer orthogonal to it.

    Raises InputError for a world that cannot be.
    """

    annotators: tuple[str, ...] = ANNOTATORS
    conflict: float = 0.2
    decisiveness: tuple[float, ...] = (2.0,)
    train_pairs: tuple[int, ...] = (3200,)
    test_pairs: int = 1000
    ties: float = 0.0
    votes: int = 1
    reveal: bool = False
    reversed: str | None = None
    prompt_words: int = 6
    response_words: int = 14
    seed: int = 0

    def __post_init__(self) -> None:
        K, most = len(self.annotators), len(WORDS) - 2
        require(
            0 <= self.conflict <= 1 and 0 <= self.ties < 1 and 1 <= K <= most,
            f"world: conflict {self.conflict}, ties {self.ties}, {K} annotators:"
            f" expected shares and at most {most} annotators",
        )
        counts = [*self.train_pairs, self.test_pairs + 1]
        has_pairs = self.train_pairs and min(counts) >= 1 and max(counts) <= PAIRS_PER_ANNOTATOR
        require(
            0 <= self.seed < 2**63 and has_pairs,
            f"world: seed {self.seed}, {self.train_pairs} training and {self.test_pairs} test"
            " pairs: expected a seed from 0 to 2^63 - 1,"
            f" and 1 to {PAIRS_PER_ANNOTATOR} pairs each",
        )
        require(
            self.reversed is None or self.reversed in self.annotators,
            f"world: reversed is {self.reversed!r}; expected one of {', '.join(self.annotators)}",
        )
        require(
            1 <= self.votes <= MOST_VOTES,
            f"world: {self.votes} votes a pair; expected 1 to {MOST_VOTES}",
        )
        prompts = sum(self._own(self.train_pairs, k) + self.test_pairs for k in range(K))
        require(
            len(WORDS) ** self.prompt_words >= 2 * prompts,
            f"world: {self.prompt_words} words a prompt make too few prompts for {prompts} pairs",
        )
        for name in ("decisiveness", "train_pairs"):
            count = len(getattr(self, name))
            require(count in (1, K), f"world: {name} has {count} values; expected 1 or {K}")

    @staticmethod
    def _own(values: tuple, k: int) -> Any:
        """The value of annotator k: its own, or the one for all."""
        return values[k % len(values)]

    # ---- what is known exactly ----

    def values(self) -> tuple[np.ndarray, np.ndarray]:
        """Word values of r* (W,) and of the drifts (K, W), both already scaled by the conflict."""
        K, W = len(self.annotators), len(WORDS)
        random = np.random.default_rng([self.seed, 0]).standard_normal((W, K + 1))
        # Orthonormal columns, of which the first is what all words have alike. Those behind it are
        # therefore centred.
        basis, _ = np.linalg.qr(np.concatenate([np.ones((W, 1)), random], 1))
        shared, axes = basis[:, 1], basis[:, 2:].T
        drifting = [k for k in range(K) if self.annotators[k] != self.reversed]
        n, drifts = len(drifting), np.zeros((K, W))
        simplex = np.eye(n) - 1 / max(1, n)  # n points that sum to zero
        drifts[drifting] = simplex @ axes[:n] * math.sqrt(n / max(1, n - 1))  # of unit length
        scale = math.sqrt(W)  # unit variance over words
        shared = scale * math.sqrt(1 - self.conflict) * shared
        drifts = scale * math.sqrt(self.conflict) * drifts
        if self.reversed:
            drifts[self.annotators.index(self.reversed)] = -2 * shared  # r* + drift = -r*
        return shared, drifts

    def true_margins(self, pairs: list[Pair]) -> np.ndarray:
        """Every annotator's true margin of every pair, before beta: (N, K)."""
        shared, drifts = self.values()
        return _count_differences(pairs) @ (shared + drifts).T / math.sqrt(self.response_words)

    def true_rewards(self, responses: Sequence[str]) -> "TrueRewards":
        """The true rewards of responses, whoever wrote them: what a policy is judged by.

        A response is worth what its first n words are worth. Words that the world does not know
        have no value, though they take a place.
        """
        shared, drifts = self.values()
        n = self.response_words
        counts = np.array([_counts(" ".join(text.split()[:n])) for text in responses])  # (N, W)
        counts = counts.reshape(-1, len(WORDS)) / math.sqrt(n)
        return TrueRewards(counts @ shared, counts @ (shared + drifts).T)

    def decompose(self, margins: np.ndarray, pairs: list[Pair]) -> "Decomposition":
        """What a model's margins m on these pairs consist of: shared reward, drift, and neither.

            slope on x          mean(m x) / mean(x²)            1 if m has x as it is
            share of X          mean of the square of m's projection on the columns of X / mean(m²)

        with x the true margins of r* or of one drift, and X those of r* (N, 1), or of all drifts
        (N, K). margins: (N,). r* and the drifts are orthogonal under the world's pairs, so the
        shares add up to 1, but for what a sample adds: to drift, about K / N of what is neither.
        They are NaN for margins of 0. The drifts sum to zero, so a model with one of them has
        -1 / (K - 1) of every other. Source: Eq. 4-6.

        Raises ValueError if an annotator is reversed: that drift is -2 r*, orthogonal to nothing.
        """
        if self.reversed:
            raise ValueError(
                f"{self.reversed} is reversed: shared reward and drift cannot be told apart in"
                " this world"
            )
        m = np.asarray(margins, dtype=np.float64)
        counts = _count_differences(pairs) / math.sqrt(self.response_words)
        shared, drifts = self.values()
        true, drift = counts @ shared, counts @ drifts.T  # (N,), (N, K)
        both = np.concatenate([true[:, None], drift], 1)  # (N, 1 + K)
        return Decomposition(
            shared=_slope(m, true),
            drift=np.array([_slope(m, column) for column in drift.T]),
            shared_share=_share(m, true[:, None]),
            drift_share=_share(m, drift),
            other_share=1 - _share(m, both),
        )

    def ceilings(self, pairs: list[Pair]) -> tuple[np.ndarray, np.ndarray]:
        """Expected accuracy per annotator over these pairs, of two rules: (K,) and (K,).

        The first is each annotator's own best rule. The second is the best rule shared by all. It
        decides each pair by sum_k (2 p_k - 1): no preference shared by all annotators has a better
        mean accuracy, so no single reward has either.
        """
        betas = np.broadcast_to(self.decisiveness, len(self.annotators))
        p = probability(betas * self.true_margins(pairs))  # (N, K)
        takes_first = (2 * p - 1).sum(1, keepdims=True) > 0
        return np.maximum(p, 1 - p).mean(0), np.where(takes_first, p, 1 - p).mean(0)

    # ---- files ----

    @classmethod
    def read(cls, directory: Path) -> "World":
        """The world that `write` wrote into a directory. Raises InputError if there is none."""
        path = directory / "world.json"
        require(path.is_file(), f"{path}: no such file; expected the directory of a world")
        values = read_checked_json(path)
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()
        }
        try:
            return cls(**fields)
        except TypeError:
            raise InputError(f"{path}: is not that of a world of this version") from None

    def paths(self, directory: Path) -> Paths:
        """Where `write` puts the training and the test file of each annotator."""
        paths = {}
        for k, name in enumerate(self.annotators):
            suffix = ".jsonl.gz" if LineFormat.of_annotator(k).is_zipped else ".jsonl"
            home = directory / "data"
            paths[name] = (home / f"{name}.train{suffix}", home / f"{name}.test{suffix}")
        return paths

    def write(self, directory: Path) -> Paths:
        """Write NAME.train.jsonl, NAME.test.jsonl of each annotator, a checkpoint, and world.json.

        The annotators use different line formats, and one is zipped, so that everything comes
        through the doors that real data comes through. Returns the paths by name.
        """
        make_directory(directory / "data")
        random = np.random.default_rng([self.seed, 1])
        prompts: set[str] = set()
        paths = self.paths(directory)
        texts = []  # on which the tokenizer is trained
        for k, name in enumerate(self.annotators):
            train_pairs = self._own(self.train_pairs, k)
            pairs = train_pairs + self.test_pairs
            lines = [json.dumps(self._line(k, random, prompts)) for _ in range(pairs)]
            _write_lines(paths[name][0], lines[:train_pairs])
            _write_lines(paths[name][1], lines[train_pairs:])
            texts += lines[:TOKENIZER_LINES]
        tokenizer = directory / "tokenizer.json"
        train_tokenizer(texts, tokenizer)
        files = [tokenizer, *(path for both in paths.values() for path in both)]
        write_checksums(
            directory, {str(path.relative_to(directory)): file_checksum(path) for path in files}
        )
        random_checkpoint(directory / "model", small_gpt_neox(), tokenizer, self.seed)
        write_checked_json(directory / "world.json", asdict(self))
        return paths

    def _line(self, k: int, random: np.random.Generator, prompts: set[str]) -> Line:
        """One labelled pair of annotator k, on a prompt that no other pair has."""
        question = _draw_words(random, self.prompt_words)
        while question in prompts:
            question = _draw_words(random, self.prompt_words)
        prompts.add(question)
        speaker = f"{self.annotators[k]} asks " if self.reveal else ""
        prompt = f"\n\nHuman: {speaker}{question}\n\nAssistant:"
        a = " " + _draw_words(random, self.response_words)
        b = " " + _draw_words(random, self.response_words)
        margin = self.true_margins([Pair(prompt, a, b)])[0, k]
        p = float(probability(self._own(self.decisiveness, k) * margin))
        for_a = int((random.random(self.votes) < p).sum())
        is_tie = random.random() < self.ties
        labelled = LabelledPair(prompt, a, b, (for_a, self.votes - for_a), p)
        return labelled.tie() if is_tie else LineFormat.of_annotator(k).write(labelled)


class LabelledPair(NamedTuple):
    """Two responses, the votes for either, and the probability that a vote is for a."""

    prompt: str
    a: str
    b: str
    votes: tuple[int, int]
    p: float

    @property
    def prefers_a(self) -> bool:
        """Whether a has more votes, or as many."""
        return self.votes[0] >= self.votes[1]

    @property
    def votes_of_sides(self) -> Line:
        """The votes for the chosen and for the rejected response; nothing for a single vote."""
        return {"votes": sorted(self.votes, reverse=True)} if sum(self.votes) > 1 else {}

    @property
    def chosen(self) -> str:
        """The response that was preferred."""
        return self.a if self.prefers_a else self.b

    @property
    def rejected(self) -> str:
        """The other response."""
        return self.b if self.prefers_a else self.a

    def tie(self) -> Line:
        """Two texts with equal scores."""
        return {"text": [self.prompt + self.a, self.prompt + self.b], "score": [1.0, 1.0]}

    def scored(self) -> Line:
        """Two texts, of which the preferred one has the score 1; with votes, whole dialogues."""
        if sum(self.votes) > 1:
            return self.dialogues()
        scores = [float(self.prefers_a), float(not self.prefers_a)]
        return {"text": [self.prompt + self.a, self.prompt + self.b], "score": scores}

    def dialogues(self) -> Line:
        """Two whole dialogues, without a prompt."""
        both = {"chosen": self.prompt + self.chosen, "rejected": self.prompt + self.rejected}
        return both | self.votes_of_sides

    def triple(self) -> Line:
        """Prompt and responses, with the exact probability of a vote for the chosen one."""
        p = self.p if self.prefers_a else 1 - self.p
        return {
            "prompt": self.prompt,
            "chosen": self.chosen,
            "rejected": self.rejected,
            "probability": round(p, 6),
            **self.votes_of_sides,
        }


class LineFormat(NamedTuple):
    """How an annotator's lines are written."""

    write: Callable[[LabelledPair], Line]
    is_zipped: bool = False

    @classmethod
    def of_annotator(cls, k: int) -> "LineFormat":
        """The format of annotator k: five formats, in turn."""
        formats = (
            cls(LabelledPair.triple),
            cls(LabelledPair.triple),
            cls(LabelledPair.dialogues),
            cls(LabelledPair.triple, is_zipped=True),
            cls(LabelledPair.scored),
        )
        return formats[k % len(formats)]


class TrueRewards(NamedTuple):
    """Of N responses: r* (N,), and what every annotator values them at (N, K)."""

    shared: np.ndarray
    annotators: np.ndarray


class Decomposition(NamedTuple):
    """What margins consist of: see `World.decompose`.

    shared, drift (K,): slopes on r* and on each drift, 1 where a model has it as it is.
    shared_share, drift_share, other_share: shares of the margins' mean square.
    """

    shared: float
    drift: np.ndarray
    shared_share: float
    drift_share: float
    other_share: float


def _slope(m: np.ndarray, x: np.ndarray) -> float:
    """mean(m x) / mean(x²); NaN for x of 0."""
    return float(np.mean(m * x) / np.mean(x * x)) if np.any(x) else math.nan


def _share(m: np.ndarray, columns: np.ndarray) -> float:
    """The share of the mean square of m that its projection on the columns (N, C) has."""
    if not np.any(m):
        return math.nan
    coefficients = np.linalg.lstsq(columns, m, rcond=None)[0]
    return float(np.mean((columns @ coefficients) ** 2) / np.mean(m * m))


def _count_differences(pairs: list[Pair]) -> np.ndarray:
    """How much more often each word occurs in the chosen response: (N, W)."""
    return np.array([_counts(pair.chosen) - _counts(pair.rejected) for pair in pairs])


def _counts(response: str) -> np.ndarray:
    """How often each word of the world occurs: (W,)."""
    index = {word: i for i, word in enumerate(WORDS)}
    places = [index[word] for word in response.split() if word in index]
    return np.bincount(np.array(places, dtype=int), minlength=len(WORDS))


def _draw_words(random: np.random.Generator, count: int) -> str:
    return " ".join(WORDS[i] for i in random.integers(len(WORDS), size=count))


def _write_lines(path: Path, lines: list[str]) -> None:
    content = "".join(line + "\n" for line in lines).encode()
    write_bytes(path, gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)


def train_tokenizer(texts: list[str], path: Path, vocabulary: int = 512) -> None:
    """Train a small byte-level BPE, which can encode any text, and save it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=["<|endoftext|>", "<|padding|>"],  # ids 0 and 1: see `small_gpt_neox`
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    with written_whole(path) as unfinished:
        tokenizer.save(str(unfinished))


def small_gpt_neox(width: int = 64, blocks: int = 2, heads: int = 4, vocabulary: int = 512) -> dict:
    """config.json of a small GPT-NeoX in Pythia's proportions."""
    return {
        "model_type": "gpt_neox",
        "architectures": ["GPTNeoXForCausalLM"],
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
        "rotary_pct": 0.25,
        "rotary_emb_base": 10000,
        "use_parallel_residual": True,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
