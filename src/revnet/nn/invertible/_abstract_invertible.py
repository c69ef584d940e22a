"""The interface of invertible layers, and checks of their inputs."""

import abc
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from revnet._checks import check_tensor
from revnet._torch_release import has_autocast


class AbstractInvertible(nn.Module, abc.ABC):
    """A layer that is a bijection: `inverse` undoes `forward`, and `log_det` measures the change of volumes.

    Example:
        >>> import torch
        >>> from revnet.nn import AbstractInvertible
        >>> class Negate(AbstractInvertible):
        ...     def forward(self, x):
        ...         return -x
        ...     def inverse(self, y):
        ...         return -y
        ...     def forward_with_log_det(self, x):
        ...         return -x, torch.zeros(len(x))
        >>> Negate().log_det(torch.rand(3, 4))
        tensor([0., 0., 0.])
    """

    takes_arguments: ClassVar[bool] = False
    """Whether the methods take additional arguments, such as a context, which `InvertibleSequential` then passes on."""

    @abc.abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Compute the output."""

    @abc.abstractmethod
    def inverse(self, y: Tensor) -> Tensor:
        """Compute the input from the output."""

    @abc.abstractmethod
    def forward_with_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the output, and for each sample the log-determinant of the map from input to output, (B,)."""

    def log_det(self, x: Tensor) -> Tensor:
        """Compute the log-determinant at `x` for each sample, (B,)."""
        return self.forward_with_log_det(x)[1]


def zero_log_det(x: Tensor) -> Tensor:
    """Return the log-determinant of a map that preserves volumes."""
    dtype = x.real.dtype if x.is_floating_point() or x.is_complex() else torch.get_default_dtype()
    return torch.zeros(x.shape[0], dtype=dtype, device=x.device)


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Return a context without autocast, for computations that low precision would make hard to undo."""
    # Autocast is not available on the meta device.
    return torch.autocast(x.device.type, enabled=False) if has_autocast(x.device.type) else nullcontext()


def check_images(x: Tensor, name: str = "x") -> None:
    """Raise unless `x` is a batch of images."""
    if not isinstance(x, Tensor):
        check_tensor(name, x)
    if x.dim() != 4:
        raise ValueError(
            f"`{name}` (of shape {tuple(x.shape)}) must be (B, C, H, W), a batch of images; for one image pass "
            f"`{name}[None]`."
        )


def check_halvable(x: Tensor, factor: int) -> None:
    """Raise unless the sides of the images are multiples of `factor`."""
    check_images(x)
    height, width = x.shape[-2:]
    if height % factor or width % factor:
        raise ValueError(
            f"`x` (of shape {tuple(x.shape)}) must have sides that are multiples of {factor}; crop or pad the images "
            f"to {-(-height // factor) * factor}x{-(-width // factor) * factor}."
        )


def check_multiple(y: Tensor, factor: int) -> None:
    """Raise unless the number of channels is a multiple of `factor`."""
    check_images(y, "y")
    if y.shape[1] % factor:
        raise ValueError(
            f"`y` (of shape {tuple(y.shape)}) must have a multiple of {factor} channels, which become pixels; pass "
            "what `forward` returned."
        )
