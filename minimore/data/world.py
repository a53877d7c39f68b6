"""A synthetic world of annotators whose shared reward and drift are known exactly.

A response is a bag of words; annotator k values it at r*(y) + drift_k(y), each a sum of word values / sqrt(words). Over the
world's own pairs the drifts are orthogonal to r*, equally strong, and sum to zero over the annotators (a regular simplex). Labels
are drawn: P(a over b) = sigmoid(beta_k (margin of annotator k)), beta_k being the annotator's decisiveness.

Everything is written as real files: JSON lines, a tokenizer trained here, a checkpoint directory.

W words, K annotators, N pairs.
"""

import gzip
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ..calibration import probability
from ..model.checkpoint import random_checkpoint
from ..options import InputError
from .records import Pair

WORDS = [
    "amber",
    "anchor",
    "basil",
    "bridge",
    "candle",
    "canyon",
    "cedar",
    "copper",
    "coral",
    "cotton",
    "ember",
    "falcon",
    "fennel",
    "garnet",
    "ginger",
    "hazel",
    "indigo",
    "ivory",
    "jasper",
    "juniper",
    "lantern",
    "lemon",
    "linen",
    "maple",
    "marble",
    "meadow",
    "nectar",
    "olive",
    "onyx",
    "orchard",
    "pebble",
    "pepper",
    "quartz",
    "raven",
    "saffron",
    "silver",
    "thistle",
    "timber",
    "velvet",
    "willow",
]
MOST_PAIRS = 10**6  # of one annotator: prompts are all different, and there are 40^6
ANNOTATORS = ("ana", "ben", "cleo", "dov", "eve")


