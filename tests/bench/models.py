"""Models with random weights for benchmarks. No more is held than what is measured."""

import torch

from minimore.engine.optim import replace_parameter, where_it_is
from minimore.model.trunk import Trunk
from minimore.reward import RewardModel, fresh_head


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
