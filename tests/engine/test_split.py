import pytest
import torch

from revnet.engine._split import split


def test_splits_along_any_dimension():
    x = torch.arange(24.0).view(2, 4, 3)
    x1, x2 = split(x, 1)
    assert torch.equal(torch.cat((x1, x2), 1), x)
    assert split(x, 0)[0].shape == (1, 4, 3)
    assert split(x.transpose(1, 2), -1)[1].shape == (2, 3, 2)


def test_parts_are_dense_and_keep_the_memory_format():
    x = torch.randn(2, 4, 3, 3)
    assert all(half.is_contiguous() for half in split(x, 1))
    x = x.to(memory_format=torch.channels_last)
    assert all(half.is_contiguous(memory_format=torch.channels_last) for half in split(x, 1))


def test_returns_a_pair_unchanged():
    x1, x2 = torch.randn(2, 3), torch.randn(2, 5)
    assert split((x1, x2), 1) == (x1, x2)
    assert split([x1, x2], 1) == (x1, x2)


@pytest.mark.parametrize(
    ("x", "dim", "error", "message"),
    [
        (
            torch.randn(2, 63),
            1,
            ValueError,
            r"`x` \(of shape .*\) has size 63 along `split_dim` \(=1\), .*must be even.*use 64 channels",
        ),
        (torch.randn(2, 4), 2, ValueError, r"`split_dim` \(=2\) must be a dimension of `x`, .*from -2 to 1"),
        (torch.randn(()), 1, ValueError, r"`split_dim` \(=1\) must be a dimension"),
        (
            torch.ones(2, 4, dtype=torch.int64),
            1,
            TypeError,
            r"`x` has dtype torch.int64, but a stream must be floating",
        ),
        ((torch.randn(2),), 0, TypeError, r"`x` \(=tuple of 1\) must be a tensor.* or a pair"),
        ("abc", 0, TypeError, r"`x` \(=str\) must be a tensor"),
        ((torch.randn(2), 3), 0, TypeError, r"`x2` \(=int\) must be a tensor"),
        ((torch.randn(2), torch.ones(2, dtype=torch.bool)), 0, TypeError, r"`x2` has dtype torch.bool"),
    ],
)
def test_rejects_wrong_inputs(x, dim, error, message):
    with pytest.raises(error, match=message):
        split(x, dim)
