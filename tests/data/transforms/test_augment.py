import hashlib

import pytest
import torch
from torch import Tensor, nn

from revnet.data import make_augment
from revnet.data._random_keys import image_keys

SIZE = (4, 6)


def numbered(num_images: int) -> Tensor:
    """Return images with distinct, nonzero pixels, so that a crop reveals its position."""
    return torch.arange(1.0, 2 * 4 * 6 + 1).view(1, 2, 4, 6).repeat(num_images, 1, 1, 1)


def windows(image: Tensor, padding: int) -> list[Tensor]:
    padded = nn.functional.pad(image, (padding,) * 4)
    steps = range(2 * padding + 1)
    return [padded[:, top : top + SIZE[0], left : left + SIZE[1]] for top in steps for left in steps]


def matching_candidates(images: Tensor, candidates: list[Tensor]) -> list[int]:
    """Return the index of the candidate that each image equals; there must be exactly one."""
    table = torch.stack(candidates).flatten(1)
    matches = (images.flatten(1)[:, None] == table).all(2)
    assert matches.sum(1).eq(1).all()
    return matches.int().argmax(1).tolist()


def test_crops_are_the_windows_of_the_zero_padded_image() -> None:
    torch.manual_seed(0)
    images = numbered(400)
    output = make_augment(2, False, SIZE)(images)
    assert output.shape == images.shape
    assert output.dtype == images.dtype
    assert set(matching_candidates(output, windows(images[0], 2))) == set(range(25))


def test_flip_mirrors_about_half_of_the_images() -> None:
    torch.manual_seed(0)
    images = numbered(1000)
    flipped = sum(matching_candidates(make_augment(0, True, SIZE)(images), [images[0], images[0].flip(-1)]))
    assert abs(flipped - 500) < 80  # five standard deviations; the seed is fixed


def test_crop_and_flip_together() -> None:
    torch.manual_seed(0)
    images = numbered(600)
    crops = windows(images[0], 1)
    chosen = matching_candidates(make_augment(1, True, SIZE)(images), crops + [crop.flip(-1) for crop in crops])
    assert set(chosen) == set(range(18))


def test_cutout_comes_last() -> None:
    torch.manual_seed(0)
    images = numbered(200)
    crops = windows(images[0], 1)
    candidates = torch.stack(crops + [crop.flip(-1) for crop in crops])
    for output in make_augment(1, True, SIZE, cutout=3)(images):
        is_erased = (candidates != output) & (output == 0)
        matches = ((candidates == output) | is_erased).flatten(1).all(1)
        heights, widths = is_erased.any(3).any(1).sum(1), is_erased.any(2).any(1).sum(1)
        assert (matches & (heights <= 3) & (widths <= 3)).any()


def test_input_is_not_modified() -> None:
    images = numbered(8)
    before = images.clone()
    make_augment(1, True, SIZE, cutout=2)(images)
    assert torch.equal(images, before)


def test_draws_follow_the_seed() -> None:
    augment, images = make_augment(2, True, SIZE, cutout=2), numbered(50)
    torch.manual_seed(3)
    first, second = augment(images), augment(images)
    torch.manual_seed(3)
    assert torch.equal(make_augment(2, True, SIZE, cutout=2)(images), first)
    assert not torch.equal(first, second)


def test_draws_are_a_function_of_the_key() -> None:
    augment, images, keys = make_augment(2, True, SIZE, cutout=2), numbered(50), torch.arange(50)
    before = torch.get_rng_state()
    output = augment(images, keys)
    assert torch.equal(augment(images[20:30], keys[20:30]), output[20:30])
    assert torch.equal(augment(images, keys.flip(0)).flip(0), output)
    assert not torch.equal(augment(images, keys + 50), output)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_cutout_does_not_change_crops_and_flips() -> None:
    images, keys = numbered(50), torch.arange(50)
    plain, erased = make_augment(2, True, SIZE)(images, keys), make_augment(2, True, SIZE, cutout=2)(images, keys)
    assert torch.equal(erased.where(erased != 0, plain), plain)


def test_single_images_and_single_pixels() -> None:
    assert make_augment(2, True, SIZE)(numbered(1)).shape == (1, 2, 4, 6)
    assert make_augment(0, True, (1, 1))(torch.ones(3, 1, 1, 1)).shape == (3, 1, 1, 1)


def test_without_transforms_it_is_the_identity() -> None:
    augment, images = make_augment(0, False, SIZE), numbered(2)
    assert isinstance(augment, nn.Identity)
    assert augment(images) is images
    assert augment(images, torch.arange(2)) is images


def test_draws_never_change() -> None:
    # Accuracies can be reproduced only while a seed gives the same crops and flips.
    output = make_augment(2, True, SIZE)(numbered(100), image_keys(3, 0, torch.arange(100)))
    assert hashlib.sha256(output.numpy().tobytes()).hexdigest() == (
        "4a3027508b80d50cdf8f04ba42a5d4296a5b421178bafd3d4f763912bb64a90a"
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_keeps_dtype_and_layout(dtype: torch.dtype) -> None:
    output = make_augment(1, True, SIZE)(numbered(3).to(dtype))
    assert output.dtype == dtype
    assert output.is_contiguous()


def test_evaluation_mode_returns_the_batch_unchanged() -> None:
    images = numbered(4)
    assert make_augment(2, True, SIZE, cutout=2).eval()(images) is images


def test_has_no_state() -> None:
    augment = make_augment(2, True, SIZE)
    augment(numbered(4))
    assert augment.state_dict() == {}


@pytest.mark.gpu
def test_gpu_batches_use_the_same_draws() -> None:
    augment, images = make_augment(2, True, SIZE, cutout=2), numbered(50)
    torch.manual_seed(3)
    expected = augment(images)
    torch.manual_seed(3)
    assert torch.equal(augment(images.cuda()).cpu(), expected)


def test_rejects_bad_arguments() -> None:
    for padding in (-1, 4):
        with pytest.raises(
            ValueError, match=rf"`crop_padding` \(={padding}\) must be at least 0, and below .* pass 0 to leave"
        ):
            make_augment(padding, True, SIZE)
    with pytest.raises(ValueError, match=r"`image_size` \(=\(0, 4\)\) must be positive"):
        make_augment(1, True, (0, 4))
    for cutout in (-1, 4, 6):
        with pytest.raises(
            ValueError, match=rf"`cutout` \(={cutout}\) must be at least 0, and below .* pass 0 to leave"
        ):
            make_augment(1, True, SIZE, cutout=cutout)


def test_rejects_bad_batches() -> None:
    augment = make_augment(1, True, SIZE)
    with pytest.raises(TypeError, match=r"`images` \(=torch.uint8\) must be floating point; apply `Preprocess` first"):
        augment(numbered(2).to(torch.uint8))
    with pytest.raises(ValueError, match=r"must have the size \(4, 6\) of this augmentation"):
        augment(torch.zeros(2, 2, 6, 4))
    for keys in (torch.arange(3), torch.zeros(2), torch.zeros(2, 1, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"`keys` \(of shape .*\) must be int64 of shape \(2,\), one for each im"):
            augment(numbered(2), keys)
