"""What the functions of attention.py and of the engine must do: loops, exact sums and autograd.

Each check takes the function and raises WrongAnswer for the first case in which it is wrong.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..engine.optim import Coefficients
from ..model.attention import Stream, pack
from ..model.model_config import ModelConfig
from ..model.rotation import rotations
from ..model.trunk import Block
from .expect import WrongAnswer, expect, expect_close, expect_refused

# ---- the stream ----------------------------------------------------------------------------------

Items = list[tuple[list[int], list[list[int]]]]


def check_pack(pack: Callable) -> None:
    """The drawing on top of attention.py, number by number; then every text read back."""
    drawing: Items = [
        ([1, 2, 3, 4], [[5, 6, 7], [8, 9]]),
        ([10, 11], [[12, 13, 14, 15], [16, 17, 18]]),
    ]
    stream = pack(drawing)
    case = "the two pairs that attention.py draws"
    expect_close(f"{case}: tokens", stream.tokens, list(range(1, 19)))
    positions = [0, 1, 2, 3, 4, 5, 6, 4, 5, 0, 1, 2, 3, 4, 5, 2, 3, 4]
    expect_close(f"{case}: positions", stream.positions, positions)
    expect_close(f"{case}: last", stream.last, [6, 8, 14, 17])
    right = [(0, 7, 0, 0), (7, 9, 0, 4), (9, 15, 9, 9), (15, 18, 9, 11)]
    expect_segments(case, stream, right)
    types = {stream.tokens.dtype, stream.positions.dtype, stream.last.dtype}
    expect(types == {torch.int64}, case, "three tensors of int64", str(types))
    lone: Items = [([], [[7, 8, 9]]), ([1], [[2], [3], [4, 5]])]
    stream = pack(lone)
    case = "a lone text of 3 tokens, then a prefix of 1 token with responses of 1, 1 and 2"
    expect_close(f"{case}: positions", stream.positions, [0, 1, 2, 0, 1, 1, 1, 2])
    expect_segments(case, stream, [(0, 3, 0, 0), (3, 5, 3, 3), (5, 6, 3, 4), (6, 8, 3, 4)])
    for items in (drawing, lone):
        expect_texts(pack(items), items)
    expect_refused("an empty continuation", lambda: pack([([1, 2], [[3], []])]))


def expect_segments(case: str, stream: Stream, right: list[tuple]) -> None:
    """Raise WrongAnswer unless the segments are these."""
    segments = [tuple(segment[:4]) for segment in stream.segments]  # all of their tokens ask
    expect(
        segments == right,
        f"{case}: segments (start, end, prefix, prefix_end)",
        str(right),
        str(segments),
    )


def expect_texts(stream: Stream, items: Items) -> None:
    """Raise WrongAnswer unless each segment sees its whole text, at positions 0, 1, 2, ..."""
    texts = [prefix + own for prefix, continuations in items for own in continuations]
    for s, (text, segment) in enumerate(zip(texts, stream.segments)):
        places = segment.key_places
        expect_close(f"text {s}: the tokens that its last one sees", stream.tokens[places], text)
        expect_close(f"text {s}: their positions", stream.positions[places], range(len(text)))
        expect(
            places[-1] == stream.last[s],
            f"text {s}: its last token",
            str(places[-1]),
            str(int(stream.last[s])),
        )


def check_visible_keys(visible_keys: Callable) -> None:
    """Query by query and key by key, with a prefix in front, padding, and windows."""
    queries = np.array([[4, 5, 6], [2, 3, 2], [9, 9, 9]])
    keys = np.array([[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 0, 0, 0], [0, 1, 2, 3, 4, 5, 6]])
    is_padding = np.zeros((3, 7), dtype=bool)
    is_padding[1, 4:] = True
    for window in (None, 1, 3, 100):
        visible = visible_keys(queries.copy(), keys.copy(), is_padding.copy(), window)
        case = f"window {window}"
        right = np.array(
            [
                visible_to(query, keys[t], is_padding[t], window)
                for t in range(3)
                for query in queries[t]
            ]
        ).reshape(3, 3, 7)
        shape = np.shape(visible)
        expect(shape == right.shape, case, f"shape {right.shape}", f"shape {shape}")
        expect(visible.dtype == bool, case, "an array of bool", f"one of {visible.dtype}")
        for t, q, key in np.argwhere(visible != right).tolist():
            what = "padding" if is_padding[t, key] else f"the key at position {keys[t, key]}"
            verbs = ("sees", "does not see") if visible[t, q, key] else ("does not see", "sees")
            raise WrongAnswer(
                f"{case}: the query at position {queries[t, q]} {verbs[0]} {what},"
                f" expected that it {verbs[1]} it"
            )


def visible_to(query: int, keys: np.ndarray, is_padding: np.ndarray, window: int | None) -> list:
    """Which keys one query sees, by definition; the last one, where a window leaves it none."""
    row = [
        bool(not padding and key <= query and (window is None or key > query - window))
        for key, padding in zip(keys, is_padding)
    ]
    if window is not None and not any(row):
        row[-1] = True
    return row


# ---- the optimizer -------------------------------------------------------------------------------


def check_adamw_(adamw_: Callable) -> None:
    """Three steps by algorithm 2 of Loshchilov and Hutter, in numpy; the large eps shows its place.

    There the moments are corrected, m / (1 - β₁ᵗ) and v / (1 - β₂ᵗ), and here the coefficients are.
    """
    learning_rate, decay, betas, eps = 0.01, 0.1, (0.9, 0.99), 0.1
    random = np.random.default_rng(0)
    x, first, second = random.normal(size=5), np.zeros(5), np.zeros(5)
    value, m, v = (torch.tensor(numbers) for numbers in (x, first, second))  # copies
    for step in (1, 2, 3):
        g = random.normal(size=5)
        coefficients = Coefficients(
            keep=1 - learning_rate * decay,
            rate=learning_rate / (1 - betas[0] ** step),
            root=math.sqrt(1 - betas[1] ** step),
        )
        adamw_(value, m, v, torch.tensor(g), coefficients, betas, eps)
        first = betas[0] * first + (1 - betas[0]) * g
        second = betas[1] * second + (1 - betas[1]) * g**2
        corrected = first / (1 - betas[0] ** step), second / (1 - betas[1] ** step)
        update = corrected[0] / (np.sqrt(corrected[1]) + eps)
        x = x - learning_rate * update - learning_rate * decay * x
        expect_close(f"step {step}: m", m, first)
        expect_close(f"step {step}: v", v, second)
        expect_close(f"step {step}: value", value, x)


# ---- the bits of a number ------------------------------------------------------------------------


def numbers_of_all_sizes() -> Tensor:
    """fp32 numbers: round ones, exact ties between two bf16 neighbours, random ones."""
    named = [0.0, 1.0, -1.0, math.pi, -math.pi, 1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 1e-40]
    random = torch.randn(500, generator=torch.Generator().manual_seed(0))
    return torch.cat([torch.tensor(named), random, random * 1e-20, random * 1e20])


def neighbours(x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The bf16 number between 0 and x that is next to x, and the one behind x: float64."""
    bits = x.numpy().view(np.uint32)
    below = bits & np.uint32(0xFFFF0000)
    above = below + np.uint32(0x10000)
    return below.view(np.float32).astype(np.float64), above.view(np.float32).astype(np.float64)


