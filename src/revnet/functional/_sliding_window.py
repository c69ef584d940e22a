"""Run a model on the patches of a large image or volume, and average its outputs where they overlap.

MONAI's function of the same name does the work where MONAI is installed. Elsewhere the loop below does it, with the
same patches, the same weights and the same order of sums, so the result does not depend on which one ran.

B C: batch, channels. The other dimensions are spatial; there can be any number of them.

References:
    Cardoso et al. (2022), MONAI: An open-source framework for deep learning in healthcare;
    Isensee et al. (2021), nnU-Net, for the Gaussian weights.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revnet._checks import check_choice, check_count, check_tensor, describe, is_integer, is_number

_MOST_ELEMENTS = 2**40
"""Largest number of elements of a padded input; more do not fit into the memory of any machine."""
_SIGMA = 0.125
"""Standard deviation of the Gaussian weights, relative to the side of a patch."""
_LEAST_WEIGHT = 1e-3
"""Smallest Gaussian weight. Far corners would underflow to 0, and 0 divided by 0 is not a number."""

Model = Callable[[Tensor], Tensor]
Window = tuple[slice, ...]


def sliding_window_inference(
    model: Model,
    x: Tensor,
    patch_size: int | Sequence[int],
    *,
    overlap: float = 0.25,
    weights: Literal["constant", "gaussian"] = "gaussian",
    batch_size: int = 1,
    padding_value: float = 0.0,
    device: torch.device | str | None = None,
    output_device: torch.device | str | None = None,
) -> Tensor:
    """Compute `model(x)` patch by patch, without gradients, and average the outputs where patches overlap.

    Only the patches of one batch are on the device of the model, so `x` and the output may be far larger than its
    memory. MONAI's function runs the patches if MONAI is installed; the numbers are the same without it.

    Where a model computes each position on its own, the result is the output of the model on the whole input, up to
    the rounding of the average. Other models see the border of a patch instead of what lies beyond it, which overlap
    and Gaussian weights hide.

    Args:
        model: A module or a function from a batch of patches, (B, C, ...), to floating-point outputs of the same
            spatial size, with any number of channels. Call `eval()` first if it has dropout or batch norm.
        x: Images or volumes, (B, C, ...), floating-point. An input smaller than a patch is padded on both sides, and
            the output is cropped.
        patch_size: Sides of a patch, or one side for all dimensions.
        overlap: Share of its side by which a patch overlaps the next one, from 0 to below 1.
        weights: Weights of a patch in the average: "gaussian" trusts the center most, with a standard deviation of an
            eighth of the side, and "constant" trusts all positions alike.
        batch_size: Number of patches that the model computes at a time.
        padding_value: Value of the padding.
        device: Device of the patches. None means the device of the model's parameters, or of `x` for a function.
        output_device: Device of the output and its sums. None means the device of `x`.

    Returns:
        The output, (B, channels of the model, ...), in float32, or in float64 if `x` is float64.

    Raises:
        TypeError: `model` is not callable, `x` is not a floating-point tensor, or `model` does not return one.
        ValueError: `x` has no spatial dimensions, a size is not positive, `overlap` is not from 0 to below 1, a device
            is not available, or the output of `model` has another spatial size.

    Example:
        >>> import torch
        >>> from revnet.functional import sliding_window_inference
        >>> from revnet.models import UNet3d
        >>> model = UNet3d(in_channels=1, num_classes=2, widths=(8, 16)).eval()
        >>> volume = torch.randn(1, 1, 20, 24, 33)
        >>> sliding_window_inference(model, volume, 16, overlap=0.5).shape
        torch.Size([1, 2, 20, 24, 33])
    """
    sides = _check(model, x, patch_size, overlap, weights, batch_size, padding_value)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    predict = _checked(model, sides, x.dtype, dtype)
    at = _device_of(model, x) if device is None else _check_device("device", device)
    output_at = x.device if output_device is None else _check_device("output_device", output_device)
    function = _find_monai() or _run
    with torch.no_grad():
        y = function(
            inputs=x.to(dtype),
            roi_size=sides,
            sw_batch_size=batch_size,
            predictor=predict,
            overlap=float(overlap),
            mode=weights,
            sigma_scale=_SIGMA,
            padding_mode="constant",
            cval=float(padding_value),
            sw_device=at,
            device=output_at,
        )
        return y.contiguous()  # A cropped view would keep the padding.


def _find_monai() -> Callable[..., Tensor] | None:
    """Return MONAI's `sliding_window_inference`, or None if MONAI is not installed or does not load."""
    if find_spec("monai") is None:
        return None
    try:
        return import_module("monai.inferers").sliding_window_inference
    except ImportError:  # It lacks a package, or does not fit this release of PyTorch.
        return None


