"""config.json of well-known checkpoints, in the spelling in which each was published.

Sizes, names and rotary frequencies are compared; there are no weights.

Oracles: the published number of parameters, and transformers' own model on the meta device.
"""

import json
import shutil

import pytest
import torch
from checkpoints import assert_refused
from conftest import GOLDENS
from safetensors.torch import save_file

from minimore.model.checkpoint import Checkpoint, saved_config
from minimore.model.config_json import Json
from minimore.model.families import FAMILIES, name_table
from minimore.model.rotation import rotations
from minimore.model.trunk import Trunk

OLD_LLAMA = dict(
    model_type="llama",
    hidden_act="silu",
    hidden_size=4096,
    intermediate_size=11008,
    num_attention_heads=32,
    num_hidden_layers=32,
    rms_norm_eps=1e-6,
    vocab_size=32000,
    use_cache=True,
    torch_dtype="float16",
    initializer_range=0.02,
)
LLAMA3 = OLD_LLAMA | dict(
    attention_bias=False,
    intermediate_size=14336,
    num_key_value_heads=8,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    vocab_size=128256,
    torch_dtype="bfloat16",
    pretraining_tp=1,
    tie_word_embeddings=False,
    max_position_embeddings=8192,
    rope_scaling=None,
    mlp_bias=False,
    bos_token_id=128000,
    eos_token_id=128001,
)
LLAMA31_ROPE = dict(
    factor=8.0,
    high_freq_factor=4.0,
    low_freq_factor=1.0,
    original_max_position_embeddings=8192,
    rope_type="llama3",
)
PYTHIA = dict(
    model_type="gpt_neox",
    hidden_act="gelu",
    layer_norm_eps=1e-5,
    rotary_pct=0.25,
    rotary_emb_base=10000,
    use_parallel_residual=True,
    tie_word_embeddings=False,
    max_position_embeddings=2048,
    bos_token_id=0,
    eos_token_id=0,
    torch_dtype="float16",
)
QWEN2 = dict(
    model_type="qwen2",
    hidden_act="silu",
    attention_dropout=0.0,
    bos_token_id=151643,
    eos_token_id=151643,
    initializer_range=0.02,
    rms_norm_eps=1e-6,
    rope_theta=1000000.0,
    sliding_window=131072,
    use_sliding_window=False,
    torch_dtype="bfloat16",
)
QWEN3 = QWEN2 | dict(
    model_type="qwen3",
    attention_bias=False,
    head_dim=128,
    sliding_window=None,
    rope_scaling=None,
    num_key_value_heads=8,
    max_position_embeddings=40960,
    vocab_size=151936,
)
OPT = dict(
    model_type="opt",
    activation_function="relu",
    do_layer_norm_before=True,
    dropout=0.1,
    attention_dropout=0.0,
    layerdrop=0.0,
    init_std=0.02,
    max_position_embeddings=2048,
    vocab_size=50272,
    prefix="</s>",
    bos_token_id=2,
    eos_token_id=2,
    pad_token_id=1,
    torch_dtype="float16",
)
GPT2 = dict(
    model_type="gpt2",
    activation_function="gelu_new",
    attn_pdrop=0.1,
    bos_token_id=50256,
    embd_pdrop=0.1,
    eos_token_id=50256,
    initializer_range=0.02,
    layer_norm_epsilon=1e-5,
    n_ctx=1024,
    n_positions=1024,
    resid_pdrop=0.1,
    vocab_size=50257,
)
GEMMA = dict(
    model_type="gemma",
    attention_bias=False,
    attention_dropout=0.0,
    bos_token_id=2,
    eos_token_id=1,
    pad_token_id=0,
    head_dim=256,
    hidden_act="gelu",
    initializer_range=0.02,
    max_position_embeddings=8192,
    rms_norm_eps=1e-6,
    rope_scaling=None,
    rope_theta=10000.0,
    torch_dtype="bfloat16",
    vocab_size=256000,
)
GEMMA3 = dict(
    model_type="gemma3_text",
    attention_bias=False,
    attention_dropout=0.0,
    attn_logit_softcapping=None,
    bos_token_id=2,
    eos_token_id=[1, 106],
    pad_token_id=0,
    final_logit_softcapping=None,
    head_dim=256,
    hidden_activation="gelu_pytorch_tanh",
    initializer_range=0.02,
    max_position_embeddings=32768,
    query_pre_attn_scalar=256,
    rms_norm_eps=1e-6,
    rope_local_base_freq=10000,
    rope_scaling=None,
    rope_theta=1000000,
    sliding_window=512,
    sliding_window_pattern=6,
    torch_dtype="bfloat16",
    vocab_size=262144,
)
OLMO2 = dict(
    model_type="olmo2",
    attention_bias=False,
    attention_dropout=0.0,
    eos_token_id=100257,
    pad_token_id=100277,
    hidden_act="silu",
    initializer_range=0.02,
    max_position_embeddings=4096,
    num_key_value_heads=32,
    rms_norm_eps=1e-6,
    rope_scaling=None,
    rope_theta=500000,
    tie_word_embeddings=False,
    torch_dtype="float32",
    vocab_size=100352,
)
PHI3 = dict(
    model_type="phi3",
    attention_bias=False,
    attention_dropout=0.0,
    bos_token_id=1,
    eos_token_id=32000,
    pad_token_id=32000,
    embd_pdrop=0.0,
    resid_pdrop=0.0,
    hidden_act="silu",
    hidden_size=3072,
    intermediate_size=8192,
    num_attention_heads=32,
    num_hidden_layers=32,
    num_key_value_heads=32,
    initializer_range=0.02,
    max_position_embeddings=4096,
    original_max_position_embeddings=4096,
    rms_norm_eps=1e-5,
    rope_scaling=None,
    rope_theta=10000.0,
    sliding_window=2047,
    tie_word_embeddings=False,
    torch_dtype="bfloat16",
    vocab_size=32064,
)
INTERNLM2 = dict(
    model_type="internlm2",
    auto_map={"AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM"},
    attn_implementation="eager",
    bias=False,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=2,
    hidden_act="silu",
    hidden_size=2048,
    intermediate_size=8192,
    num_attention_heads=16,
    num_hidden_layers=24,
    num_key_value_heads=8,
    initializer_range=0.02,
    max_position_embeddings=32768,
    rms_norm_eps=1e-5,
    rope_scaling=dict(type="dynamic", factor=2.0),
    rope_theta=1000000,
    tie_word_embeddings=False,
    torch_dtype="bfloat16",
    vocab_size=92544,
)
REAL = {  # name: config.json, published number of parameters (language-model head included)
    "pythia-1.4b": (
        PYTHIA
        | dict(
            hidden_size=2048,
            intermediate_size=8192,
            num_attention_heads=16,
            num_hidden_layers=24,
            vocab_size=50304,
        ),
        1_414_647_808,
    ),
    "pythia-2.8b": (
        PYTHIA
        | dict(
            hidden_size=2560,
            intermediate_size=10240,
            num_attention_heads=32,
            num_hidden_layers=32,
            vocab_size=50304,
        ),
        2_775_208_960,
    ),
    "pythia-6.9b": (
        PYTHIA
        | dict(
            hidden_size=4096,
            intermediate_size=16384,
            num_attention_heads=32,
            num_hidden_layers=32,
            vocab_size=50432,
        ),
        6_857_302_016,
    ),
    "llama-7b": (
        OLD_LLAMA
        | dict(
            architectures=["LLaMAForCausalLM"],
            max_sequence_length=2048,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=-1,
        ),
        6_738_415_616,
    ),
    "alpaca-7b": (
        OLD_LLAMA
        | dict(
            vocab_size=32001,
            max_position_embeddings=2048,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=32000,
        ),
        6_738_423_808,
    ),
    "llama-2-7b": (
        OLD_LLAMA
        | dict(
            max_position_embeddings=4096,
            num_key_value_heads=32,
            pretraining_tp=1,
            rms_norm_eps=1e-5,
            rope_scaling=None,
            tie_word_embeddings=False,
            bos_token_id=1,
            eos_token_id=2,
        ),
        6_738_415_616,
    ),
    "llama-3-8b": (LLAMA3, 8_030_261_248),
    "llama-3.1-8b-instruct": (
        LLAMA3
        | dict(
            rope_scaling=LLAMA31_ROPE,
            max_position_embeddings=131072,
            eos_token_id=[128001, 128008, 128009],
        ),
        8_030_261_248,
    ),
    "llama-3.2-1b": (
        LLAMA3
        | dict(
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=16,
            head_dim=64,
            tie_word_embeddings=True,
            max_position_embeddings=131072,
            rope_scaling=LLAMA31_ROPE | dict(factor=32.0),
        ),
        1_235_814_400,
    ),
    "sheared-llama-1.3b": (
        OLD_LLAMA
        | dict(
            hidden_size=2048,
            intermediate_size=5504,
            num_attention_heads=16,
            num_hidden_layers=24,
            num_key_value_heads=16,
            rms_norm_eps=1e-5,
            max_position_embeddings=4096,
            pad_token_id=0,
            rope_scaling=None,
            pretraining_tp=1,
        ),
        1_345_423_360,
    ),
    "mistral-7b-v0.1": (
        LLAMA3
        | dict(
            model_type="mistral",
            vocab_size=32000,
            rope_theta=10000.0,
            sliding_window=4096,
            max_position_embeddings=32768,
            bos_token_id=1,
            eos_token_id=2,
        ),
        7_241_732_096,
    ),
    "mistral-7b-v0.3": (
        LLAMA3
        | dict(
            model_type="mistral",
            vocab_size=32768,
            rope_theta=1e6,
            sliding_window=None,
            max_position_embeddings=32768,
            bos_token_id=1,
            eos_token_id=2,
        ),
        7_248_023_552,
    ),
    "qwen2-1.5b": (
        QWEN2
        | dict(
            hidden_size=1536,
            intermediate_size=8960,
            max_window_layers=28,
            num_attention_heads=12,
            num_hidden_layers=28,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            vocab_size=151936,
            max_position_embeddings=131072,
        ),
        1_543_714_304,
    ),
    "qwen2.5-7b": (
        QWEN2
        | dict(
            hidden_size=3584,
            intermediate_size=18944,
            max_window_layers=28,
            num_attention_heads=28,
            num_hidden_layers=28,
            num_key_value_heads=4,
            tie_word_embeddings=False,
            vocab_size=152064,
            max_position_embeddings=131072,
        ),
        7_615_616_512,
    ),
    "qwen3-0.6b": (
        QWEN3
        | dict(
            hidden_size=1024,
            intermediate_size=3072,
            max_window_layers=28,
            num_attention_heads=16,
            num_hidden_layers=28,
            tie_word_embeddings=True,
        ),
        596_049_920,
    ),
    "qwen3-8b": (
        QWEN3
        | dict(
            hidden_size=4096,
            intermediate_size=12288,
            max_window_layers=36,
            num_attention_heads=32,
            num_hidden_layers=36,
            tie_word_embeddings=False,
        ),
        8_190_735_360,
    ),
    "opt-125m": (
        OPT
        | dict(
            hidden_size=768,
            ffn_dim=3072,
            num_attention_heads=12,
            num_hidden_layers=12,
            word_embed_proj_dim=768,
        ),
        125_239_296,
    ),
    "opt-1.3b": (
        OPT
        | dict(
            hidden_size=2048,
            ffn_dim=8192,
            num_attention_heads=32,
            num_hidden_layers=24,
            word_embed_proj_dim=2048,
        ),
        1_315_758_080,
    ),
    "opt-6.7b": (
        OPT
        | dict(
            hidden_size=4096,
            ffn_dim=16384,
            num_attention_heads=32,
            num_hidden_layers=32,
            word_embed_proj_dim=4096,
            _remove_final_layer_norm=False,
        ),
        6_658_473_984,
    ),
    "gemma-2b": (
        GEMMA
        | dict(
            hidden_size=2048,
            intermediate_size=16384,
            num_attention_heads=8,
            num_hidden_layers=18,
            num_key_value_heads=1,
        ),
        2_506_172_416,
    ),
    "gemma-7b": (
        GEMMA
        | dict(
            hidden_size=3072,
            intermediate_size=24576,
            num_attention_heads=16,
            num_hidden_layers=28,
            num_key_value_heads=16,
        ),
        8_537_680_896,
    ),
    "gemma-3-270m": (
        GEMMA3
        | dict(
            hidden_size=640,
            intermediate_size=2048,
            num_attention_heads=4,
            num_hidden_layers=18,
            num_key_value_heads=1,
            layer_types=(["sliding_attention"] * 5 + ["full_attention"]) * 3,
            _sliding_window_pattern=6,
            sliding_window_pattern=None,
            use_bidirectional_attention=False,
        ),
        268_098_176,
    ),
    "gemma-3-1b-it": (
        GEMMA3
        | dict(
            hidden_size=1152,
            intermediate_size=6912,
            num_attention_heads=4,
            num_hidden_layers=26,
            num_key_value_heads=1,
        ),
        999_885_952,
    ),
    "olmo-2-1124-7b": (
        OLMO2
        | dict(
            hidden_size=4096,
            intermediate_size=11008,
            num_attention_heads=32,
            num_hidden_layers=32,
        ),
        7_298_617_344,
    ),
    "gpt2": (GPT2 | dict(n_embd=768, n_head=12, n_layer=12), 124_439_808),
    "gpt2-xl": (GPT2 | dict(n_embd=1600, n_head=25, n_layer=48), 1_557_611_200),
    "phi-3-mini-4k-instruct": (PHI3, 3_821_079_552),
    "internlm2-1_8b": (INTERNLM2, 1_889_110_016),
}


