"""Attention over segments against its definition, and rewards that packing cannot change."""

import random

import pytest
import torch
import torch.nn.functional as F
from conftest import open_model
from runs import slow_but

import minimore.model.attention
import minimore.model.trunk
from minimore.data.pairs import TokenPair, encode, pack_pairs, shared_length
from minimore.model.attention import attend, pack
from minimore.model.rotation import rotary_angles, rotate
from minimore.model.tokenizer import Tokenizer
from minimore.reward import pair_rewards, text_rewards

HEADS = [(1, 1, 4), (4, 4, 8), (4, 2, 8), (6, 2, 5), (3, 1, 16)]  # H, G, C
BOUND = {torch.float64: 1e-12, torch.float32: 2e-6}


# ---- the definition ------------------------------------------------------------------------------


def visible(items):
    """(N, N): a token sees itself and what stands before it in its own text.

    The prefix is part of every text.
    """
    owner = []  # per token of the stream: its item, and its continuation or None
    for i, (prefix, continuations) in enumerate(items):
        owner += [(i, None)] * len(prefix)
        for c, continuation in enumerate(continuations):
            owner += [(i, c)] * len(continuation)
    return torch.tensor(
        [
            [
                place <= at and item == mine and part in (None, own)
                for place, (item, part) in enumerate(owner)
            ]
            for at, (mine, own) in enumerate(owner)
        ]
    )


def by_definition(q, k, v, mask):
    """softmax(q kᵀ / sqrt(C)) v over the keys in the mask, head by head in float64.

    Head h reads key head h // (H / G).
    """
    out = []
    for h in range(q.shape[1]):
        g = h // (q.shape[1] // k.shape[1])
        scores = q[:, h].double() @ k[:, g].double().T / q.shape[2] ** 0.5
        out.append(scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v[:, g].double())
    return torch.stack(out, 1)  # (N, H, C)


def random_items(seed):
    """Pairs with a shared prompt, lone texts, empty prompts, short segments, up to 3 responses."""
    chance = random.Random(seed)

    def length():
        return chance.choice([1, 1, 2, chance.randint(3, 20)])

    return [
        (
            [0] * (length() if chance.random() < 0.7 else 0),
            [[0] * length() for _ in range(chance.randint(1, 3))],
        )
        for _ in range(chance.randint(1, 7))
    ]


def random_qkv(items, heads, dtype=torch.float64, device="cpu"):
    (H, G, C), N = heads, sum(len(p) + sum(map(len, cs)) for p, cs in items)
    generator = torch.Generator().manual_seed(N)
    return [
        torch.randn(N, n, C, generator=generator, dtype=torch.float64)
        .to(device, dtype)
        .requires_grad_()
        for n in (H, G, G)
    ]


def assert_same_with_gradients(result, expected, inputs, bound):
    """Outputs, and the gradients of an arbitrary function of them, agree everywhere."""
    generator = torch.Generator().manual_seed(0)
    slope = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    slope = slope.to(expected.device)

    def with_gradients(out):
        return out, *torch.autograd.grad((out.double() * slope).sum(), inputs)

    for ours, theirs in zip(with_gradients(result), with_gradients(expected)):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=bound, atol=bound)


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("seed", slow_but(range(3), range(12)))
def test_attend_is_a_masked_softmax(seed, heads, dtype):
    items = random_items(seed)
    q, k, v = random_qkv(items, heads, dtype)
    result, expected = attend(q, k, v, pack(items)), by_definition(q, k, v, visible(items))
    assert result.dtype == dtype
    assert_same_with_gradients(result, expected, (q, k, v), BOUND[dtype])


@pytest.mark.parametrize("window", [1, 2, 5, 9, 10**6])
@pytest.mark.parametrize("seed", range(6))
def test_a_window_counts_positions(seed, window):
    """A query sees the keys of its text that are less than `window` positions behind it.

    The border of a shared prompt does not matter.
    """
    items = random_items(seed)
    q, k, v = random_qkv(items, (4, 2, 8))
    stream = pack(items)
    near = stream.positions[:, None] - stream.positions[None, :] < window
    expected = by_definition(q, k, v, visible(items) & near)
    assert_same_with_gradients(attend(q, k, v, stream, window), expected, (q, k, v), 1e-12)


