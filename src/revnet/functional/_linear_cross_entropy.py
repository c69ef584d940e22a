"""The cross-entropy of a linear layer, without its logits existing as a whole.

N: number of rows, such as the tokens of a batch; D: features; V: number of classes, such as the vocabulary.
"""

from itertools import repeat
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from revnet._checks import check_choice, check_count, check_floating, check_share, check_tensor, describe, is_integer
from revnet._torch_internals import backward_keeps_graph, is_batched_gradient
from revnet.functional._context import autocast_dtype, check_same_dtype, is_transformed
from revnet.functional._once import differentiated_once

_ONCE = (
    "a compiled `linear_cross_entropy` has no second derivatives, but its gradient was differentiated; call the "
    "function outside of `torch.compile`."
)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: Literal["mean", "sum"] = "mean",
    chunk_size: int | None = None,
) -> Tensor:
    """Compute the cross-entropy of `linear(x, weight, bias)` on some rows of `x` at a time.

    The logits of a language model have a number for each token of the batch and each token of the vocabulary, and the
    ordinary loss needs several tensors of this size. Here they exist for one chunk of rows at a time. The forward pass
    also computes the gradients, chunk by chunk, and the backward pass multiplies them by the gradient of the loss. This
    takes the same three matrix products as the ordinary loss.

    Memory: between the passes it holds the gradients of `x`, `weight` and `bias`, and `x`. The forward pass adds one
    chunk of logits.

    `torch.nn.functional.linear_cross_entropy` with `options`, since PyTorch 2.13, works in the same way. Unlike it,
    this function follows autocast, has second derivatives unless compiled, smooths labels, compiles with
    `fullgraph=True`, and works under `torch.func`. For second derivatives and under `torch.func`, it computes all
    logits at once.

    Args:
        x: Features. Not modified.
        weight: Weight of the linear layer.
        targets: Class of each row, from 0 to V - 1, or `ignore_index`.
        bias: Bias of the linear layer.
        ignore_index: Target of rows that do not count.
        label_smoothing: Share of the target that is spread over all classes, as in `torch.nn.CrossEntropyLoss`.
        reduction: "mean" divides the sum by the number of rows that count. If no row counts, the mean is NaN.
        chunk_size: Rows of a chunk. By default, the logits of a chunk are about as large as `weight`, or as four times
            `x`, whichever is larger.

    Shape:
        x: (..., D). weight: (V, D). targets: (...), integers. bias: (V,). Output: ().

    Returns:
        The loss. It is in float32 if `x` has a lower precision.

    Raises:
        TypeError: An argument has the wrong type, or `x`, `weight` and `bias` have different data types and autocast is
            off.
        ValueError: An argument has the wrong shape or is out of range, or a target is not a class.

    Numerics:
        Logits are computed in the data type of `x`, or of autocast, and everything after them at least in float32. The
        gradient of the weight is summed over the chunks in float32 or more.

    Example:
        >>> import torch
        >>> from revnet.functional import linear_cross_entropy
        >>> head = torch.nn.Linear(16, 50_000)
        >>> features, targets = torch.randn(2, 10, 16), torch.randint(50_000, (2, 10))
        >>> loss = linear_cross_entropy(features, head.weight, targets, bias=head.bias)
        >>> loss.backward()

    References:
        Hsu et al. (2024), Liger Kernel: Efficient Triton Kernels for LLM Training.
    """
    check_rows(x, weight, targets, bias)
    check_choice("reduction", reduction, ("mean", "sum"))
    check_share(label_smoothing=label_smoothing, below_one=False)
    if not is_integer(ignore_index):
        raise TypeError(f"`ignore_index` (={describe(ignore_index)}) must be an integer, such as -100.")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"`ignore_index` (={describe(ignore_index)}) must fit into 64 bits, as targets do; use -100.")
    if chunk_size is not None:
        check_count("chunk_size", chunk_size)
    # In a small integer type, `ignore_index` would be another class: -100 is 156 in uint8.
    rows, targets = x.reshape(-1, x.shape[-1]), targets.reshape(-1).long()
    options = ignore_index, float(label_smoothing)
    size = default_chunk_size(rows.shape[0], *weight.shape) if chunk_size is None else chunk_size
    try:
        if is_transformed():
            total = _total_of_logits(rows, weight, bias, targets, *options)
        elif torch.is_grad_enabled():
            total = _ChunkedTotal.apply(rows, weight, bias, targets, *options, size)
        else:
            total = _chunked_total(rows, weight, bias, targets, *options, size, (False, False, False))[0]
    except (IndexError, RuntimeError) as error:
        if "out of bounds" not in str(error):
            raise
        raise target_error(targets, len(weight), ignore_index) from None
    if reduction == "sum":
        return total
    count = (targets != ignore_index).sum()
    return torch.where(count > 0, total / count.clamp(min=1), torch.nan)


