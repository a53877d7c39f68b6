"""AdamW against torch's; what rounds is unbiased; bytes are what the table says."""

import math
from itertools import product

import pytest
import torch

from minimore.engine.optim import (
    AdamW,
    Coefficients,
    adamw,
    chance,
    compile_update,
    empty_moments,
    join,
    key_of,
    random_bits,
    read_moments,
    round_at_random,
    split,
    write_moments,
)
from minimore.engine.recipe import MOMENTS, PARAMETERS

BYTES = (
    {"float32": 4, "split": 4, "bfloat16": 2},
    {"float32": 8, "bfloat16": 4, "int8": 2 + 12 / 256},
)


def steps_of(optimizer, gradients, value, rate=1e-3):
    """Parameter after one update per gradient."""
    p = optimizer.adopt("p", value.clone())
    optimizer.learning_rate = rate
    for g in gradients:
        optimizer.update("p", p, g)
        optimizer.steps += 1
    return p


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_fp32_is_bitwise_torchs_adamw(dtype, decay):
    gradients, value = (
        torch.randn(20, 300, 301, dtype=dtype),
        torch.randn(300, 301, dtype=dtype),
    )  # more than one slice
    theirs = torch.nn.Parameter(value.clone())
    reference = torch.optim.AdamW([theirs], lr=1e-3, weight_decay=decay, fused=False, foreach=False)
    for g in gradients:
        theirs.grad = g.clone()
        reference.step()
    ours = AdamW(weight_decay=decay)
    assert torch.equal(steps_of(ours, gradients, value), theirs.detach())
    assert torch.equal(ours.state["p"]["m"].view(300, 301), reference.state[theirs]["exp_avg"])
    assert torch.equal(ours.state["p"]["v"].view(300, 301), reference.state[theirs]["exp_avg_sq"])


def test_split_is_bitwise_fp32():
    gradients, value = torch.randn(20, 300, 301), torch.randn(300, 301)
    whole, parts = AdamW(), AdamW("split")
    expected, high = steps_of(whole, gradients, value), steps_of(parts, gradients, value)
    assert high.dtype == torch.bfloat16 and torch.equal(parts.value("p", high), expected)
    assert (high.float() - expected).abs().max() <= expected.abs().max() * 2**-8


def test_split_and_join():
    x = torch.cat(
        [
            torch.randn(10_000) * 10 ** torch.randn(10_000).mul(8),
            torch.tensor([0.0, -0.0, 1e-45, -1e-38, 3e38, 1 + 2**-8, -1 - 2**-8]),
        ]
    )
    high, low = split(x)
    assert (
        torch.equal(join(high, low).view(torch.int32), x.view(torch.int32))
        and low.dtype == torch.int16
    )
    off = high != x.bfloat16()  # torch's cast rounds ties to even, this one away from zero
    assert off.tolist()[-2:] == [True, True] and off.sum() <= 2 + 3


@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("parameters", PARAMETERS)
def test_bytes_a_parameter(parameters, moments):
    optimizer = AdamW(parameters, moments)
    p = optimizer.adopt("p", torch.randn(64, 512))
    held = p.nbytes + sum(t.nbytes for t in optimizer.state["p"].values())
    assert held / p.numel() == BYTES[0][parameters] + BYTES[1][moments]
    vector = optimizer.adopt("v", torch.randn(512))
    assert (
        vector.dtype == torch.float32
        and sum(t.nbytes for t in optimizer.state["v"].values()) == 8 * 512
    )


def z_score(samples, expected):
    """Of the mean of samples (n, ...) about `expected`, in standard errors, of the numbers that go both ways often; the others are right to 3% of what they vary by.

    (And to 1e-5: the fp32 logarithm of 1e-14 is exact to 3e-6 of the number.)
    """
    samples, expected = samples.double(), expected.double()
    error, spread, between = (
        samples.mean(0) - expected,
        samples.std(0),
        samples.amax(0) - samples.amin(0),
    )
    often = (spread > 0.14 * between) & (spread > 1e-3 * expected.abs())
    assert (
        often.double().mean() > 0.5
        and (
            error.abs()[~often]
            <= 0.03 * between[~often].clamp_min(0) + 2e-3 * expected.abs()[~often]
        ).all()
    )
    return (error / spread * math.sqrt(len(samples)))[often] * expected[often].sign()