@pytest.mark.parametrize("area", [1, 100, 1 << 22])
@pytest.mark.parametrize("waste", [1.0, 1.3, 1e9])
def test_tiles_of_any_size_are_the_same(monkeypatch, area, waste):
    monkeypatch.setattr(minimore.model.attention, "TILE_AREA", area)
    monkeypatch.setattr(minimore.model.attention, "TILE_WASTE", waste)
    items = [item for seed in range(4) for item in random_items(seed)]
    q, k, v = random_qkv(items, (4, 2, 8))
    stream = pack(items)
    expected = by_definition(q, k, v, visible(items))
    assert_same_with_gradients(attend(q, k, v, stream), expected, (q, k, v), 1e-12)
    if area == 1:  # one segment a tile: the limit is in force
        assert len(stream.tiling(None, q.dtype).tiles) == len(stream.segments)
    if (area, waste) == (1 << 22, 1e9):  # one tile without prefixes, and one with them
        assert len(stream.tiling(None, q.dtype).tiles) == 2


def test_tiles_keep_within_their_area_and_waste(monkeypatch):
    monkeypatch.setattr(minimore.model.attention, "TILE_AREA", 2000)
    monkeypatch.setattr(minimore.model.attention, "TILE_WASTE", 1.3)
    stream = pack([item for seed in range(10) for item in random_items(seed)])
    tiling = stream.tiling(None, torch.float32)
    area = {segment.start: segment.queries * segment.keys for segment in stream.segments}
    place, several = 0, 0
    for segments, queries, keys, _ in tiling.tiles:
        starts = tiling.queries.source[place : place + segments * queries : queries].tolist()
        place += segments * queries
        if segments > 1:
            several += 1
            assert segments * queries * keys <= 2000
            assert segments * queries * keys <= 1.3 * sum(area[start] for start in starts)
    assert several and place == len(tiling.queries.source)


# ---- the other route: keys gathered by an index, both sides cut into segments --------------------


def varlen_by_definition(q, k, v, cu_q, cu_k, max_q, max_k, *, is_causal=False):
    """Attention within each cut, aligned at the bottom right.

    The last query sees all keys, the one before all but the last, and so on.
    """
    assert cu_q.dtype == cu_k.dtype == torch.int32 and all(x.is_contiguous() for x in (q, k, v))
    assert (max_q, max_k) == (int(cu_q.diff().max()), int(cu_k.diff().max())) and is_causal
    assert q.shape[1] == k.shape[1] == v.shape[1] and (cu_q[-1], cu_k[-1]) == (len(q), len(k))
    out = []
    for (a, b), (c, d) in zip(cu_q.unfold(0, 2, 1).tolist(), cu_k.unfold(0, 2, 1).tolist()):
        mask = torch.ones(b - a, d - c, dtype=torch.bool).tril(diagonal=(d - c) - (b - a))
        out.append(by_definition(q[a:b], k[c:d], v[c:d], mask))
    return torch.cat(out)


def varlen_by_window(q, k, v, cu_q, cu_k, max_q, max_k, *, window_size=(-1, -1)):
    """The spelling of other versions of torch: no look to the right."""
    return varlen_by_definition(q, k, v, cu_q, cu_k, max_q, max_k, is_causal=window_size == (-1, 0))


@pytest.mark.parametrize("varlen", [varlen_by_definition, varlen_by_window])
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("seed", slow_but([0], range(3)))
def test_the_varlen_route_is_a_masked_softmax(monkeypatch, seed, heads, varlen):
    monkeypatch.setattr(minimore.model.attention, "varlen_attention", lambda: varlen)
    items = random_items(seed)
    q, k, v = random_qkv(items, heads)
    result = minimore.model.attention._attend_varlen(q, k, v, pack(items))
    assert_same_with_gradients(result, by_definition(q, k, v, visible(items)), (q, k, v), 1e-12)


def test_without_a_shared_prompt_the_varlen_route_gathers_nothing():
    assert pack([([], [[1, 2]]), ([3], [[4]]), ([], [[5], [6]])]).varlen.keys is None
    assert pack([([3], [[4], [5]])]).varlen.keys.source.tolist() == [0, 1, 0, 2]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("heads", [(4, 4, 64), (4, 2, 64)], ids=str)
