import pytest
import torch

from revnet.training import TrainConfig
from revnet.training.classification.mixing import Mix, make_mix


@pytest.fixture
def batch():
    """Images whose pixels are their number, each with a class of its own."""
    images = torch.arange(4.0)[:, None, None, None].expand(4, 1, 8, 8).contiguous()
    return images, torch.arange(4)


def test_blends_each_image_with_its_neighbor(batch):
    images, targets = Mix(4, mixup=0.4, cutmix=0)(*batch)
    share = targets[1, 1]
    torch.testing.assert_close(targets[1], torch.tensor([1 - share, share, 0, 0]))
    torch.testing.assert_close(images[1], torch.full((1, 8, 8), float(share)))
    torch.testing.assert_close(targets.sum(1), torch.ones(4))


def test_pastes_a_rectangle_of_the_neighbor(batch):
    for _ in range(20):
        images, targets = Mix(4, mixup=0, cutmix=1)(*batch)
        is_pasted = images[1] == 0
        torch.testing.assert_close(targets[1, 0], is_pasted.float().mean()), "the share is counted in pixels"
        rows, columns = is_pasted[0].any(1).sum(), is_pasted[0].any(0).sum()
        assert is_pasted.sum() == rows * columns


def test_a_coin_decides_between_both(batch):
    is_pasted = {bool((Mix(4, mixup=1, cutmix=1)(*batch)[0][1] % 1 == 0).all()) for _ in range(30)}
    assert is_pasted == {True, False}


def test_the_seed_decides(batch):
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        results.append(Mix(4, mixup=0.2, cutmix=1)(*batch))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_no_mixing_by_default():
    assert make_mix(TrainConfig(), 10) is None
