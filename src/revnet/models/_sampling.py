"""Sample the tokens that continue a sequence."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from revnet._checks import check_count, describe, is_number

_MOST_NEW = 1_000_000
"""Largest number of tokens that one call generates."""
_SMALL = 1e-6
"""Temperature below which a quotient could be infinite, so that the largest logit is moved to 0 first."""
_LEAST = torch.finfo(torch.float32).tiny
"""Least temperature, which float32 can hold."""


def check_sampling(num_new: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise an error unless the arguments of `generate` are valid."""
    check_count("num_new", num_new, least=0, most=_MOST_NEW)
    if not is_number(temperature) or temperature < 0:
        raise ValueError(
            f"`temperature` (={describe(temperature)}) must be positive and finite, or 0 for the most likely token."
        )
    if top_k is not None:
        check_count("top_k", top_k)
    if top_p is not None and not (is_number(top_p) and 0 < top_p <= 1):
        raise ValueError(f"`top_p` (={describe(top_p)}) must be above 0 and at most 1, which keeps all tokens.")


def draw_tokens(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Tensor:
    """Draw a token for each row of the logits, (B, vocab_size), and return them, (B, 1)."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    if temperature < _SMALL:
        logits, temperature = logits - logits.amax(-1, keepdim=True), max(temperature, _LEAST)
    values, order = (logits / temperature).sort(-1, descending=True)
    if top_k is not None:
        values[:, top_k:] = -math.inf
    probabilities = values.softmax(-1)
    if top_p is not None and top_p < 1:  # At 1, the rounding of the sum would drop tokens.
        # The token that reaches the sum is kept, so the most likely token is always kept.
        sum_before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(sum_before >= top_p, 0)
    try:
        return order.gather(-1, torch.multinomial(probabilities, 1, generator=generator))
    except RuntimeError:
        if bool(probabilities.isfinite().all()):
            raise
        raise ValueError(
            "the model computed logits that are NaN or infinite, so no token can be drawn; its weights have diverged, "
            "or its precision is too low."
        ) from None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set all modules to evaluation mode, and restore the mode of each module on exit."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
