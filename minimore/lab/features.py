"""Pooled states of a frozen checkpoint, stored once; reward heads trained on them in seconds, seed after seed.

All of more.py lives at the head, so the paper's mechanism can be tried here with statistical power: one evening of GPU stores the states
of a 7B model, a laptop does the rest. It is a linear probe, not the paper's Table 2, where the whole model is trained.

K sources, N pairs, D width, S seeds.
"""

import math
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..calibration import accuracy, negative_log_likelihood, pair_ece
from ..data.pairs import load_source, pack_pairs, split_by_tokens
from ..data.sampling import epoch_steps
from ..files import one_line, read_json, refuse_existing, write_json
from ..model.checkpoint import Checkpoint
from ..model.tensors import write_tensors
from ..more import MOST_SOURCES, WEIGHTINGS, bradley_terry_losses, head_gradients
from ..options import InputError, option, parse_sources, require_tests
from ..reward import ReadingOptions, fresh_head, load_reward_model
from ..uncertainty import over_seeds

PARTS = ("train", "test")
PROBE = "linear probe on frozen features, not the paper's Table 2"


# ---- storing -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class FeaturesOptions(ReadingOptions):
    """What `features` takes."""

    source: tuple[str, ...] = option(
        (),
        repeat=True,
        value="NAME=TRAIN.jsonl,TEST.jsonl",
        help="once per source, with a test file",
    )
    output: str = option(
        value="DIR",
        help="directory for the states; an interrupted command goes on where it stopped",
    )
    dtype: str = option(
        "float16", choices=("float16", "float32"), help="type in which states are stored"
    )


def features(options: FeaturesOptions):
    """Store the last hidden states of both sides of every pair; features.json comes last, so its presence means whole."""
    paths = parse_sources(options.source)
    require_tests(paths)
    out, checkpoint = Path(options.output), Checkpoint(options.model)
    limit, truncate = options.limits(checkpoint)
    if out.exists() and (
        not out.is_dir()
        or (out / "features.json").exists()
        or any(p.suffix not in (".safetensors", ".partial") for p in out.iterdir())
    ):
        raise InputError(f"--output {out}: exists already; choose another name or remove it")
    out.mkdir(parents=True, exist_ok=True)
    model = load_reward_model(checkpoint, options)
    described = {}
    for k, (name, files) in enumerate(paths.items()):
        described[name] = {}
        for part, path in zip(PARTS, files):
            source, file = (
                load_source(name, path, checkpoint.tokenizer, limit, truncate),
                f"{k:02d}.{part}.safetensors",
            )
            key = f"{checkpoint.identity()} {options.dtype} {model.trunk.compute_dtype} {source.digest()}"
            if not _stored(out / file, key):
                chosen, rejected = pooled_states(
                    model, source.pairs, options.micro_tokens, getattr(torch, options.dtype)
                )
                whole = lambda field: torch.tensor([getattr(p, field) for p in source.pairs])
                write_tensors(
                    out / file,
                    {
                        "chosen": chosen,
                        "rejected": rejected,
                        "prompt": whole("prompt"),
                        "longer": whole("longer"),
                    },
                    {"of": key},
                )
            described[name][part] = {"file": file, "pairs": len(source.pairs), "from": path}
            print(f"{part:5} {source.line()}", flush=True)
    write_json(
        out / "features.json",
        {
            "note": PROBE,
            "model": options.model,
            "width": checkpoint.config.width,
            "max_length": limit,
            "truncate": truncate,
            "dtype": options.dtype,
            "sources": described,
        },
    )
    print(
        f"{out}: states of {len(paths)} sources, {sum(p.stat().st_size for p in out.glob('*.safetensors')) / 1e6:.1f} MB"
    )


def _stored(path, key):
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("of") == key
    except (SafetensorError, OSError):
        return False