@pytest.mark.parametrize(
    "dtype, bound", [(torch.bfloat16, 3e-2), (torch.float16, 4e-3), (torch.float32, 1e-4)], ids=str
)
def test_attend_on_cuda_is_a_masked_softmax(heads, dtype, bound):
    items = [item for seed in range(4) for item in random_items(seed)]
    q, k, v = random_qkv(items, heads, dtype, "cuda")
    expected = by_definition(q, k, v, visible(items).cuda())
    assert_same_with_gradients(attend(q, k, v, pack(items).to("cuda")), expected, (q, k, v), bound)


# ---- pack ----------------------------------------------------------------------------------------


def test_pack_by_hand():
    stream = pack(
        [
            ([1, 2, 3, 4], [[5, 6, 7], [8, 9]]),
            ([], [[10]]),
            ([11], [[12], [13, 14], [15]]),
            ([], [[16], [17, 18]]),
        ]
    )
    assert stream.tokens.tolist() == list(range(1, 19))
    assert stream.positions.tolist() == [0, 1, 2, 3, 4, 5, 6, 4, 5, 0, 0, 1, 1, 2, 1, 0, 0, 1]
    assert stream.last.tolist() == [6, 8, 9, 11, 13, 14, 15, 17]
    assert {x.dtype for x in (stream.tokens, stream.positions, stream.last)} == {torch.int64}


@pytest.mark.parametrize(
    "items", [[([1, 2], [[]])], [([], [[]])], [([], [[1]]), ([1], [[2], []])]], ids=str
)
def test_a_text_without_a_token_of_its_own_is_refused(items):
    with pytest.raises(ValueError, match="at least one token"):
        pack(items)


# ---- rewards: packing, sharing and precision -----------------------------------------------------

LONG = (
    "\n\nHuman: "
    + "How do I keep a small garden alive when the summer is dry? " * 3
    + "\n\nAssistant:"
)
TEXTS = [  # prompt, chosen, rejected
    (LONG, " Water it early in the morning, and cover the soil.", " You can't."),
    (LONG, " Water it. Then wait.", " Water it."),  # the rejected text begins the chosen one
    (
        "\n\nHuman: Is Paris the capital of France?\n\nAssistant:",
        " Yes.",
        " Yes, Paris is the capital of France.",
    ),
    ("", "a", "b"),  # one token each, nothing shared
    ("", "Good soil and good seeds", "Nothing helps"),
    ("1 + 1 = ", "2", "3"),
    ("Grüße aus 東京 ", "🌱🌱🌱 danke!", "nein"),
    (
        LONG + " First, the soil." + LONG,
        " Then the seeds, then the water, then the light." * 4,
        " Then nothing at all.",
    ),
    ("the the the the", " the the", " the the the the the the the the the the"),
]


@pytest.fixture(params=[512, 40], ids=["whole", "truncated"])
def pairs(golden, request):
    ids, cut = encode([p + r for p, *rs in TEXTS for r in rs], Tokenizer(golden), request.param)
    assert any(cut) == (request.param == 40)
    pairs = [TokenPair(a, b, shared_length(a, b), 0) for a, b in zip(ids[0::2], ids[1::2])]
    assert any(p.shared for p in pairs)
    return pairs


@torch.no_grad()
def alone(model, pairs):
    """(B, 2): every text in a forward pass of its own."""

    def reward(text):
        return model.rewards(pack([([], [text.tolist()])]))

    return torch.stack([torch.cat([reward(p.chosen), reward(p.rejected)]) for p in pairs])


def assert_same(result, expected, bound=1e-5):
    torch.testing.assert_close(result, expected, rtol=bound, atol=bound)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("micro_tokens", slow_but([60], [1, 60, 300, 10**6]))
def test_rewards_do_not_depend_on_sharing_or_on_what_is_computed_together(
    model, pairs, share, micro_tokens
):
    expected = alone(model, pairs)
    assert_same(pair_rewards(model, pairs, micro_tokens, share), expected)
    texts = [side.tolist() for p in pairs for side in (p.chosen, p.rejected)]
    assert_same(text_rewards(model, texts, micro_tokens), expected.flatten())


