"""How long a grid will take, roughly, from the speed of one matrix product on this machine."""

import time
from collections.abc import Iterable

import torch

from ..model.checkpoint import Checkpoint
from ..reward import device_of
from .grid import Cell, ReproduceOptions

MEASURED_SECONDS = 0.1
SHARE_OF_SPEED = 0.5  # what a training reaches of the speed of a matrix product
STEP_SECONDS = 0.02  # of a step, whatever its size
CELL_SECONDS = 1.0  # to load a model and to store margins
WORLD_TOKENS = 60  # of a pair
REAL_TOKENS = 400  # of a pair, at most
POLICY_SECONDS = 8.0  # to tune a policy on 1000 prompts and to judge it
LEARNER_SECONDS = 12.0  # to let one learn from 4000 pairs
WORLD_SECONDS = 40.0  # to make the base policy of a world, its samples and its controls
TRAIN_FLOPS, SCORE_FLOPS = 6, 2  # of a token with a parameter


def estimated_seconds(options: ReproduceOptions, cells: Iterable[Cell]) -> float:
    """Seconds that training and scoring these cells will take."""
    speed = SHARE_OF_SPEED * flops_per_second(on_gpu=device_of(options) == "cuda")
    parameters: dict[str, int] = {}  # of each model, which many cells share
    seconds = 0.0
    worlds = set()  # whose policies are counted already
    for cell in cells:
        model = str(cell.model)
        if model not in parameters:
            parameters[model] = matrix_parameters(cell)
        seconds += cell_seconds(options, cell, parameters[model], speed)
        if cell.testbed:
            share = cell.design.prompts / 1000
            seconds += share * POLICY_SECONDS
            seconds += share * LEARNER_SECONDS * bool(cell.learner)
            seconds += share * WORLD_SECONDS * (cell.testbed not in worlds)
            worlds.add(cell.testbed)
    return seconds


def cell_seconds(options: ReproduceOptions, cell: Cell, parameters: int, speed: float) -> float:
    """Seconds of one cell, with a model of so many parameters, at so many FLOPs a second."""
    pairs = cell.options["pairs_per_source"] * len(cell.sources)
    test_pairs = options.test_pair_count() * len(cell.tests)
    tokens_a_pair = WORLD_TOKENS if cell.world else min(options.max_length, REAL_TOKENS)
    flops = (TRAIN_FLOPS * pairs + SCORE_FLOPS * test_pairs) * tokens_a_pair * parameters
    steps = pairs / cell.options["batch_size"]
    return CELL_SECONDS + STEP_SECONDS * steps + flops / speed


def flops_per_second(on_gpu: bool) -> float:
    """The measured speed of the product of two square matrices."""
    n = 4096 if on_gpu else 512
    a = torch.randn(n, n)
    if on_gpu:
        a = a.to("cuda", torch.bfloat16)
    a @ a  # the first product is slow
    flops, began = 0, time.monotonic()
    while time.monotonic() - began < MEASURED_SECONDS:
        float((a @ a)[0, 0])  # reading a number waits for a GPU
        flops += 2 * n**3
    return flops / (time.monotonic() - began)


def matrix_parameters(cell: Cell) -> int:
    """Parameters of the matrices in all blocks of a cell's model."""
    if cell.world is not None:
        return 24 * cell.at["size"] ** 2  # two blocks of 12 D²
    c = Checkpoint(str(cell.model)).config
    attention = 2 * c.width * c.head_width * (c.heads + c.kv_heads)
    mlp = (3 if c.gated else 2) * c.width * c.mlp_width
    return c.blocks * (attention + mlp)
