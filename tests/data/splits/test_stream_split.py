"""Streams, here from parquet files with images of varying size."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from revnet.data import ImageDataset, load_dataset, make_loader
from revnet.data.decoding.batch import DecodedBatch
from revnet.data.decoding.crop import CenterCrop, RandomResizedCrop
from revnet.data.loading._share import Share
from revnet.data.loading._stream_batches import Chunk, StreamBatches
from revnet.data.loading.loader import Loader
from revnet.data.splits.rows import AbstractRows, Order, Row, shuffled
from revnet.data.splits.stream_split import StreamSplit
from revnet.errors import DataError
from tests.data.samples import NUM_STREAMED, encode, flat_image, random_images, write_stream

# PyTorch warns on a machine with fewer cores than a test has workers.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

Writer = Callable[..., None]


@pytest.fixture
def dataset(tmp_path: Path, write_parquet: Writer) -> ImageDataset:
    return write_stream(tmp_path / "numbers", write_parquet)


def order(loader: Loader, epoch: int = 0) -> list[int]:
    loader.sampler.set_epoch(epoch)
    return [int(label) for _, labels in loader for label in labels]


class Rows(AbstractRows):
    """Rows from a list, each in its own shard."""

    def __init__(self, rows: list[Row], error: Exception | None = None) -> None:
        self.rows = rows
        self.error = error

    @property
    def num_shards(self) -> int:
        return len(self.rows)

    def read(self, order: Order | None, worker: int, num_workers: int) -> Iterator[Row]:
        rows = self.rows[worker::num_workers]
        yield from rows if order is None else shuffled(rows, 10, order.row_generator(worker))
        if self.error is not None:
            raise self.error


def make_split(labels: list[int | None], *, num_classes: int = 10, error: Exception | None = None) -> StreamSplit:
    """Return noise with the given labels; images with negative labels are damaged."""
    rows = [
        Row(b"text" if label is not None and label < 0 else encode(image), label and abs(label), f"row {number}")
        for number, (label, image) in enumerate(zip(labels, random_images(len(labels)), strict=True))
    ]
    return StreamSplit(
        Rows(rows, error),
        num_images=len(labels),
        num_classes=num_classes,
        image_size=4,
        crop=RandomResizedCrop(),
        on_corrupt="skip",
    )


# ---- batches


def test_splits(dataset: ImageDataset) -> None:
    assert dataset.name == "numbers"
    assert isinstance(dataset.train, StreamSplit)
    assert (dataset.in_channels, *dataset.image_size) == (3, 4, 4)
    assert len(dataset.train) == NUM_STREAMED
    assert dataset.train.labels.tolist() == list(range(NUM_STREAMED))
    assert dataset.train.crop == RandomResizedCrop()
    assert dataset.test.crop == CenterCrop()
    assert repr(dataset.test) == "StreamSplit(3 images, image_size=4, crop=CenterCrop(fraction=0.875))"


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("num_workers", [0, 2, 7])
def test_batches(dataset: ImageDataset, shuffle: bool, num_workers: int) -> None:
    loader = make_loader(dataset.train, batch_size=4, shuffle=shuffle, seed=0, num_workers=num_workers)
    batches = list(loader)
    assert len(batches) == len(loader) == 7
    assert [len(labels) for _, labels in batches] == [4] * 6 + [1]
    labels = torch.cat([labels for _, labels in batches])
    assert labels.sort().values.tolist() == list(range(NUM_STREAMED))
    if num_workers == 0:
        assert (labels.tolist() == list(range(NUM_STREAMED))) is not shuffle
    for images, labels in batches:
        assert images.shape[1:] == (3, 4, 4)
        assert images.dtype == torch.uint8
        assert labels.dtype == torch.int64
        assert torch.equal(images[:, 0, 0, 0], (10 * labels).to(torch.uint8))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_drop_last(dataset: ImageDataset, num_workers: int) -> None:
    loader = make_loader(dataset.train, batch_size=4, shuffle=True, seed=0, drop_last=True, num_workers=num_workers)
    assert [len(labels) for _, labels in loader] == [4] * 6
    assert len(loader) == 6


@pytest.mark.parametrize("num_workers", [0, 2])
def test_order_and_crops_are_a_function_of_seed_and_epoch(num_workers: int) -> None:
    split = make_split([number % 10 for number in range(20)])

    def epoch(loader: Loader, number: int) -> tuple[Tensor, Tensor]:
        loader.sampler.set_epoch(number)
        images, labels = zip(*loader, strict=True)
        return torch.cat(images), torch.cat(labels)

    def make(seed: int) -> Loader:
        return make_loader(split, batch_size=4, shuffle=True, seed=seed, num_workers=num_workers)

    before = torch.get_rng_state()
    loader = make(7)
    epochs = [epoch(loader, number) for number in range(3)]
    torch.manual_seed(123)
    resumed = epoch(make(7), 2)
    assert torch.equal(resumed[0], epochs[2][0])
    assert torch.equal(resumed[1], epochs[2][1])
    assert len({tuple(labels.tolist()) for _, labels in epochs}) == 3
    assert epoch(make(8), 2)[1].tolist() != resumed[1].tolist()
    torch.set_rng_state(before)


def test_crops_do_not_depend_on_workers_or_order() -> None:
    split = make_split([*range(10)])
    crops = []
    for shuffle, num_workers in [(True, 0), (False, 0), (True, 2)]:
        loader = make_loader(split, batch_size=3, shuffle=shuffle, seed=5, num_workers=num_workers)
        loader.sampler.set_epoch(1)
        images, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
        crops.append(images[labels.argsort()])
    assert torch.equal(crops[0], crops[1])
    assert torch.equal(crops[0], crops[2])


def test_row_groups_are_shared_among_workers(tmp_path: Path, write_parquet: Writer) -> None:
    from pyarrow import parquet

    write_stream(tmp_path, write_parquet)
    whole = parquet.read_table(tmp_path / "train-00000-of-00003.parquet")
    for file in tmp_path.glob("train-*.parquet"):
        file.unlink()
    parquet.write_table(whole, tmp_path / "train-00000-of-00001.parquet", row_group_size=2)

    train = load_dataset(tmp_path, image_size=4).train
    assert train.rows.num_shards == 5
    loader = make_loader(train, batch_size=3, shuffle=False, seed=0, num_workers=2)
    # Row groups 0, 2, 4 go to one worker and 1, 3 to the other; each has one row or two left over.
    assert [labels.tolist() for _, labels in loader] == [[0, 1, 4], [2, 3, 6], [5, 8, 7]]


def test_streams_have_no_part_to_hold_out(dataset: ImageDataset) -> None:
    with pytest.raises(
        ValueError, match=r"`fraction` \(=0.1\) cannot be held out of .* a stream; train on all of them"
    ):
        dataset.holdout(0.1, seed=0)


# ---- damaged data


@pytest.mark.parametrize("num_workers", [0, 2])
def test_skip(num_workers: int, caplog: pytest.LogCaptureFixture) -> None:
    split = make_split([0, 1, -2, 3, 4, 5, -6, 7, 8, 9])
    loader = make_loader(split, batch_size=3, shuffle=False, seed=0, num_workers=num_workers)
    for _ in range(2):
        assert sorted(order(loader)) == [0, 1, 3, 4, 5, 7, 8, 9]
    assert sorted(caplog.messages) == ["skipped row 2: it is not an image", "skipped row 6: it is not an image"]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_stop(num_workers: int, tmp_path: Path, write_parquet: Writer) -> None:
    write_stream(tmp_path, write_parquet)
    names = [str(number) for number in range(NUM_STREAMED)]
    file = tmp_path / "test-00000-of-00001.parquet"
    write_parquet(file, [flat_image(0), {"bytes": b"", "path": None}], [0, 1], class_names=names)

    loader = make_loader(
        load_dataset(tmp_path, image_size=4).test, batch_size=3, shuffle=False, seed=0, num_workers=num_workers
    )
    with pytest.raises(DataError) as caught:
        order(loader)
    assert str(caught.value) == (
        f"row 1 of '{file}' cannot be decoded: it is empty; restore it, or set `on_corrupt` to 'skip' to leave such "
        "images out."
    )


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("label", [10, None])
def test_labels_without_a_class(label: int | None, num_workers: int) -> None:
    split = make_split([0, 1, 2, label, 4], num_classes=10)
    loader = make_loader(split, batch_size=2, shuffle=False, seed=0, num_workers=num_workers)
    with pytest.raises(DataError, match=rf"^row 3 has the label {label}, but there are 10 classes, so it must be in"):
        order(loader)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_interrupted_stream(num_workers: int) -> None:
    split = make_split([0, 1, 2, 3, 4], error=DataError("the stream was interrupted"))
    with pytest.raises(DataError, match=r"^the stream was interrupted$"):
        order(make_loader(split, batch_size=2, shuffle=True, seed=0, num_workers=num_workers))


def test_a_file_that_is_truncated_after_loading(dataset: ImageDataset, tmp_path: Path) -> None:
    file = tmp_path / "numbers" / "train-00001-of-00003.parquet"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match=rf"^'{file}' cannot be read as parquet: .*; download it again\.$"):
        order(make_loader(dataset.train, batch_size=2, shuffle=False, seed=0))


# ---- the parts


def test_shuffling_keeps_every_row_and_looks_no_further_ahead_than_its_buffer() -> None:
    rows = [Row(b"", label, "") for label in range(100)]
    labels = [row.label for row in shuffled(rows, 10, np.random.default_rng(0))]
    assert sorted(labels) == list(range(100))
    assert labels != list(range(100))
    assert all(label < position + 11 for position, label in enumerate(labels))
    assert sorted(row.label for row in shuffled(rows[:5], 10, np.random.default_rng(0))) == [0, 1, 2, 3, 4]
    assert list(shuffled([], 10, np.random.default_rng(0))) == []


def chunk(reader: int, labels: list[int], num_corrupt: int = 0, fatal: str | None = None) -> Chunk:
    """Return a chunk of a stream whose global batches have two images."""
    images = torch.tensor(labels, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    numbers = torch.tensor(labels, dtype=torch.int64)
    batch = DecodedBatch(images, numbers, numbers, (("x", "y"),) * num_corrupt, fatal)
    return Chunk(reader, (batch,), is_full=len(labels) + num_corrupt == 2 and fatal is None)


def follow(chunks: list[Chunk], drop_last: bool) -> list[DecodedBatch]:
    batches = StreamBatches(
        make_split([0] * 6), batch_size=2, drop_last=drop_last, shuffle=False, seed=0, share=Share(), num_workers=4
    )
    return list(batches.follow(chunks))


@pytest.mark.parametrize(
    ("chunks", "drop_last", "expected"),
    [
        ([chunk(0, [0, 1]), chunk(1, [2]), chunk(0, [3, 4]), chunk(2, [5])], True, [[0, 1], [3, 4], [2, 5]]),
        ([chunk(0, [0, 1]), chunk(2, [2]), chunk(0, [3, 4]), chunk(1, [5])], True, [[0, 1], [3, 4], [5, 2]]),
        ([chunk(0, [0, 1]), chunk(1, [2]), chunk(0, [3, 4])], True, [[0, 1], [3, 4]]),
        ([chunk(0, [0, 1]), chunk(1, [2]), chunk(0, [3, 4])], False, [[0, 1], [3, 4], [2]]),
        ([chunk(0, [0], 1), chunk(1, [1]), chunk(2, [], 1), chunk(3, [2])], True, [[0], [1, 2]]),
        ([chunk(0, [], 2), chunk(1, [], 1)], False, []),
        ([chunk(0, []), chunk(1, [0, 1])], False, [[0, 1]]),
        ([], False, []),
    ],
)
def test_remainders_are_joined_to_full_batches(chunks: list[Chunk], drop_last: bool, expected: list[list[int]]) -> None:
    joined = follow(chunks, drop_last)
    assert [part.labels.tolist() for part in joined if len(part.labels)] == expected
    assert sum(len(part.corrupt) for part in joined) == sum(len(part.corrupt) for (_, (part,), _) in chunks)
    for part in joined:
        assert part.images[:, 0, 0, 0].tolist() == part.labels.tolist()


def test_a_fatal_error_is_passed_on() -> None:
    assert next(part.fatal for part in follow([chunk(0, [0], fatal="gone")], False)) == "gone"
