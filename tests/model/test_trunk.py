"""Rewards against transformers, in many configurations, and mistakes that must show."""

import dataclasses
import json
import shutil

import pytest
import torch
from conftest import GOLDENS, edit_json, open_model
from reference import SIZES, reference_model, reference_rewards, reference_texts
from runs import slow_but
from safetensors.torch import load_file

import minimore.model.checkpoint
import minimore.model.trunk
from minimore.model.attention import attend, pack
from minimore.model.checkpoint import Checkpoint, save_checkpoint
from minimore.reward import RewardModel

TEXTS = reference_texts()


@torch.no_grad()
def rewards_of(model, texts=TEXTS):
    return model.rewards(pack([([], [text]) for text in texts]))


def errors(rewards, expected):
    """Deviations in units of the tolerance 2e-5 max(1, |expected|)."""
    assert rewards.shape == expected.shape and rewards.dtype == expected.dtype == torch.float32
    return (rewards - expected).abs() / (2e-5 * expected.abs().clamp_min(1))


def expected_of(golden):
    stored = json.loads((golden / "expected.json").read_text())
    assert stored["texts"] == TEXTS
    return torch.tensor(stored["rewards"])


def test_rewards_equal_the_stored_references(golden):
    assert errors(rewards_of(open_model(golden)), expected_of(golden)).max() <= 1


# ---- live comparison -----------------------------------------------------------------------------


def rope(kind="default", **fields):
    return dict(rope_parameters=dict(rope_type=kind, **(dict(rope_theta=10000.0) | fields)))


def two_ropes(**of_full_attention):
    """Gemma 3's rotation: with and without a window."""
    full = dict(rope_type="default", rope_theta=2000.0) | of_full_attention
    sliding = dict(rope_type="default", rope_theta=500.0)
    return dict(rope_parameters=dict(full_attention=full, sliding_attention=sliding))


