import pytest
import torch

from revnet.functional import additive, additive_inverse, split


def test_split_takes_halves_along_any_dimension():
    x = torch.arange(24.0).view(2, 4, 3)
    x1, x2 = split(x, 1)
    assert torch.equal(torch.cat((x1, x2), 1), x)
    assert split(x, 0)[0].shape == (1, 4, 3)
    assert split(x.transpose(1, 2), -1)[1].shape == (2, 3, 2)


def test_halves_are_dense_and_keep_the_memory_format():
    x = torch.randn(2, 4, 3, 3)
    assert all(half.is_contiguous() for half in split(x, 1))
    x = x.to(memory_format=torch.channels_last)
    assert all(half.is_contiguous(memory_format=torch.channels_last) for half in split(x, 1))


def test_a_pair_is_taken_as_it_is():
    x1, x2 = torch.randn(2, 3), torch.randn(2, 5)
    assert split((x1, x2), 1) == (x1, x2)
    assert split([x1, x2], 1) == (x1, x2)


@pytest.mark.parametrize(
    ("x", "dim", "error", "message"),
    [
        (torch.randn(2, 63), 1, ValueError, r"`x` has size 63 along dimension 1 .*must be even.*use 64 channels"),
        (torch.randn(2, 4), 2, ValueError, r"`split_dim` \(=2\) must be a dimension of the input, .*from -2 to 1"),
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
def test_split_refuses(x, dim, error, message):
    with pytest.raises(error, match=message):
        split(x, dim)


def test_the_inverse_undoes_the_coupling():
    x, residual = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    y = additive(x, residual)
    torch.testing.assert_close(additive_inverse(y, residual), x, rtol=1e-14, atol=1e-14)
    before = y.clone()
    result = additive_inverse(y, residual, in_place=True)
    assert result.data_ptr() == y.data_ptr()
    assert torch.equal(result, before - residual)


@pytest.mark.parametrize(
    ("residual", "error", "message"),
    [
        (
            torch.randn(3, 1),
            ValueError,
            r"`blocks\.0\.g` returned shape \(3, 1\), but must .* \(3, 4\).*not reversible",
        ),
        (torch.randn(3, 4, dtype=torch.float64), TypeError, r"`blocks\.0\.g` returned torch.float64, .*torch.float32"),
        (None, TypeError, r"`blocks\.0\.g` returned NoneType, but must return one tensor"),
        ((torch.randn(3, 4), 1), TypeError, r"returned tuple of 2"),
    ],
)
def test_a_residual_that_does_not_fit(residual, error, message):
    for function in (additive, additive_inverse):
        with pytest.raises(error, match=message):
            function(torch.randn(3, 4), residual, "blocks.0.g")


def test_a_low_precision_residual_fits_a_float32_stream():
    y = additive(torch.ones(2), torch.ones(2, dtype=torch.bfloat16))
    assert y.dtype is torch.float32
