"""Residual functions that compute from their input, parameters and buffers alone, by modules whose code is known.

Such a function draws no random numbers, does not write to its parameters, and always saves the same kinds of tensors.
Its calls are therefore not searched for random numbers, writes, and tensors from outside the function. On small
tensors, this search takes a noticeable part of a step.
"""

from collections.abc import Callable, Iterable
from types import NoneType
from typing import Any, TypeVar

from torch import Tensor, nn

from revnet._torch_internals import hooks_of

_CLASSES: list[type[nn.Module]] = [
    *(nn.Sequential, nn.Identity, nn.Flatten, nn.Unflatten, nn.Linear),
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    *(nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm),
    *(nn.CELU, nn.ELU, nn.GELU, nn.GLU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU),
    *(nn.LogSigmoid, nn.LogSoftmax, nn.Mish, nn.PReLU, nn.ReLU, nn.ReLU6, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softmax),
    *(nn.Softmin, nn.Softplus, nn.Softshrink, nn.Softsign, nn.Tanh, nn.Tanhshrink, nn.Threshold),
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
    *(nn.ChannelShuffle, nn.PixelShuffle, nn.PixelUnshuffle, nn.Upsample),
]
_FORWARDS: dict[type[nn.Module], Callable[..., Any]] = {cls: cls.forward for cls in _CLASSES}
"""The classes, without their subclasses, and their methods, which other libraries may replace."""

Module = TypeVar("Module", bound=type[nn.Module])


def self_contained(cls: Module) -> Module:
    """Declare that a class of modules computes from its input, parameters and buffers alone. It is a class decorator.

    Its `forward` draws no random numbers, and saves the same kinds of tensors whenever it gets the same kind of input.
    """
    _FORWARDS[cls] = cls.forward
    return cls


def is_self_contained(modules: Iterable[nn.Module]) -> bool:
    """Return whether a function consists of such modules, with plain tensors and without hooks."""
    return all(map(_is_known, modules))


def _is_known(module: nn.Module) -> bool:
    runs_class_forward = "forward" not in module.__dict__ and module._compiled_call_impl is None
    # A tensor that is neither parameter nor buffer, as from the older `weight_norm`.
    has_other_tensor = any(isinstance(value, Tensor) for value in module.__dict__.values())
    return (
        _FORWARDS.get(type(module)) is type(module).forward
        and runs_class_forward
        and not any(hooks_of(module))
        and not has_other_tensor
        and {*map(type, module._parameters.values())} <= {nn.Parameter, NoneType}
        and {*map(type, module._buffers.values())} <= {Tensor, NoneType}
    )
