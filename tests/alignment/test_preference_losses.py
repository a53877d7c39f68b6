"""Each loss against a second one, written pair by pair from its equation; limits; gradients."""

import math

import pytest
import torch

from minimore.alignment.preference_losses import (
    bapo_losses,
    dpo_losses,
    implicit_margins,
    merged_reference,
    mrpo_losses,
    spo_losses,
)

BETA = 0.3


def log_probabilities(*shape, seed=0):
    """Such as responses of some tokens have: negative, and far from 0."""
    generator = torch.Generator().manual_seed(seed)
    return -20 * torch.rand(*shape, generator=generator, dtype=torch.float64) - 1


# ---- second implementations: probabilities, and one pair at a time -------------------------------


def probability_of_preference(policy, reference, beta=BETA):
    """Bradley-Terry with rewards β log(π / π_ref): exp(r_w) / (exp(r_w) + exp(r_l))."""
    worth = [(p.exp() / q.exp()) ** beta for p, q in zip(policy[:2], reference[:2])]
    return worth[0] / sum(worth)


def slow_dpo(policy, reference):
    return -probability_of_preference(policy, reference).log()


def slow_mrpo(policy, references, clip=None):
    """The reference of each response is 1 / mean of 1 / π_k."""
    merged = []
    for column in range(2):
        inverse = []
        for row in references:
            value, first = row[column], references[0][column]
            if clip is not None:
                value = max(min(value, first - clip * first), first + clip * first)
            inverse.append(1 / value.exp())
        merged.append((len(inverse) / sum(inverse)).log())
    return slow_dpo(policy, merged)


def slow_bapo(policy, reference, anchor):
    forgotten = BETA * (reference[2].exp() / policy[2].exp()).log()
    return slow_dpo(policy, reference) + (anchor * forgotten if forgotten > 0 else 0.0)


def slow_spo(policy, reference, degree):
    """A pair a degree: less was removed from the one than from the other."""
    order = [0, *range(2, len(policy))]
    degrees = [
        slow_dpo([policy[a], policy[b]], [reference[a], reference[b]])
        for a, b in zip(order, order[1:])
    ]
    return slow_dpo(policy, reference) + degree * sum(degrees) / len(degrees)


def row_by_row(slow, policy, reference, *more):
    """(B,), a pair at a time; reference: (B, S), or (R, B, S)."""
    return torch.stack([slow(p, q, *more) for p, q in zip(policy, reference.movedim(-2, 0))])


CASES = {
    "dpo": (2, (), dpo_losses, slow_dpo, ()),
    "mrpo": (2, (3,), mrpo_losses, slow_mrpo, ()),
    "mrpo clipped": (2, (3,), mrpo_losses, slow_mrpo, (0.1,)),
    "bapo": (3, (), bapo_losses, slow_bapo, (0.7,)),
    "spo of one degree": (3, (), spo_losses, slow_spo, (0.7,)),
    "spo": (5, (), spo_losses, slow_spo, (0.7,)),
}


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_those_of_their_equations(case):
    columns, references, loss, slow, more = CASES[case]
    policy = log_probabilities(12, columns).requires_grad_()
    reference = log_probabilities(*references, 12, columns, seed=1)
    ours = loss(policy, reference, BETA, *more)
    theirs = row_by_row(slow, policy, reference, *more)
    torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)
    gradients = (torch.autograd.grad(losses.sum(), policy)[0] for losses in (ours, theirs))
    torch.testing.assert_close(*gradients, atol=1e-10, rtol=1e-10)


def test_the_gradient_of_dpo_in_closed_form():
    """2305.18290, section 4: -β σ(r_l - r_w) (∇ log π(y_w) - ∇ log π(y_l)), to 1e-10."""
    policy = log_probabilities(9, 2).requires_grad_()
    reference = log_probabilities(9, 2, seed=1)
    (gradient,) = torch.autograd.grad(dpo_losses(policy, reference, BETA).sum(), policy)
    wrong = 1 - row_by_row(probability_of_preference, policy.detach(), reference)
    expected = torch.stack([-BETA * wrong, BETA * wrong], 1)
    torch.testing.assert_close(gradient, expected, atol=1e-10, rtol=0)


