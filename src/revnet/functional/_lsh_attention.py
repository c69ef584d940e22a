"""Attention among tokens in the same bucket of locality-sensitive hashing.

Queries and keys are the same vectors, except that keys are normalized. Each round of hashing applies a random rotation
and puts vectors of similar direction into one bucket, which is likely to contain the keys with the largest scores.
Tokens are sorted by bucket and divided into chunks, and each token attends to its own chunk and the one before it.
Further rounds catch pairs that one round misses. With T tokens, chunks of a fixed size and a number of buckets
proportional to T, a round costs O(T log T).

This differs from the published code in order to be strictly causal. There, the chunk boundaries decide which earlier
tokens a token sees, and these depend on the number of *later* tokens in each bucket. Here a token sees the nearest
`2 * bucket_size` earlier tokens of its bucket, which are always in the two chunks, wherever the boundaries are.

B H T D: batch, heads, tokens, features of a head. C M: number of chunks, tokens per chunk.

References:
    Kitaev, Kaiser, Levskaya (2020), Reformer: The Efficient Transformer, section 2 and appendix A.
    Andoni et al. (2015), Practical and Optimal LSH for Angular Distance.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from revnet._checks import (
    MOST_LAYERS,
    check_bool,
    check_count,
    check_generator,
    check_mask,
    check_per_head,
    check_same_heads,
)
from revnet._torch_internals import is_jit_tracing, outside_of_traces
from revnet._torch_release import is_exporting
from revnet.functional._block_attention import block_attention

_MOST_BITS = 6
"""Largest number of bits of one hash. More buckets use several hashes, so the cost is logarithmic in their number."""


def lsh_attention(
    qk: Tensor,
    v: Tensor,
    *,
    bucket_size: int = 64,
    num_hashes: int = 4,
    max_length: int | None = None,
    is_causal: bool = False,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Compute the attention to the tokens that at least one round of hashing finds near.

    A token counts once, even if several rounds find it, which is the correction for duplicates of appendix A. A token
    sees itself only if it finds no other. The random rotations are the same for the whole batch. If one bucket holds
    all tokens, up to a `max_length` of about `1.4 * bucket_size`, no rotations are drawn and nothing is missed.

    With the same `max_length` and the same rotations, causal attention computes the same for the first tokens of a
    sequence, however many tokens follow, up to the rounding of matrix products of a different size.

    Args:
        qk: Queries, which are also the keys. As keys they are scaled to length sqrt(D).
        v: Values.
        bucket_size: Average number of tokens per bucket in a sequence of `max_length`. A chunk has twice this number.
        num_hashes: Number of hashing rounds.
        max_length: Number of tokens that the number of buckets is chosen for. The default is the number of tokens T,
            so that other tokens share a bucket in a longer sequence.
        is_causal: Whether a token sees only earlier tokens: the nearest `2 * bucket_size` of its bucket. Otherwise it
            sees the tokens of its bucket in its chunk and in the chunk before.
        mask: Which tokens are real. A token that is not real is not seen by real ones, and its output is meaningless.
        generator: Generator that draws the rotations on its own device. The default is PyTorch's global one.

    Shape:
        qk, v: (B, H, T, D); mask: (B, T), bool. Output: (B, H, T, D).

    Raises:
        TypeError: An argument is not of the type in the signature, or `qk` or `v` is not floating-point.
        ValueError: A count is not positive, or the shapes do not fit.

    Numerics:
        A token whose vector lies between two buckets may move to the other one by rounding, and then sees other tokens.
        If the vectors are rebuilt, use `FixedPoint`, which rebuilds them exactly. The result can be differentiated
        once. Differentiating the gradient raises `NotImplementedError`, except under the transforms of `torch.func` and
        in forward mode, which use ordinary autograd and store more.

    References:
        Kitaev, Kaiser, Levskaya (2020), Reformer: The Efficient Transformer, equations 2 to 7 and appendix A.
    """
    check_per_head(qk=qk, v=v)
    check_same_heads("v", v, qk, num_dims=3)
    check_count("bucket_size", bucket_size)
    check_count("num_hashes", num_hashes, most=MOST_LAYERS)
    if max_length is not None:
        check_count("max_length", max_length)
    check_bool(is_causal=is_causal)
    check_mask(mask, (qk.shape[0], qk.shape[-2]))
    check_generator(generator)
    T = qk.shape[-2]
    if T == 0:  # There are no buckets.
        return v + qk.sum().to(v.dtype)
    num_bits = max(0, round(math.log2((T if max_length is None else max_length) / bucket_size)))
    rounds = [
        _sort(buckets, min(2 * bucket_size, T), is_causal)
        for buckets in _hash(qk.detach(), num_bits, num_hashes if num_bits else 1, mask, generator)
    ]
    outputs, log_sums = zip(*[_attend(qk, v, rounds, index) for index in range(len(rounds))], strict=True)
    if len(rounds) == 1:
        return outputs[0]
    weights = torch.stack(log_sums).softmax(0).to(v.dtype)  # (rounds, B, H, T)
    return (torch.stack(outputs) * weights[..., None]).sum(0)


