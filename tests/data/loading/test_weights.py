import pytest
import torch

from revnet.data import make_loader
from revnet.data.splits.image_split import ImageSplit


@pytest.fixture
def split():
    """Twelve images, whose pixels are their number; three in four are of class 0."""
    numbers = torch.arange(12, dtype=torch.uint8)
    return ImageSplit(numbers[:, None, None, None].expand(12, 1, 2, 2).contiguous(), (torch.arange(12) % 4 == 3).long())


def batches(split, epoch=0, **options):
    weights = 1.0 / torch.bincount(split.labels)[split.labels]
    options = {"batch_size": 4, "shuffle": True, "seed": 0, "weights": weights, "keys": True} | options
    loader = make_loader(split, **options)
    loader.sampler.set_epoch(epoch)
    return loader, list(loader)


def test_rare_classes_are_drawn_as_often(split):
    labels = torch.cat([batch[1] for epoch in range(100) for batch in batches(split, epoch)[1]])
    # 1200 draws of a fair coin: five standard deviations.
    assert abs(float(labels.float().mean()) - 0.5) < 5 * 0.5 / 1200**0.5


def test_draws_are_a_function_of_seed_and_epoch(split):
    first, again, other = (torch.cat([b[0] for b in batches(split, epoch)[1]]) for epoch in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_repeated_images_have_other_keys(split):
    _, all_batches = batches(split)
    images = torch.cat([batch[0][:, 0, 0, 0] for batch in all_batches])
    keys = torch.cat([batch[2] for batch in all_batches])
    assert len(set(images.tolist())) < 12, "some image is drawn twice"
    assert len(set(keys.tolist())) == 12


def test_processes_together_see_the_same_images(split):
    _, whole = batches(split)
    parts = [batches(split, rank=rank, num_processes=2)[1] for rank in range(2)]
    for batch, *shares in zip(whole, *parts, strict=True):
        assert torch.equal(batch[0], torch.cat([share[0] for share in shares]))


def test_position_continues_the_draws(split):
    loader, whole = batches(split)
    iterator = iter(loader)
    next(iterator)
    state = loader.state_dict()
    resumed, _ = batches(split)
    resumed.load_state_dict(state)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(resumed, whole[1:], strict=True))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.ones(3), r"`weights` \(of shape \(3,\), .*\) must be floating point of shape \(12,\)"),
        (torch.ones(12, dtype=torch.int64), r"must be floating point"),
        (torch.zeros(12), r"must be finite, 0 or more, and not all 0"),
        (-torch.ones(12), r"must be finite, 0 or more"),
    ],
)
def test_rejects_invalid_weights(split, weights, message):
    with pytest.raises(ValueError, match=message):
        batches(split, weights=weights)
