"""The checksum that shows whether the stages have the same batch."""

import pytest
import torch

from revnet.distributed.pipeline._microbatches import checksum_of


def tokens(rank, num_samples=16, length=64, dtype=torch.int64):
    """Return another part of the data in each process; every row begins with the same token."""
    drawn = torch.randint(2, 100, (num_samples, length), generator=torch.Generator().manual_seed(rank)).to(dtype)
    drawn[:, 0] = 1
    return drawn


def images(rank):
    """Return images whose borders are zero."""
    drawn = torch.zeros(16, 1, 8, 8)
    drawn[..., 2:6, 2:6] = torch.rand(16, 1, 4, 4, generator=torch.Generator().manual_seed(rank))
    return drawn


BATCHES = {
    **{f"tokens of length {length}": (lambda rank, n=length: tokens(rank, length=n)) for length in (5, 32, 33, 64, 65)},
    "17 samples": lambda rank: tokens(rank, num_samples=17),
    "short integers": lambda rank: tokens(rank, length=5, dtype=torch.int16),
    "half precision": lambda rank: tokens(rank, length=7, dtype=torch.bfloat16),
    "booleans": lambda rank: tokens(rank, length=63) > 50,
    "complex numbers": lambda rank: torch.complex(images(0), images(rank)),
    "images": images,
    "a mask first": lambda rank: {"mask": torch.ones(16, 64), "input_ids": tokens(rank)},
    "a pair": lambda rank: (images(0), images(rank)),
    "one sample": lambda rank: torch.stack([images(0)[0]] * 15 + [images(rank)[0]]),
    "one element": lambda rank: images(0).index_put(
        (torch.tensor(3), *torch.tensor([0, 4, 4])), torch.tensor(rank + 2.0)
    ),
    "the order of samples": lambda rank: tokens(0).roll(rank, 0),
    "the shape": lambda rank: torch.zeros(8 + 8 * rank, 2),
    "the dtype": lambda rank: torch.zeros(8, 2, dtype=(torch.float32, torch.int32)[rank]),
}


@pytest.mark.parametrize("name", BATCHES)
def test_another_batch_has_another_checksum(name):
    assert checksum_of(BATCHES[name](0)) != checksum_of(BATCHES[name](1))


@pytest.mark.parametrize("name", BATCHES)
def test_the_same_batch_has_the_same_checksum(name):
    assert checksum_of(BATCHES[name](0)) == checksum_of(BATCHES[name](0))


@pytest.mark.parametrize(
    ("batch", "same"),
    [
        (torch.arange(99.0)[1:].view(1, 98), torch.arange(1.0, 99.0).view(1, 98)),
        (torch.arange(20.0).view(4, 5)[:, 1:], torch.arange(20.0).view(4, 5)[:, 1:].clone()),
        (images(0).to(memory_format=torch.channels_last), images(0)),
        (torch.full((2, 3), torch.nan), torch.full((2, 3), torch.nan)),
        (torch.tensor([1 + 2j, 3j]).conj(), torch.tensor([1 + 2j, 3j]).conj().resolve_conj()),
        (torch.ones(4, 1).expand(4, 6), torch.ones(4, 6)),
        (torch.ones(4, 2, requires_grad=True) * 2, torch.full((4, 2), 2.0)),
        ({"a": torch.zeros(2), "b": torch.ones(2)}, {"b": torch.ones(2), "a": torch.zeros(2)}),
        (torch.zeros(3, 0), torch.zeros(3, 0)),
    ],
)
def test_the_checksum_depends_on_values_only(batch, same):
    assert checksum_of(batch) == checksum_of(same)


@pytest.mark.parametrize("batch", [None, (), {"step": 3}])
def test_there_is_no_checksum_without_a_tensor(batch):
    assert checksum_of(batch) is None