@pytest.fixture(params=REAL)
def real(request):
    """(config.json, our family, the trunk on the meta device, published number of parameters)"""
    config, published = REAL[request.param]
    family = FAMILIES[config["model_type"]]
    with torch.device("meta"):
        return config, family, Trunk(family.config(Json(config, "config.json"))), published


def test_the_published_number_of_parameters(real):
    config, family, trunk, published = real
    tied = config.get("tie_word_embeddings", family.tied)
    assert (
        sum(p.numel() for p in trunk.parameters()) + (0 if tied else trunk.embedding.weight.numel())
        == published
    )


@pytest.mark.slow
def test_names_shapes_and_frequencies_are_those_of_transformers(transformers, real):
    config, family, trunk, _ = real
    if config["model_type"] == "internlm2":
        pytest.skip("transformers has no class of its own for InternLM2")
    theirs = transformers.AutoConfig.for_model(**config)
    with torch.device("meta"):
        model = transformers.AutoModelForSequenceClassification.from_config(theirs)
    expected = {k: tuple(p.shape) for k, p in model.named_parameters() if k != "score.weight"}
    found = {}
    for key, ours in name_table(family, trunk).items():
        first = trunk.get_parameter(ours[0])
        shape = (sum(trunk.get_parameter(p).shape[0] for p in ours), *first.shape[1:])
        found[family.prefix + key] = shape[::-1] if family.is_transposed(key) else shape
    assert found == expected
    rotary = [type(m) for m in model.modules() if type(m).__name__.endswith("RotaryEmbedding")]
    assert bool(rotary) == (config["model_type"] not in ("opt", "gpt2"))
    if rotary:
        # Of every type of block that transformers rotates differently: what it is called there.
        kinds = {block: () for block in range(trunk.c.blocks)}
        if trunk.c.window_rope_base is not None:
            kinds = dict(enumerate((kind,) for kind in theirs.layer_types))
        positions, module = torch.arange(3000), rotary[0](theirs)
        ours_by_block = rotations(trunk.c, positions)
        for block, kind in {kind: (block, kind) for block, kind in kinds.items()}.values():
            # (1, N, R), its two halves alike
            found = module(torch.empty(1), positions[None], *kind)
            for ours, expected in zip(ours_by_block[block], found):
                half = ours.shape[-1]
                torch.testing.assert_close(ours[:, 0], expected[0, :, :half], atol=1e-6, rtol=0)
                assert 2 * half == expected.shape[-1]


