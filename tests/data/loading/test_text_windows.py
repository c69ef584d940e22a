import pytest
import torch

from revnet.data import ConsecutiveWindows, RandomWindows


def random_windows(**options):
    return RandomWindows(torch.arange(50), **({"length": 4, "batch_size": 3, "num_batches": 5, "seed": 7} | options))


def test_windows_are_a_function_of_seed_and_update_alone():
    uninterrupted = random_windows()
    epochs = []
    for epoch in range(2):
        uninterrupted.set_epoch(epoch)
        epochs += list(uninterrupted)
    torch.rand(100)
    resumed = random_windows()
    resumed.sampler.set_epoch(1)
    assert all(torch.equal(a, b) for a, b in zip(epochs[5:], resumed, strict=True))
    assert not torch.equal(epochs[0], epochs[5])
    assert not torch.equal(epochs[0], random_windows(seed=8).batch(0))


def test_the_global_generator_is_not_used():
    state = torch.get_rng_state()
    list(random_windows())
    assert torch.equal(torch.get_rng_state(), state)


def test_windows_cover_the_text_from_its_first_to_its_last_token():
    windows = torch.cat(list(random_windows(batch_size=200)))
    assert windows.shape == (1000, 5)
    assert windows.dtype == torch.int64
    assert (windows.diff() == 1).all()
    assert (windows.min(), windows.max()) == (0, 49)


def test_every_token_is_a_target_of_consecutive_windows_once():
    windows = torch.cat(list(ConsecutiveWindows(torch.arange(22), length=5, batch_size=3)))
    assert windows[:, 0].tolist() == [0, 5, 10, 15]
    assert windows[:, 1:].flatten().tolist() == list(range(1, 21))


def test_max_windows_samples_the_text_evenly():
    windows = ConsecutiveWindows(torch.arange(101), length=10, batch_size=2, max_windows=4)
    assert (len(windows), windows.num_windows) == (2, 4)
    assert torch.cat(list(windows))[:, 0].tolist() == [0, 20, 50, 70]


@pytest.mark.parametrize("make", [random_windows, lambda **options: ConsecutiveWindows(torch.arange(50), **options)])
def test_rejects_texts_shorter_than_a_window(make):
    with pytest.raises(ValueError, match=r"`length` \(=50\) must be less than the 50 characters"):
        make(length=50, batch_size=1)
    with pytest.raises(ValueError, match=r"`batch_size` \(=0\) must be positive"):
        make(length=5, batch_size=0)


@pytest.mark.parametrize("num_parts", [1, 2])
def test_random_windows_of_two_processes_are_the_windows_of_one(num_parts):
    whole = list(random_windows(batch_size=8))
    ranks = [list(random_windows(batch_size=8, rank=rank, num_processes=2, num_parts=num_parts)) for rank in range(2)]
    for update, expected in enumerate(whole):
        parts = [part for own in ranks for part in own[update * num_parts : (update + 1) * num_parts]]
        assert {len(part) for part in parts} == {4 // num_parts}
        assert torch.equal(torch.cat(parts), expected)


@pytest.mark.parametrize("num_processes", [1, 2, 3, 4])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_consecutive_windows_of_several_processes_cover_the_text_once(num_processes, batch_size):
    def make(rank, num_processes):
        return ConsecutiveWindows(
            torch.arange(22), length=5, batch_size=batch_size, rank=rank, num_processes=num_processes
        )

    ranks = [make(rank, num_processes) for rank in range(num_processes)]
    assert {windows.num_windows for windows in ranks} == {4}
    assert len({len(windows) for windows in ranks}) == 1
    assert all(len(batch) for windows in ranks for batch in windows)
    starts = torch.cat([batch[:, 0] for windows in ranks for batch in windows])
    assert starts.sort().values.tolist() == [0, 5, 10, 15]


def test_rejects_windows_that_cannot_be_divided():
    with pytest.raises(ValueError, match=r"`batch_size` \(=3\) must be a multiple of 2, .* pass 2 or 4\.$"):
        random_windows(num_processes=2)
    with pytest.raises(ValueError, match=r"`num_processes` \(=5\) must not exceed the 4 windows of the text"):
        ConsecutiveWindows(torch.arange(22), length=5, batch_size=3, num_processes=5)
