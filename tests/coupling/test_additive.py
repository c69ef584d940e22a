import pytest
import torch

from revnet.coupling._additive import additive, additive_inverse


def test_inverse_undoes_forward():
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
def test_rejects_a_wrong_residual(residual, error, message):
    for function in (additive, additive_inverse):
        with pytest.raises(error, match=message):
            function(torch.randn(3, 4), residual, "blocks.0.g")


def test_accepts_a_low_precision_residual():
    y = additive(torch.ones(2), torch.ones(2, dtype=torch.bfloat16))
    assert y.dtype is torch.float32
