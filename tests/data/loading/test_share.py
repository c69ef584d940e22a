"""Division of global batches among processes."""

import pytest

from revnet.data.loading._share import Share


def shares(num_processes: int, num_parts: int = 1) -> list[Share]:
    return [Share(rank, num_processes, num_parts) for rank in range(num_processes)]


@pytest.mark.parametrize("num_processes", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("batch_size", [1, 2, 5, 10, 100])
def test_without_drop_last_every_sample_is_in_one_share_and_no_share_is_empty(
    num_processes: int, batch_size: int
) -> None:
    for num_samples in range(num_processes, 40):
        batches = Share().global_batches(num_samples, batch_size, drop_last=False)
        assert max(map(len, batches)) <= batch_size
        parts = []
        for share in shares(num_processes):
            own = share.global_batches(num_samples, batch_size, drop_last=False)
            parts.append([part for batch in own for part in share.parts(batch)])
        assert len({len(own) for own in parts}) == 1, "every process has the same number of batches"
        for batch in zip(*parts, strict=True):
            sizes = [len(part) for part in batch]
            assert 1 <= min(sizes) <= max(sizes) <= min(sizes) + 1
            assert sum(sizes) <= max(batch_size, num_processes) + num_processes - 1
        assert [sample for batch in zip(*parts, strict=True) for part in batch for sample in part] == [
            *range(num_samples)
        ]


def test_one_process_has_the_usual_batches() -> None:
    assert Share().global_batches(25, 10, drop_last=False) == [range(10), range(10, 20), range(20, 25)]
    assert Share().global_batches(25, 10, drop_last=True) == [range(10), range(10, 20)]
    assert Share().global_batches(20, 10, drop_last=True) == [range(10), range(10, 20)]
    assert Share().parts(range(3, 9)) == [range(3, 9)]


def test_parts_are_consecutive_slices() -> None:
    parts = [share.parts(range(100, 112)) for share in shares(2, num_parts=3)]
    assert parts == [
        [range(100, 102), range(102, 104), range(104, 106)],
        [range(106, 108), range(108, 110), range(110, 112)],
    ]


@pytest.mark.parametrize(
    ("batch_size", "num_processes", "num_parts", "message"),
    [
        (10, 4, 1, r"`batch_size` \(=10\) must be a multiple of 4, .* 4 processes in 1 part; pass 8 or 12\.$"),
        (10, 2, 3, r"`batch_size` \(=10\) must be a multiple of 6, .* 2 processes in 3 parts; pass 6 or 12\.$"),
        (3, 1, 2, r"`batch_size` \(=3\) must be a multiple of 2, .* 1 process in 2 parts; pass 2 or 4\.$"),
        (3, 8, 1, r"`batch_size` \(=3\) must be a multiple of 8, .* 8 processes in 1 part; pass 8\.$"),
    ],
)
def test_rejects_batches_that_cannot_be_divided(
    batch_size: int, num_processes: int, num_parts: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Share(0, num_processes, num_parts).check_batch_size(batch_size)


def test_rejects_numbers_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"`num_processes` \(=0\) must be positive; pass 1"):
        Share(0, 0)
    with pytest.raises(ValueError, match=r"`num_parts` \(=-1\) must be positive; pass 1"):
        Share(0, 1, -1)
    for rank in (-1, 2):
        with pytest.raises(ValueError, match=rf"`rank` \(={rank}\) must be from 0 to 1, since `num_processes` is 2"):
            Share(rank, 2)
    with pytest.raises(ValueError, match=r"`num_processes` \(=4\) must not exceed the 3 images of the split"):
        Share(0, 4).check_num_samples(3, "images of the split")
