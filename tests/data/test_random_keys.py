"""Random numbers of images: reference values, uniformity and independence.

The numbers are fixed, so a test cannot fail by chance. A bound of six standard deviations would be exceeded by random
numbers once in 500 million.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from revnet.data._random_keys import _GAMMA, Purpose, _mix, _mix_all, check_keys, image_keys, uniform

NUM_KEYS = 20_000
MASK = 2**64 - 1


def unsigned(numbers: Tensor) -> list[int]:
    return [number & MASK for number in numbers.tolist()]


def draws(seed: int = 0, epoch: int = 0, purpose: Purpose = Purpose.AUGMENT, count: int = 1) -> Tensor:
    return uniform(image_keys(seed, epoch, torch.arange(NUM_KEYS)), count, purpose)


# ---- reference values


def test_the_hash_is_the_one_of_splitmix64() -> None:
    # The first numbers of the published generator with seed 0.
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [_mix(number * _GAMMA) for number in (1, 2, 3)] == expected


def test_tensors_are_hashed_like_integers() -> None:
    numbers = torch.randint(-(2**63), 2**63 - 1, (1000,))
    numbers[:4] = torch.tensor([0, -1, 2**63 - 1, -(2**63)])
    assert unsigned(_mix_all(numbers.clone())) == [_mix(number) for number in unsigned(numbers)]


@pytest.mark.parametrize("seed", [0, 7, -1, 2**32, 2**70])
@pytest.mark.parametrize("epoch", [0, 1, 1000])
def test_keys_are_hashes_of_seed_epoch_and_image(seed: int, epoch: int) -> None:
    images = [0, 1, 17, 2**32 - 1]
    start = _mix(_mix(seed) + epoch)
    assert unsigned(image_keys(seed, epoch, torch.tensor(images))) == [_mix(start + i * _GAMMA) for i in images]


def test_numbers_are_halves_of_hashes() -> None:
    keys = torch.tensor([3, -5])
    for purpose in Purpose:
        expected = []
        for key in keys.tolist():
            hashes = [_mix(key + (purpose * 2**40 + pair) * _GAMMA) for pair in range(2)]
            halves = [half for number in hashes for half in (number & (2**32 - 1), number >> 32)]
            expected.append([(half >> 8) / 2**24 for half in halves])
        assert uniform(keys, 4, purpose).tolist() == expected
        assert uniform(keys, 3, purpose).tolist() == [numbers[:3] for numbers in expected]


def test_numbers_do_not_depend_on_the_batch() -> None:
    keys = image_keys(1, 2, torch.arange(50))
    whole = uniform(keys, 7, Purpose.COLOR)
    assert torch.equal(uniform(keys[10:20], 7, Purpose.COLOR), whole[10:20])
    assert torch.equal(uniform(keys.flip(0), 3, Purpose.COLOR).flip(0), whole[:, :3])
    assert whole.shape == (50, 7)
    assert whole.dtype == torch.float32
    assert uniform(keys[:0], 7, Purpose.COLOR).shape == (0, 7)
    assert uniform(keys, 0, Purpose.COLOR).shape == (50, 0)


@pytest.mark.gpu
def test_numbers_do_not_depend_on_the_device() -> None:
    keys = image_keys(1, 2, torch.arange(1000))
    assert torch.equal(image_keys(1, 2, torch.arange(1000).cuda()).cpu(), keys)
    assert torch.equal(uniform(keys.cuda(), 7, Purpose.COLOR).cpu(), uniform(keys, 7, Purpose.COLOR))


def test_keys_of_seeds_epochs_and_images_are_distinct() -> None:
    keys = torch.cat([image_keys(seed, epoch, torch.arange(1000)) for seed in range(10) for epoch in range(10)])
    assert len(keys.unique()) == len(keys)


# ---- uniformity


def assert_uniform(numbers: Tensor, num_bins: int = 256) -> None:
    """Compare the counts of equal bins with the chi-square distribution, which has this mean and deviation."""
    counts = torch.histc(numbers.double().flatten(), bins=num_bins, min=0, max=1)
    expected = numbers.numel() / num_bins
    statistic = float(((counts - expected) ** 2 / expected).sum())
    degrees = num_bins - 1
    assert abs(statistic - degrees) < 6 * math.sqrt(2 * degrees), statistic


SETS = {
    "images": lambda: draws(),
    "second half of a hash": lambda: draws(count=2)[:, 1],
    "another pair": lambda: draws(count=9)[:, 8],
    "another purpose": lambda: draws(purpose=Purpose.NOISE),
    "one image": lambda: uniform(image_keys(0, 0, torch.tensor([5])), NUM_KEYS, Purpose.NOISE),
    "one image, first halves": lambda: uniform(image_keys(0, 0, torch.tensor([5])), 2 * NUM_KEYS, Purpose.NOISE)[
        :, ::2
    ],
    "epochs": lambda: torch.cat([uniform(image_keys(0, e, torch.arange(20)), 1, Purpose.AUGMENT) for e in range(1000)]),
    "seeds": lambda: torch.cat([uniform(image_keys(s, 0, torch.arange(20)), 1, Purpose.AUGMENT) for s in range(1000)]),
    "plain keys": lambda: uniform(torch.arange(NUM_KEYS), 1, Purpose.AUGMENT),
}


@pytest.mark.parametrize("name", SETS)
def test_numbers_are_uniform(name: str) -> None:
    numbers = SETS[name]()
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert_uniform(numbers)
    assert_uniform((numbers * 2**8) % 1)  # lower bits
    assert_uniform((numbers * 2**16) % 1)


# ---- independence

FIRST = draws()[:, 0]
PAIRS: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "neighboring images": lambda: (FIRST[:-1], FIRST[1:]),
    "images 2^10 apart": lambda: (FIRST[: -(2**10)], FIRST[2**10 :]),
    "neighboring epochs": lambda: (FIRST, draws(epoch=1)[:, 0]),
    "neighboring seeds": lambda: (FIRST, draws(seed=1)[:, 0]),
    "seed and epoch": lambda: (draws(epoch=1)[:, 0], draws(seed=1)[:, 0]),
    "halves of a hash": lambda: tuple(draws(count=2).unbind(1)),
    "neighboring hashes": lambda: tuple(draws(count=4)[:, 1:3].unbind(1)),
    "distant numbers": lambda: tuple(draws(count=3000)[:, ::2999].unbind(1)),
    "image and number": lambda: (draws(count=3)[:-1, 2], draws(count=3)[1:, 0]),
    "purposes": lambda: (FIRST, draws(purpose=Purpose.COLOR)[:, 0]),
}


@pytest.mark.parametrize("name", PAIRS)
def test_numbers_are_independent(name: str) -> None:
    x, y = (part.double() for part in PAIRS[name]())
    correlation = float(torch.corrcoef(torch.stack([x, y]))[0, 1])
    assert abs(correlation) < 6 / math.sqrt(len(x)), "the standard deviation for independent numbers"
    # Pairs fill the unit square evenly.
    assert_uniform(((x * 16).floor() * 16 + (y * 16).floor()) / 256 + 1 / 512)


def test_every_bit_of_a_key_changes_half_of_the_bits_of_its_numbers() -> None:
    keys = image_keys(0, 0, torch.arange(500))
    bits = (uniform(keys, 2, Purpose.AUGMENT).double() * 2**24).long()
    places = torch.arange(24)
    for bit in range(64):
        changed = keys ^ torch.tensor(1 << bit if bit < 63 else -(2**63))
        difference = bits ^ (uniform(changed, 2, Purpose.AUGMENT).double() * 2**24).long()
        share = float(((difference[..., None] >> places) & 1).double().mean())
        assert abs(share - 0.5) < 6 * 0.5 / math.sqrt(difference.numel() * 24), f"bit {bit}"


# ---- keys of a batch


def test_keys_are_drawn_from_the_global_generator_if_there_are_none() -> None:
    images = torch.zeros(20, 1, 2, 2)
    torch.manual_seed(3)
    first, second = check_keys(None, images), check_keys(None, images)
    torch.manual_seed(3)
    assert torch.equal(check_keys(None, images), first)
    assert first.dtype == torch.int64
    assert len(torch.cat([first, second]).unique()) == 40
