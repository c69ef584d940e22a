import pytest
import torch

from revnet.data import Dequantize, load_dataset
from revnet.data.transforms.dequantize import count_levels


def spread(levels, num_levels):
    """Return levels as pixels, 0 to 255."""
    return levels.mul(255 / (num_levels - 1)).round().to(torch.uint8)


@pytest.mark.parametrize("num_levels", [2, 3, 17, 100, 255, 256])
def test_every_level_falls_into_its_cell_and_is_recovered(num_levels):
    levels = torch.arange(num_levels).float()
    images = spread(levels, num_levels)
    dequantize = Dequantize(num_levels)
    for seed in range(20):
        x = dequantize(images, torch.Generator().manual_seed(seed))
        assert torch.equal((x * num_levels).floor(), levels)
        assert torch.equal(dequantize.inverse(x), images)


def test_the_noise_fills_the_cell_evenly():
    x = Dequantize(4)(torch.full((100_000,), 85, dtype=torch.uint8))  # level 1 of 0..3
    assert 0.25 <= x.min() < x.max() < 0.5
    shares = torch.histc(x, bins=10, min=0.25, max=0.5) / len(x)
    assert (shares - 0.1).abs().max() < 0.005, "five standard deviations of a share"


def test_numbers_stay_below_one_and_in_the_highest_cell():
    x = Dequantize(256)(torch.full((1_000_000,), 255, dtype=torch.uint8))
    assert x.max() < 1
    assert x.min() >= 255 / 256


def test_the_noise_comes_from_the_generator_or_the_global_state():
    images = torch.zeros(5, dtype=torch.uint8)
    draws = [Dequantize()(images, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*draws)
    torch.manual_seed(3)
    assert torch.equal(Dequantize()(images), draws[0])


def test_the_noise_is_a_function_of_the_key():
    images, keys = torch.zeros(6, 3, 4, 5, dtype=torch.uint8), torch.arange(6)
    state = torch.get_rng_state()
    x = Dequantize()(images, keys=keys)
    assert torch.equal(Dequantize()(images[2:5], keys=keys[2:5]), x[2:5])
    assert len(x.unique()) == x.numel(), "every pixel has its own noise"
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match=r"`generator` and `keys` each determine the noise; pass one of them"):
        Dequantize()(images, torch.Generator(), keys=keys)
    with pytest.raises(ValueError, match=r"`keys` \(of shape \(5,\), torch.int64\) must be int64 of shape \(6,\)"):
        Dequantize()(images, keys=keys[:5])


def test_numbers_outside_the_range_get_the_nearest_level():
    pixels = Dequantize(17).inverse(torch.tensor([-3.0, -0.001, 0.0, 1.0, 7.0]))
    assert pixels.tolist() == [0, 0, 0, 255, 255]


def test_digits_have_17_levels():
    assert count_levels(load_dataset("digits").train.images) == 17


@pytest.mark.parametrize(
    ("values", "num_levels"), [([0, 255], 2), ([0, 127, 255], 256), ([0, 128, 255], 3), ([7], 256), ([3, 9], 256)]
)
def test_only_levels_on_an_even_scale_are_counted(values, num_levels):
    assert count_levels(torch.tensor(values, dtype=torch.uint8)) == num_levels


def test_the_likelihood_with_noise_bounds_the_likelihood_of_the_bytes():
    # For a density that is constant in each cell, the bound is tight: P(k) = p(x) / K.
    num_levels, levels = 4, torch.arange(4)
    probabilities = torch.tensor([0.1, 0.2, 0.3, 0.4])
    x = Dequantize(num_levels)(spread(levels.float(), num_levels))
    log_density = (probabilities * num_levels)[(x * num_levels).long()].log()
    torch.testing.assert_close(log_density - torch.tensor(4.0).log(), probabilities.log())


@pytest.mark.parametrize("num_levels", [1, 257])
def test_rejects_a_bad_number_of_levels(num_levels):
    with pytest.raises(ValueError, match=rf"`num_levels` \(={num_levels}\) must be from 2 to 256"):
        Dequantize(num_levels)


def test_rejects_floats():
    with pytest.raises(TypeError, match=r"`images` \(=torch.float32\) must be uint8 pixels"):
        Dequantize()(torch.zeros(3))