@dataclass(frozen=True)
class World:
    """conflict: share of an annotator's taste that is drift, 0 to 1; reveal: whether the prompt names the annotator;
    ties: share of pairs labelled a tie; reversed: an annotator who wants the opposite of r* (no drift, no orthogonality)."""

    annotators: tuple[str, ...] = ANNOTATORS
    conflict: float = 0.2
    decisiveness: tuple[float, ...] = (2.0,)  # beta per annotator, or one for all
    train_pairs: tuple[int, ...] = (3200,)  # per annotator, or one for all
    test_pairs: int = 1000
    ties: float = 0.0
    reveal: bool = False
    reversed: str | None = None
    prompt_words: int = 6
    response_words: int = 14
    seed: int = 0

    def __post_init__(self):
        K = len(self.annotators)
        if not 0 <= self.conflict <= 1 or not 0 <= self.ties < 1 or K < 1 or len(WORDS) < K + 2:
            raise InputError(
                f"world: conflict {self.conflict}, ties {self.ties}, {K} annotators: expected shares and at most {len(WORDS) - 2} annotators"
            )
        pairs = [*self.train_pairs, self.test_pairs + 1]
        if not 0 <= self.seed < 2**63 or not pairs or min(pairs) < 1 or max(pairs) > MOST_PAIRS:
            raise InputError(
                f"world: seed {self.seed}, {self.train_pairs} training and {self.test_pairs} test pairs: expected a seed "
                f"from 0 to 2^63 - 1, and 1 to {MOST_PAIRS} pairs each"
            )
        if self.reversed is not None and self.reversed not in self.annotators:
            raise InputError(
                f"world: reversed is {self.reversed!r}; expected one of {', '.join(self.annotators)}"
            )
        prompts = sum(
            self.train_pairs[k % len(self.train_pairs)] + self.test_pairs for k in range(K)
        )
        if len(WORDS) ** self.prompt_words < 2 * prompts:
            raise InputError(
                f"world: {self.prompt_words} words a prompt make too few prompts for {prompts} pairs"
            )
        for name in ("decisiveness", "train_pairs"):
            if len(getattr(self, name)) not in (1, K):
                raise InputError(
                    f"world: {name} has {len(getattr(self, name))} values; expected 1 or {K}"
                )

    def values(self) -> tuple[np.ndarray, np.ndarray]:
        """Word values of r* (W,) and of the drifts (K, W), both already scaled by the conflict."""
        K, W = len(self.annotators), len(WORDS)
        random = np.random.default_rng([self.seed, 0]).standard_normal((W, K + 1))
        basis, _ = np.linalg.qr(
            np.concatenate([np.ones((W, 1)), random], 1)
        )  # column 0: what every word has alike
        shared, axes = basis[:, 1], basis[:, 2:].T  # unit, centred, orthogonal
        drifting = [k for k in range(K) if self.annotators[k] != self.reversed]
        n, drifts = len(drifting), np.zeros((K, W))
        simplex = np.eye(n) - 1 / max(1, n)  # n points that sum to zero
        drifts[drifting] = simplex @ axes[:n] * math.sqrt(n / max(1, n - 1))  # of unit length
        scale = math.sqrt(W)  # unit variance over words
        shared, drifts = (
            scale * math.sqrt(1 - self.conflict) * shared,
            scale * math.sqrt(self.conflict) * drifts,
        )
        if self.reversed:
            drifts[self.annotators.index(self.reversed)] = -2 * shared  # r* + drift = -r*
        return shared, drifts

    def true_margins(self, pairs: list[Pair]) -> np.ndarray:
        """Every annotator's true margin (chosen minus rejected) of every pair, beta not applied: (N, K)."""
        shared, drifts = self.values()
        counts = np.array([_counts(p.chosen) - _counts(p.rejected) for p in pairs])
        return counts @ (shared + drifts).T / math.sqrt(self.response_words)

    def decompose(self, margins: np.ndarray, pairs: list[Pair]) -> "Decomposition":
        """What a model's margins on these pairs consist of, for Eq. 4: shared reward, drift, and neither.

        margins: (N,), of the same pairs. r* and the drifts are orthogonal under the world's pairs, so the shares add up to 1 but for what a
        sample adds (to drift, about K / N of what is neither); they are undefined (NaN) for margins of 0. The drifts sum to zero, so a model
        with one of them has -1 / (K - 1) of every other. Raises ValueError if an annotator is reversed: that drift is -2 r*, and orthogonal to nothing.
        """
        if self.reversed:
            raise ValueError(
                f"{self.reversed} is reversed: shared reward and drift cannot be told apart in this world"
            )
        m = np.asarray(margins, dtype=np.float64)
        counts = np.array([_counts(p.chosen) - _counts(p.rejected) for p in pairs]) / math.sqrt(
            self.response_words
        )
        shared, drifts = self.values()
        true, drift = counts @ shared, counts @ drifts.T  # (N,), (N, K)
        slope = lambda x: float(np.mean(m * x) / np.mean(x * x)) if np.any(x) else math.nan
        explained = lambda x: (
            float(np.mean((x @ np.linalg.lstsq(x, m, rcond=None)[0]) ** 2) / np.mean(m * m))
            if np.any(m)
            else math.nan
        )
        parts = explained(true[:, None]), explained(drift)
        both = explained(np.concatenate([true[:, None], drift], 1))
        return Decomposition(slope(true), np.array([slope(d) for d in drift.T]), *parts, 1 - both)

    def ceilings(self, pairs: list[Pair]) -> tuple[np.ndarray, np.ndarray]:
        """Expected accuracy per annotator (K,) over these pairs: of that annotator's own best rule, and of the best single rule.

        The single rule decides each pair by sum_k (2 p_k - 1): no preference shared by all annotators has a better mean
        accuracy, so no single reward has either.
        """
        betas = np.broadcast_to(self.decisiveness, len(self.annotators))
        p = probability(betas * self.true_margins(pairs))  # (N, K)
        first = (2 * p - 1).sum(1, keepdims=True) > 0
        return np.maximum(p, 1 - p).mean(0), np.where(first, p, 1 - p).mean(0)

    def paths(self, directory: Path) -> dict[str, tuple[Path, Path]]:
        """Where `write` puts the training and test file of each annotator."""
        end = lambda k: ".jsonl.gz" if k % 5 == 3 else ".jsonl"
        return {
            name: tuple(directory / "data" / f"{name}.{part}{end(k)}" for part in ("train", "test"))
            for k, name in enumerate(self.annotators)
        }

    def write(self, directory: Path) -> dict[str, tuple[Path, Path]]:
        """Write data/NAME.train.jsonl and .test.jsonl per annotator and the checkpoint model/; returns the paths by name.

        The annotators use different line formats, one is gzipped: all doors that real data comes through.
        """
        (directory / "data").mkdir(parents=True)
        random, seen, paths, texts = (
            np.random.default_rng([self.seed, 1]),
            set(),
            self.paths(directory),
            [],
        )
        for k, name in enumerate(self.annotators):
            count = self.train_pairs[k % len(self.train_pairs)]
            lines = [self._line(k, random, seen) for _ in range(count + self.test_pairs)]
            for path, part in zip(paths[name], (lines[:count], lines[count:])):
                content = "".join(json.dumps(line) + "\n" for line in part).encode()
                path.write_bytes(
                    gzip.compress(content, mtime=0) if path.suffix == ".gz" else content
                )
            texts += [json.dumps(line) for line in lines[:200]]
        train_tokenizer(texts, directory / "tokenizer.json")
        random_checkpoint(
            directory / "model", small_gpt_neox(), directory / "tokenizer.json", self.seed
        )
        return paths

    def _line(self, k, random, seen):
        """One labelled pair of annotator k, on a prompt that no other pair has."""
        words = lambda n: " ".join(WORDS[i] for i in random.integers(len(WORDS), size=n))
        while (asked := words(self.prompt_words)) in seen:
            pass
        seen.add(asked)
        prompt = f"\n\nHuman: {self.annotators[k] + ' asks ' if self.reveal else ''}{asked}\n\nAssistant:"
        a, b = (" " + words(self.response_words) for _ in range(2))
        beta = self.decisiveness[k % len(self.decisiveness)]
        p = float(probability(beta * self.true_margins([Pair(prompt, a, b)])[0, k]))
        prefers_a, tie = random.random() < p, random.random() < self.ties
        chosen, rejected, p = (a, b, p) if prefers_a else (b, a, 1 - p)
        if tie or k % 5 == 4:
            return {
                "text": [prompt + a, prompt + b],
                "score": [1.0, 1.0] if tie else [float(prefers_a), float(not prefers_a)],
            }
        if k % 5 == 2:
            return {"chosen": prompt + chosen, "rejected": prompt + rejected}
        return {
            "prompt": prompt,
            "chosen": chosen,
            "rejected": rejected,
            "probability": round(p, 6),
        }


class Decomposition(NamedTuple):
    """Slopes: margin on r* and on each drift (K,), 1 where a model has it as it is. Shares of the margins' mean square: r*, drifts, neither."""

    shared: float
    drift: np.ndarray
    shared_share: float
    drift_share: float
    other_share: float


def _counts(response: str) -> np.ndarray:
    """How often each word occurs: (W,)."""
    index = {word: i for i, word in enumerate(WORDS)}
    return np.bincount([index[w] for w in response.split()], minlength=len(WORDS))


def train_tokenizer(texts: list[str], path: Path, vocabulary: int = 512):
    """A small byte-level BPE, so that any text can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=["<|endoftext|>", "<|padding|>"],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    tokenizer.save(str(path))


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
