"""Run a module on one chunk of its input at a time, in the forward and the backward pass.

References:
    Kitaev, Kaiser, Levskaya (2020), Reformer: The Efficient Transformer, section 3.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from revnet._checks import check_count, check_module, check_tensor, describe, is_integer
from revnet._torch_internals import (
    current_dispatch_mode,
    forward_mode_level,
    in_functorch_transform,
    is_jit_tracing,
    without_parametrization_cache,
)
from revnet._torch_release import has_autocast, is_exporting
from revnet.functional._module_state import ModuleState, check_graph, refuse_gradients, saves_as_usual


def chunked(module: nn.Module, x: Tensor, num_chunks: int, *, dim: int = 1) -> Tensor:
    """Compute `module(x)` in chunks along `dim`, so that its activations exist for one chunk at a time.

    The backward pass computes each chunk again from the stored `x`, which costs one more forward pass of the module.
    It uses the parameters, buffers and training flags of the forward pass. Under `torch.compile`, the transforms of
    `torch.func` and forward-mode differentiation the chunks use ordinary autograd. Exported and traced programs have no
    chunks.

    Args:
        module: A module that treats the positions along `dim` independently, draws no random numbers and keeps no
            state. If it computes with a tensor that requires a gradient, this must be its input, a parameter or a
            buffer.
        x: Input of the module.
        num_chunks: Number of chunks. There are fewer if `x` has fewer positions.
        dim: Dimension along which `x` is split.

    Returns:
        The value of `module(x)`, up to the rounding of kernels on different shapes.

    Raises:
        TypeError: `module` is not a module, `x` is not a tensor, or `dim` is not an integer.
        ValueError: `num_chunks` is not a positive integer, or `x` has no dimension `dim`.
        NotImplementedError: `module` computes with another tensor that requires a gradient, or writes to its input, a
            parameter or a buffer. Under a dispatch mode, such as the one of `Reverse(keep=...)`, the backward pass
            raises the error about the other tensor.
        ReconstructionError: In the backward pass, `module` has other submodules than in the forward pass.
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
        return result
    if torch.is_grad_enabled() and not _needs_ordinary_autograd():
        state = ModuleState(module)
        if x.requires_grad or any(tensor.requires_grad for tensor in state.tensors):
            result = _Chunked.apply(state, num_chunks, dim, x, *state.tensors)
            state.tensors.clear()  # The node saves them.
            return result
    return torch.cat([module(chunk) for chunk in x.chunk(num_chunks, dim)], dim)


def _needs_ordinary_autograd() -> bool:
    return torch.compiler.is_dynamo_compiling() or in_functorch_transform() or forward_mode_level() >= 0


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, state: ModuleState, num_chunks: int, dim: int, x: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(x, *tensors)
        ctx.state, ctx.num_chunks, ctx.dim = state, num_chunks, dim
        ctx.autocast = autocast_now(x.device.type)
        outputs = []
        with state.no_writes(x, tensors):
            if current_dispatch_mode() is not None:
                # The mode may keep the results of operators that require gradients: the activations of every chunk.
                with without_parametrization_cache():  # A tensor without a gradient must not enter it.
                    outputs += [state.module(chunk) for chunk in x.chunk(num_chunks, dim)]
            else:
                with saves_as_usual(), torch.enable_grad():
                    for chunk in x.chunk(num_chunks, dim):
                        y = state.module(chunk)
                        check_graph(y, (x, *tensors), state.module)
                        outputs.append(y.detach())
                        del y  # frees the activations
        state.check_same_tensors(tensors)
        return torch.cat(outputs, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        is_twice = torch.is_grad_enabled()  # a double backward: the chunks belong to the caller's graph
        state, (x, *tensors) = ctx.state, ctx.saved_tensors
        state.check_submodules()
        wanted = [index for index, needs in enumerate(ctx.needs_input_grad[3:]) if needs]
        grad_chunks: list[Tensor] = []
        sums: dict[int, Tensor] = {}
        for chunk, grad in zip(x.chunk(ctx.num_chunks, ctx.dim), grads[0].chunk(ctx.num_chunks, ctx.dim), strict=True):
            with torch.enable_grad(), ctx.autocast, state.no_writes(x, tensors):
                inputs = [chunk, *tensors]
                for index in wanted:  # New tensors: those of the caller may have hooks, or depend on one another.
                    tensor = inputs[index]
                    inputs[index] = tensor.view_as(tensor) if is_twice else tensor.detach().requires_grad_()
                y = state.run(inputs[0], inputs[1:])
            check_graph(y, inputs, state.module)
            leaves = [inputs[index] for index in wanted]
            results = torch.autograd.grad(y, leaves, grad, create_graph=is_twice, allow_unused=True)
            if not is_twice:
                refuse_gradients(leaves)
            for index, result in zip(wanted, results, strict=True):
                if index == 0:
                    grad_chunks.append(torch.zeros_like(chunk) if result is None else result)
                elif result is not None:
                    sums[index] = sums[index] + result if index in sums else result
        grad_x = torch.cat(grad_chunks, ctx.dim) if grad_chunks else None
        return None, None, None, grad_x, *[sums.get(index + 1) for index in range(len(tensors))]


def autocast_now(device_type: str) -> AbstractContextManager[Any]:
    """Return a context that restores the current autocast state."""
    if not has_autocast(device_type) or not torch.is_autocast_enabled(device_type):
        return nullcontext()
    return torch.autocast(device_type, torch.get_autocast_dtype(device_type), cache_enabled=False)
