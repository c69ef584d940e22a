"""Attention of every token to every other."""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from revnet._checks import check_bool, check_mask, check_per_head
from revnet._torch_internals import is_batched_gradient
from revnet.functional._context import autocast_now, check_same_dtype, is_transformed

_MOST_ROWS = 1024
"""Largest number of queries whose mask exists at a time, if it has numbers of documents."""


def full_attention(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = False, mask: Tensor | None = None) -> Tensor:
    """Compute the attention of every token to every other token with PyTorch's kernels.

    The cost grows with the square of the length. The products of queries and keys are stored only if there is a `mask`.
    If it has numbers of documents and more than 1,024 tokens, they exist for 1,024 queries at a time: the backward pass
    computes them again. A backward pass that creates a graph uses PyTorch's "math" kernel for these, which has second
    derivatives.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        is_causal: Whether a token sees only itself and earlier tokens.
        mask: Which tokens are real. A token that is not real is seen only by itself, and its output is meaningless.
            Integers are the numbers of documents, and 0 where a token is not real: a token sees only its own document.

    The queries may be the last T tokens of S, and several of their heads may share a head of the keys and values.

    Shape:
        q: (B, H, T, D); k, v: (B, G, S, D), where G divides H; mask: (B, S), bool or integers. Output: (B, H, T, D).

    Raises:
        TypeError: An argument is not of the type in the signature, or `q`, `k` and `v` are not floating-point, or have
            different data types while autocast is off.
        ValueError: The shapes do not fit each other, or there are more queries than keys with `is_causal` or a `mask`.

    References:
        Vaswani et al. (2017), Attention Is All You Need, section 3.2.1.
    """
    check_per_head(q=q, k=k, v=v)
    check_same_dtype(q=q, k=k, v=v)
    check_bool(is_causal=is_causal)
    check_mask(mask, (q.shape[0], k.shape[-2]), takes_documents=True)
    _check_shapes(q.shape, k.shape, v.shape, needs_positions=is_causal or mask is not None)
    T, S = q.shape[-2], k.shape[-2]
    if mask is None and (T == S or not is_causal):
        return _dot_product(q, k, v, is_causal=is_causal)
    if mask is None and T == 1:  # The last token sees all.
        return _dot_product(q, k, v)
    is_long = mask is not None and mask.dtype != torch.bool and T == S and T > _MOST_ROWS
    if is_long and not (torch.compiler.is_compiling() or is_transformed()):
        by_rows: Tensor = _AttentionByRows.apply(q, k, v, mask, is_causal)
        return by_rows
    return _attend(q, k, v, None if mask is None else mask[:, S - T :], mask, S - T, is_causal)


def _check_shapes(q: torch.Size, k: torch.Size, v: torch.Size, *, needs_positions: bool) -> None:
    if v[:3] != k[:3]:
        raise ValueError(f"`v` has shape {tuple(v)}, but must have the batch, heads and tokens of `k`, {tuple(k[:3])}.")
    if (q[0], q[3]) != (k[0], k[3]):
        raise ValueError(f"`k` has shape {tuple(k)}, but must have the batch and features of `q`, {tuple(q)}.")
    if q[1] % max(1, k[1]):
        raise ValueError(f"`k` has {k[1]} heads, which must divide the {q[1]} heads of `q`.")
    if needs_positions and q[2] > k[2]:
        raise ValueError(
            f"`q` has {q[2]} tokens, but `k` has only {k[2]}, of which the queries are the last ones; pass the keys of "
            "all of them."
        )


