"""AdamW against torch's; what rounds is unbiased; bytes are what the table says."""

import math
import operator
from itertools import product

import pytest
import torch

from minimore.engine.optim import AdamW, Coefficients, adamw_, compile_update, slice_of_state
from minimore.engine.recipe import MOMENTS, PARAMETERS
from minimore.engine.storage import (
    chance,
    empty_moments,
    join,
    key_of,
    places,
    random_bits,
    read_moments,
    round_at_random,
    split,
    write_moments,
)

PARAMETER_BYTES = {"float32": 4, "split": 4, "bfloat16": 2}  # with the low halves
MOMENT_BYTES = {"float32": 8, "bfloat16": 4, "int8": 2 + 12 / 256}


def after_steps(optimizer, gradients, value, rate=1e-3):
    """A parameter after one update per gradient."""
    p = optimizer.adopt("p", value.clone())
    optimizer.learning_rate = rate
    for g in gradients:
        optimizer.update("p", p, g)
        optimizer.steps += 1
    return p


STEPS, COPIES = 30, 100  # what is rounded is drawn in so many steps, and so often in each


def keys_of_steps(rounded):
    return [key_of(0, step, "p", rounded) for step in range(STEPS)]


# ---- AdamW ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_fp32_is_bitwise_torchs_adamw(dtype, decay):
    shape = 300, 301  # more than one slice
    gradients, value = torch.randn(20, *shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    theirs = torch.nn.Parameter(value.clone())
    reference = torch.optim.AdamW([theirs], lr=1e-3, weight_decay=decay, fused=False, foreach=False)
    for g in gradients:
        theirs.grad = g.clone()
        reference.step()
    ours = AdamW(weight_decay=decay)
    assert torch.equal(after_steps(ours, gradients, value), theirs.detach())
    assert torch.equal(ours.state["p"]["m"].view(shape), reference.state[theirs]["exp_avg"])
    assert torch.equal(ours.state["p"]["v"].view(shape), reference.state[theirs]["exp_avg_sq"])


def test_the_formula_by_hand():
    value, m, v, g = (torch.tensor([x], dtype=torch.float64) for x in (2.0, 0.5, 0.25, 4.0))
    coefficients = Coefficients(keep=0.99, rate=0.1, root=0.5)
    adamw_(value, m, v, g, coefficients, betas=(0.9, 0.99), eps=1e-3)
    assert m.item() == pytest.approx(0.9 * 0.5 + 0.1 * 4)
    assert v.item() == pytest.approx(0.99 * 0.25 + 0.01 * 16)
    step = 0.1 * m.item() / (math.sqrt(v.item()) / 0.5 + 1e-3)
    assert value.item() == pytest.approx(2 * 0.99 - step)


@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("parameters", PARAMETERS)
def test_bytes_a_parameter(parameters, moments):
    optimizer = AdamW(parameters, moments)
    matrix, vector = torch.randn(64, 512), torch.randn(512)
    p, q = optimizer.adopt("matrix", matrix), optimizer.adopt("vector", vector)
    states = {
        name: sum(tensor.nbytes for tensor in state.values())
        for name, state in optimizer.state.items()
    }
    expected = PARAMETER_BYTES[parameters] + MOMENT_BYTES[moments]
    assert (p.nbytes + states["matrix"]) / p.numel() == expected
    assert q.dtype == torch.float32 and states["vector"] == 8 * 512


def test_one_huge_gradient_spoils_no_block():
    """Its square overflows. That number stands still, with any moments; its neighbours go on."""
    torch.manual_seed(0)
    usual = torch.randn(2, 256) + 1
    huge = usual.clone()
    huge[0, 0] = 1e25
    for moments in MOMENTS:
        gradients = [usual, usual, huge, usual, usual, usual]
        p = after_steps(AdamW("float32", moments), gradients, torch.zeros(2, 256))
        moved = p.flatten()[1:].abs() > 1e-3
        assert p.isfinite().all() and moved.float().mean() > 0.9, moments


def test_small_steps_arrive_on_average_where_rounding_to_nearest_freezes():
    value, g, rate = torch.ones(200, 200), torch.ones(200, 200), 1e-5
    moved = 1 - after_steps(AdamW("bfloat16"), [g] * 50, value, rate).float().mean()
    assert moved == pytest.approx(50 * rate, rel=0.1)
    # One such step, rounded to the nearest, is nothing.
    assert ((value.bfloat16() - rate) == 1).all()


def test_slices_change_nothing(monkeypatch):
    gradients, value, results = torch.randn(3, 40, 100), torch.randn(40, 100), []
    for size in (256, 1024, 1 << 20):
        monkeypatch.setattr("minimore.engine.optim.SLICE", {"cpu": size})
        optimizer = AdamW("bfloat16", "int8")
        p = after_steps(optimizer, gradients, value)
        results.append((p, *optimizer.state["p"].values()))
    first, *others = results
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other))