def test_windows_are_those_of_transformers(transformers):
    for name, window in {"gemma-3-270m": 512, "gemma-3-1b-it": 512}.items():
        config, _ = REAL[name]
        types = transformers.AutoConfig.for_model(**config).layer_types
        assert types.count("full_attention") == len(types) // 6
        expected = tuple(window if kind == "sliding_attention" else None for kind in types)
        assert FAMILIES["gemma3_text"].config(Json(config, "")).windows == expected
    assert FAMILIES["phi3"].config(Json(PHI3, "")).windows == (2047,) * 32


@pytest.mark.parametrize(
    "config, words",
    [
        (GEMMA | dict(model_type="gemma2", attn_logit_softcapping=50.0), ["gemma2", "softly"]),
        (GEMMA3 | dict(final_logit_softcapping=30.0), ["final_logit_softcapping", "softly"]),
        (GEMMA3 | dict(attn_logit_softcapping=50.0), ["attn_logit_softcapping", "softly"]),
        (GEMMA3 | dict(use_bidirectional_attention=True), ["use_bidirectional_attention"]),
        (GEMMA3 | dict(sliding_window=None), ['"sliding_window" is null']),
        (
            dict(model_type="gemma3", text_config=GEMMA3, vision_config={}),
            ["gemma3", "images", "gemma3_text"],
        ),
        (
            PHI3
            | dict(
                max_position_embeddings=131072,
                sliding_window=262144,
                rope_scaling=dict(
                    type="longrope", long_factor=[1.08] * 48, short_factor=[1.0] * 48
                ),
            ),
            ["rope scaling 'longrope' is not supported"],
        ),
    ],
    ids=["gemma-2", "logits", "scores", "bidirectional", "window", "gemma-3-4b", "phi-3-mini-128k"],
)
def test_what_a_family_has_beyond_this_is_refused_by_name(damaged, config, words):
    sizes = dict(hidden_size=24, num_attention_heads=4, num_hidden_layers=2, vocab_size=300)
    directory = damaged()
    content = dict(intermediate_size=40) | sizes | config
    (directory / "config.json").write_text(json.dumps(content))
    assert_refused(directory, "config.json", *words)


