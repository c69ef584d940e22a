"""A model with units of both kinds, and its policies."""

from torch import nn

from revnet import AbstractPolicy, PolicySequential, ReversibleBlock, ReversibleSequential
from revnet.nn._whole_model import policy_holders
from tests.helpers import mlp


def make_model() -> nn.Sequential:
    """Return a unit of modules that are not reversible, a sequence of three blocks, and a head without units."""
    return nn.Sequential(
        PolicySequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU()),
        ReversibleSequential(*[ReversibleBlock(mlp(2), mlp(2)) for _ in range(3)]),
        nn.Linear(4, 2),
    )


def policies(model: nn.Module) -> dict[str, tuple[AbstractPolicy, ...]]:
    """Return the policies of each module that has units, by its name."""
    return {name: holder.policies for name, holder in policy_holders(model).items()}