def _checked(model: Model, sides: tuple[int, ...], dtype: torch.dtype, sum_dtype: torch.dtype) -> Model:
    """Return a function that runs `model` in `dtype` and returns a copy of its output in `sum_dtype`."""

    def predict(patches: Tensor) -> Tensor:
        y: Any = model(patches.to(dtype))
        if not isinstance(y, Tensor) or not y.is_floating_point():
            shown = f"a tensor of dtype {y.dtype}" if isinstance(y, Tensor) else describe(y)
            raise TypeError(
                f"`model` returned {shown}, but must return a floating-point tensor, such as logits; pass a function "
                "that picks it from the output, and take labels from the average."
            )
        if y.dim() != patches.dim() or y.shape[0] != patches.shape[0] or y.shape[2:] != sides:
            raise ValueError(
                f"`model` returned shape {tuple(y.shape)} for patches of shape {tuple(patches.shape)}, but must keep "
                "the batch and the spatial size; resize its output with `torch.nn.functional.interpolate`."
            )
        # A copy, since the weights are multiplied in place, and the output may be a view of the input.
        return y.to(sum_dtype, copy=True)

    return predict


def _device_of(model: Model, x: Tensor) -> torch.device:
    """Return the device of the parameters of `model`, or the device of `x` if there are none."""
    tensors = itertools.chain(model.parameters(), model.buffers()) if isinstance(model, nn.Module) else ()
    return next((tensor.device for tensor in tensors), x.device)


# The loop, with the parameters of MONAI's function ----------------------------------------------------------------


