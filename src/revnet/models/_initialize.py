"""Initial weights of the official code."""

import math

from torch import nn


def initialize(model: nn.Module) -> None:
    """Initialize the weights like the official code.

    Convolutions: normal with standard deviation sqrt(2 / (k^2 out_channels)), truncated at two standard deviations.
    Linear layers: uniform within sqrt(3 / in_features), with zero bias. Batch norm: weight one and bias zero.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            deviation = math.sqrt(2 / (module.kernel_size[0] * module.kernel_size[1] * module.out_channels))
            nn.init.trunc_normal_(module.weight, std=deviation, a=-2 * deviation, b=2 * deviation)
        elif isinstance(module, nn.Linear):
            bound = math.sqrt(3 / module.in_features)
            nn.init.uniform_(module.weight, -bound, bound)
            nn.init.zeros_(module.bias)