def test_rounding_of_parameters_is_unbiased():
    x = torch.randn(200) * 10.0 ** torch.arange(-20, 20).repeat(5)
    bits = lambda i: random_bits(
        key_of(0, i, "p", "value"), torch.arange(len(x), dtype=torch.int32)
    )
    samples = torch.stack([round_at_random(x, bits(i)).double() for i in range(3000)])
    z = z_score(samples, x)
    assert z.abs().max() < 4.5 and 0.8 < z.std() < 1.2
    assert (
        samples.unique(dim=0).amax(0) - samples.amin(0) <= x.abs() * 2**-7
    ).all()  # neighbours, nothing else


@pytest.mark.parametrize("kind, decades", [("bfloat16", 6), ("int8", 6), ("int8", 20)])
def test_rounding_of_moments_is_unbiased(kind, decades):
    """Every block spans so many decades of v; over 20 of them neighbouring codes are a factor of 1.2 apart, where a bias would show."""
    torch.manual_seed(0)
    scale = 10.0 ** ((torch.rand(1000) - 1) * decades / 2 + decades / 8)
    m, v = (
        (torch.rand(1000) + 0.5) * scale * torch.where(torch.rand(1000) < 0.5, -1, 1),
        (torch.rand(1000) + 0.5) * scale**2,
    )
    m[5] = v[5] = 0
    state, found = empty_moments(m, kind), []
    for i in range(3000):
        write_moments(
            state,
            m,
            v,
            lambda what: random_bits(
                key_of(0, i, "p", str(what)), torch.arange(1000, dtype=torch.int32)
            ),
        )
        found.append(torch.stack(read_moments(state, 1000)))
    found = torch.stack(found)
    assert (found[:, :, 5] == 0).all() and (found[:, 1] >= 0).all()
    for samples, expected in ((found[:, 0], m), (found[:, 1], v)):
        z = z_score(samples, expected)
        assert z.abs().max() < 5 and abs(z.mean()) < 0.15 and 0.8 < z.std() < 1.2, z.mean()
    relative = (found[:, 1] / v - 1)[:, v > 0].abs()
    assert relative.max() < (
        2**-7 if kind == "bfloat16" else 2 ** (decades * math.log2(10) / 254) - 1 + 0.02
    )


def test_a_block_of_zeros_of_equal_and_of_tiny_numbers():
    for values in (
        torch.zeros(300),
        torch.full((300,), 1e-4),
        torch.full((300,), 1e-42),
        torch.tensor([1e-30, 1e3]).repeat(150),
    ):
        state = empty_moments(values, "int8")
        write_moments(
            state,
            values.sqrt(),
            values,
            lambda what: random_bits(what, torch.arange(300, dtype=torch.int32)),
        )
        m, v = read_moments(state, 300)
        assert m.isfinite().all() and v.isfinite().all() and (v <= values.max() * 1.0001).all()
        if (values == 1e-4).all():
            assert torch.allclose(v, values, rtol=1e-5) and torch.allclose(
                m, values.sqrt(), rtol=1e-5
            )


def test_one_huge_gradient_spoils_no_block():
    """Its square overflows; with int8 moments that number stands still, as with fp32 ones, and its neighbours go on."""
    torch.manual_seed(0)
    for moments in MOMENTS:
        optimizer, g = AdamW("float32", moments), torch.randn(2, 256) + 1
        p, optimizer.learning_rate = optimizer.adopt("p", torch.zeros(2, 256)), 1e-3
        for t in range(6):
            optimizer.update(
                "p",
                p,
                g
                if t != 2
                else torch.cat([torch.full((1, 1), 1e25), g.flatten()[1:].view(1, -1)], 1).view(
                    2, 256
                ),
            )
            optimizer.steps += 1
        assert p.isfinite().all() and (p.flatten()[1:].abs() > 1e-3).float().mean() > 0.9, moments


