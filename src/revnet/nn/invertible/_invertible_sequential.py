"""A fully invertible network."""

from itertools import groupby
from typing import cast

from torch import Tensor, nn

from revnet._checks import check_tensor, describe
from revnet.nn.blocks._abstract_block import AbstractReversibleBlock
from revnet.nn.blocks._reversible_sequential import ReversibleSequential
from revnet.nn.invertible._abstract_invertible import AbstractInvertible, zero_log_det
from revnet.nn.policies._has_policies import as_policy
from revnet.nn.policies._policy import AbstractPolicy, Reverse

_REVERSE = Reverse()


class InvertibleSequential(AbstractInvertible):
    """Run invertible layers and reversible blocks in order, so that the input can be computed from the output.

    Consecutive blocks run as one `ReversibleSequential`, which holds only its output. The layers between them run by
    ordinary autograd. The layers of this library hold nothing, except for the 1x1 convolution, which holds its input.
    For constant memory, put many blocks between two layers.

    Args:
        layers: Invertible layers, reversible blocks, sequences of blocks, and other invertible networks.
        policy: Policy for the activations of the blocks, or its name. The default is `Reverse()`.

    Raises:
        TypeError: A layer is not invertible, or `policy` is not a policy.
        ValueError: No policy has this name.

    Shape:
        x: A tensor that the first layer accepts. Output: the output of the last layer.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from revnet import ReversibleBlock
        >>> from revnet.nn import InvertibleSequential, SpaceToDepth
        >>> block = ReversibleBlock(nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1))
        >>> model = InvertibleSequential(SpaceToDepth(), block)
        >>> x = torch.rand(1, 1, 4, 4)
        >>> torch.allclose(model.inverse(model(x)), x, atol=1e-5)
        True
    """

    def __init__(
        self,
        *layers: AbstractInvertible | AbstractReversibleBlock | ReversibleSequential,
        policy: AbstractPolicy | str = _REVERSE,
    ):
        super().__init__()
        policy = as_policy(policy)
        for index, layer in enumerate(layers):
            if not isinstance(layer, AbstractInvertible | AbstractReversibleBlock | ReversibleSequential):
                raise TypeError(
                    f"`layers[{index}]` (={describe(layer)}) must be an invertible layer, such as `SpaceToDepth`, or a "
                    "reversible block; put other modules into the functions of a block, or after the network."
                )
        self.layers = nn.ModuleList()
        # Consecutive blocks that split their input in the same way run together.
        for _, group in groupby(layers, _split):
            members = list(group)
            blocks = [layer for layer in members if isinstance(layer, AbstractReversibleBlock)]
            self.layers.extend([ReversibleSequential(*blocks, policy=policy)] if blocks else members)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the features."""
        check_tensor("x", x)
        for layer in self.layers:
            x = layer(x)
        return x

    def inverse(self, y: Tensor) -> Tensor:
        """Compute the input from the features. Use evaluation mode if the network has batch norm or dropout."""
        check_tensor("y", y)
        for layer in reversed(self._invertible_layers()):
            y = layer.inverse(y)
        return y

    def forward_with_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the features, and the log-determinant of the whole network for each sample, (B,)."""
        check_tensor("x", x)
        total = zero_log_det(x)
        for layer in self._invertible_layers():
            x, log_det = layer.forward_with_log_det(x)
            total = total + log_det
        return x, total

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, index: int) -> nn.Module:
        return self.layers[index]

    def _invertible_layers(self) -> list[AbstractInvertible]:
        """Return the layers. A sequence of blocks has the methods of an invertible layer."""
        return cast("list[AbstractInvertible]", list(self.layers))


def _split(layer: nn.Module) -> tuple[int, int] | None:
    return (layer.split_dim, layer.num_streams) if isinstance(layer, AbstractReversibleBlock) else None
