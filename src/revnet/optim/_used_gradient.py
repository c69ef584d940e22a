"""Placeholder for a gradient that was used and freed."""

from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


class UsedGradient(Tensor):
    """Gradient of a parameter after its update: a tensor without data, which refuses every operation.

    Without it, whatever reads gradients after the backward pass would take the parameter for unused, and do nothing:
    clipping, a gradient scaler, `DistributedDataParallel`, and the accumulation of a second gradient.
    """

    @classmethod
    def of(cls, parameter: Tensor) -> Self:
        """Return the placeholder of a parameter."""
        gradient: Self = torch.Tensor._make_wrapper_subclass(
            cls, parameter.size(), strides=parameter.stride(), dtype=parameter.dtype, device=parameter.device
        )
        return gradient

    # Every operation reaches `__torch_dispatch__`.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Raise an error that says what cannot be done with the gradient."""
        shape = next((tuple(leaf.shape) for leaf in tree_leaves(args) if isinstance(leaf, cls)), ())
        raise RuntimeError(
            f"the gradient of a parameter of shape {shape} was used and freed in the backward pass, by "
            "`StepInBackward`, so it cannot be accumulated, clipped, unscaled or reduced; call "
            "`optimizer.step()` after every backward pass, or train without `StepInBackward`."
        )

    def __repr__(self) -> str:  # type: ignore[override]
        return f"UsedGradient(shape={tuple(self.shape)})"
