"""The paper's mathematics against exact statements, autograd and slow loops."""

import itertools

import pytest
import torch

from minimore import more
from minimore.more import (
    WEIGHTINGS,
    bradley_terry_losses,
    frank_wolfe_weights,
    group_dro_weights,
    head_gradients,
    min_norm_weights,
    more_loss,
    more_weights,
    normalize_gradients,
    pair_losses,
    proportional_weights,
    uniform_weights,
    weighted_loss,
)


def batch(B=12, K=3, D=5, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    z_chosen, z_rejected = (torch.randn(B, D, generator=g, dtype=dtype) for _ in range(2))
    return torch.randn(D, generator=g, dtype=dtype), z_chosen, z_rejected, torch.arange(B) % K


def optimality_gap(gradients):
    """How much shorter than sum lambda g any other vector of the hull could be.

    Lengths are squared, and in units of the longest gradient's.
    """
    G = gradients.double() / gradients.abs().max().double()
    weights = min_norm_weights(gradients)
    assert weights.dtype == torch.float64 and weights.min() >= 0 and abs(weights.sum() - 1) < 1e-12
    M = G @ G.T
    return ((weights @ M @ weights - (M @ weights).min()) / M.diagonal().max()).item()


def test_losses_are_means_per_source():
    head, zc, zr, source = batch()
    for k, loss in enumerate(bradley_terry_losses(head, zc, zr, source)):
        margins = [
            (zc[b] @ head - zr[b] @ head).item() for b in range(len(source)) if source[b] == k
        ]
        slow = sum(
            torch.log1p(torch.exp(torch.tensor(-m, dtype=torch.float64))).item() for m in margins
        ) / len(margins)
        assert abs(loss.item() - slow) < 1e-12


def test_losses_do_not_overflow():
    assert pair_losses(torch.tensor([-1e4, 1e4])).tolist() == [1e4, 0.0]


@pytest.mark.parametrize("K", [1, 2, 5])
def test_head_gradients_equal_autograd(K):
    head, zc, zr, source = batch(K=K)
    head.requires_grad_()
    losses = bradley_terry_losses(head, zc, zr, source)
    autograd = torch.stack(
        [torch.autograd.grad(loss, head, retain_graph=True)[0] for loss in losses]
    )
    assert torch.allclose(head_gradients(head, zc, zr, source), autograd, rtol=0, atol=1e-14)


def test_label_smoothing_mixes_in_the_other_way_round():
    head, zc, zr, source = batch(K=3)
    head.requires_grad_()
    losses = bradley_terry_losses(head, zc, zr, source, smoothing=0.1)
    plain, other = (
        bradley_terry_losses(head, zc, zr, source),
        bradley_terry_losses(head, zr, zc, source),
    )
    assert torch.allclose(losses, 0.9 * plain + 0.1 * other, rtol=0, atol=1e-14)
    autograd = torch.stack(
        [torch.autograd.grad(loss, head, retain_graph=True)[0] for loss in losses]
    )
    assert torch.allclose(
        head_gradients(head, zc, zr, source, smoothing=0.1), autograd, rtol=0, atol=1e-14
    )
    best = torch.tensor(0.9).logit()  # of all margins the smoothed loss wants this one
    assert pair_losses(best, 0.1) < min(pair_losses(best + d, 0.1) for d in (-0.01, 0.01))


def test_a_source_without_a_pair_is_nan_and_stays_out_of_the_solve():
    head, zc, zr, source = batch(K=2)
    losses, gradients = (
        bradley_terry_losses(head, zc, zr, source, 3),
        head_gradients(head, zc, zr, source, 3),
    )
    assert losses.isnan().tolist() == [False, False, True] and gradients[2].isnan().all()
    for name, weigh in WEIGHTINGS.items():
        weights = weigh(losses, gradients, torch.bincount(source, minlength=3), {})
        assert weights[2] == 0 and weights[:2].sum() == pytest.approx(1), name
        assert weighted_loss(weights, losses).isfinite()
    head.requires_grad_()
    loss, weights = more_loss(head, zc, zr, source, 3)
    loss.backward()
    two = more_loss(head, zc, zr, source, 2)
    assert (
        head.grad.isfinite().all()
        and torch.equal(weights[:2], two[1])
        and loss.item() == two[0].item()
    )


def zoo():
    """Hard gradient matrices of K = 1 to 8 rows.

    Their scales reach from 1e-6 to 1e6; rows are duplicate, opposite, nearly parallel or of low
    rank.
    """
    g = torch.Generator().manual_seed(1)
    for K, D in itertools.product(range(1, 9), (1, 2, 3, 7, 64)):
        G = torch.randn(K, D, generator=g, dtype=torch.float64)
        yield "plain", G
        yield "scaled", G * 10 ** (12 * torch.rand(K, 1, generator=g, dtype=torch.float64) - 6)
        yield "near parallel", G[:1] + 1e-7 * G
        yield "near parallel in fp32", (G[:1] + 1e-7 * G).float()
        yield "duplicate", torch.cat([G, G])[:8]
        yield "opposite", torch.cat([G, -G])[:8]
        yield "opposite, other length", torch.cat([G, -1e-5 * G])[:8]
        yield "huge", G * 1e150
        yield "tiny", G * 1e-150


@pytest.mark.parametrize(
    "name",
    [
        "plain",
        "scaled",
        "near parallel",
        "near parallel in fp32",
        "duplicate",
        "opposite",
        "opposite, other length",
        "huge",
        "tiny",
    ],
)
def test_min_norm_weights_are_optimal(name):
    assert max(optimality_gap(G) for kind, G in zoo() if kind == name) < 1e-9


def test_two_sources_have_the_closed_form():
    g = torch.Generator().manual_seed(2)
    for _ in range(200):
        g1, g2 = torch.randn(2, 3, generator=g, dtype=torch.float64)
        first = (((g2 - g1) @ g2) / ((g1 - g2) @ (g1 - g2))).clamp(0, 1)
        assert torch.allclose(
            min_norm_weights(torch.stack([g1, g2])),
            torch.stack([first, 1 - first]),
            rtol=0,
            atol=1e-10,
        )


def test_special_rows():
    one = torch.tensor([[3.0, 4.0]])
    assert min_norm_weights(one).tolist() == [1.0]
    assert min_norm_weights(torch.zeros(3, 2)).tolist() == pytest.approx([1 / 3] * 3)
    assert min_norm_weights(torch.tensor([[1.0, 0], [0, 0], [0, 1]])).tolist() == [0, 1, 0]
    for bad in (
        torch.tensor([[1.0, float("nan")]]),
        torch.tensor([[float("inf"), 1.0]]),
        torch.ones(3),
        torch.ones(0, 2),
        torch.eye(13),
    ):
        with pytest.raises(ValueError):
            min_norm_weights(bad)


@pytest.mark.slow
def test_frank_wolfe_approaches_the_solution():
    plain = [G for kind, G in zoo() if kind == "plain"]
    for G in plain[::2]:  # every K and every D, but not every two of them
        exact = (min_norm_weights(G) @ G).square().sum()
        iterated = (frank_wolfe_weights(G, iterations=1000, tolerance=1e-9) @ G).square().sum()
        assert exact - 1e-12 <= iterated <= exact + 1e-3 * G.square().sum(1).max()
        assert frank_wolfe_weights(G).sum() == pytest.approx(1)


def test_small_gradients_capture_the_weight_unless_normalised():
    G = torch.diag(torch.tensor([1, 0.5, 0.3, 0.1, 0.02], dtype=torch.float64))
    assert min_norm_weights(G).tolist() == pytest.approx(
        [0.0004, 0.0015, 0.0042, 0.0376, 0.9403], abs=0.02
    )
    assert min_norm_weights(
        normalize_gradients(G, torch.ones(5, dtype=torch.float64), "l2")
    ).tolist() == pytest.approx([0.2] * 5)


@pytest.mark.parametrize(
    "how, expected",
    [
        ("none", [3.0, 4.0]),
        ("l2", [0.6, 0.8]),
        ("loss", [3 / (3 / 8), 4 / (3 / 8)]),
        ("loss+", [3 / 10, 4 / 10]),
    ],
)
def test_normalisations_are_the_authors_formulas(how, expected):
    G, losses = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([2.0, 4.0])
    assert normalize_gradients(G, losses, how)[0].tolist() == pytest.approx(expected)
    with pytest.raises(ValueError):
        normalize_gradients(G, losses, "l1")


@pytest.mark.parametrize("scale", [1e-30, 1e-39, 1.0, 1e30])
def test_l2_keeps_tiny_and_huge_rows_of_length_one(scale):
    G = torch.tensor([[3.0, 4.0], [1.0, 0.0]]) * torch.tensor([[scale], [1.0]])
    assert normalize_gradients(G, torch.ones(2), "l2").norm(dim=1).tolist() == pytest.approx(
        [1, 1], abs=1e-5
    )


def test_a_saturated_source_does_not_break_loss_plus():
    G, losses = torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.tensor([0.0, 2.0])
    assert normalize_gradients(G, losses, "loss+").tolist() == [[0, 0], pytest.approx([0.3, 0.4])]
    assert more_weights(losses, G, torch.tensor([1, 1]), {}, normalize="loss+").tolist() == [1, 0]


def test_two_sources_of_unit_length_are_uniform():
    G = torch.randn(2, 7, generator=torch.Generator().manual_seed(0))
    assert more_weights(torch.ones(2), G, torch.tensor([1, 1]), {}).tolist() == pytest.approx(
        [0.5, 0.5]
    )


def test_more_loss_with_one_source_is_bradley_terry():
    head, zc, zr, _ = batch()
    loss, weights = more_loss(head, zc, zr, torch.zeros(12, dtype=torch.int64))
    assert weights.tolist() == [1.0] and loss.item() == pytest.approx(
        pair_losses((zc - zr) @ head).mean().item(), abs=1e-14
    )


def test_the_gradient_of_more_is_the_shortest_vector():
    head, zc, zr, source = batch(B=30, K=3)
    head.requires_grad_()
    loss, weights = more_loss(head, zc, zr, source, normalize="none")
    loss.backward()
    gradients = head_gradients(head, zc, zr, source)
    assert torch.allclose(head.grad, weights @ gradients, rtol=0, atol=1e-14)
    assert (
        gradients @ head.grad
    ).min() >= head.grad.square().sum() - 1e-12  # going down it goes down for everyone
    assert not weights.requires_grad


def test_the_readers_five_lines_run_in_fp32():
    head, zc, zr, source = batch(dtype=torch.float32)
    losses, gradients = (
        bradley_terry_losses(head, zc, zr, source),
        head_gradients(head, zc, zr, source),
    )
    loss = weighted_loss(min_norm_weights(gradients), losses)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(
        more_loss(head, zc, zr, source, normalize="none")[0].item()
    )


def test_proportional_weights_are_the_mean():
    head, zc, zr, _ = batch()
    source = torch.tensor([0] * 7 + [1] * 4 + [2])
    losses = bradley_terry_losses(head, zc, zr, source)
    weights = proportional_weights(losses, None, torch.bincount(source), {})
    assert weighted_loss(weights, losses).item() == pytest.approx(
        pair_losses((zc - zr) @ head).mean().item()
    )
    assert uniform_weights(losses, None, torch.bincount(source), {}).tolist() == pytest.approx(
        [1 / 3] * 3
    )


def test_gradient_average_starts_at_the_first_gradient_and_skips_absent_sources():
    losses, pairs = torch.ones(2), torch.tensor([1, 1])
    first, second = torch.tensor([[1.0, 0], [0, 1]]), torch.tensor([[0, 1.0], [0, 2]])
    state = {}
    more_weights(losses, first, pairs, state, average=0.25)
    assert torch.equal(state["average"], first)
    nan = second.clone()
    nan[1] = torch.nan
    more_weights(losses, nan, torch.tensor([1, 0]), state, average=0.25)
    assert torch.equal(state["average"], torch.tensor([[0.75, 0.25], [0, 1]]))
    fresh = {}
    weights = more_weights(losses, nan, torch.tensor([1, 0]), fresh, average=0.25)
    assert weights.tolist() == [1, 0] and fresh["seen"].tolist() == [True, False]
    more_weights(losses, second, pairs, fresh, average=0.25)
    assert torch.equal(
        fresh["average"][1], second[1]
    )  # its first gradient, not an average with zero
    untouched = {}
    more_weights(losses, first, pairs, untouched)
    assert untouched == {}


def test_group_dro_multiplies_and_remembers():
    losses, pairs, state = torch.tensor([1.0, 0.0]), torch.tensor([1, 1]), {}
    for n in (1, 2):
        weights = group_dro_weights(losses, None, pairs, state, rate=0.5)
        e = torch.tensor(0.5 * n).exp()
        assert weights.tolist() == pytest.approx([(e / (e + 1)).item(), (1 / (e + 1)).item()])
    before = state["log_q"].clone()
    assert group_dro_weights(
        torch.tensor([1.0, float("nan")]), None, torch.tensor([3, 0]), state, rate=0.0
    ).tolist() == [1, 0]
    assert torch.allclose(state["log_q"], before)
    assert group_dro_weights(torch.tensor([1e6, 1.0]), None, pairs, {}).tolist() == [
        1,
        0,
    ]  # exp(1e4) would overflow


def test_every_weighting_is_named():
    assert (
        list(WEIGHTINGS) == ["more", "uniform", "proportional", "group_dro"]
        and more.MOST_SOURCES == 12
    )