def _dot_product(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    if q.shape[1] != k.shape[1]:
        options["enable_gqa"] = True
    return F.scaled_dot_product_attention(q, k, v, **options)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, q_mask: Tensor | None, k_mask: Tensor | None, start: int, is_causal: bool
) -> Tensor:
    """Return the attention of the queries, of which the first has the position `start` among the keys.

    Without masks, it is causal.
    """
    shape = (q.shape[-2], k.shape[-2])
    if k_mask is None or q_mask is None:
        return _dot_product(q, k, v, attn_mask=torch.ones(shape, dtype=torch.bool, device=q.device).tril(start))
    seen = k_mask[:, None, None, :].bool()  # (B, 1, 1, S)
    if k_mask.dtype != torch.bool:
        seen = seen & (q_mask[:, None, :, None] == k_mask[:, None, None, :])
    if is_causal:
        seen = seen & torch.ones(shape, dtype=torch.bool, device=q.device).tril(start)
    # A token always sees itself, since the softmax over no keys is NaN.
    if start:
        itself = torch.ones(shape, dtype=torch.bool, device=q.device).tril(start).triu(start)
    else:
        itself = torch.eye(*shape, dtype=torch.bool, device=q.device)
    return _dot_product(q, k, v, attn_mask=seen | itself)


class _AttentionByRows(torch.autograd.Function):
    """Attention with a mask that exists for some queries at a time; the backward pass computes them again."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, is_causal: bool) -> Tensor:
        ctx.save_for_backward(q, k, v, mask)
        ctx.is_causal, ctx.autocast = is_causal, autocast_now(q.device.type)
        parts = [
            _attend(q[..., own, :], k[..., seen, :], v[..., seen, :], mask[:, own], mask[:, seen], own.start, is_causal)
            for own, seen in _rows(q.shape[-2], is_causal)
        ]
        return torch.cat(parts, -2)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        is_twice = torch.is_grad_enabled()  # a double backward: the parts belong to the caller's graph
        *tensors, mask = ctx.saved_tensors
        wanted = [index for index in range(3) if ctx.needs_input_grad[index]]
        # Keys and values have a gradient from each part, and many of them would vanish in low precision.
        wide = [
            tensor.dtype if index == 0 else torch.promote_types(tensor.dtype, torch.float32)
            for index, tensor in enumerate(tensors)
        ]
        sums = [torch.zeros_like(tensor, dtype=dtype) for tensor, dtype in zip(tensors, wide, strict=True)]
        sources = tensors
        if is_twice:  # Autograd adds the second derivatives, too.
            sources = [tensor.to(dtype) for tensor, dtype in zip(tensors, wide, strict=True)]
        for own, seen in _rows(tensors[0].shape[-2], ctx.is_causal):
            parts = (own, seen, seen)
            # Of PyTorch's kernels, only this one has second derivatives everywhere.
            kernel = sdpa_kernel(SDPBackend.MATH) if is_twice else nullcontext()
            with torch.enable_grad(), ctx.autocast, kernel:
                inputs = [
                    source[..., part, :].to(tensor.dtype)
                    for source, part, tensor in zip(sources, parts, tensors, strict=True)
                ]
                if not is_twice:
                    inputs = [tensor.detach().requires_grad_(index in wanted) for index, tensor in enumerate(inputs)]
                y = _attend(inputs[0], inputs[1], inputs[2], mask[:, own], mask[:, seen], own.start, ctx.is_causal)
            leaves = [inputs[index] for index in wanted]
            results = torch.autograd.grad(y, leaves, grads[0][..., own, :], create_graph=is_twice)
            for index, result in zip(wanted, results, strict=True):
                part, length = parts[index], sums[index].shape[-2]
                if is_twice or is_batched_gradient(result):
                    sums[index] = sums[index] + F.pad(result, (0, 0, part.start, length - part.stop))
                else:
                    sums[index][..., part, :] += result
        grads_of = [sums[index].to(tensors[index].dtype) if index in wanted else None for index in range(3)]
        return *grads_of, None, None


def _rows(length: int, is_causal: bool) -> Iterator[tuple[slice, slice]]:
    """Yield the queries of each part, and the keys that they may see."""
    for start in range(0, length, _MOST_ROWS):
        stop = min(start + _MOST_ROWS, length)
        yield slice(start, stop), slice(0, stop if is_causal else length)
