"""Run a module on one chunk of its input at a time, in the forward and the backward pass.

References:
    Kitaev, Kaiser, Levskaya (2020), Reformer: The Efficient Transformer, section 3.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from revnet._checks import check_count, check_module, check_tensor, describe, is_integer
from revnet._torch_internals import (
    current_dispatch_mode,
    is_batched_gradient,
    is_jit_tracing,
    without_parametrization_cache,
)
from revnet._torch_release import is_exporting
from revnet.functional._context import autocast_now, is_transformed
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

    Numerics:
        The gradients of parameters and buffers are summed over the chunks in float32 or more. Where the chunks use
        ordinary autograd, this takes a copy of the parameters in low precision for each of them.
    """
    check_module("module", module, hint="wrap the function in a module")
    check_tensor("x", x)
    check_count("num_chunks", num_chunks)
    if not is_integer(dim):
        raise TypeError(f"`dim` (={describe(dim)}) must be an integer, the dimension along which `x` is split.")
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"`dim` (={describe(dim)}) must be a dimension of `x`, which has shape {tuple(x.shape)}.")
    is_compiling = torch.compiler.is_dynamo_compiling()
    # A program in a file has no fixed number of positions.
    if num_chunks == 1 or is_exporting() or (not is_compiling and is_jit_tracing()):
        result: Tensor = module(x)
        return result
    if torch.is_grad_enabled() and not (is_compiling or is_transformed()):
        state = ModuleState(module)
        if x.requires_grad or any(tensor.requires_grad for tensor in state.tensors):
            result = _Chunked.apply(state, num_chunks, dim, x, *state.tensors)
            state.tensors.clear()  # The node saves them.
            return result
    return torch.cat(_outputs(module, x.chunk(num_chunks, dim)), dim)


def _outputs(module: nn.Module, chunks: Sequence[Tensor]) -> list[Tensor]:
    """Return the outputs of the chunks, whose graph adds the gradients of the chunks in float32 or more."""
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    low = {
        name: tensor for name, tensor in named.items() if tensor.requires_grad and _sum_dtype(tensor) != tensor.dtype
    }
    if not low or not torch.is_grad_enabled():
        return [module(chunk) for chunk in chunks]
    # Each chunk gets a rounded copy of its own, so that the gradients meet in the wide tensor.
    wide = {name: tensor.to(_sum_dtype(tensor)) for name, tensor in low.items()}
    return [
        functional_call(module, {name: wide[name].to(tensor.dtype) for name, tensor in low.items()}, (chunk,))
        for chunk in chunks
    ]


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, state: ModuleState, num_chunks: int, dim: int, x: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(x, *tensors)
        ctx.state, ctx.num_chunks, ctx.dim = state, num_chunks, dim
        ctx.autocast = autocast_now(x.device.type)
        outputs = []
        is_dispatched, has_graph = current_dispatch_mode() is not None, False
        with state.no_writes(x, tensors):
            if is_dispatched:
                # The mode may keep the results of operators that require gradients: the activations of every chunk.
                with without_parametrization_cache():  # A tensor without a gradient must not enter it.
                    outputs += [state.module(chunk) for chunk in x.chunk(num_chunks, dim)]
            else:
                with saves_as_usual(), torch.enable_grad():
                    for chunk in x.chunk(num_chunks, dim):
                        y = state.module(chunk)
                        check_graph(y, (x, *tensors), state.module)
                        has_graph |= y.requires_grad
                        outputs.append(y.detach())
                        del y  # frees the activations
        state.check_same_tensors(tensors)
        result = torch.cat(outputs, dim)
        if not (has_graph or is_dispatched):  # In a dispatch mode, it is unknown until the backward pass.
            ctx.mark_non_differentiable(result)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        is_twice = torch.is_grad_enabled()  # a double backward: the chunks belong to the caller's graph
        state, (x, *tensors) = ctx.state, ctx.saved_tensors
        state.check_submodules()
        wanted = [index for index, needs in enumerate(ctx.needs_input_grad[3:]) if needs]
        grad_chunks: list[Tensor] = []
        sums: dict[int, Tensor] = {}
        sources = {index: tensors[index - 1] for index in wanted if index > 0}
        if is_twice:  # Autograd adds the second derivatives, too.
            sources = {index: tensor.to(_sum_dtype(tensor)) for index, tensor in sources.items()}
        for chunk, grad in zip(x.chunk(ctx.num_chunks, ctx.dim), grads[0].chunk(ctx.num_chunks, ctx.dim), strict=True):
            with torch.enable_grad(), ctx.autocast, state.no_writes(x, tensors):
                inputs = [chunk, *tensors]
                for index in wanted:  # New tensors: those of the caller may have hooks, or depend on one another.
                    copy = sources.get(index, chunk).to(inputs[index].dtype)
                    inputs[index] = copy.view_as(copy) if is_twice else copy.detach().requires_grad_()
                y = state.run(inputs[0], inputs[1:])
            check_graph(y, inputs, state.module)
            leaves = [inputs[index] for index in wanted]
            results: Sequence[Tensor | None] = [None] * len(leaves)
            if y.requires_grad:
                results = torch.autograd.grad(y, leaves, grad, create_graph=is_twice, allow_unused=True)
            if not is_twice:
                refuse_gradients(leaves)
            for index, result in zip(wanted, results, strict=True):
                if index == 0:
                    grad_chunks.append(torch.zeros_like(chunk) if result is None else result)
                elif result is not None:
                    sums[index] = _added(sums.get(index), result)
        grad_x = torch.cat(grad_chunks, ctx.dim) if grad_chunks else None
        # Taken out one by one: each sum is freed once it is rounded.
        totals = [
            sums.pop(index + 1).to(each.dtype) if index + 1 in sums else None for index, each in enumerate(tensors)
        ]
        return None, None, None, grad_x, *totals


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    """Return the data type in which gradients of `tensor` are summed: many of them would vanish in lower precision."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _added(total: Tensor | None, gradient: Tensor) -> Tensor:
    if total is None:
        return gradient.to(_sum_dtype(gradient))
    is_own = total.dtype != gradient.dtype  # It is the copy above.
    may_overwrite = is_own and not (torch.is_grad_enabled() or is_batched_gradient(gradient))
    return total.add_(gradient) if may_overwrite else total + gradient