@torch.no_grad()
def pooled_states(model, pairs, micro_tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Last hidden states of the chosen and the rejected texts, two (N, D), on the CPU."""
    order = sorted(range(len(pairs)), key=lambda i: pairs[i].tokens)
    out = torch.empty(2, len(pairs), model.head.shape[0], dtype=dtype)
    for part in split_by_tokens([pairs[i].tokens for i in order], micro_tokens):
        rows = [order[i] for i in part]
        for side, z in enumerate(model.features(pack_pairs([pairs[i] for i in rows]))):
            out[side, rows] = z.to("cpu", dtype)
    if not out.isfinite().all():
        raise FloatingPointError(f"a hidden state is not finite in {dtype}; try --dtype float32")
    return out[0], out[1]


# ---- heads ---------------------------------------------------------------------------------------------------------------


class Stored(NamedTuple):
    """One part of one source: chosen minus rejected states (N, D) as stored, and characters by which the chosen response is longer."""

    difference: Tensor
    longer: np.ndarray


def load_features(directory: str) -> tuple[dict, dict[str, dict[str, Stored]]]:
    """features.json and {source: {"train" | "test": Stored}}."""
    where = Path(directory)
    if where.is_dir() and not (where / "features.json").is_file():
        raise InputError(
            f"--features {directory}: is not whole; run the same `minimore features` command again"
        )
    described = read_json(where / "features.json")
    try:
        stored = {
            name: {part: _read(where, parts[part]["file"], described["width"]) for part in PARTS}
            for name, parts in described["sources"].items()
        }
    except (KeyError, TypeError, AttributeError, ValueError, SafetensorError, OSError) as error:
        raise InputError(
            f"--features {directory}: damaged ({one_line(error)}); store the features again"
        ) from None
    if not stored:
        raise InputError(f"--features {directory}: holds no source")
    return described, stored


def _read(where, name, width):
    if Path(name).name != name:
        raise ValueError(f"{name} is no plain file name")
    with safe_open(where / name, framework="pt") as file:
        chosen, rejected, longer = (
            file.get_tensor(key) for key in ("chosen", "rejected", "longer")
        )
    if chosen.shape != rejected.shape or chosen.shape != (len(longer), width) or not len(longer):
        raise ValueError(
            f"{name}: states of shapes {tuple(chosen.shape)} and {tuple(rejected.shape)}, expected (N, {width})"
        )
    difference = chosen.sub_(rejected)
    if not all(part.isfinite().all() for part in difference.split(4096)):
        raise ValueError(f"{name}: a state is not finite")
    return Stored(difference, longer.numpy())


@dataclass(frozen=True, kw_only=True)
class ProbeOptions:
    """What `probe` takes."""

    features: str = option(value="DIR", help="what `minimore features` stored")
    method: tuple[str, ...] = option(
        (),
        repeat=True,
        choices=tuple(WEIGHTINGS),
        help="once per weighting; others are compared with the first (default: uniform and more)",
    )
    seeds: int = option(
        20, help="heads a method; a seed sets the head's start and the order of the data"
    )
    normalize: str = option(
        "l2",
        choices=("none", "l2", "loss", "loss+"),
        help="more: scaling of the head gradients before the solve",
    )
    sampling: str = option(
        "equal",
        choices=("equal", "proportional"),
        help="equal shares of every source in every step, or a random mix",
    )
    pairs_per_source: int | None = option(
        None, help="resample every source to this many pairs an epoch"
    )
    epochs: int = option(1, help="passes over the sampled pairs")
    batch_size: int | None = option(None, help="pairs a step (default: 16 x sources)")
    learning_rate: float = option(
        1e-2,
        help="peak learning rate of Adam, falling linearly; states are scaled to unit variance first",
    )
    label_smoothing: float = option(0.0, help="share of labels taken as the wrong way round")
    json: str | None = option(None, value="OUT.json", help="write all figures here; must not exist")


def train_head(
    train: list[Tensor], method: str, options: ProbeOptions, seed: int, scale: float = 1.0
) -> tuple[Tensor, np.ndarray]:
    """A head (D,) trained on differences of states / scale, one (N_k, D) tensor a source, and the weights of every step (steps, K).

    The gradient of the weighted loss with respect to the head is the weighted sum of the sources' closed-form gradients: there is no autograd.
    """
    K, D = len(train), train[0].shape[1]
    batch_size = options.batch_size or 16 * K
    weigh = partial(
        WEIGHTINGS[method],
        state={},
        **({"normalize": options.normalize} if method == "more" else {}),
    )
    head, mean, square = fresh_head(D, seed), torch.zeros(D), torch.zeros(D)
    plans = [
        step
        for e in range(options.epochs)
        for step in epoch_steps(
            [len(t) for t in train], options.sampling, options.pairs_per_source, batch_size, seed, e
        )
    ]
    history, nothing = [], torch.zeros(1, D)
    for t, plan in enumerate(plans):
        z = torch.stack([train[k][i] for k, i in plan]).float() / scale  # (B, D)
        source = torch.from_numpy(plan[:, 0])
        losses = bradley_terry_losses(
            head, z, nothing, source, K, options.label_smoothing
        )  # (K,)   Eq. 1
        gradients = head_gradients(head, z, nothing, source, K, options.label_smoothing)  # (K, D)
        weights = weigh(losses, gradients, torch.bincount(source, minlength=K))  # (K,)
        g = weights.to(gradients) @ gradients.nan_to_num()  # (D,)   the gradient of Eq. 7
        mean, square = 0.9 * mean + 0.1 * g, 0.999 * square + 0.001 * g * g  # Adam
        rate = (
            options.learning_rate
            * (1 - t / len(plans))
            * math.sqrt(1 - 0.999 ** (t + 1))
            / (1 - 0.9 ** (t + 1))
        )
        head = head - rate * mean / (square.sqrt() + 1e-8)
        history.append(weights.double().numpy())
    return head, np.stack(history)


def probe(options: ProbeOptions):
    """Train heads by every method and seed; print accuracy and ECE per source over seeds, the worst source, and differences."""
    refuse_existing(options.json, "--json")
    for name, most in (
        ("seeds", 1000),
        ("epochs", 10**6),
        ("batch_size", 10**6),
        ("pairs_per_source", 10**7),
    ):
        value = getattr(options, name)
        if value is not None and not 1 <= value <= most:
            raise InputError(f"--{name.replace('_', '-')} {value}: expected 1 to {most}")
    described, stored = load_features(options.features)
    names, methods = list(stored), tuple(dict.fromkeys(options.method)) or ("uniform", "more")
    if options.sampling == "equal" and options.batch_size and options.batch_size % len(names):
        raise InputError(
            f"--batch-size {options.batch_size}: under equal sampling expected a multiple of the {len(names)} sources"
        )
    if "more" in methods and len(names) > MOST_SOURCES:
        raise InputError(
            f"--method more: {len(names)} sources, but the exact solver takes at most {MOST_SOURCES}; merge some"
        )
    if options.learning_rate <= 0 or not 0 <= options.label_smoothing < 0.5:
        raise InputError(
            "--learning-rate must be more than 0, and --label-smoothing from 0 to less than 0.5"
        )
    train, test = (
        [stored[name]["train"].difference for name in names],
        {name: stored[name]["test"].difference for name in names},
    )
    scale = (
        math.sqrt(
            np.mean(
                [
                    float(np.mean([part.float().square().mean() for part in t.split(4096)]))
                    for t in train
                ]
            )
        )
        or 1.0
    )
    found = {}
    for method in methods:
        runs = []
        for seed in range(options.seeds):
            head, weights = train_head(train, method, options, seed, scale)
            margins = {
                name: torch.cat([part.float() @ head for part in t.split(4096)]).double().numpy()
                / scale
                for name, t in test.items()
            }
            if not all(np.isfinite(m).all() for m in margins.values()):
                raise FloatingPointError(
                    f"{method}, seed {seed}: a margin is not finite; try a smaller --learning-rate"
                )
            runs.append(
                {
                    "accuracy": [accuracy(m) for m in margins.values()],
                    "ece": [pair_ece(m) for m in margins.values()],
                    "nll": [negative_log_likelihood(m) for m in margins.values()],
                    "weights": weights.mean(0).tolist(),
                }
            )
        found[method] = {rate: [run[rate] for run in runs] for rate in runs[0]}  # (S, K) each
    print(f"{PROBE}: {described['model']}, {options.seeds} seeds")
    print(probe_table(names, found))
    if options.json:
        longer = {name: accuracy(stored[name]["test"].longer) for name in names}
        write_json(
            options.json,
            {
                "note": PROBE,
                "options": asdict(options),
                "sources": names,
                "methods": found,
                "length_accuracy": longer,
            },
        )


def probe_table(names: list[str], found: dict) -> str:
    """Per method and source: mean over seeds and half the width of its 95% interval; then the differences from the first method."""
    cell = lambda values: "{:.4f} ± {:.4f}".format(*over_seeds(values))
    lines, (first, *others) = [], found
    columns = [*names, "mean", "worst"]
    for rate, worst in (("accuracy", np.min), ("ece", np.max), ("nll", np.max), ("weights", None)):
        wide = max(17, *(len(n) + 2 for n in names))
        lines.append(f"{rate:20}" + "".join(f"{c:>{wide}}" for c in (columns if worst else names)))
        table = {method: np.array(r[rate]) for method, r in found.items()}  # (S, K)
        full = {
            method: np.concatenate([v, v.mean(1, keepdims=True), worst(v, 1)[:, None]], 1)
            if worst
            else v
            for method, v in table.items()
        }
        rows = [(method, full[method]) for method in found] + [
            (f"{m} - {first}", full[m] - full[first]) for m in others
        ]
        lines += [
            f"{title:20}" + "".join(f"{cell(column):>{wide}}" for column in values.T)
            for title, values in rows
        ]
    return (
        "\n".join(lines)
        + "\n± is half a 95% interval over seeds, the test pairs held fixed; a difference is taken seed by seed"
    )