# ---- what they must reduce to --------------------------------------------------------------------


def test_limits_are_dpo():
    policy, reference = log_probabilities(8, 4), log_probabilities(8, 4, seed=1)
    dpo = dpo_losses(policy, reference, BETA)
    assert torch.equal(bapo_losses(policy, reference, BETA, 0.0), dpo)
    assert torch.equal(spo_losses(policy, reference, BETA, 0.0), dpo)
    for references in (reference[None], torch.stack([reference] * 3)):
        torch.testing.assert_close(mrpo_losses(policy, references, BETA), dpo)
    others = log_probabilities(3, 8, 4, seed=2)
    clipped = mrpo_losses(policy, torch.cat([reference[None], others]), BETA, clip=0.0)
    torch.testing.assert_close(clipped, dpo)  # no reference may differ from the first


@pytest.mark.parametrize("loss", [dpo_losses, mrpo_losses])
def test_a_small_beta_has_the_slope_of_a_coin(loss):
    """∂L/∂r = -1/2 where both implicit rewards vanish, so ∂L/∂log π = -β/2."""
    policy = log_probabilities(8, 2).requires_grad_()
    reference = log_probabilities(*((2,) if loss is mrpo_losses else ()), 8, 2, seed=1)
    beta = 1e-8
    losses = loss(policy, reference, beta)
    (gradient,) = torch.autograd.grad(losses.sum(), policy)
    assert losses.tolist() == pytest.approx([math.log(2)] * 8, abs=1e-6)
    torch.testing.assert_close(
        gradient / beta, torch.tensor([[-0.5, 0.5]] * 8).double(), atol=1e-6, rtol=0
    )


def test_a_policy_that_is_its_reference_pays_log_2_and_no_anchor():
    policy = log_probabilities(5, 4)
    assert implicit_margins(policy, policy, BETA).abs().max() == 0
    log_2 = [math.log(2)] * 5
    assert bapo_losses(policy, policy, BETA, 10.0).tolist() == pytest.approx(log_2)
    assert spo_losses(policy, policy, BETA, 1.0).tolist() == pytest.approx([2 * x for x in log_2])


def test_the_anchor_pulls_only_at_what_was_forgotten():
    reference = log_probabilities(2, 3)
    policy = reference.clone()
    policy[:, 2] += torch.tensor([1.5, -1.5])  # more likely than before, and less
    policy.requires_grad_()
    (gradient,) = torch.autograd.grad(bapo_losses(policy, reference, BETA, 2.0).sum(), policy)
    assert gradient[:, 2].tolist() == pytest.approx([0.0, -2.0 * BETA])


def test_degrees_in_order_cost_least():
    reference = torch.zeros(1, 5, dtype=torch.float64)
    in_order = torch.tensor([[0.0, 0.0, -1.0, -2.0, -3.0]], dtype=torch.float64)
    swapped = in_order[:, [0, 1, 3, 2, 4]]
    cost = [spo_losses(p, reference, 1.0, 1.0).item() for p in (in_order, swapped)]
    assert cost[0] < cost[1]


def test_the_merged_reference_is_a_lower_bound():
    """Harmonic <= geometric mean, which makes the objective a lower bound; and it is symmetric."""
    references = log_probabilities(4, 7, 2)
    merged = merged_reference(references)
    assert (merged <= references.mean(0) + 1e-12).all()
    assert (merged >= references.amin(0) - 1e-12).all()
    torch.testing.assert_close(merged, merged_reference(references.flip(0)))


def test_nothing_overflows():
    """A long response has a log-probability of thousands of nats."""
    policy, reference = torch.tensor([[-9e3, -1e3, -5e3]]), torch.tensor([[-1e3, -9e3, -4e3]])
    assert dpo_losses(policy, reference, 1.0).item() == 16000
    assert bapo_losses(policy, reference, 1.0, 1.0).item() == 17000
    assert merged_reference(torch.stack([policy, reference])).isfinite().all()
