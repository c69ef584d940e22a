"""A fully invertible network."""

from itertools import groupby
from typing import cast

from torch import Tensor, nn

from revnet.nn._abstract_block import AbstractReversibleBlock
from revnet.nn._invertible import AbstractInvertible, zero_log_det
from revnet.nn._policy import AbstractPolicy, Reverse
from revnet.nn._policy_holder import as_policy
from revnet.nn._sequential import ReversibleSequential

_REVERSE = Reverse()


class InvertibleSequential(AbstractInvertible):
    """Invertible layers and reversible blocks in a row: the input can be computed from the output, shapes and all.

    Blocks that follow one another run as one `ReversibleSequential`, and are kept as one: of their activations, only
    the output is held. The layers between them run by ordinary autograd; those of this library hold nothing, but for
    the 1x1 convolution, which holds its input. A network whose memory shall be flat therefore has many blocks between
    two layers.

    Args:
        layers: Invertible layers, reversible blocks and sequences of them, whole networks of this kind.
        policy: What to do with the activations of the blocks, `Reverse()` by default.

    Raises:
        TypeError: A layer is none of these.

    Shape:
        x: a tensor as the first layer takes it. Output: as the last one returns it.
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
                    f"`layers[{index}]` (={type(layer).__name__}) must be invertible: a layer such as `SpaceToDepth`, "
                    "or a reversible block; put what is not into the functions of a block, or behind the network."
                )
        self.layers = nn.ModuleList()
        # Blocks that split alike run together.
        for _, group in groupby(layers, _split):
            members = list(group)
            blocks = [layer for layer in members if isinstance(layer, AbstractReversibleBlock)]
            self.layers.extend([ReversibleSequential(*blocks, policy=policy)] if blocks else members)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the features."""
        for layer in self.layers:
            x = layer(x)
        return x

    def inverse(self, y: Tensor) -> Tensor:
        """Compute the input from the features. Invert networks with batch norm or dropout in evaluation mode."""
        for layer in reversed(self._invertible_layers()):
            y = layer.inverse(y)
        return y

    def forward_with_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the features, and the log-determinant of the whole for each sample, (B,)."""
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
        """The layers, sequences of blocks among them: on a tensor they are layers like the others."""
        return cast("list[AbstractInvertible]", list(self.layers))


def _split(layer: nn.Module) -> tuple[int, int] | None:
    return (layer.split_dim, layer.num_streams) if isinstance(layer, AbstractReversibleBlock) else None