def check_split(split: Callable) -> None:
    """The high half is the nearer neighbour, away from zero at a tie; low adds up to the bits."""
    x = numbers_of_all_sizes()
    high, low = split(x.clone())
    types = (high.dtype, low.dtype)
    right = (torch.bfloat16, torch.int16)
    expect(types == right, "the types of high and low", str(right), str(types))
    nearer, farther = neighbours(x)
    numbers = x.double().numpy()
    goes_up = np.abs(farther - numbers) <= np.abs(numbers - nearer)
    nearest = np.where(goes_up, farther, nearer)
    for i in np.flatnonzero(high.double().numpy() != nearest).tolist():
        half = high[i].item()
        raise WrongAnswer(
            f"the high half of {numbers[i]:.9g}: expected {nearest[i]:.9g}, got {half:.9g}"
        )
    bits = x.view(torch.int32).long()
    own_bits = high.float().view(torch.int32).long() + low.long()
    for i in (own_bits != bits).nonzero()[:, 0].tolist():
        raise WrongAnswer(
            f"{numbers[i]:.9g}, the bits of high plus low: expected {bits[i]}, got {own_bits[i]}"
        )


def check_round_at_random(round_at_random: Callable) -> None:
    """Over all 65,536 values of 16 random bits, the mean of what is stored is the number itself."""
    every = torch.arange(65536, dtype=torch.int32)
    for number in (1.0, math.pi, -math.pi, 1 + 2**-8, 1.00001, -1e-20, 3e20):
        x = torch.tensor(number, dtype=torch.float32)
        for name, bits in {"": every, ", with bits 16 to 31 set": every - 65536}.items():
            stored = round_at_random(x.repeat(65536), bits.clone())
            case = f"{x.item():.9g}{name}"
            is_bf16 = stored.dtype == torch.bfloat16
            expect(is_bf16, case, "bfloat16", str(stored.dtype))
            nearer, farther = (float(end[0]) for end in neighbours(x.reshape(1)))
            allowed = {nearer, farther} if x.item() != nearer else {nearer}
            values = set(stored.double().tolist())
            expect(values <= allowed, f"{case}: what is stored", text(allowed), text(values))
            mean = stored.double().mean() / x.double()
            expect_close(f"{case}: the mean of what is stored, over the number", mean, 1.0, 1e-12)


