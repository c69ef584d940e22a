"""Let the losses of a model work on some rows of logits at a time, or on all of them."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from revnet._checks import check_module
from revnet.nn._cross_entropy_head import cross_entropy_heads


def check_has_head(model: nn.Module) -> None:
    """Raise unless `model` has a layer whose loss can be chunked."""
    check_module("model", model)
    if not cross_entropy_heads(model):
        raise ValueError(
            f"`model` (={type(model).__name__}) has no `revnet.nn.CrossEntropyHead`, whose loss `chunked_loss` is "
            "about; end the model with one, or leave `chunked_loss` out."
        )


def chunk_loss(model: nn.Module, is_chunked: bool) -> None:
    """Set whether the losses of `model` are chunked."""
    for head in cross_entropy_heads(model):
        head.is_chunked = is_chunked


@contextmanager
def chunking_loss(model: nn.Module, is_chunked: bool | None) -> Iterator[None]:
    """Set whether the losses of `model` are chunked, and restore it on exit; None leaves it."""
    before = [(head, head.is_chunked) for head in cross_entropy_heads(model)]
    if is_chunked is not None:
        chunk_loss(model, is_chunked)
    try:
        yield
    finally:
        for head, value in before:
            head.is_chunked = value