LLAMA3 = dict(
    rope_theta=500.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
LONGEST = {
    "gpt_neox": 2048,
    "llama": 2048,
    "mistral": 131072,
    "qwen2": 32768,
    "qwen3": 32768,
    "gemma": 8192,
    "olmo2": 2048,
}


def without(llama3, name):
    """The scaling in config.json that leaves out one of its numbers."""
    return {"rope_type": "llama3"} | {key: llama3[key] for key in llama3 if key != name}


CONFIGURATIONS = [
    ("gpt_neox", {}),
    ("gpt_neox", dict(use_parallel_residual=False)),
    ("gpt_neox", rope(partial_rotary_factor=0.5)),
    ("gpt_neox", rope(partial_rotary_factor=1.0)),
    # 3 dimensions rotate, an odd number
    ("gpt_neox", dict(hidden_size=36, num_attention_heads=3) | rope(partial_rotary_factor=0.25)),
    ("gpt_neox", rope(partial_rotary_factor=0.25, rope_theta=500.0)),
    ("gpt_neox", rope("linear", partial_rotary_factor=0.5, factor=4.0)),
    ("gpt_neox", rope("llama3", partial_rotary_factor=1.0, **LLAMA3)),
    ("gpt_neox", dict(hidden_act="gelu_new", layer_norm_eps=0.05)),
    ("gpt_neox", dict(hidden_act="gelu_fast")),
    ("gpt_neox", dict(hidden_act="relu")),
    ("gpt_neox", dict(attention_bias=False)),
    ("gpt2", {}),
    ("gpt2", dict(n_inner=None, activation_function="relu", layer_norm_epsilon=0.05)),
    ("llama", {}),
    ("llama", dict(num_key_value_heads=2, rms_norm_eps=0.05)),
    ("llama", dict(num_key_value_heads=1, head_dim=16)),
    ("llama", dict(attention_bias=True)),
    ("llama", dict(mlp_bias=True, hidden_act="gelu_pytorch_tanh")),
    ("llama", rope(rope_theta=500.0)),
    ("llama", rope(partial_rotary_factor=0.5)),  # which transformers ignores in this family
    ("llama", rope("llama3", **LLAMA3)),
    ("llama", rope("linear", factor=4.0)),
    ("llama", dict(tie_word_embeddings=True)),
    ("mistral", dict(sliding_window=None)),
    ("mistral", dict(sliding_window=16, head_dim=8)),  # shorter than the texts
    ("mistral", dict(sliding_window=1000) | rope(rope_theta=1e6)),
    ("qwen2", {}),
    ("qwen2", dict(use_sliding_window=True, sliding_window=8, max_window_layers=1)),
    (
        "qwen2",
        dict(
            use_sliding_window=True,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention"],
        ),
    ),
    ("qwen2", dict(tie_word_embeddings=True) | rope(rope_theta=1e6)),
    ("qwen3", {}),
    (
        "qwen3",
        dict(
            attention_bias=True,
            head_dim=16,
            use_sliding_window=True,
            sliding_window=5,
            max_window_layers=0,
        ),
    ),
    ("opt", {}),
    ("opt", dict(enable_bias=False, activation_function="gelu")),
    ("llama", rope("dynamic", factor=4.0)),  # the texts are short enough
    ("olmo2", {}),
    ("olmo2", dict(attention_bias=True, num_key_value_heads=4, rms_norm_eps=0.05)),
    ("gemma", {}),
    (
        "gemma",
        dict(head_dim=16, num_key_value_heads=1, attention_bias=True) | rope(rope_theta=500.0),
    ),
    ("gemma3_text", {}),
    ("gemma3_text", dict(query_pre_attn_scalar=24, **two_ropes(factor=8.0, rope_type="linear"))),
    ("gemma3_text", dict(layer_types=None, num_hidden_layers=7)),
    ("phi3", {}),
    ("phi3", dict(sliding_window=16) | rope(partial_rotary_factor=0.5)),  # 3 dimensions rotate
    ("phi3", dict(hidden_size=32) | rope(partial_rotary_factor=0.75, rope_theta=500.0)),
]
OLD_SPELLINGS = [  # configuration, and its spelling in config.json before transformers 5
    (
        "gpt_neox",
        rope(partial_rotary_factor=0.5, rope_theta=500.0),
        dict(rotary_pct=0.5, rotary_emb_base=500),
    ),
    (
        "gpt_neox",
        rope("linear", partial_rotary_factor=0.5, factor=4.0),
        dict(rotary_pct=0.5, rotary_emb_base=10000, rope_scaling={"type": "linear", "factor": 4.0}),
    ),
    ("llama", rope(rope_theta=500.0), dict(rope_theta=500.0, rope_scaling=None)),
    (
        "llama",
        rope("linear", rope_theta=500.0, factor=4.0),
        dict(rope_theta=500.0, rope_scaling={"type": "linear", "factor": 4.0}),
    ),
    (
        "llama",
        rope("llama3", **LLAMA3),
        dict(rope_theta=500.0, rope_scaling=without(LLAMA3, "rope_theta")),
    ),
    (  # the length beside the scaling is the one that counts
        "llama",
        rope("llama3", **LLAMA3),
        dict(
            rope_theta=500.0,
            original_max_position_embeddings=64,
            rope_scaling=without(LLAMA3, "rope_theta") | dict(original_max_position_embeddings=16),
        ),
    ),
    *(  # no length at all is the family's longest
        (
            family,
            rope("llama3", **LLAMA3 | dict(original_max_position_embeddings=longest)),
            dict(
                max_position_embeddings=...,
                rope_parameters=without(LLAMA3, "original_max_position_embeddings"),
            ),
        )
        for family, longest in LONGEST.items()
    ),
    (
        "llama",
        rope(rope_theta=500.0),
        dict(rope_scaling={}, rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
    ),
    (
        "gemma3_text",
        two_ropes(factor=8.0, rope_type="linear"),
        dict(
            rope_theta=2000,
            rope_local_base_freq=500,
            rope_scaling=dict(factor=8.0, rope_type="linear"),
        ),
    ),
    (
        "gemma3_text",
        dict(num_hidden_layers=3, layer_types=["sliding_attention"] * 2 + ["full_attention"]),
        dict(layer_types=..., sliding_window_pattern=3),
    ),
    ("gemma", {}, dict(hidden_act="gelu")),  # which means the other one
    (
        "phi3",
        rope(partial_rotary_factor=0.5, rope_theta=500.0),
        dict(partial_rotary_factor=0.5, rope_theta=500.0, rope_scaling=None),
    ),
    ("qwen2", dict(num_key_value_heads=4), dict(num_key_value_heads=None)),
    ("gpt_neox", {}, dict(num_key_value_heads=1)),
    ("opt", {}, dict(head_dim=5, num_key_value_heads=1)),
]


def quick_for_every_family(cases):
    """The first case of every family, and the others marked as slow."""
    quick = {case[0]: case for case in reversed(cases)}
    return [
        case if case is quick[case[0]] else pytest.param(*case, marks=pytest.mark.slow)
        for case in cases
    ]


def write(theirs, directory):
    theirs.save_pretrained(directory)
    shutil.copy(
        GOLDENS
        / ("gpt_neox" if theirs.config.model_type == "gpt_neox" else "llama")
        / "tokenizer.json",
        directory,
    )


def open_by_transformers(transformers, directory, **options):
    model_class = transformers.AutoModelForSequenceClassification
    return model_class.from_pretrained(directory, **options).eval()


@torch.no_grad()
def padded_rewards(model, texts, side):
    """transformers' rewards of one padded batch."""
    width = max(map(len, texts))
    tokens = torch.full((len(texts), width), model.config.pad_token_id)
    mask = torch.zeros_like(tokens)
    for row, text in enumerate(texts):
        place = slice(width - len(text), width) if side == "left" else slice(len(text))
        tokens[row, place] = torch.tensor(text)
        mask[row, place] = 1
    return model(tokens, attention_mask=mask).logits[:, 0]


@pytest.mark.parametrize("family, changes", quick_for_every_family(CONFIGURATIONS), ids=str)
def test_rewards_equal_those_of_transformers(transformers, tmp_path, family, changes):
    theirs = reference_model(family, **changes)
    expected = reference_rewards(theirs, TEXTS)
    write(theirs, tmp_path / "theirs")
    checkpoint = Checkpoint(str(tmp_path / "theirs"))
    ours = RewardModel(*checkpoint.load())
    assert errors(rewards_of(ours), expected).max() <= 1

    (tmp_path / "ours").mkdir()
    save_checkpoint(tmp_path / "ours", checkpoint, ours.trunk, ours.head)
    for key, tensor in load_file(tmp_path / "ours" / "model.safetensors").items():
        assert torch.equal(tensor, theirs.state_dict()[key]), key
    reopened = open_by_transformers(transformers, tmp_path / "ours")
    assert type(reopened) is type(theirs) and reopened.config.num_labels == 1
    assert errors(reference_rewards(reopened, TEXTS), expected).max() <= 1
    # transformers' GPT-2 counts positions from the padding on, unless it is told not to.
    for side in ("right", "left") if family != "gpt2" else ("right",):
        assert errors(padded_rewards(reopened, TEXTS, side), expected).max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "family, changes, spelling", quick_for_every_family(OLD_SPELLINGS), ids=str
)
def test_the_old_spelling_of_config_json_means_the_same(
    transformers, tmp_path, family, changes, spelling
):
    theirs = reference_model(family, **changes)
    expected = reference_rewards(theirs, TEXTS)
    write(theirs, tmp_path)
    edit_json(tmp_path / "config.json", dict(rope_parameters=...) | spelling)
    assert errors(rewards_of(open_model(tmp_path)), expected).max() <= 1
    reopened = open_by_transformers(transformers, tmp_path)  # the spelling is a real one
    assert errors(reference_rewards(reopened, TEXTS), expected).max() <= 1


@pytest.mark.parametrize("family", SIZES)
def test_a_config_of_sizes_alone_has_the_defaults_of_transformers(transformers, tmp_path, family):
    theirs = reference_model(family)
    write(theirs, tmp_path)
    sizes = {k: v for k, v in SIZES[family].items() if not k.endswith("token_id")}
    (tmp_path / "config.json").write_text(json.dumps(dict(model_type=family, **sizes)))
    assert errors(rewards_of(open_model(tmp_path)), reference_rewards(theirs, TEXTS)).max() <= 1
    # A wrong epsilon is too small to show in a reward.
    layer_norm_eps = getattr(theirs.config, "layer_norm_eps", 1e-5)
    eps = getattr(theirs.config, "rms_norm_eps", layer_norm_eps)
    assert Checkpoint(str(tmp_path)).config.norm_eps == eps


@pytest.mark.parametrize(
    "family, tied",
    [
        ("gpt_neox", False),
        ("llama", False),
        ("llama", True),
        ("qwen3", True),
        ("opt", True),
        ("gpt2", True),
        ("olmo2", False),
        ("gemma", True),
        ("gemma3_text", True),
        ("phi3", False),
    ],
)
def test_a_language_model_has_the_hidden_states_of_transformers_and_no_reward_head(
    transformers, tmp_path, family, tied
):
    theirs = reference_model(family, head="ForCausalLM", tie_word_embeddings=tied)
    write(theirs, tmp_path)
    checkpoint = Checkpoint(str(tmp_path))
    language_heads = {"lm_head.weight", "embed_out.weight"} & set(checkpoint.tensors.files)
    assert bool(language_heads) != tied
    trunk, head = checkpoint.load()
    assert head is None and not checkpoint.has_head
    text = TEXTS[4]
    with torch.no_grad():
        hidden = trunk(pack([([], [text[: n + 1]]) for n in range(len(text))]))  # (N, D)
        expected = theirs.base_model(torch.tensor([text])).last_hidden_state[0]
    assert errors(hidden, expected).max() <= 1


# ---- mistakes that the comparison must catch -----------------------------------------------------

FAR = 50  # tolerances that a mistake moves some reward by, at least

WRONG_CONFIGURATIONS = [
    ("gpt_neox", dict(norm_eps=1e-5)),
    ("gpt_neox", dict(activation="relu")),
    ("gpt_neox", dict(rotary_width=8)),
    ("gpt_neox", dict(rotary_width=16)),
    ("gpt_neox", dict(rope_base=500.0)),
    ("gpt_neox", dict(rope_factor=4.0)),
    ("gpt_neox", dict(parallel_residual=False)),
    ("llama", dict(norm_eps=1e-6)),
    ("llama", dict(activation="gelu")),
    ("llama", dict(rotary_width=4)),
    ("llama", dict(rope_base=10000.0)),
    ("llama", dict(rope_factor=4.0)),
    ("llama", dict(rope_llama3=None)),
    ("llama", dict(rope_llama3=(4.0, 1.0, 4.0, 64))),
    ("llama", dict(rope_llama3=(8.0, 1.0, 4.0, 512))),
    ("llama", dict(rope_llama3=(8.0, 2.0, 4.0, 64))),
    ("llama", dict(rope_llama3=(8.0, 1.0, 8.0, 64))),
    ("llama", dict(parallel_residual=True)),
]


def assert_shows(family, model):
    assert errors(rewards_of(model), expected_of(GOLDENS / family)).max() >= FAR


@pytest.mark.parametrize("family, changes", WRONG_CONFIGURATIONS, ids=str)
def test_a_wrong_configuration_shows(family, changes):
    checkpoint = Checkpoint(str(GOLDENS / family))
    checkpoint.config = dataclasses.replace(checkpoint.config, **changes)
    assert_shows(family, RewardModel(*checkpoint.load()))


@pytest.mark.slow
@pytest.mark.parametrize(
    "family, right, wrong",
    [
        ("mistral", dict(sliding_window=16), dict(windows=(15, 15))),
        ("mistral", dict(sliding_window=16), dict(windows=(17, 17))),
        ("mistral", dict(sliding_window=16), dict(windows=())),
        (
            "qwen2",
            dict(use_sliding_window=True, sliding_window=8, max_window_layers=1),
            dict(windows=(8, 8)),
        ),
        ("gpt2", {}, dict(parallel_residual=True)),
        ("gpt2", dict(layer_norm_epsilon=0.05), dict(norm_eps=1e-5)),
        ("opt", {}, dict(position_offset=1)),
        ("opt", {}, dict(position_offset=0)),
        ("opt", {}, dict(activation="gelu")),
        ("qwen3", dict(rms_norm_eps=0.05), dict(norm_eps=1e-6)),
        ("qwen3", {}, dict(rope_base=500.0)),
        ("gemma", {}, dict(norm_offset=0.0)),
        ("gemma", {}, dict(embedding_scale=1.0)),
        ("gemma", {}, dict(embedding_scale=5.0)),  # instead of 4.9, as bf16 may round
        ("gemma", {}, dict(activation="silu")),
        ("gemma3_text", {}, dict(norm_offset=0.0)),
        ("gemma3_text", {}, dict(embedding_scale=1.0)),
        ("gemma3_text", {}, dict(rope_base=1e4, window_rope_base=1e6)),
        ("gemma3_text", {}, dict(window_rope_base=None)),
        ("gemma3_text", {}, dict(windows=(None, 16))),
        ("gemma3_text", {}, dict(windows=(15, None))),
        ("gemma3_text", {}, dict(windows=(16, 16))),
        ("gemma3_text", {}, dict(query_scale=1.0)),
        ("gemma3_text", two_ropes(factor=8.0, rope_type="linear"), dict(rope_factor=1.0)),
        ("olmo2", dict(rms_norm_eps=0.05), dict(norm_eps=1e-6)),
        ("olmo2", {}, dict(parallel_residual=True)),
        ("phi3", rope(partial_rotary_factor=0.5), dict(rotary_width=6)),
        ("phi3", dict(sliding_window=16), dict(windows=(16, None))),
    ],
    ids=str,
)
def test_a_wrong_configuration_of_another_family_shows(
    transformers, tmp_path, family, right, wrong
):
    theirs = reference_model(family, **right)
    write(theirs, tmp_path)
    checkpoint = Checkpoint(str(tmp_path))
    checkpoint.config = dataclasses.replace(checkpoint.config, **wrong)
    rewards = rewards_of(RewardModel(*checkpoint.load()))
    assert errors(rewards, reference_rewards(theirs, TEXTS)).max() >= FAR


def without_query_and_key_norms(block):
    block.attention.query_norm = block.attention.key_norm = torch.nn.Identity()


def norms_before(block):
    """Those behind attention and MLP are put before them."""
    block.attention_norm, block.mlp_norm = block.attention_output_norm, block.mlp_output_norm
    block.attention_output_norm = block.mlp_output_norm = torch.nn.Identity()


def norms_of_the_sum(block):
    """The residual stream is normed together with what is added, as in the first transformer."""

    def after_attention(x, attended):
        residual = block.attention_output_norm(x + block.attention.output(attended.flatten(1)))
        return residual, block.mlp.hidden(residual)

    def last_product(residual, hidden):
        return block.mlp_output_norm(residual + block.mlp.down(hidden))

    block.after_attention, block.last_product = after_attention, last_product


def no_norms_behind(block):
    block.attention_output_norm = block.mlp_output_norm = torch.nn.Identity()


def exchanged_norms(block):
    """What LLaMA calls post_attention_layernorm is its norm before the MLP."""
    block.attention_output_norm, block.mlp_norm = block.mlp_norm, block.attention_output_norm


def exchanged_gate(block):
    block.mlp.gate, block.mlp.up = block.mlp.up, block.mlp.gate


@pytest.mark.slow
@pytest.mark.parametrize(
    "family, mistake",
    [
        ("qwen3", without_query_and_key_norms),
        ("olmo2", without_query_and_key_norms),
        ("gemma3_text", without_query_and_key_norms),
        ("olmo2", norms_before),
        ("olmo2", norms_of_the_sum),
        ("olmo2", no_norms_behind),
        ("gemma3_text", no_norms_behind),
        ("gemma3_text", exchanged_norms),
        ("phi3", exchanged_gate),
    ],
)
def test_norms_in_the_wrong_place_and_exchanged_matrices_show(
    transformers, tmp_path, family, mistake
):
    theirs = reference_model(family)
    write(theirs, tmp_path)
    ours = open_model(tmp_path)
    for block in ours.trunk.blocks:
        mistake(block)
    assert errors(rewards_of(ours), reference_rewards(theirs, TEXTS)).max() >= FAR


def test_heads_normed_one_by_one_show(transformers, tmp_path, monkeypatch):
    """OLMo-2's norm is over all heads together."""

    def one_by_one(norm, x):
        weight = norm.weight.view(-1, 6)
        heads = x.view(len(x), -1, 6)
        scale = torch.rsqrt(heads.square().mean(-1, keepdim=True) + norm.eps)
        return heads * scale * weight

    theirs = reference_model("olmo2")
    write(theirs, tmp_path)
    monkeypatch.setattr(
        minimore.model.trunk.Attention, "_normed", lambda self, norm, x: one_by_one(norm, x)
    )
    rewards = rewards_of(open_model(tmp_path))
    assert errors(rewards, reference_rewards(theirs, TEXTS)).max() >= FAR


@pytest.mark.parametrize("family", slow_but(["gpt_neox", "gemma3_text"], SIZES))
def test_a_run_stored_in_bfloat16_scores_alike_to_its_rounding(transformers, tmp_path, family):
    theirs = reference_model(family)
    write(theirs, tmp_path / "theirs")
    checkpoint = Checkpoint(str(tmp_path / "theirs"))
    (tmp_path / "ours").mkdir()
    save_checkpoint(tmp_path / "ours", checkpoint, *checkpoint.load(), "bfloat16")
    exact = rewards_of(open_model(tmp_path / "ours"))  # the stored weights, computed in fp32
    reopened = open_by_transformers(transformers, tmp_path / "ours")
    assert reopened.dtype == torch.bfloat16
    rounding = (reference_rewards(reopened, TEXTS).float() - exact).abs().max()
    ours = open_model(tmp_path / "ours")
    ours.trunk.compute_dtype = torch.bfloat16
    assert 0 < (rewards_of(ours) - exact).abs().max() < 2 * rounding < 0.5
    wide = open_by_transformers(transformers, tmp_path / "ours", dtype=torch.float32)
    assert errors(reference_rewards(wide, TEXTS), exact).max() <= 1


def test_the_other_gelu_shows():
    """The two differ by 5e-4 at most, so a reward moves less than by FAR.

    Rounding alone stays below a fifth of the tolerance.
    """
    checkpoint, expected = Checkpoint(str(GOLDENS / "gpt_neox")), expected_of(GOLDENS / "gpt_neox")
    assert errors(rewards_of(RewardModel(*checkpoint.load())), expected).max() < 0.2
    checkpoint.config = dataclasses.replace(checkpoint.config, activation="gelu_tanh")
    assert errors(rewards_of(RewardModel(*checkpoint.load())), expected).max() > 4


@pytest.mark.slow
def test_every_parameter_shows(golden):
    """A bias left out, a norm's weight left at 1, rows of a matrix or of the head moved by one."""
    expected, unseen = expected_of(golden), []
    for name, _ in open_model(golden).named_parameters():
        model = open_model(golden)
        with torch.no_grad():
            p = model.get_parameter(name)
            if name.endswith("bias"):
                p.zero_()
            elif "norm" in name:
                p.fill_(1)
            else:
                p.copy_(p.roll(1, 0))
        if errors(rewards_of(model), expected).max() < FAR:
            unseen.append(name)
    assert not unseen


def swap(model, one, other):
    a, b = (model.get_parameter(f"trunk.blocks.0.{name}.weight").data for name in (one, other))
    a[:], b[:] = b.clone(), a.clone()


@pytest.mark.parametrize(
    "family, one, other",
    [
        ("gpt_neox", "attention_norm", "mlp_norm"),
        ("gpt_neox", "attention.query", "attention.key"),
        ("gpt_neox", "attention.key", "attention.value"),
        ("llama", "attention_norm", "mlp_norm"),
        ("llama", "mlp.gate", "mlp.up"),
    ],
)
def test_swapped_weights_show(family, one, other):
    model = open_model(GOLDENS / family)
    swap(model, one, other)
    assert_shows(family, model)


def test_a_negated_head_shows(golden):
    model = open_model(golden)
    model.head.data.neg_()
    assert_shows(golden.name, model)


def test_another_grouping_of_heads_shows(monkeypatch):
    """Query head h reads key head h % G instead of h // (H / G)."""
    order = torch.tensor([0, 2, 1, 3])

    def regrouped(q, k, v, stream, window):
        return attend(q[:, order], k, v, stream, window)[:, order.argsort()]

    monkeypatch.setattr(minimore.model.trunk, "attend", regrouped)
    assert_shows("llama", open_model(GOLDENS / "llama"))


def test_the_other_layout_of_the_fused_projection_shows(monkeypatch):
    """[all queries, all keys, all values] instead of head by head."""
    monkeypatch.setattr(
        minimore.model.checkpoint, "split_rows", lambda fused, rows, groups: list(fused.chunk(3))
    )
    assert_shows("gpt_neox", open_model(GOLDENS / "gpt_neox"))


def test_rotating_neighbouring_dimensions_shows(golden, monkeypatch):
    """Dimension 2j pairs with 2j + 1 instead of j with j + R / 2."""

    def rotate(x, rotation):
        cos, sin = rotation
        width = 2 * cos.shape[-1]
        a, b = x[..., 0:width:2], x[..., 1:width:2]
        rotated = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
        return torch.cat([rotated, x[..., width:]], -1)

    monkeypatch.setattr(minimore.model.trunk, "rotate", rotate)
    assert_shows(golden.name, open_model(golden))


WRONG_STREAMS = {
    "no rotation": lambda stream: dict(positions=torch.zeros_like(stream.positions)),
    "positions stop": lambda stream: dict(positions=stream.positions.clamp(max=100)),
    "positions reversed": lambda stream: dict(positions=stream.positions.flip(0)),
    "pooled one early": lambda stream: dict(last=(stream.last - 1).clamp_min(0)),
    "texts exchanged": lambda stream: dict(last=stream.last.flip(0)),
}


@pytest.mark.parametrize("mistake", WRONG_STREAMS)
def test_wrong_positions_and_wrong_pooling_show(golden, mistake):
    stream = pack([([], [text]) for text in TEXTS])
    wrong = dataclasses.replace(stream, **WRONG_STREAMS[mistake](stream), _tilings={})
    with torch.no_grad():
        rewards = open_model(golden).rewards(wrong)
    assert errors(rewards, expected_of(golden)).max() >= FAR