def _run(
    *,
    inputs: Tensor,
    roi_size: tuple[int, ...],
    sw_batch_size: int,
    predictor: Model,
    overlap: float,
    mode: str,
    sigma_scale: float,
    padding_mode: str,
    cval: float,
    sw_device: torch.device,
    device: torch.device,
) -> Tensor:
    """Return the weighted average of the outputs of `predictor` on the patches of `inputs`."""
    sizes = inputs.shape[2:]
    missing = [max(side - size, 0) for side, size in zip(roi_size, sizes, strict=True)]
    before = [count // 2 for count in missing]
    if any(missing):
        padding = [(first, count - first) for first, count in zip(before, missing, strict=True)]
        inputs = F.pad(inputs, [count for pair in reversed(padding) for count in pair], padding_mode, cval)
    windows = list(_windows(inputs.shape[2:], roi_size, overlap))
    weight = _weight(roi_size, mode, sigma_scale, sw_device).to(inputs.dtype)
    total = inputs.new_zeros((1, 1, *inputs.shape[2:]), device=device)
    output_weight = weight.to(device)
    for window in windows:
        total[0, 0][window] += output_weight
    positions = [(index, window) for index in range(len(inputs)) for window in windows]
    y: Tensor | None = None
    for start in range(0, len(positions), sw_batch_size):
        batch = positions[start : start + sw_batch_size]
        patches = torch.stack([inputs[index][(slice(None), *window)] for index, window in batch]).to(sw_device)
        outputs = predictor(patches).mul_(weight).to(device)
        if y is None:
            y = inputs.new_zeros((len(inputs), outputs.shape[1], *inputs.shape[2:]), device=device)
        for (index, window), output in zip(batch, outputs, strict=True):
            y[index][(slice(None), *window)] += output
    assert y is not None  # there is at least one patch
    y /= total
    return y[:, :, *[slice(first, first + size) for first, size in zip(before, sizes, strict=True)]]


def _windows(sizes: Sequence[int], sides: Sequence[int], overlap: float) -> Iterator[Window]:
    """Return the windows of the patches, in row-major order. The last one in each dimension ends at the border."""
    starts = []
    for size, side in zip(sizes, sides, strict=True):
        step = side if side == size else max(int(side * (1 - overlap)), 1)
        count = math.ceil((size - side) / step) + 1
        starts.append([min(index * step, size - side) for index in range(count)])
    for corner in itertools.product(*starts):
        yield tuple(slice(start, start + side) for start, side in zip(corner, sides, strict=True))


def _weight(sides: Sequence[int], mode: str, sigma_scale: float, device: torch.device) -> Tensor:
    """Return the weights of the positions of a patch, in float32."""
    weight = torch.ones(tuple(sides) if mode == "constant" else (), device=device)
    if mode == "gaussian":
        for side in sides:
            x = torch.arange(-(side - 1) / 2, (side - 1) / 2 + 1, device=device)
            weight = weight.unsqueeze(-1) * torch.exp(x**2 / (-2 * (sigma_scale * side) ** 2))
    return weight.clamp_(min=_LEAST_WEIGHT)


# Checks -----------------------------------------------------------------------------------------------------------


def _check(
    model: Any, x: Any, patch_size: Any, overlap: Any, weights: Any, batch_size: Any, padding_value: Any
) -> tuple[int, ...]:
    """Return the sides of a patch.

    Raises:
        TypeError: `model` is not callable, or `x` is not a floating-point tensor.
        ValueError: An argument is out of range.
    """
    if not callable(model):
        raise TypeError(f"`model` (={describe(model)}) must be a module or a function from patches to outputs.")
    check_tensor("x", x)
    if x.dim() < 3 or 0 in x.shape:
        raise ValueError(
            f"`x` (of shape {tuple(x.shape)}) must be (B, C, ...) with at least one spatial dimension, and not empty; "
            "for one volume without channels pass `x[None, None]`."
        )
    if not x.is_floating_point():
        raise TypeError(f"`x` has dtype {x.dtype}, but must be floating-point; pass `x.float()`.")
    num_dims = x.dim() - 2
    sides = (patch_size,) * num_dims if is_integer(patch_size) else patch_size
    if not isinstance(sides, Sequence) or isinstance(sides, str | bytes) or len(sides) != num_dims:
        raise ValueError(
            f"`patch_size` (={describe(patch_size)}) must be one integer, or one for each of the {num_dims} spatial "
            f"dimensions of `x` (of shape {tuple(x.shape)})."
        )
    for side in sides:
        check_count("patch_size", side, hint="96 is usual")
    if math.prod(x.shape[:2]) * math.prod(map(max, sides, x.shape[2:])) > _MOST_ELEMENTS:
        raise ValueError(
            f"`patch_size` (={describe(patch_size)}) is too large: `x` (of shape {tuple(x.shape)}) would be padded to "
            f"more than {_MOST_ELEMENTS:,} elements; pass a smaller one."
        )
    if not is_number(overlap) or not 0 <= overlap < 1:
        raise ValueError(f"`overlap` (={describe(overlap)}) must be a number from 0 to below 1; 0.25 is usual.")
    check_choice("weights", weights, ("constant", "gaussian"))
    check_count("batch_size", batch_size)
    if not is_number(padding_value):
        raise ValueError(f"`padding_value` (={describe(padding_value)}) must be a finite number; 0 is usual.")
    return tuple(sides)


def _check_device(name: str, value: Any) -> torch.device:
    """Return the device, where it holds tensors."""
    if not isinstance(value, torch.device | str):
        raise TypeError(f"`{name}` (={describe(value)}) must be a device of PyTorch, such as 'cpu' or 'cuda'.")
    try:
        return torch.empty(0, device=value).device
    except (RuntimeError, AssertionError) as error:  # an assertion: this PyTorch was built without the device
        raise ValueError(
            f"`{name}` (={describe(value)}) must be a device that PyTorch can use here, such as 'cpu' or 'cuda'."
        ) from error
