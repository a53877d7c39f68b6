"""Every method is what its paper says: a second, slow implementation, pair by pair, and limits."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import minimore.lab.methods.solve
from minimore.lab.methods import maxmin
from minimore.lab.methods.by_name import METHODS, USES_SOURCE
from minimore.lab.methods.ensemble import CalibratedEnsemble
from minimore.lab.methods.gated import GatedHeads
from minimore.lab.methods.heads import OwnHeads, SharedHead
from minimore.lab.methods.maxmin import MaxMin, expectation, mixture_loss, worst_loss
from minimore.lab.methods.mean_variance import MeanVariance
from minimore.lab.methods.prototypes import Prototypes
from minimore.lab.methods.shrinkage import Shrinkage, Temperatures, log_evidence, shrunk_loss
from minimore.lab.methods.solve import PRIOR, solve
from minimore.lab.methods.states import StatePairs, of_no_source, of_own_source

K, D, E = 3, 5, 4


def drawn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def pairs_of(N=30, seed=0, prompt=True):
    """Pairs of three sources, of unequal sizes; with so many no head separates them."""
    source = torch.tensor([0, 1, 2, 0, 1, 0] * (N // 6))
    return StatePairs(
        drawn(N, D, seed=seed),
        drawn(N, D, seed=seed + 1),
        source,
        K,
        drawn(N, E, seed=seed + 2) if prompt else None,
    )


def random_parameters(**shapes):
    return {name: drawn(*shape, seed=i + 9) for i, (name, shape) in enumerate(shapes.items())}


def log_sigmoid(x):
    """-log(1 + e^-x), written as it is defined."""
    return -torch.log(1 + torch.exp(-x))


def dot(a, b):
    return sum(x * y for x, y in zip(a, b))


# ---- the second implementations: one pair at a time ----------------------------------------------


def slow_shared(p, pairs):
    terms = [-log_sigmoid(dot(p["head"], c) - dot(p["head"], r)) for c, r in sides(pairs)]
    return sum(terms) / len(terms)


def sides(pairs):
    return list(zip(pairs.chosen, pairs.rejected))


def slow_own(p, pairs):
    total = 0.0
    for k, (c, r) in zip(pairs.source.tolist(), sides(pairs)):
        total = total - log_sigmoid(dot(p["heads"][k], c) - dot(p["heads"][k], r))
    return total / len(pairs.chosen)


def slow_mixture(p, pairs, groups=(1, 0, 1)):
    total = 0.0
    for k, (c, r) in zip(pairs.source.tolist(), sides(pairs)):
        head = p["heads"][groups[k]]
        total = total - log_sigmoid(dot(head, c) - dot(head, r))
    return total / len(pairs.chosen)


def slow_worst(p, pairs, groups=(1, 0, 1)):
    losses = []
    for u in sorted(set(groups)):
        own = [i for i, k in enumerate(pairs.source.tolist()) if groups[k] == u]
        terms = [-log_sigmoid(dot(p["head"], pairs.chosen[i] - pairs.rejected[i])) for i in own]
        losses.append(sum(terms) / len(terms))
    s = maxmin.SHARPNESS
    return sum(torch.exp(s * loss) for loss in losses).log() / s


def slow_mean_variance(p, pairs):
    total = 0.0
    for c, r in sides(pairs):
        spread_c, spread_r = (
            torch.log(1 + torch.exp(dot(p["deviation"], z) + p["offset"])) for z in (c, r)
        )
        z = (dot(p["mean"], c) - dot(p["mean"], r)) / torch.sqrt(spread_c**2 + spread_r**2)
        total = total - log_sigmoid(math.sqrt(2 * math.pi) * z)
    return total / len(pairs.chosen)


def slow_prototypes(p, pairs):
    total = 0.0
    for k, (c, r) in zip(pairs.source.tolist(), sides(pairs)):
        e = torch.exp(p["weights"][k])
        ideal = sum(share * point for share, point in zip(e / e.sum(), p["points"]))
        far, near = (
            torch.sqrt(sum((dot(row, z) - a) ** 2 for row, a in zip(p["map"], ideal)))
            for z in (r, c)
        )
        total = total - log_sigmoid(far - near)
    return total / len(pairs.chosen)


HEADS = drawn(K, D, seed=5)


def slow_gated(p, pairs):
    total = 0.0
    for prompt, (c, r) in zip(pairs.prompt, sides(pairs)):
        e = [torch.exp(dot(p["gate"][k], prompt) + p["offset"][k]) for k in range(K)]
        reward_c, reward_r = (
            sum(e[k] / sum(e) * dot(HEADS[k], z) for k in range(K)) for z in (c, r)
        )
        total = total - log_sigmoid(torch.exp(p["scale"]) * (reward_c - reward_r))
    return total / len(pairs.chosen)


SHARE = torch.linspace(0.1, 0.9, 30, dtype=torch.float64)


def slow_ensemble(p, pairs):
    a, total = 1 / (1 + torch.exp(-p["weight"])), 0.0
    for share, (c, r) in zip(SHARE, sides(pairs)):
        vote = 1 / (1 + torch.exp(-dot(p["head"], c - r)))
        total = total + (1 - ((1 - a) * share + a * vote)) ** 2
    return total / len(pairs.chosen)


def slow_shrunk(p, pairs, spread=0.7):
    total = 0.0
    for k, (c, r) in zip(pairs.source.tolist(), sides(pairs)):
        head = p["shared"] + p["offsets"][k]
        total = total - log_sigmoid(dot(head, c) - dot(head, r))
    squares = sum(v**2 for row in p["offsets"] for v in row)
    shared = sum(v**2 for v in p["shared"])
    return (total + squares / (2 * spread**2)) / len(pairs.chosen) + PRIOR * shared / 2


GROUPS = torch.tensor([1, 0, 1])
LOSSES = {
    "shared": (SharedHead().loss, slow_shared, {"head": (D,)}),
    "own": (OwnHeads().loss, slow_own, {"heads": (K, D)}),
    "mixture": (lambda p, x: mixture_loss(p, GROUPS, x), slow_mixture, {"heads": (2, D)}),
    "worst": (lambda p, x: worst_loss(p, GROUPS, x), slow_worst, {"head": (D,)}),
    "mean_variance": (
        MeanVariance().loss,
        slow_mean_variance,
        {"mean": (D,), "deviation": (D,), "offset": ()},
    ),
    "prototypes": (
        Prototypes().loss,
        slow_prototypes,
        {"map": (2, D), "points": (3, 2), "weights": (K, 3)},
    ),
    "gated": (
        lambda p, x: GatedHeads().loss(p, HEADS, x),
        slow_gated,
        {"gate": (K, E), "offset": (K,), "scale": ()},
    ),
    "ensemble": (
        lambda p, x: CalibratedEnsemble().loss(p, SHARE, x),
        slow_ensemble,
        {"head": (D,), "weight": ()},
    ),
    "shrunk": (
        lambda p, x: shrunk_loss(p, 0.7, x),
        slow_shrunk,
        {"shared": (D,), "offsets": (K, D)},
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients_are_those_of_the_paper_pair_by_pair(name):
    loss, slow_loss, shapes = LOSSES[name]
    parameters = {n: v.requires_grad_() for n, v in random_parameters(**shapes).items()}
    fast, slow = loss(parameters, pairs_of()), slow_loss(parameters, pairs_of())
    assert float(fast.detach()) == pytest.approx(float(slow.detach()), rel=1e-12)
    leaves = list(parameters.values())
    for ours, theirs in zip(torch.autograd.grad(fast, leaves), torch.autograd.grad(slow, leaves)):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-10)
        assert ours.abs().max() > 1e-4


# ---- one signature -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_all_methods_have_one_signature_and_are_antisymmetric(name, monkeypatch):
    monkeypatch.setattr(minimore.lab.methods.solve, "SMALL_GRADIENT", 1e-2)  # it need not be good
    method, pairs = METHODS[name], pairs_of(N=48)
    parameters = method.fit(pairs, 0)
    turned = replace(pairs, chosen=pairs.rejected, rejected=pairs.chosen)
    moved = replace(pairs, source=(pairs.source + 1) % K)
    for knows_source in (True, False):
        margins = method.margins(parameters, pairs, knows_source)
        assert margins.shape == (48,) and margins.isfinite().all()
        back = method.margins(parameters, turned, knows_source)
        assert torch.allclose(margins, -back, atol=1e-9)  # P(a over b) + P(b over a) = 1
        looks = not torch.equal(margins, method.margins(parameters, moved, knows_source))
        assert looks <= (knows_source and name in USES_SOURCE)
    again = method.fit(pairs, 0)
    assert all(torch.equal(parameters[key], again[key]) for key in parameters)


def test_no_source_is_the_mean_probability_of_all():
    margins = drawn(20, K) * 3
    p = of_no_source(margins).sigmoid()
    assert torch.allclose(p, margins.sigmoid().mean(1), atol=1e-12)
    far = of_no_source(torch.tensor([[800.0, 900.0], [-800.0, 800.0]], dtype=torch.float64))
    assert far[0] == pytest.approx(800 + math.log(2)) and far[1] == pytest.approx(0, abs=1e-12)
    assert torch.equal(of_own_source(margins, torch.tensor([2] * 20)), margins[:, 2])


def test_the_solver_finds_where_newton_ends():
    pairs = pairs_of(N=60)
    z, w = pairs.difference.numpy(), np.zeros(D)
    for _ in range(50):  # Newton's method on the same sum
        p = 1 / (1 + np.exp(-z @ w))
        gradient = -z.T @ (1 - p) / len(z) + PRIOR * w
        hessian = (z * (p * (1 - p))[:, None]).T @ z / len(z) + PRIOR * np.eye(D)
        w = w - np.linalg.solve(hessian, gradient)
    assert np.allclose(SharedHead().fit(pairs, 0)["head"].numpy(), w, atol=1e-5)


@pytest.mark.parametrize("width", [2, 12])
def test_the_solver_walks_through_a_bent_valley(width):
    def rosenbrock(p):
        x = p["x"]
        return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()

    start = {"x": torch.zeros(width).double()}
    end = solve(rosenbrock, start, prior=0)["x"]
    assert torch.allclose(end, torch.ones(width).double(), atol=1e-4)
    values = [float(rosenbrock(solve(rosenbrock, start, 0, n))) for n in range(1, 20)]
    assert (np.diff(values) <= 0).all()  # every step lowers it


# ---- limits --------------------------------------------------------------------------------------


def test_maxmin_with_one_group_is_bradley_terry():
    pairs = pairs_of(N=60)
    parameters, shared = MaxMin(groups=1).fit(pairs, 0), SharedHead().fit(pairs, 0)
    for knows_source in (True, False):
        margins = MaxMin(groups=1).margins(parameters, pairs, knows_source)
        assert torch.allclose(margins, SharedHead().margins(shared, pairs, False), atol=1e-5)


def test_the_fair_head_is_worse_for_nobody_than_for_the_worst():
    pairs = pairs_of(N=120)
    groups = torch.tensor([0, 1, 1])
    fair = solve(lambda p: worst_loss(p, groups, pairs), {"head": torch.zeros(D).double()})["head"]
    worst = float(maxmin.group_losses(fair, groups, pairs).max())
    for seed in range(200):  # no other head has a smaller worst loss, but for the soft maximum
        other = fair + 0.3 * drawn(D, seed=seed)
        assert maxmin.group_losses(other, groups, pairs).max() > worst - math.log(2) / 100


@pytest.mark.parametrize("prompt", [True, False])
def test_a_gate_of_equal_heads_is_the_shared_head(prompt):
    pairs, head = pairs_of(prompt=prompt), drawn(D)
    width = E if prompt else 0
    parameters = random_parameters(gate=(K, width), offset=(K,)) | {
        "scale": torch.zeros(()).double(),
        "heads": head.repeat(K, 1),
    }
    margins = GatedHeads().margins(parameters, pairs, True)
    assert torch.allclose(margins, pairs.difference @ head, atol=1e-12)


def test_a_gate_that_sees_the_source_opens_the_head_of_the_source():
    pairs = pairs_of(N=60)
    pairs = replace(pairs, prompt=torch.nn.functional.one_hot(pairs.source, K).double())
    parameters = {
        "gate": 50 * torch.eye(K).double(),
        "offset": torch.zeros(K).double(),
        "scale": torch.zeros(()).double(),
        "heads": HEADS,
    }
    own = OwnHeads().margins({"heads": HEADS}, pairs, True)
    assert torch.allclose(GatedHeads().margins(parameters, pairs, False), own, atol=1e-9)


def test_shrinkage_at_its_ends_is_one_head_and_own_heads():
    pairs = pairs_of(N=120)
    none, full = Shrinkage((1e-3,)).fit(pairs, 0), Shrinkage((1e4,)).fit(pairs, 0)
    shared = SharedHead().fit(pairs, 0)
    own = solve(lambda p: OwnHeads().loss(p, pairs), {"heads": none["heads"] * 0}, prior=0)
    assert torch.allclose(none["heads"], shared["head"].expand(K, D), atol=1e-4)
    assert torch.allclose(full["heads"], own["heads"], atol=1e-3)
    assert float(Shrinkage().fit(pairs, 0)["spread"]) in Shrinkage().spreads


def test_the_evidence_is_the_integral_over_the_offset():
    """Of one source and one number the integral can be summed on a grid."""
    z = drawn(40, 1) + 0.4
    pairs = StatePairs(z, torch.zeros_like(z), torch.zeros(40, dtype=torch.long), 1)
    spread, shared = 0.5, torch.tensor([0.3]).double()
    offsets = torch.linspace(-8, 8, 4001).double()
    likelihood = torch.nn.functional.logsigmoid(z * (shared + spread * offsets)).sum(0)
    normal = -offsets.square() / 2 - math.log(2 * math.pi) / 2
    exact = float((likelihood + normal).logsumexp(0) + math.log(16 / 4000))
    best_offset = spread * offsets[(likelihood + normal).argmax()]
    exact -= 40 * PRIOR * 0.3**2 / 2
    best = {"shared": shared, "offsets": best_offset.reshape(1, 1)}
    assert log_evidence(best, spread, pairs) == pytest.approx(exact, abs=0.02)


def test_an_ensemble_of_one_is_a_head_with_the_brier_loss():
    pairs = pairs_of(N=120)
    parameters = CalibratedEnsemble(heads=1).fit(pairs, 0)
    assert parameters["weights"].tolist() == [1.0]
    z = pairs.difference
    lone = solve(
        lambda p: (1 - (z @ p["head"]).sigmoid()).square().mean(),
        {"head": 0.1 * drawn(D, seed=3)},
    )["head"]
    margins = CalibratedEnsemble(heads=1).margins(parameters, pairs, False)
    assert torch.allclose(margins, z @ lone, atol=1e-3)
    many = CalibratedEnsemble(heads=4).fit(pairs, 0)
    assert float(many["weights"].sum()) == pytest.approx(1)


def test_equal_temperatures_are_one_and_a_reversed_source_is_read_backwards():
    head, z = 2 * drawn(D), drawn(1500, D, seed=1)
    source = torch.arange(1500) % K
    scale = torch.tensor([1.0, 0.2, -1.0]).double()[source]  # of the labels' log-odds
    p = (scale * (z @ head)).sigmoid()
    sign = (torch.rand(1500, generator=torch.Generator().manual_seed(4)).double() < p) * 2.0 - 1
    pairs = StatePairs(z * sign[:, None], torch.zeros_like(z), source, K)
    parameters = Temperatures().fit(pairs, 0)
    first, second, third = (parameters["inverse"] / parameters["inverse"][0]).tolist()
    assert first == 1 and 0.05 < second < 0.4 and -1.4 < third < -0.7


def test_prototypes_with_one_point_are_the_same_for_all_sources():
    pairs = pairs_of()
    parameters = random_parameters(map=(2, D), points=(1, 2), weights=(K, 1))
    margins = Prototypes(points=1).margins(parameters, pairs, True)
    assert torch.allclose(margins, Prototypes(points=1).margins(parameters, pairs, False))


def test_equal_deviations_are_bradley_terry():
    pairs, mean = pairs_of(), drawn(D)
    offset = torch.tensor(math.log(math.e - 1)).double()  # softplus of it is 1
    parameters = {"mean": mean, "deviation": torch.zeros(D).double(), "offset": offset}
    margins = MeanVariance().margins(parameters, pairs, False)
    assert torch.allclose(margins, math.sqrt(math.pi) * pairs.difference @ mean, atol=1e-12)


# ---- expectation-maximisation --------------------------------------------------------------------


def planted(seed, annotators=30, pairs=20):
    """Annotators of two opposite tastes: the pairs, and the true group of each annotator."""
    random = np.random.default_rng(seed)
    head = random.standard_normal(D) * 2
    groups = (np.arange(annotators) % 2 == 0).astype(int)
    source = np.repeat(np.arange(annotators), pairs)
    z = random.standard_normal((len(source), D))
    sign = np.where(groups[source] == 1, 1.0, -1.0)
    p = 1 / (1 + np.exp(-sign * (z @ head)))
    z *= np.where(random.random(len(z)) < p, 1.0, -1.0)[:, None]  # the chosen side first
    chosen = torch.from_numpy(z)
    states = StatePairs(chosen, torch.zeros_like(chosen), torch.from_numpy(source), annotators)
    return states, groups


@pytest.mark.parametrize("seed", range(5))
def test_two_opposite_groups_are_found(seed):
    pairs, groups = planted(seed)
    found = MaxMin().fit(pairs, seed)["groups"].numpy()
    agreement = np.mean((found == groups)[pairs.source.numpy()])  # of pairs
    assert max(agreement, 1 - agreement) >= 0.95


@pytest.mark.parametrize("prior", [0.0, PRIOR])
@pytest.mark.parametrize("groups", [2, 4])
def test_the_likelihood_of_em_never_falls(groups, prior):
    for seed in range(4):
        pairs, _ = planted(seed, annotators=12)
        _, _, likelihoods = MaxMin(groups=groups, prior=prior).mixture(pairs, seed)
        assert len(likelihoods) > 1 and (np.diff(likelihoods) >= -1e-12).all()


def test_the_expectation_takes_the_group_of_the_largest_product():
    pairs, heads = pairs_of(), drawn(4, D)
    for k, group in enumerate(expectation(heads, pairs).tolist()):
        own = pairs.difference[pairs.source == k]
        products = [np.prod([1 / (1 + math.exp(-float(w @ z))) for z in own]) for w in heads]
        assert group == int(np.argmax(products))
