"""Run a module on one chunk of its input at a time, in the forward and the backward pass.

References:
    Kitaev, Kaiser, Levskaya (2020), Reformer: The Efficient Transformer, section 3.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from revnet._checks import check_count, check_module, check_tensor, describe, is_integer
from revnet._torch_internals import is_jit_tracing
from revnet._torch_release import has_autocast, is_exporting


def chunked(module: nn.Module, x: Tensor, num_chunks: int, *, dim: int = 1) -> Tensor:
    """Compute `module(x)` in chunks along `dim`, so that its activations exist for one chunk at a time.

    The backward pass computes each chunk again from the stored `x`, which costs one more forward pass of the module.
    Under `torch.compile` the chunks use ordinary autograd. Exported and traced programs have no chunks.

    Args:
        module: A module that treats the positions along `dim` independently, draws no random numbers and keeps no
            state.
        x: Input of the module.
        num_chunks: Number of chunks. There are fewer if `x` has fewer positions.
        dim: Dimension along which `x` is split.

    Returns:
        The value of `module(x)`, up to the rounding of kernels on different shapes.

    Raises:
        TypeError: `module` is not a module, `x` is not a tensor, or `dim` is not an integer.
        ValueError: `num_chunks` is not a positive integer, or `x` has no dimension `dim`.
    """
    check_module("module", module, hint="wrap the function in a module")
    check_tensor("x", x)
    check_count("num_chunks", num_chunks)
    if not is_integer(dim):
        raise TypeError(f"`dim` (={describe(dim)}) must be an integer, the dimension along which `x` is split.")
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"`dim` (={describe(dim)}) must be a dimension of `x`, which has shape {tuple(x.shape)}.")
    if num_chunks == 1 or is_exporting() or is_jit_tracing():  # A program in a file has no fixed number of positions.
        result: Tensor = module(x)
    elif torch.is_grad_enabled() and not torch.compiler.is_dynamo_compiling():
        parameters = dict(module.named_parameters())
        result = _Chunked.apply(module, tuple(parameters), num_chunks, dim, x, *parameters.values())
    else:
        result = torch.cat([module(chunk) for chunk in x.chunk(num_chunks, dim)], dim)
    return result


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, module: nn.Module, names: tuple[str, ...], num_chunks: int, dim: int, x: Tensor, *parameters: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, *parameters)
        ctx.module, ctx.names, ctx.num_chunks, ctx.dim = module, names, num_chunks, dim
        ctx.autocast = autocast_now(x.device.type)
        return torch.cat([module(chunk) for chunk in x.chunk(num_chunks, dim)], dim)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        is_twice = torch.is_grad_enabled()  # a double backward: the chunks belong to the caller's graph
        x, *parameters = ctx.saved_tensors
        wanted = [index for index, needs in enumerate(ctx.needs_input_grad[4:]) if needs]
        grad_chunks: list[Tensor] = []
        sums: dict[int, Tensor] = {}
        for chunk, grad in zip(x.chunk(ctx.num_chunks, ctx.dim), grads[0].chunk(ctx.num_chunks, ctx.dim), strict=True):
            with torch.enable_grad(), ctx.autocast:
                inputs = [chunk, *parameters]
                if not is_twice:
                    inputs = [tensor.detach().requires_grad_(index in wanted) for index, tensor in enumerate(inputs)]
                y = functional_call(ctx.module, dict(zip(ctx.names, inputs[1:], strict=True)), (inputs[0],))
            results = torch.autograd.grad(
                y, [inputs[index] for index in wanted], grad, create_graph=is_twice, allow_unused=True
            )
            for index, result in zip(wanted, results, strict=True):
                if index == 0:
                    grad_chunks.append(torch.zeros_like(chunk) if result is None else result)
                elif result is not None:
                    sums[index] = sums[index] + result if index in sums else result
        grad_x = torch.cat(grad_chunks, ctx.dim) if grad_chunks else None
        return None, None, None, None, grad_x, *[sums.get(index + 1) for index in range(len(parameters))]


def autocast_now(device_type: str) -> AbstractContextManager[Any]:
    """Return a context that restores the current autocast state."""
    if not has_autocast(device_type) or not torch.is_autocast_enabled(device_type):
        return nullcontext()
    return torch.autocast(device_type, torch.get_autocast_dtype(device_type), cache_enabled=False)
