"""Attention to near tokens individually, and to far tokens in groups that grow with the distance: O(T) for T tokens.

The sequence is divided into blocks. Every token attends to all tokens in its own block and in the neighboring blocks.
Then pairs of neighboring tokens are merged, and the same step runs on the coarser sequence, between blocks that were
not neighbors before. This repeats until all blocks are neighbors. Each level has half the tokens of the level before
it, so all levels together cost at most twice as much as the first.

In the attention matrix, level l fills the blocks next to the diagonal, which are twice the size of level l - 1, except
for the quadrant nearest to the diagonal, which level l - 1 fills. The key and the value of a group are means over its
tokens, weighted by the number of tokens. In an encoder the query is a mean too. In a causal model a mean would pass
information from later tokens to earlier ones, so the first query of a group represents the group, as in the authors'
code (google/flaxformer, h_transformer).

B H T D: batch, heads, tokens, features of a head. C N: number of blocks, tokens per block.

References:
    Zhu, Soricut (2021), H-Transformer-1D: Fast One-Dimensional Hierarchical Attention for Sequences, section 6.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from revnet._checks import check_block_size, check_bool, check_mask, check_per_head, check_same_heads
from revnet.functional._block_attention import UNSEEN, add_logarithms, block_attention


def hierarchical_attention(
    q: Tensor, k: Tensor, v: Tensor, *, block_size: int = 64, is_causal: bool = False, mask: Tensor | None = None
) -> Tensor:
    """Compute the attention to near tokens individually, and to far tokens in groups.

    Up to `2 * block_size` tokens there is one level, and the result is full attention.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        block_size: Tokens per block on every level, an even number. The paper calls it N_r.
        is_causal: Whether a token sees only itself and earlier tokens.
        mask: Which tokens are real. A token that is not real counts in no group, and its output is meaningless.

    Shape:
        q, k, v: (B, H, T, D); mask: (B, T), bool. Output: (B, H, T, D).

    Raises:
        TypeError: An argument is not of the type in the signature, or `q`, `k` or `v` is not floating-point.
        ValueError: `block_size` is not a positive even number, or the shapes do not fit.

    Numerics:
        The result can be differentiated once. Differentiating the gradient raises `NotImplementedError`, except under
        the transforms of `torch.func` and in forward mode, which use ordinary autograd and store more.

    References:
        Zhu, Soricut (2021), H-Transformer-1D: Fast One-Dimensional Hierarchical Attention for Sequences, section 6.
    """
    check_per_head(q=q, k=k, v=v)
    check_same_heads("k", k, q)
    check_same_heads("v", v, q, num_dims=3)
    check_block_size(block_size)
    check_bool(is_causal=is_causal)
    check_mask(mask, (q.shape[0], q.shape[-2]))
    real = torch.ones(1, q.shape[-2], device=q.device) if mask is None else mask
    counts = real[:, None, :].to(torch.promote_types(q.dtype, torch.float32))
    levels = [_attend(q, k, v, counts, block_size, is_causal=is_causal, is_finest=True)]
    while q.shape[-2] > 2 * block_size:
        q, k, v, counts = _coarsen(q, k, v, counts, is_causal=is_causal)
        levels.append(_attend(q, k, v, counts, block_size, is_causal=is_causal, is_finest=False))
    y, log_sums = levels.pop()
    while levels:
        finer_y, finer_log_sums = levels.pop()
        T = finer_log_sums.shape[-1]
        y, log_sums = y.repeat_interleave(2, dim=2)[:, :, :T], log_sums.repeat_interleave(2, dim=2)[:, :, :T]
        total = add_logarithms(log_sums, finer_log_sums)
        weight, finer_weight = ((sums - total).exp().to(y.dtype)[..., None] for sums in (log_sums, finer_log_sums))
        y, log_sums = weight * y + finer_weight * finer_y, total
    return y


def _attend(
    q: Tensor, k: Tensor, v: Tensor, counts: Tensor, block_size: int, *, is_causal: bool, is_finest: bool
) -> tuple[Tensor, Tensor]:
    """Return the attention between neighboring blocks of one level, and the logarithms of the softmax sums."""
    T, D = q.shape[-2:]
    offsets = [-1, 0, 1] if is_finest else [-1, 1]
    if is_causal:
        offsets.remove(1)
    padding = -T % block_size
    q, k, v = (F.pad(x, (0, 0, 0, padding)).unflatten(2, (-1, block_size)) for x in (q, k, v))  # (B, H, C, N, D)
    # A group counts once per token: the logarithm of the number of tokens is added to its score.
    log_counts = F.pad(counts.log().clamp(min=UNSEEN), (0, padding), value=UNSEEN)
    log_counts = log_counts.unflatten(2, (-1, 1, block_size))  # (B, 1, C, 1, N)

    keys, values = (torch.cat([_shifted(x, offset) for offset in offsets], dim=3) for x in (k, v))
    bias = torch.cat([_shifted(log_counts, offset, fill=UNSEEN) for offset in offsets], dim=4)
    seen = torch.cat([_seen(block_size, offset, is_causal, is_finest, q.device) for offset in offsets], dim=1)
    y, log_sums = block_attention(q / math.sqrt(D), keys, values, ~seen, bias=bias)
    return y.flatten(2, 3)[:, :, :T], log_sums.flatten(2)[:, :, :T]


def _seen(block_size: int, offset: int, is_causal: bool, is_finest: bool, device: torch.device) -> Tensor:
    """Return which tokens of the block at `offset` each token of a block sees on this level, (N, N)."""
    seen = torch.ones(block_size, block_size, dtype=torch.bool, device=device)
    half = block_size // 2
    if offset == 0 and is_causal:
        seen = seen.tril()
    elif not is_finest and offset == -1:
        seen[:half, half:] = False  # neighbors on the finer level
    elif not is_finest:
        seen[half:, :half] = False
    return seen


def _shifted(blocks: Tensor, offset: int, fill: float = 0.0) -> Tensor:
    """Shift blocks, (B, H, C, ...), so that block c becomes block c + `offset`."""
    if offset == 0:
        return blocks
    edge = torch.full_like(blocks[:, :, :1], fill)
    return torch.cat((edge, blocks[:, :, :-1]) if offset < 0 else (blocks[:, :, 1:], edge), dim=2)


def _coarsen(
    q: Tensor, k: Tensor, v: Tensor, counts: Tensor, *, is_causal: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Merge pairs of tokens into means over their real tokens, and return the numbers of real tokens too."""
    odd = q.shape[-2] % 2
    q, k, v = (F.pad(x, (0, 0, 0, odd)).unflatten(2, (-1, 2)) for x in (q, k, v))  # (B, H, T / 2, 2, D)
    pairs = F.pad(counts, (0, odd)).unflatten(2, (-1, 2))
    counts = pairs.sum(-1)
    shares = (pairs / counts.clamp(min=1)[..., None])[..., None].to(q.dtype)
    first_real = torch.where(pairs[..., :1] > 0, q[..., 0, :], q[..., 1, :])
    return first_real if is_causal else (q * shares).sum(3), (k * shares).sum(3), (v * shares).sum(3), counts
