"""The loss of a pair on which annotators disagree, or that has a margin or a weight of its own.

The paper's pairs have one vote each, and more.py needs none of this for them. Every function is
pure.

B pairs.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Labels(NamedTuple):
    """What annotators say of B pairs, each (B,). One vote for each is share 1, margin 0, weight 1.

    share: of the votes, those for the chosen response. margin: by how much its reward should be the
    higher one (Llama 2, arXiv 2307.09288, Eq. 2). weight: of the pair's loss. L_k stays the mean
    over the pairs of a source, so a pair of weight 2 counts like two in the loss and in its
    gradient, whatever else the batch holds; a mean over the sum of weights would not notice a
    weight where a source has one pair in the batch. The weights that come here have the mean 1 in
    a source: data/pairs.py divides those of the file by their mean.
    """

    share: Tensor
    margin: Tensor
    weight: Tensor

    def split(self, size: int) -> "list[Labels]":
        """Consecutive parts of so many pairs."""
        return [Labels(*part) for part in zip(*(values.split(size) for values in self))]


def labelled_losses(margins: Tensor, labels: Labels, smoothing: float = 0.0) -> Tensor:
    """Bradley-Terry loss of pairs with a share t, a margin c and a weight w.

    w (-t log sigmoid(m - c) - (1 - t) log sigmoid(c - m))

    margins m: (B,) -> (B,), nats. smoothing s: the share becomes (1 - s) t + s (1 - t). With
    c = 0 it is the mean loss of the single votes, so it is least where sigmoid(m) = t.
    """
    m, c, w = margins, labels.margin, labels.weight
    t = _smoothed(labels.share, smoothing)
    return w * (-t * F.logsigmoid(m - c) - (1 - t) * F.logsigmoid(c - m))


def labelled_slopes(margins: Tensor, labels: Labels, smoothing: float = 0.0) -> Tensor:
    """Derivative of `labelled_losses` by the margin: w (sigmoid(m - c) - t). (B,) -> (B,)."""
    m, c, w = margins, labels.margin, labels.weight
    t = _smoothed(labels.share, smoothing)
    return w * (torch.sigmoid(m - c) - t)


def _smoothed(share: Tensor, smoothing: float) -> Tensor:
    """The share of votes when some of them are taken as the wrong way round."""
    return (1 - smoothing) * share + smoothing * (1 - share)
