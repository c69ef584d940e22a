import pytest
import torch

from revnet.functional import rotary_table, rotate


def test_rotates_pairs_by_their_position():
    """The reference multiplies complex numbers, with RoFormer's frequencies."""
    x = torch.randn(1, 2, 5, 6, dtype=torch.float64)
    y = rotate(x, rotary_table(5, 6, dtype=torch.float64))
    for position in range(5):
        for pair in range(3):
            angle = torch.tensor(position * 10_000 ** (-2 * pair / 6), dtype=torch.float64)
            turn = torch.polar(torch.ones_like(angle), angle)
            expected = torch.complex(x[..., position, pair], x[..., position, pair + 3]) * turn
            actual = torch.complex(y[..., position, pair], y[..., position, pair + 3])
            torch.testing.assert_close(actual, expected)


def test_products_depend_on_the_distance_alone():
    table = rotary_table(20, 8, dtype=torch.float64)
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64).expand(2, 1, 1, 20, 8)
    products = (rotate(q, table) @ rotate(k, table).mT)[0, 0]
    for distance in range(-19, 20):
        along = products.diagonal(distance)
        torch.testing.assert_close(along, along[:1].expand_as(along))


def test_low_precision_rotates_in_float32():
    x = torch.randn(1, 1, 300, 4).bfloat16()
    y = rotate(x, rotary_table(300, 4))
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, rotate(x.float(), rotary_table(300, 4)).bfloat16())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tables_in_low_precision_are_rounded(dtype):
    """Positions above 256 or 2048 have no number of their own in these types."""
    assert torch.equal(rotary_table(3000, 4, dtype=dtype), rotary_table(3000, 4).to(dtype))


def test_rejects_odd_heads_and_other_lengths():
    with pytest.raises(ValueError, match=r"`head_dim` \(=5\) must be even, since rotary positions rotate pairs"):
        rotary_table(3, 5)
    for head_dim in (5, 1):
        with pytest.raises(ValueError, match=rf"`head_dim` \(={head_dim}\) must be even"):
            rotate(torch.randn(1, 1, 3, head_dim), torch.zeros(2, 3, head_dim // 2))
    with pytest.raises(ValueError, match=r"`table` has shape \(2, 3, 2\), but must have \(2, 7, 2\); make it with"):
        rotate(torch.randn(1, 1, 7, 4), rotary_table(3, 4))