def default_chunk_size(num_rows: int, num_classes: int, num_features: int) -> int:
    """Return a number of rows whose logits are as large as the weight or as four times the features.

    Much smaller chunks would save little: the gradient of the weight has this size, and a transformer has hidden layers
    of four times its features. They would be slower, because each chunk reads and writes the gradient of the weight.
    """
    most = max(num_features, -(-4 * num_rows * num_features // num_classes))
    num_chunks = max(1, -(-num_rows // most))
    return max(1, -(-num_rows // num_chunks))


class _ChunkedTotal(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        ignore_index: int,
        label_smoothing: float,
        size: int,
    ) -> Tensor:
        options = ignore_index, label_smoothing
        total, *gradients = _chunked_total(x, weight, bias, targets, *options, size, ctx.needs_input_grad[:3])
        ctx.options = options
        ctx.autocast = autocast_dtype(x)
        # The inputs are for second derivatives. The layer before needs `x` anyway.
        ctx.save_for_backward(x, weight, bias, targets, *gradients)
        # Until PyTorch 2.11, `torch.compile` loses the gradient of a result that was written in place.
        return total.clone() if torch.compiler.is_compiling() else total

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight, bias, targets, *gradients = ctx.saved_tensors
        is_compiling = torch.compiler.is_compiling()
        if not is_compiling and torch.is_grad_enabled():  # a double backward
            return *_differentiable_gradients(ctx, x, weight, bias, targets, grads[0]), None, None, None, None
        may_overwrite = not (is_compiling or backward_keeps_graph() or is_batched_gradient(grads[0]))
        multiply = Tensor.mul_ if may_overwrite else torch.mul
        inputs = x, weight, bias
        scaled = [
            None if gradient is None or tensor is None else multiply(gradient, grads[0]).to(tensor.dtype)
            for gradient, tensor in zip(gradients, inputs, strict=True)
        ]
        if is_compiling:
            sources = (*inputs, grads[0])
            scaled = [result if result is None else differentiated_once(result, sources, _ONCE) for result in scaled]
        return *scaled, None, None, None, None


def _chunked_total(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    size: int,
    needs: tuple[bool, ...],
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Return the sum of the losses and its gradients by `x`, `weight` and `bias`, where they are needed."""
    dtype = autocast_dtype(x) or x.dtype
    precise = torch.promote_types(x.dtype, torch.float32)
    wide = torch.promote_types(weight.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        # Gradients of the sum, which the backward pass scales and converts: in float16, those of the mean may vanish.
        low_weight, low_bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        total = torch.zeros((), dtype=precise, device=x.device)
        grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if needs[0] else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if needs[1] else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and needs[2] else None
        counts = (targets != ignore_index)[:, None]
        classes = targets[:, None].masked_fill(~counts, 0)
        grad_parts = repeat(None) if grad_x is None else grad_x.split(size)
        parts = x.split(size), classes.split(size), counts.to(precise).split(size), grad_parts
        for part, labels, weights, grad_part in zip(*parts, strict=False):
            part = part.to(dtype)
            logits = F.linear(part, low_weight, low_bias).to(precise)
            loss, grad_logits = _loss_of_chunk(logits, labels, weights, label_smoothing, needs_gradient=any(needs))
            del logits
            total += loss
            if grad_logits is not None:
                if grad_bias is not None:
                    grad_bias += grad_logits.sum(0)
                grad_logits = grad_logits.to(dtype)
                if grad_part is not None:
                    grad_part.copy_(grad_logits @ low_weight)
                if grad_weight is not None and dtype == wide:
                    grad_weight.addmm_(grad_logits.T, part)
                elif grad_weight is not None:
                    grad_weight += grad_logits.T @ part
            del grad_logits  # its memory is for the logits of the next chunk
    return total, grad_x, grad_weight, grad_bias


def _loss_of_chunk(
    logits: Tensor, classes: Tensor, counts: Tensor, label_smoothing: float, *, needs_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the sum of the losses of a chunk, and their gradient in the memory of `logits`, which are overwritten."""
    logits -= logits.amax(1, keepdim=True)
    at_target = logits.gather(1, classes)
    if label_smoothing:
        # Not `lerp`, which subtracts the two: a class may have a logit of -inf, and so the mean.
        at_target = (1 - label_smoothing) * at_target + label_smoothing * logits.mean(1, keepdim=True)
    total = logits.exp_().sum(1, keepdim=True)
    # Rows that do not count may hold anything, such as infinity in the padding.
    loss = ((total.log() - at_target) * counts).masked_fill_(counts == 0, 0).sum()
    if not needs_gradient:
        return loss, None
    logits *= counts / total
    logits.masked_fill_(counts == 0, 0)
    if label_smoothing:
        logits -= counts * (label_smoothing / logits.shape[1])
    logits.scatter_add_(1, classes, counts * (label_smoothing - 1))
    return loss, logits


def _differentiable_gradients(
    ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, grad: Tensor
) -> list[Tensor | None]:
    """Return the gradients with a graph, from all logits at once."""
    needs = ctx.needs_input_grad[:3]
    inputs = [
        tensor for tensor, is_needed in zip((x, weight, bias), needs, strict=True) if tensor is not None and is_needed
    ]
    with torch.autocast(x.device.type, ctx.autocast, enabled=ctx.autocast is not None):
        total = _total_of_logits(x, weight, bias, targets, *ctx.options)
    gradients = iter(torch.autograd.grad(total, inputs, grad, create_graph=True))
    return [next(gradients) if is_needed else None for is_needed in needs]


def _total_of_logits(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, ignore_index: int, label_smoothing: float
) -> Tensor:
    """Return the sum of the losses by the ordinary functions."""
    logits = F.linear(x, weight, bias)
    precise = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(
        logits.to(precise), targets, reduction="sum", ignore_index=ignore_index, label_smoothing=label_smoothing
    )


def target_error(targets: Tensor, num_classes: int, ignore_index: int = -100) -> ValueError:
    """Return the error for targets that are not classes."""
    try:
        counted = targets[targets != ignore_index]
        found = f", but the others range from {counted.min()} to {counted.max()}"
    except RuntimeError:  # `torch.func.vmap` hides the values.
        found = ""
    return ValueError(
        f"`targets` must be from 0 to {num_classes - 1}, or {ignore_index} for rows that do not count{found}; use a "
        "layer with a class for each of them."
    )


def check_rows(x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> None:
    """Raise unless these have the types and shapes of the arguments of `linear_cross_entropy`."""
    check_features(x, weight, bias)
    check_tensor("targets", targets)
    if targets.is_floating_point() or targets.is_complex() or targets.dtype is torch.bool:
        raise TypeError(f"`targets` has dtype {targets.dtype}, but must hold integers, the class of each row of `x`.")
    if targets.shape != x.shape[:-1]:
        raise ValueError(
            f"`targets` has shape {tuple(targets.shape)}, but must have {tuple(x.shape[:-1])}, a class for each row of "
            "`x`."
        )


def check_features(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """Raise unless `x` can be the input of a linear layer with these parameters."""
    given = {"x": x, "weight": weight} if bias is None else {"x": x, "weight": weight, "bias": bias}
    for name, tensor in given.items():
        check_tensor(name, tensor)
        check_floating(name, tensor)
    check_same_dtype(**given)
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"`weight` has shape {tuple(weight.shape)}, but must have (V, D), as in `nn.Linear`.")
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"`x` has shape {tuple(x.shape)}, but must have (..., {weight.shape[1]}), as `weight` has "
            f"{weight.shape[1]} columns."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"`bias` has shape {tuple(bias.shape)}, but must have {tuple(weight.shape[:1])}.")