def text(values: set[float]) -> str:
    """At most four numbers of a set, as words."""
    return " or ".join(f"{value:.9g}" for value in sorted(values)[:4])


# ---- the streamed walk ---------------------------------------------------------------------------

LAYERS: dict[str, Any] = {"norm": "layer", "activation": "gelu", "gated": False}
GATED: dict[str, Any] = {"norm": "rms", "activation": "silu", "gated": True}


def tiny_block(seed: int, parallel: bool, biases: bool, behind: bool, layers: dict) -> Block:
    """A block of random numbers, of the family that `tiny_config` describes."""
    block = Block(tiny_config(parallel, biases, behind, layers), None).double()
    generator = torch.Generator().manual_seed(seed)
    for p in block.parameters():
        p.data = 0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return block


def tiny_config(parallel: bool, biases: bool, behind: bool, layers: dict) -> ModelConfig:
    """Width 8, two heads, an MLP of 12."""
    return ModelConfig(
        vocabulary=20,
        width=8,
        blocks=1,
        heads=2,
        kv_heads=2,
        head_width=4,
        mlp_width=12,
        norm_eps=1e-5,
        parallel_residual=parallel,
        qkv_bias=biases,
        attention_output_bias=biases,
        mlp_bias=biases,
        rotary_width=4,
        rope_base=10000.0,
        norm_before=not behind,
        norm_after=behind,
        **layers,
    )


def check_recomputed_gradients(recomputed_gradients: Callable) -> None:
    """Autograd through the whole block, for blocks of three families."""
    stream = pack([([1, 2, 3], [[4, 5], [6]]), ([], [[7, 8]])])
    blocks: dict[str, tuple] = {
        "a block as in GPT-NeoX": (True, True, False, LAYERS),
        "a block as in Llama": (False, False, False, GATED),
        "a block with norms behind": (False, False, True, GATED),
    }
    for seed, (case, kind) in enumerate(blocks.items()):
        block = tiny_block(seed, *kind)
        rotation = rotations(tiny_config(*kind), stream.positions)[0]
        generator = torch.Generator().manual_seed(seed)
        x, d_y = (torch.randn(8, 8, generator=generator, dtype=torch.float64) for _ in range(2))
        names = [name for name, _ in block.named_parameters()]
        leaf = x.clone().requires_grad_()
        y = block(leaf, rotation, stream)
        d_x, *right = torch.autograd.grad(y, [leaf, *block.parameters()], d_y)
        own_d_x, gradients = recomputed_gradients(block, x, d_y.clone(), rotation, stream)
        expect_close(f"{case}: the gradient of x", own_d_x, d_x, 1e-6)
        missing = sorted(set(names) ^ set(gradients))[:3]
        expect(
            not missing,
            f"{case}: names of gradients",
            "those of the parameters",
            f"a difference in {', '.join(missing)}",
        )
        for name, gradient in zip(names, right):
            expect_close(f"{case}: the gradient of {name}", gradients[name], gradient, 1e-6)
