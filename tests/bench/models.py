"""Models with random weights for benchmarks: one shape, and how it is filled.

No more is held than what is measured.
"""

import torch

from minimore.engine.optim import replace_parameter, where_it_is
from minimore.model.model_config import ModelConfig
from minimore.model.trunk import Trunk
from minimore.reward import RewardModel, fresh_head

# Pythia-1.4B; other shapes replace some of these numbers.
NEOX = ModelConfig(
    vocabulary=50304,
    width=2048,
    blocks=24,
    heads=16,
    kv_heads=16,
    head_width=128,
    mlp_width=8192,
    activation="gelu",
    gated=False,
    norm="layer",
    norm_eps=1e-5,
    parallel_residual=True,
    qkv_bias=True,
    attention_output_bias=True,
    mlp_bias=True,
    rotary_width=32,
    rope_base=10000.0,
)


def random_model(config, optimizer, device="cpu", home=where_it_is):
    """Each parameter is made on the device and adopted at once, as in loading a checkpoint."""
    with torch.device("meta"):
        model = RewardModel(Trunk(config), torch.empty(config.width))
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in list(model.named_parameters()):
        value = random_value(name, parameter.shape, generator)
        replace_parameter(model, name, optimizer.adopt(name, value, home))
        del value
    return model


def random_value(name, shape, generator):
    """What a parameter begins with: norms at one, biases at zero, matrices small."""
    if name == "head":
        return fresh_head(shape[0], 0).to(generator.device)
    value = torch.empty(shape, device=generator.device)
    if value.ndim > 1:
        return value.normal_(0, 0.02, generator=generator)
    return value.fill_(float(name.endswith("norm.weight")))