def test_rewards_do_not_depend_on_order_or_batch(model, pairs):
    expected = pair_rewards(model, pairs)
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))
    assert_same(pair_rewards(model, [pairs[i] for i in order]), expected[order])
    assert_same(pair_rewards(model, pairs[3:5]), expected[3:5])
    assert_same(pair_rewards(model, pairs * 3), expected.repeat(3, 1))


def test_chosen_and_rejected_are_two_equal_sides(model, pairs):
    exchanged = [p._replace(chosen=p.rejected, rejected=p.chosen) for p in pairs]
    assert_same(pair_rewards(model, exchanged), pair_rewards(model, pairs).flip(1))


def test_in_float64_everything_is_computed_in_float64(golden, pairs):
    """And then sharing changes nothing beyond 1e-12, gradients included."""
    model = open_model(golden, torch.float64).double()
    model.trunk.compute_dtype = torch.float64
    results = []
    for share in (True, False):
        model.zero_grad()
        z = torch.stack(model.features(pack_pairs(pairs, share=share)))  # (2, B, D)
        F.softplus(-(z @ model.head).diff(dim=0)).sum().backward()
        results.append([z, z @ model.head, *(p.grad for p in model.parameters())])
    for shared, apart in zip(*results):
        assert shared.dtype == torch.float64
        assert_same(shared, apart, 1e-11)
    narrow = pair_rewards(open_model(golden), pairs)
    assert_same(results[0][1].detach().T.float(), narrow)
    assert not torch.equal(results[0][1].detach().T, narrow.double())  # not fp32 in disguise


def loss_gradients(model, batch):
    model.zero_grad()
    chosen, rejected = model.features(batch)
    F.softplus((rejected - chosen) @ model.head).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    "dtype", slow_but([torch.float32], [torch.float32, torch.bfloat16]), ids=str
)
def test_recomputing_blocks_leaves_every_gradient_bitwise_the_same(
    model, pairs, monkeypatch, dtype
):
    model.trunk.compute_dtype = dtype
    expected = loss_gradients(model, pack_pairs(pairs))
    calls, checkpoint = [], minimore.model.recompute.checkpoint

    def counted(function, *inputs, **options):
        calls.append(function)
        return checkpoint(function, *inputs, **options)

    monkeypatch.setattr(minimore.model.recompute, "checkpoint", counted)
    model.trunk.recompute = "full"
    recomputed = loss_gradients(model, pack_pairs(pairs))
    assert calls == list(model.trunk.blocks)
    for name, gradient in expected.items():
        assert torch.equal(gradient, recomputed[name]), name
        cancels = name == "trunk.final_norm.bias"  # in every margin
        assert gradient.any() or cancels, name
    pair_rewards(model, pairs)
    assert len(calls) == len(model.trunk.blocks)  # nothing to recompute without gradients


def test_bfloat16_is_for_the_trunk_alone(model, pairs):
    """Parameters, hidden states, head and rewards stay fp32; rewards stay near those of fp32."""
    expected = pair_rewards(model, pairs)
    model.trunk.compute_dtype = torch.bfloat16
    seen = []
    model.trunk.blocks[0].register_forward_hook(lambda block, inputs, out: seen.append(out.dtype))
    with torch.no_grad():
        z = model.trunk(pack_pairs(pairs).stream)
    rewards = pair_rewards(model, pairs)
    assert set(seen) == {torch.bfloat16}
    assert {z.dtype, rewards.dtype, *(p.dtype for p in model.parameters())} == {torch.float32}
    torch.testing.assert_close(rewards, expected, rtol=0.05, atol=0.1)
    assert (rewards - expected).abs().max() > 1e-4  # bf16 was really used
    for values in (z, rewards):  # and nothing was rounded to it at the end
        assert (values != values.bfloat16().float()).float().mean() > 0.9


def test_norms_and_rotations_are_computed_in_fp32_and_rounded_once(model):
    x = torch.randn(
        50, 4, model.head.numel(), generator=torch.Generator().manual_seed(0)
    ).bfloat16()
    rotation = rotary_angles(model.trunk.c, torch.arange(50) * 7)
    for compute in (model.trunk.final_norm, lambda x: rotate(x, rotation)):
        assert torch.equal(compute(x), compute(x.float()).bfloat16())
        assert compute(x.double()).dtype == torch.float64