def test_small_steps_arrive_on_average_where_rounding_to_nearest_freezes():
    value, g, rate = torch.ones(200, 200), torch.ones(200, 200), 1e-5
    moved = 1 - steps_of(AdamW("bfloat16"), [g] * 50, value, rate).float().mean()
    assert moved == pytest.approx(50 * rate, rel=0.1)
    assert ((value.bfloat16() - rate) == 1).all()  # one such step, rounded to nearest, is nothing


def test_random_bits_are_a_function_of_place_and_even():
    place = torch.arange(1 << 18, dtype=torch.int32)
    bits = random_bits(key_of(3, 7, "p", "value"), place)
    assert torch.equal(bits[1000:2000], random_bits(key_of(3, 7, "p", "value"), place[1000:2000]))
    assert len(bits.unique()) > 0.9999 * len(bits)  # a bijection of places, so no value twice
    ones = torch.stack([(bits >> i) & 1 for i in range(32)]).double()
    assert (ones.mean(1) - 0.5).abs().max() < 5 * 0.5 / 512
    together = torch.corrcoef(ones - 0.5) - torch.eye(32)
    assert together.abs().max() < 5 / 512
    others = [
        random_bits(key_of(*key), place)
        for key in (
            (3, 8, "p", "value"),
            (4, 7, "p", "value"),
            (3, 7, "q", "value"),
            (3, 7, "p", "first"),
        )
    ]
    for other in [*others, bits.roll(1), bits.roll(256)]:
        assert torch.corrcoef(torch.stack([chance(bits), chance(other)]))[0, 1].abs() < 5 / 512
    sample = chance(bits).sort().values
    assert (
        (sample - torch.linspace(0, 1, len(sample))).abs().max() < 2 / 512
        and sample[0] >= 0
        and sample[-1] < 1
    )


def test_slices_change_nothing(monkeypatch):
    gradients, value, found = torch.randn(3, 40, 100), torch.randn(40, 100), []
    for size in (256, 1024, 1 << 20):
        monkeypatch.setattr("minimore.engine.optim.SLICE", {"cpu": size})
        optimizer = AdamW("bfloat16", "int8")
        found.append((steps_of(optimizer, gradients, value), *optimizer.state["p"].values()))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


def test_what_cuda_compiles_is_one_graph_a_storage_and_the_same():
    """The update as CUDA runs it, scalars as tensors, any length: traced whole, once a storage, and run without a compiler."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = compile_update(backend)
    for parameters, moments in product(PARAMETERS, MOMENTS):
        for n in (1000, 2048, 70_000):
            plain, other, value = (
                AdamW(parameters, moments),
                AdamW(parameters, moments),
                torch.randn(n // 4, 4),
            )
            p, q = plain.adopt("p", value.clone()), other.adopt("p", value.clone())
            plain.learning_rate = other.learning_rate = 1e-3
            for _ in (1, 2):
                g, (c, keys) = torch.randn(n), other.numbers(torch.device("cpu"))
                assert isinstance(c.rate, torch.Tensor) and isinstance(keys["p"][0], torch.Tensor)
                plain.update("p", p, g)
                compiled(q.view(-1), g, other.state["p"], c, keys["p"], 0, (0.9, 0.999), 1e-8)
                plain.steps, other.steps = plain.steps + 1, other.steps + 1
            assert torch.allclose(
                plain.value("p", p),
                other.value("p", q),
                rtol=2**-7 if parameters == "bfloat16" else 1e-6,
                atol=1e-6,
            )
    assert (
        len(graphs) <= 2 * 9
    )  # one for all lengths; a second where a length that is no multiple of a block came first


def test_the_formula_by_hand():
    one = lambda x: torch.tensor([x], dtype=torch.float64)
    value, m, v = adamw(
        one(2.0), one(0.5), one(0.25), one(4.0), Coefficients(0.99, 0.1, 0.5), (0.9, 0.99), 1e-3
    )
    assert m.item() == pytest.approx(0.9 * 0.5 + 0.1 * 4) and v.item() == pytest.approx(
        0.99 * 0.25 + 0.01 * 16
    )
    assert value.item() == pytest.approx(
        2 * 0.99 - 0.1 * m.item() / (math.sqrt(v.item()) / 0.5 + 1e-3)
    )
