"""A fully invertible network."""

from itertools import groupby
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from revnet._checks import check_tensor, describe, describe_kind
from revnet.nn.blocks._abstract_block import AbstractReversibleBlock
from revnet.nn.blocks._reversible_sequential import ReversibleSequential
from revnet.nn.blocks._run import ROLES
from revnet.nn.invertible._abstract_invertible import AbstractInvertible, zero_log_det
from revnet.nn.policies._has_policies import as_policy
from revnet.nn.policies._policy import AbstractPolicy, Reverse

_REVERSE = Reverse()

_Arguments = tuple[tuple[Any, ...], dict[str, Any]]
_NONE: _Arguments = ((), {})
_OWN = tuple(f"{role}_kwargs" for role in ROLES)


class InvertibleSequential(AbstractInvertible):
    """Run invertible layers and reversible blocks in order, so that the input can be computed from the output.

    Consecutive blocks run as one `ReversibleSequential`, which holds only its output. The layers between them run by
    ordinary autograd. The layers of this library hold nothing, except for `InvertibleConv1x1` and `ActNorm`, which hold
    their input. For constant memory, put many blocks between two layers, and use `FlowStep`, which has both inside.

    Additional arguments, such as the context of a conditional flow, reach all residual functions.

    Args:
        layers: Invertible layers, reversible blocks, sequences of blocks, and other invertible networks.
        policy: Policy for the activations of the blocks, or its name. The default is `Reverse()`.

    Raises:
        TypeError: A layer is not invertible, or `policy` is not a policy.
            In the passes: an additional argument is given and no layer takes one, or a layer returns several tensors.
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

    takes_arguments: ClassVar[bool] = True

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

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the features.

        Args:
            x: The input.
            args: Additional positional arguments of every residual function, such as a context; and of the layers that
                declare `takes_arguments`.
            kwargs: Additional keyword arguments. `f_kwargs` and `g_kwargs` are dicts for only one of the functions.
        """
        check_tensor("x", x)
        for layer, (own_args, own_kwargs) in self._with_arguments(args, kwargs):
            x = _checked(layer(x, *own_args, **own_kwargs), layer)
        return x

    def inverse(self, y: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the input from the features. Pass the additional arguments that the forward pass had.

        Use evaluation mode if the network has batch norm or dropout.
        """
        check_tensor("y", y)
        for layer, (own_args, own_kwargs) in reversed(self._with_arguments(args, kwargs)):
            y = layer.inverse(y, *own_args, **own_kwargs)
        return y

    def forward_with_log_det(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Compute the features, and the log-determinant of the whole network for each sample, (B,)."""
        check_tensor("x", x)
        total = zero_log_det(x)
        for layer, (own_args, own_kwargs) in self._with_arguments(args, kwargs):
            x, log_det = layer.forward_with_log_det(x, *own_args, **own_kwargs)
            total = total + log_det
            _checked(x, layer)
        return x, total

    def log_det(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the log-determinant at `x` for each sample, (B,)."""
        return self.forward_with_log_det(x, *args, **kwargs)[1]

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, index: int) -> nn.Module:
        return self.layers[index]

    def _with_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[Any, _Arguments]]:
        """Return the layers, each with the additional arguments that it takes."""
        if not args and not kwargs:
            return [(layer, _NONE) for layer in self.layers]
        taken = [_arguments_for(layer, args, kwargs) for layer in self.layers]
        roles = {f"{role}_kwargs" for layer in self.layers for role in _roles(layer)}
        for name, value in kwargs.items():
            if name in _OWN and value is not None and name not in roles:
                raise TypeError(
                    f"`{name}` is for residual functions named `{name[0]}`, and the network has none; pass the "
                    "arguments to all functions."
                )
        if all(arguments is _NONE for arguments in taken):
            raise TypeError(
                f"`{next(iter(kwargs), 'args')}` is an additional argument, but no layer of the network takes one; put "
                "a reversible block into it, or a layer with `takes_arguments = True`."
            )
        return list(zip(self.layers, taken, strict=True))


def _arguments_for(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Arguments:
    """Return the additional arguments that one layer takes; an argument of one function only if it has the function."""
    if isinstance(layer, InvertibleSequential):
        if not any(_arguments_for(inner, args, kwargs) is not _NONE for inner in layer.layers):
            return _NONE
    elif isinstance(layer, AbstractInvertible) and not layer.takes_arguments:
        return _NONE
    roles = {f"{role}_kwargs" for role in _roles(layer)}
    return args, {name: value for name, value in kwargs.items() if name not in _OWN or name in roles}


def _roles(layer: nn.Module) -> set[str]:
    """Return the names of the residual functions of a layer in their blocks."""
    if isinstance(layer, InvertibleSequential):
        return {role for inner in layer.layers for role in _roles(inner)}
    if not isinstance(layer, ReversibleSequential):
        return set()
    half_blocks = [half_block for block in layer for half_block in cast("AbstractReversibleBlock", block).half_blocks()]
    return {half_block.role for half_block in half_blocks}


def _checked(x: Any, layer: nn.Module) -> Tensor:
    if isinstance(x, tuple | list):
        raise TypeError(
            f"{type(layer).__name__} returned {describe_kind(x)}, but a layer must return one tensor; to split off a "
            "part of the features, use `MultiScaleSequential`."
        )
    return cast("Tensor", x)


def _split(layer: nn.Module) -> tuple[int, int] | None:
    return (layer.split_dim, layer.num_streams) if isinstance(layer, AbstractReversibleBlock) else None
