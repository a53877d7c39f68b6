"""MORE's weights: the closed form of the head's gradients against a backward pass a source.

    python tests/bench/weights.py

K sources, 16 pairs of each, states of width 4096. `closed form` is `head_gradients` and
`min_norm_weights`; `autograd` takes the gradient of every source's loss by a backward pass through
the head alone; `torchjd` is its Jacobian descent with MGDA, where it is installed
(`pip install torchjd`). The weights of all three solve the same problem. Milliseconds, median of 30
rounds in which they take turns. What it does not measure: the trunk, which all of them need once.
"""

import argparse
import importlib.util
import statistics
import time

import torch

from minimore.more import bradley_terry_losses, head_gradients, min_norm_weights
from minimore.tables import Table

PAIRS_A_SOURCE = 16


def random_states(sources, width):
    generator = torch.Generator().manual_seed(0)
    z_chosen, z_rejected = torch.randn(2, PAIRS_A_SOURCE * sources, width, generator=generator)
    source = torch.arange(sources).repeat_interleave(PAIRS_A_SOURCE)
    head = torch.randn(width, generator=generator) / width**0.5
    return head, z_chosen, z_rejected, source


def closed_form(head, z_chosen, z_rejected, source):
    return min_norm_weights(head_gradients(head, z_chosen, z_rejected, source))


def autograd(head, z_chosen, z_rejected, source):
    head = head.clone().requires_grad_()
    losses = bradley_terry_losses(head, z_chosen, z_rejected, source)
    rows = [torch.autograd.grad(loss, head, retain_graph=True)[0] for loss in losses]
    return min_norm_weights(torch.stack(rows))


def by_torchjd(head, z_chosen, z_rejected, source):
    """The norm of what MGDA aggregates, since it returns no weights."""
    from torchjd.aggregation import MGDA
    from torchjd.autojac import backward, jac_to_grad

    head = head.clone().requires_grad_()
    losses = bradley_terry_losses(head, z_chosen, z_rejected, source)
    backward(losses)
    jac_to_grad([head], MGDA())
    return head.grad


def measured(sources, width, rounds):
    """Milliseconds of each way, and how much longer MGDA's vector is than the shortest."""
    states = random_states(sources, width)
    ways = {"closed form": closed_form, "autograd": autograd}
    if importlib.util.find_spec("torchjd"):
        ways["torchjd"] = by_torchjd
    results = {name: way(*states) for name, way in ways.items()}  # warms up, too
    torch.testing.assert_close(results["closed form"], results["autograd"], atol=1e-5, rtol=0)
    excess = None
    if "torchjd" in results:
        shortest = (results["closed form"].float() @ head_gradients(*states)).norm()
        excess = float(results["torchjd"].norm() / shortest - 1)
    milliseconds = {name: [] for name in ways}
    for turn in range(rounds):
        for name in list(ways) if turn % 2 else list(ways)[::-1]:
            began = time.perf_counter()
            ways[name](*states)
            milliseconds[name].append(1000 * (time.perf_counter() - began))
    return {name: statistics.median(values) for name, values in milliseconds.items()}, excess


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    table = Table("sources", "closed form ms", "autograd ms", "torchjd ms", "longer than shortest")
    for sources in range(2, 9):
        medians, excess = measured(sources, options.width, options.rounds)
        times = [medians.get(way) for way in ("closed form", "autograd", "torchjd")]
        cells = ["" if ms is None else f"{ms:.2f}" for ms in times]
        table.add(sources, *cells, "" if excess is None else f"{excess:.1e}")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(table)


if __name__ == "__main__":
    main()