# ---- what else lies in those directories: old keys, odd ids, both layouts of OPT ----------------


def small(family, **changes):
    """A directory with random weights of two blocks, in that family's published spelling."""
    sizes = dict(hidden_size=24, num_attention_heads=4, num_hidden_layers=2, vocab_size=300)
    sizes |= (
        dict(ffn_dim=40, word_embed_proj_dim=24) if family == "opt" else dict(intermediate_size=40)
    )
    return {"opt": OPT, "llama": REAL["llama-7b"][0], "gpt_neox": PYTHIA}[family] | sizes | changes


def write(directory, config, change=lambda tensors: tensors):
    directory.mkdir()
    family = FAMILIES[config["model_type"]]
    trunk = Trunk(family.config(Json(config, "config.json")))
    torch.manual_seed(0)
    tensors = {
        family.prefix + k: torch.randn(
            sum(trunk.get_parameter(p).shape[0] for p in ours),
            *trunk.get_parameter(ours[0]).shape[1:],
        )
        * 0.3
        for k, ours in name_table(family, trunk).items()
    }
    save_file(change(tensors), directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    shutil.copy(GOLDENS / "llama" / "tokenizer.json", directory)
    return Checkpoint(str(directory))


def test_the_first_llama_opens_with_its_stored_frequencies_and_is_saved_with_a_pad_id_that_exists(
    tmp_path,
):
    frequencies = {
        f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(3) for i in range(2)
    }
    checkpoint = write(
        tmp_path / "llama",
        small("llama"),
        lambda t: t | frequencies | {"lm_head.weight": torch.zeros(300, 24)},
    )
    trunk, head = checkpoint.load()
    assert head is None and trunk.c.kv_heads == 4
    assert (
        saved_config(checkpoint)["pad_token_id"] == 290
    )  # not -1, as LLaMA's first config.json had it


@pytest.mark.parametrize("strip", ["", "model.", "model.decoder."])
def test_opt_opens_in_every_layout_of_the_hub(tmp_path, strip):
    checkpoint = write(
        tmp_path / "opt",
        small("opt"),
        lambda t: (
            {k.removeprefix(strip): v for k, v in t.items()}
            | {"lm_head.weight": t["model.decoder.embed_tokens.weight"].clone()}
        ),
    )
    trunk, _ = checkpoint.load()
    assert trunk.position_embedding.weight.shape == (2050, 24)


def test_pythia_opens_with_its_stored_masks(tmp_path):
    stored = {
        f"gpt_neox.layers.{i}.attention.{k}": v
        for i in range(2)
        for k, v in (
            ("bias", torch.ones(1, 1, 8, 8, dtype=torch.bool)),
            ("masked_bias", torch.tensor(-1e9)),
            ("rotary_emb.inv_freq", torch.ones(1)),
        )
    }
    write(
        tmp_path / "pythia",
        small("gpt_neox"),
        lambda t: t | stored | {"embed_out.weight": torch.zeros(300, 24)},
    ).load()