@pytest.mark.slow
def test_what_cuda_compiles_is_one_graph_a_storage_and_the_same():
    """The update as CUDA runs it, scalars as tensors, any length: traced whole, once a storage.

    It runs without a compiler, and takes places for indices as a compiler does.
    """
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        # As an input a number would be float64, and so would be a part of the arithmetic.
        for value in inputs:
            assert not isinstance(value, float | torch.SymFloat)
            assert not isinstance(value, torch.Tensor) or value.dtype != torch.float64
        places_as_indices(graph)
        return graph.forward

    compiled = compile_update(backend)
    storages = list(zip(PARAMETERS, reversed(MOMENTS)))  # they are read and written independently
    for (parameters, moments), n in product(storages, (1000, 2048, 70_000)):
        plain, traced = AdamW(parameters, moments), AdamW(parameters, moments)
        value = torch.randn(n // 4, 4)
        p, q = plain.adopt("p", value.clone()), traced.adopt("p", value.clone())
        plain.learning_rate = traced.learning_rate = 1e-3
        for _ in (1, 2):
            g = torch.randn(n)
            plain.update("p", p, g)
            update_traced(compiled, traced, q, g)
            plain.steps, traced.steps = plain.steps + 1, traced.steps + 1
        assert torch.equal(p, q)
        assert all(
            torch.equal(plain.state["p"][kind], traced.state["p"][kind])
            for kind in traced.state["p"]
        )
    # One for all lengths, and a second where a length came first that is no multiple of a block.
    assert len(graphs) <= 2 * len(storages)


def places_as_indices(graph):
    """Count in 64 bits, as torch's compiler does for a GPU.

    It gives every range the type of an index, whatever type is asked for. Sums and products of
    indices are indices, and their casts are dropped. It refuses to read 64 bits as an fp32 number;
    here they are read as two.
    """
    indices = set()
    for node in graph.graph.nodes:
        is_of_indices = not indices.isdisjoint(node.all_input_nodes)
        if node.target is torch.arange:
            node.update_kwarg("dtype", torch.int64)
            indices.add(node)
        elif is_of_indices and node.target in ("int", "to"):
            node.replace_all_uses_with(node.args[0])
        elif is_of_indices and node.target in (operator.add, operator.sub, operator.mul):
            indices.add(node)
    assert not indices.isdisjoint(graph.graph.nodes)
    graph.recompile()


def update_traced(compiled, optimizer, p, g):
    """One update in two slices, with the coefficients and keys that a device would have."""
    numbers = optimizer.numbers(torch.device("cpu"))
    keys = numbers.keys["p"]
    assert isinstance(numbers.coefficients.rate, torch.Tensor)
    assert isinstance(keys["value"], torch.Tensor)
    flat, state = p.view(-1), optimizer.state["p"]
    for start, end in ((0, 512), (512, 1 << 20)):  # whole blocks, and whatever there is of the last
        compiled(
            flat[start:end],
            g[start:end],
            slice_of_state(state, start, end),
            numbers.coefficients,
            keys,
            start,
            (0.9, 0.999),
            1e-8,
        )


# ---- parameters ----------------------------------------------------------------------------------


def test_split_is_bitwise_fp32():
    gradients, value = torch.randn(20, 300, 301), torch.randn(300, 301)
    expected = after_steps(AdamW(), gradients, value)
    optimizer = AdamW("split")
    high = after_steps(optimizer, gradients, value)
    assert high.dtype == torch.bfloat16
    assert torch.equal(optimizer.value("p", high), expected)
    assert (high.float() - expected).abs().max() <= expected.abs().max() * 2**-8


def test_split_and_join():
    spread = torch.randn(10_000) * 10 ** torch.randn(10_000).mul(8)
    special = torch.tensor([0.0, -0.0, 1e-45, -1e-38, 3e38, 1 + 2**-8, -1 - 2**-8])
    x = torch.cat([spread, special])
    high, low = split(x)
    assert low.dtype == torch.int16
    assert torch.equal(join(high, low).view(torch.int32), x.view(torch.int32))
    # torch's cast rounds ties to even, this one away from zero: the last two are ties.
    differs = high != x.bfloat16()
    assert differs[-2:].all() and differs.sum() <= 2 + 3


def test_rounding_of_parameters_is_unbiased():
    x = torch.randn(200) * 10.0 ** torch.arange(-20, 20).repeat(5)
    samples = torch.cat(
        [
            round_at_random(x.repeat(COPIES), random_bits(key, places(COPIES * 200)))
            .double()
            .view(COPIES, 200)
            for key in keys_of_steps("value")
        ]
    )
    z = z_scores(samples, x)
    assert z.abs().max() < 4.5 and 0.8 < z.std() < 1.2
    # Neighbours in bf16, and nothing else.
    assert (samples.amax(0) - samples.amin(0) <= x.abs() * 2**-7).all()


def z_scores(samples, expected):
    """Of the mean of samples (n, ...) about `expected`, in standard errors, away from zero.

    Only of numbers that go both ways often. The others are right to 3% of what they vary by, and to
    a part that covers the fp32 logarithm: that of 1e-14 is exact to 3e-6 of the number.
    """
    samples, expected = samples.double(), expected.double()
    error, spread = samples.mean(0) - expected, samples.std(0)
    between = samples.amax(0) - samples.amin(0)
    often = (spread > 0.14 * between) & (spread > 1e-3 * expected.abs())
    assert often.double().mean() > 0.5
    allowed = 0.03 * between + 2e-3 * expected.abs()
    assert (error.abs() <= allowed)[~often].all()
    return (error / spread * math.sqrt(len(samples)))[often] * expected[often].sign()


# ---- moments -------------------------------------------------------------------------------------


def spread_moments(decades, count=1024):
    """Moments (count,) of which every block spans so many decades of v; one of them is zero."""
    torch.manual_seed(0)
    scale = 10.0 ** ((torch.rand(count) - 1) * decades / 2 + decades / 8)
    sign = torch.where(torch.rand(count) < 0.5, -1, 1)
    m = (torch.rand(count) + 0.5) * scale * sign
    v = (torch.rand(count) + 0.5) * scale**2
    m[5] = v[5] = 0
    return m, v


def read_again(m, v, kind):
    """Both moments (n,) written and read many times: two (STEPS x COPIES, n)."""
    n, reads = len(m), []
    m, v = m.repeat(COPIES), v.repeat(COPIES)  # whole blocks, so copies have no scales in common
    for first, second in zip(keys_of_steps("first"), keys_of_steps("second")):
        keys, state = {"first": first, "second": second}, empty_moments(m, kind)
        write_moments(state, m, v, lambda name, keys=keys: random_bits(keys[name], places(len(m))))
        reads.append([moment.view(COPIES, n) for moment in read_moments(state, len(m))])
    return [torch.cat(moment) for moment in zip(*reads)]


@pytest.mark.slow
@pytest.mark.parametrize("kind, decades", [("bfloat16", 6), ("int8", 6), ("int8", 20)])
def test_rounding_of_moments_is_unbiased(kind, decades):
    """Over 20 decades neighbouring codes are a factor of 1.2 apart, where a bias would show."""
    m, v = spread_moments(decades)
    m_samples, v_samples = read_again(m, v, kind)
    assert (m_samples[:, 5] == 0).all() and (v_samples[:, 5] == 0).all() and (v_samples >= 0).all()
    for samples, expected in ((m_samples, m), (v_samples, v)):
        z = z_scores(samples, expected)
        assert z.abs().max() < 5 and abs(z.mean()) < 0.15 and 0.8 < z.std() < 1.2, z.mean()
    relative = (v_samples / v - 1)[:, v > 0].abs()
    one_code = 2 ** (decades * math.log2(10) / 254) - 1
    assert relative.max() < (2**-7 if kind == "bfloat16" else one_code + 0.02)


@pytest.mark.parametrize(
    "v",
    [
        torch.zeros(300),
        torch.full((300,), 1e-4),
        torch.full((300,), 1e-42),
        torch.tensor([1e-30, 1e3]).repeat(150),
    ],
    ids=["zeros", "equal", "tiny", "far apart"],
)
def test_a_block_of_special_numbers(v):
    state = empty_moments(v, "int8")
    keys = {"first": 1, "second": 2}
    write_moments(state, v.sqrt(), v, lambda rounded: random_bits(keys[rounded], places(300)))
    m_read, v_read = read_moments(state, 300)
    assert m_read.isfinite().all() and v_read.isfinite().all()
    assert (v_read <= v.max() * 1.0001).all()
    if (v == 1e-4).all():
        assert torch.allclose(v_read, v, rtol=1e-5) and torch.allclose(m_read, v.sqrt(), rtol=1e-5)


# ---- random bits ---------------------------------------------------------------------------------


def test_random_bits_are_a_function_of_place_and_even():
    place = places(1 << 18)
    bits = random_bits(key_of(3, 7, "p", "value"), place)
    assert torch.equal(bits[1000:2000], random_bits(key_of(3, 7, "p", "value"), place[1000:2000]))
    assert len(bits.unique()) > 0.9999 * len(bits)  # a bijection of places, so no value twice
    ones = torch.stack([(bits >> i) & 1 for i in range(32)]).double()
    assert (ones.mean(1) - 0.5).abs().max() < 5 * 0.5 / 512
    between_bits = torch.corrcoef(ones - 0.5) - torch.eye(32)
    assert between_bits.abs().max() < 5 / 512
    sample = chance(bits).sort().values
    assert (sample - torch.linspace(0, 1, len(sample))).abs().max() < 2 / 512
    assert sample[0] >= 0 and sample[-1] < 1


def test_random_bits_of_other_keys_and_places_are_others():
    place = places(1 << 18)
    bits = random_bits(key_of(3, 7, "p", "value"), place)
    keys = (3, 8, "p", "value"), (4, 7, "p", "value"), (3, 7, "q", "value"), (3, 7, "p", "first")
    others = [random_bits(key_of(*key), place) for key in keys]
    for other in (*others, bits.roll(1), bits.roll(256)):
        both = torch.stack([chance(bits), chance(other)])
        assert torch.corrcoef(both)[0, 1].abs() < 5 / 512
