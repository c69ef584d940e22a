"""The network of a run before its first update."""

from torch import nn

from revnet.training.freezing import freeze_parameters
from revnet.training.run.precision import convert_parameters
from revnet.training.settings.run_config import AbstractRunConfig


def prepare_network(model: nn.Module, config: AbstractRunConfig) -> nn.Module:
    """Freeze and convert the parameters of `model` as the settings ask, and return it.

    Raises:
        ValueError: A pattern of `freeze` matches nothing, or no parameter would be left to train.
    """
    if config.freeze is not None:
        freeze_parameters(model, config.freeze)
    convert_parameters(model, config)
    return model
