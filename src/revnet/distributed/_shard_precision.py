"""Hooks that keep streams in float32 while residual functions compute in a lower precision."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from revnet.engine._block_hooks import block_calls

LOW = (torch.bfloat16, torch.float16)
"""Dtypes that are too coarse for streams, which could hardly be rebuilt."""


@dataclass(frozen=True)
class CastInputs:
    """A forward pre-hook that casts all floating-point inputs, as `fully_shard` does with `cast_forward_inputs`."""

    dtype: torch.dtype
    """Dtype in which the module computes."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Return the inputs in the dtype of the module."""
        return tree_map_only(Tensor, self._cast, (args, kwargs))

    def _cast(self, x: Tensor) -> Tensor:
        return x.to(self.dtype) if x.is_floating_point() else x


class StreamPrecision:
    """Forward hooks of a module that runs reversible blocks: inside it, streams of 16 bits become float32.

    The output has the dtype of the input again, so that the layers after the module get what they expect.
    """

    def __init__(self, module: nn.Module):
        self._dtype: torch.dtype | None = None
        module.register_forward_pre_hook(self.raise_precision, with_kwargs=True)
        module.register_forward_hook(self.restore_precision)

    def raise_precision(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Return the inputs, and the ones of 16 bits in float32."""
        self._dtype = None
        if block_calls.within is not None and block_calls.within[0] is module:
            return args, kwargs  # A sequence runs the block, and its streams must not be replaced.

        def cast(x: Tensor) -> Tensor:
            if x.dtype not in LOW:
                return x
            self._dtype = self._dtype or x.dtype
            return x.float()

        return tree_map_only(Tensor, cast, (args, kwargs))

    def restore_precision(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Return the output in the dtype that the input had."""
        dtype, self._dtype = self._dtype, None
        if dtype is None:
            return output
        return tree_map_only(Tensor, lambda y: y.to(dtype) if y.dtype == torch.float32 else y, output)
