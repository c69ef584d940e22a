"""Move padding to the end of each row, where a causal model does not see it.

B T: batch and length of the tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TokenOrder:
    """An order of the tokens in each row that has the real tokens first."""

    order: Tensor
    """(B, T) Place of each token before the move."""

    def move(self, x: Tensor) -> Tensor:
        """Return `x`, (B, T, ...), with the real tokens of each row first."""
        return _take(x, self.order)

    def move_back(self, x: Tensor) -> Tensor:
        """Undo `move`."""
        return _take(x, self.order.argsort(dim=1))


def find_positions(attention_mask: Tensor, position_ids: Tensor | None, num_new: int) -> tuple[Tensor, Tensor] | None:
    """Return which tokens are real, and the positions of the new ones; None if all tokens are real.

    Args:
        attention_mask: (B, P + T), 1 where a token is real and 0 where it is padding, for P tokens in a cache and T new
            ones.
        position_ids: (B, T) or (1, T), as in `find_order`. After tokens in a cache, they must go on where these end.
        num_new: T.

    Returns:
        A mask, (B, P + T), and positions, (B, T).

    Raises:
        ValueError: The mask has other values.
        NotImplementedError: The positions of a row do not count up by one, or do not follow the ones in the cache.
    """
    mask = attention_mask != 0
    shape = len(mask), num_new
    new = mask[:, -num_new:]
    facts = [mask.all(), ((attention_mask == 0) | (attention_mask == 1)).all()]
    if position_ids is not None:
        order = torch.argsort((~new).to(torch.uint8), dim=1, stable=True)
        facts.append(_count_up(position_ids, new, order, shape))
        if mask.shape[1] > num_new:
            facts.append(((position_ids == _positions(mask, num_new)) | ~new).all())
    are_all_real, is_valid, *are_valid = torch.stack([fact.to(mask.device) for fact in facts]).tolist()
    _check_facts(is_valid, all(are_valid[:1]))
    if not all(are_valid[1:]):
        raise NotImplementedError(
            "`position_ids` must go on where the tokens in `past_key_values` end, counted over the real tokens of "
            "`attention_mask`; leave `position_ids` out."
        )
    return None if are_all_real else (mask, _positions(mask, num_new))


def _positions(mask: Tensor, num_new: int) -> Tensor:
    """Return the positions of the last `num_new` tokens, counted over the real tokens of each row."""
    return (mask.cumsum(1) - 1).clamp(min=0)[:, -num_new:]


def find_order(attention_mask: Tensor | None, position_ids: Tensor | None, shape: tuple[int, int]) -> TokenOrder | None:
    """Return how to move the padding behind the real tokens; None if it is there already.

    Args:
        attention_mask: (B, T), 1 where a token is real and 0 where it is padding.
        position_ids: (B, T) or (1, T). Rotary positions only depend on differences, so a common offset does not matter.
        shape: (B, T).

    Raises:
        ValueError: The mask or the positions have another shape or other values.
        NotImplementedError: The mask is not (B, T), or the positions of a row do not count up by one.
    """
    if attention_mask is None and position_ids is None:
        return None
    mask = None if attention_mask is None else check_padding_mask(attention_mask, shape)
    order = None if mask is None else torch.argsort((~mask).to(torch.uint8), dim=1, stable=True)
    if torch.compiler.is_compiling():  # Values would break the graph.
        return None if order is None else TokenOrder(order)
    # One transfer from the device for all questions about values.
    facts = [torch.ones((), dtype=torch.bool) if mask is None else (mask[:, 1:] <= mask[:, :-1]).all()]
    if attention_mask is not None:
        facts.append(((attention_mask == 0) | (attention_mask == 1)).all())
    if position_ids is not None:
        facts.append(_count_up(position_ids, mask, order, shape))
    is_at_end, *are_valid = torch.stack([fact.to(facts[-1].device) for fact in facts]).tolist()
    is_mask_valid = attention_mask is None or are_valid.pop(0)
    _check_facts(is_mask_valid, not are_valid or are_valid.pop())
    return None if is_at_end or order is None else TokenOrder(order)


def _check_facts(is_mask_valid: bool, do_count_up: bool) -> None:
    if not is_mask_valid:
        raise ValueError("`attention_mask` has other values than 0 and 1, 1 where a token is real.")
    if not do_count_up:
        raise NotImplementedError(
            "`position_ids` must count up by one over the real tokens of a row; sequences that are packed into one row "
            "would see each other, so pad them instead."
        )


def check_padding_mask(mask: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return whether each token is real.

    Raises:
        ValueError: The mask has another shape.
        NotImplementedError: The mask is not (B, T).
    """
    if mask.dim() != 2:
        raise NotImplementedError(
            f"`attention_mask` has shape {tuple(mask.shape)}, but must have {shape}, (B, T); other masks than padding "
            "are not supported."
        )
    if mask.shape != shape:
        raise ValueError(f"`attention_mask` has shape {tuple(mask.shape)}, but must have {shape}, as the tokens.")
    return mask != 0


def _count_up(position_ids: Tensor, mask: Tensor | None, order: Tensor | None, shape: tuple[int, int]) -> Tensor:
    if position_ids.dim() != 2 or position_ids.shape[1] != shape[1] or position_ids.shape[0] not in (1, shape[0]):
        raise ValueError(
            f"`position_ids` has shape {tuple(position_ids.shape)}, but must have {shape} or {(1, shape[1])}."
        )
    position_ids = position_ids.expand(shape)
    if mask is None or order is None:
        return (position_ids.diff(dim=1) == 1).all()
    is_pair_real = mask.gather(1, order)[:, 1:]
    return ((position_ids.gather(1, order).diff(dim=1) == 1) | ~is_pair_real).all()


def _take(x: Tensor, order: Tensor) -> Tensor:
    return x.gather(1, order if x.dim() == 2 else order[..., None].expand(*order.shape, x.shape[-1]))
