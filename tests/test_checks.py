"""The error messages for wrong arguments."""

import pytest
import torch
from torch import nn

from revnet import FixedPoint, ReversibleBlock, ReversibleSequential, set_policy, set_tolerance
from revnet._checks import describe
from revnet.functional._chunked import chunked
from revnet.nn import ChannelPermutation, HaarWavelet, InvertibleConv1x1
from tests.helpers import mlp


def sequence():
    return ReversibleSequential(ReversibleBlock(mlp(2), mlp(2)))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("x", "'x'"),
        (torch.zeros(2, 3), "a tensor of shape (2, 3)"),
        (nn.Sequential(nn.ReLU(), nn.ReLU()), "Sequential"),
        (list(range(100)), "[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16..."),
        ("a\nb" * 2, r"'a\nba\nb'"),
        (10**5000, "<int>"),
    ],
    ids=["string", "tensor", "module", "list", "lines", "integer"],
)
def test_describe_returns_one_short_line(value, words):
    assert describe(value) == words
    assert len(words) <= 60


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: FixedPoint(is_wide="no"), TypeError, "`is_wide` (='no') must be True or False."),
        (lambda: set_policy(3, "store"), TypeError, "`model` (=3) must be an nn.Module; pass a model."),
        (
            lambda: set_tolerance(sequence(), nn.ReLU()),
            ValueError,
            "`tolerance` (=ReLU) must be a relative error between 0 and 1, such as 1e-3, or None.",
        ),
        (
            lambda: chunked(3, torch.ones(1, 2), 2),
            TypeError,
            "`module` (=3) must be an nn.Module; wrap the function in a module.",
        ),
        (
            lambda: ChannelPermutation(4, order=3),
            TypeError,
            "`order` (=3) must be a sequence of integers, the channels in their new order; pass None for a random "
            "order.",
        ),
        (
            lambda: HaarWavelet()("x"),
            TypeError,
            "`x` (='x') must be a tensor; convert it with `torch.as_tensor`.",
        ),
        (
            lambda: HaarWavelet()(torch.ones(1, 1, 2, 2, dtype=torch.uint8)),
            TypeError,
            "`x` has dtype torch.uint8, but must be floating-point; pass `x.float()`.",
        ),
        (
            lambda: InvertibleConv1x1(10**9),
            ValueError,
            "`num_channels` (=1000000000) must be at most 32,768.",
        ),
    ],
)
def test_message_has_name_value_rule_and_remedy(call, error, message):
    with pytest.raises(error) as raised:
        call()
    assert str(raised.value) == message


def test_rejected_tolerance_changes_nothing():
    """Assigning a module would make it a child of the sequence."""
    model = sequence()
    with pytest.raises(ValueError, match="`tolerance`"):
        set_tolerance(model, nn.ReLU())
    assert [name for name, _ in model.named_children()] == ["blocks"]
    assert model.tolerance is None