class _Round(NamedTuple):
    """One round of hashing. A place is an index in the sequence sorted by bucket."""

    order: Tensor
    """The token at each place, (B, H, T)."""
    place: Tensor
    """The place of each token, (B, H, T)."""
    first: Tensor
    """The first place that each token sees, (B, H, T)."""
    last: Tensor
    """The last place that each token sees, (B, H, T)."""
    chunk_size: int


def _hash(
    x: Tensor, num_bits: int, num_rounds: int, mask: Tensor | None, generator: torch.Generator | None
) -> list[Tensor]:
    """Return the bucket of each token in each round, (B, H, T). Masked tokens share a separate bucket."""
    B, H, T, D = x.shape
    buckets = torch.zeros(num_rounds, B, H, T, dtype=torch.int64, device=x.device)
    num_parts = -(-num_bits // _MOST_BITS)
    for part in range(num_parts):
        bits = num_bits // num_parts + (part < num_bits % num_parts)
        # Half of the 2^bits directions are the negatives of the other half: argmax([xR; -xR]).
        shape = (num_rounds, 1, H, D, 2**bits // 2)
        if generator is not None and (is_exporting() or is_jit_tracing()):
            # An exported program would draw others in its second call, or would not use the generator at all.
            with outside_of_traces():
                rotations = torch.randn(shape, generator=generator, device=generator.device)
        else:
            rotations = torch.randn(shape, generator=generator, device=generator.device if generator else x.device)
        rotated = x @ rotations.to(x)  # (num_rounds, B, H, T, 2^bits / 2)
        buckets = buckets * 2**bits + torch.cat((rotated, -rotated), dim=-1).argmax(-1)
    if mask is not None:
        buckets = buckets.masked_fill(~mask[:, None, :], 2**num_bits)
    return list(buckets)


def _sort(buckets: Tensor, chunk_size: int, is_causal: bool) -> _Round:
    """Sort tokens by bucket and position, and compute which places each token sees."""
    in_order, order = buckets.sort(dim=-1, stable=True)
    places = torch.arange(buckets.shape[-1], device=buckets.device).expand_as(order)
    first = torch.searchsorted(in_order, in_order)
    if is_causal:
        last, first = places, first.maximum(places - chunk_size)
    else:
        start = places - places % chunk_size
        last = (torch.searchsorted(in_order, in_order, right=True) - 1).minimum(start + chunk_size - 1)
        first = first.maximum(start - chunk_size)
    place = torch.empty_like(order).scatter_(-1, order, places)
    return _Round(order, place, first.gather(-1, place), last.gather(-1, place), chunk_size)


def _attend(qk: Tensor, v: Tensor, rounds: list[_Round], index: int) -> tuple[Tensor, Tensor]:
    """Return the attention in round `index` to tokens not seen in earlier rounds, and the logarithms of the sums."""
    current = rounds[index]
    T, D = qk.shape[-2:]
    M = current.chunk_size
    order = F.pad(current.order, (0, -T % M))  # (B, H, C * M)

    def sorted_chunks(x: Tensor) -> Tensor:
        at = order if x.dim() == 3 else order[..., None].expand(*order.shape, x.shape[-1])
        return x.gather(2, at).unflatten(2, (-1, M))  # (B, H, C, M, ...)

    q = sorted_chunks(qk)
    keys = q * torch.rsqrt(q.square().mean(-1, keepdim=True) + 1e-6)
    places = torch.arange(order.shape[-1], device=qk.device).expand_as(order).unflatten(2, (-1, M))
    unseen = ~_is_seen(places, sorted_chunks(current.first), sorted_chunks(current.last)) | (places >= T)[..., None]
    for earlier in rounds[:index]:
        unseen |= _is_seen(*map(sorted_chunks, (earlier.place, earlier.first, earlier.last)))

    y, log_sums = block_attention(
        q / math.sqrt(D), _with_previous(keys), _with_previous(sorted_chunks(v)), unseen, alone=M
    )  # (B, H, C, M, D), (B, H, C, M)
    place = current.place
    y = y.flatten(2, 3).gather(2, place[..., None].expand(*place.shape, y.shape[-1]))
    return y, log_sums.flatten(2).gather(2, place)


def _is_seen(place: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """Return which tokens of a chunk and the previous chunk each token of the chunk sees."""
    others = _with_previous(place[..., None], fill=-1).mT  # (B, H, C, 1, 2 * M)
    place, first, last = (places.int() for places in (others, first[..., None], last[..., None]))
    return (place >= first).logical_and_(place <= last)


def _with_previous(x: Tensor, fill: int = 0) -> Tensor:
    """Concatenate each chunk with the previous one: (B, H, C, M, D) becomes (B, H, C, 2 * M, D)."""
    previous = torch.cat((torch.full_like(x[:, :, :1], fill), x[:, :, :-1]), dim=2)
    return torch.cat((previous, x), dim=3)
