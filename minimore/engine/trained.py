"""Which parameters are trained: `--train all`, `head`, or `last-N`, the last N blocks.

               embeddings   first blocks   last N blocks   final norm   top
    all        trained      trained        trained         trained      trained
    last-N     -            -              trained         trained      trained
    head       -            -              -               -            trained

The top is the reward head, or the unembedding of a language model. An unembedding that is the
embedding, too, counts as the embedding. What is not trained is frozen: it has no gradient and no
moments, and a frozen block keeps nothing for backward.
"""

import re
from typing import Any

from ..options import require

ALL, HEAD = "all", "head"
LAST = re.compile(r"last-([1-9][0-9]{0,5})")


def require_train(train: str) -> None:
    """Refuse a value of --train that does not exist (InputError)."""
    require(
        train in (ALL, HEAD) or LAST.fullmatch(train),
        f"--train {train}: expected all, head or last-N, such as last-2",
    )


def trained_blocks(train: str, blocks: int) -> int:
    """How many of a model's blocks are trained; these are its last ones.

    Raises InputError if the model has fewer.

    >>> trained_blocks("all", 6), trained_blocks("last-2", 6), trained_blocks("head", 6)
    (6, 2, 0)
    """
    require_train(train)
    if train == ALL:
        return blocks
    if train == HEAD:
        return 0
    last = int(train.removeprefix("last-"))
    require(
        last <= blocks, f"--train {train}: the model has {blocks} blocks; expected at most that"
    )
    return last


def is_trained(name: str, train: str, blocks: int) -> bool:
    """Whether a parameter of a model with so many blocks is trained.

    >>> is_trained("trunk.blocks.5.mlp.up.weight", "last-2", 6), is_trained("head", "head", 6)
    (True, True)
    >>> is_trained("trunk.embedding.weight", "last-6", 6)
    False
    """
    trained = trained_blocks(train, blocks)
    if train == ALL:
        return True
    if name.startswith("trunk.blocks."):
        return int(name.split(".")[2]) >= blocks - trained
    if name.startswith("trunk.final_norm."):
        return trained > 0
    return not name.startswith("trunk.")


def freeze(model: Any, train: str) -> None:
    """Let autograd know what is trained of a model."""
    for name, p in model.named_parameters():
        p.requires_grad_(is_trained(name, train, len(model.trunk.blocks)))


def frozen_blocks(model: Any) -> int:
    """How many of a model's blocks are frozen; these are its first ones."""
    return sum(not next(block.parameters()).requires_grad for block in model.trunk.blocks)
