from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DistributedSampler

from revnet.data import make_loader
from revnet.data.decoding.crop import CenterCrop, RandomResizedCrop
from revnet.data.loading.loader import Loader
from revnet.data.splits.abstract_split import AbstractSplit
from revnet.data.splits.file_split import FileSplit
from revnet.data.splits.image_split import ImageSplit
from revnet.errors import DataError
from tests.data.samples import NUM_STREAMED, encode, flat_image, random_images, write_image, write_stream

# PyTorch warns on a machine with fewer cores than a test has workers.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

NUM_IMAGES = NUM_STREAMED


@pytest.fixture(scope="module")
def image_split() -> ImageSplit:
    """Return images whose pixels and labels equal their indices."""
    numbers = torch.arange(NUM_IMAGES)
    return ImageSplit(numbers.to(torch.uint8).view(-1, 1, 1, 1), numbers)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return images of one gray level each, ten times their index."""
    folder = tmp_path_factory.mktemp("files")
    files = [folder / f"{number}.png" for number in range(NUM_IMAGES)]
    for number, file in enumerate(files):
        write_image(file, flat_image(10 * number))
    return files


@pytest.fixture(scope="module")
def file_split(files: list[Path]) -> FileSplit:
    return FileSplit(files, torch.arange(NUM_IMAGES), image_size=4, crop=RandomResizedCrop())


@pytest.fixture(params=["memory", "files"])
def split(request: pytest.FixtureRequest) -> AbstractSplit:
    return request.getfixturevalue("image_split" if request.param == "memory" else "file_split")


def noise_split(folder: Path) -> FileSplit:
    """Return images of noise, in which different crops differ."""
    for number in range(6):
        write_image(folder / f"{number}.png", random_images(1, height=12, width=16, seed=number)[0])
    return FileSplit(sorted(folder.iterdir()), torch.arange(6), image_size=4, crop=RandomResizedCrop())


def order(loader: Loader, epoch: int = 0) -> list[int]:
    loader.sampler.set_epoch(epoch)
    return [int(label) for _, labels in loader for label in labels]


def images_of(loader: Loader, epoch: int) -> Tensor:
    """Return all images of an epoch, in the order of their labels."""
    loader.sampler.set_epoch(epoch)
    batches = list(loader)
    labels = torch.cat([labels for _, labels in batches])
    return torch.cat([images for images, _ in batches])[labels.argsort()]


# ---- order


def test_batches(split: AbstractSplit) -> None:
    batches = list(make_loader(split, batch_size=10, shuffle=True, seed=0))
    assert [images.shape for images, _ in batches] == [(size, *split.image_shape) for size in (10, 10, 5)]
    scale = 1 if isinstance(split, ImageSplit) else 10
    for images, labels in batches:
        assert images.dtype == torch.uint8
        assert labels.dtype == torch.int64
        assert images[:, 0, 0, 0].tolist() == (scale * labels).tolist()


def test_without_shuffling_batches_follow_the_order_of_the_split(split: AbstractSplit) -> None:
    loader = make_loader(split, batch_size=10, shuffle=False, seed=0)
    assert order(loader) == list(range(NUM_IMAGES))
    assert order(loader, epoch=1) == list(range(NUM_IMAGES))


def test_every_epoch_sees_every_image_once_in_its_own_order(split: AbstractSplit) -> None:
    loader = make_loader(split, batch_size=10, shuffle=True, seed=0)
    orders = [order(loader, epoch) for epoch in range(3)]
    assert [sorted(labels) for labels in orders] == [list(range(NUM_IMAGES))] * 3
    assert len(set(map(tuple, orders))) == 3


def test_order_is_a_function_of_seed_and_epoch(split: AbstractSplit) -> None:
    first = order(make_loader(split, batch_size=10, shuffle=True, seed=7), epoch=4)
    torch.manual_seed(123)
    assert order(make_loader(split, batch_size=5, shuffle=True, seed=7), epoch=4) == first
    assert order(make_loader(split, batch_size=10, shuffle=True, seed=8), epoch=4) != first


def test_files_have_the_same_order_as_images_in_memory(image_split: ImageSplit, file_split: FileSplit) -> None:
    loaders = [make_loader(part, batch_size=10, shuffle=True, seed=3) for part in (image_split, file_split)]
    assert order(loaders[0], epoch=2) == order(loaders[1], epoch=2)


def test_order_is_the_one_of_a_distributed_sampler(split: AbstractSplit) -> None:
    # Results can be reproduced only while a seed gives the same order.
    sampler = DistributedSampler(split, num_replicas=1, rank=0, shuffle=True, seed=3)
    sampler.set_epoch(2)
    assert order(make_loader(split, batch_size=10, shuffle=True, seed=3), epoch=2) == list(sampler)


@pytest.mark.parametrize("shuffle", [True, False])
def test_the_global_generator_is_not_used(split: AbstractSplit, shuffle: bool) -> None:
    before = torch.get_rng_state()
    order(make_loader(split, batch_size=10, shuffle=shuffle, seed=0))
    assert torch.equal(torch.get_rng_state(), before)


def test_drop_last(split: AbstractSplit) -> None:
    loader = make_loader(split, batch_size=10, shuffle=True, seed=0, drop_last=True)
    assert len(loader) == 2
    assert len(order(loader)) == 20
    assert len(make_loader(split, batch_size=10, shuffle=True, seed=0)) == 3
    assert len(make_loader(split, batch_size=25, shuffle=True, seed=0, drop_last=True)) == 1


def test_a_batch_is_one_indexing_operation(image_split: ImageSplit, monkeypatch: pytest.MonkeyPatch) -> None:
    def one_by_one(self: ImageSplit, index: int) -> None:
        raise AssertionError(f"image {index} was fetched alone")

    monkeypatch.setattr(ImageSplit, "__getitem__", one_by_one)
    assert len(order(make_loader(image_split, batch_size=10, shuffle=True, seed=0, num_workers=2))) == NUM_IMAGES


# ---- crops and workers


def test_crops_are_a_function_of_seed_epoch_and_image(tmp_path: Path) -> None:
    split = noise_split(tmp_path)
    loader = make_loader(split, batch_size=4, shuffle=True, seed=7)
    first, second = images_of(loader, 0), images_of(loader, 1)
    assert (first != second).flatten(1).any(1).all()
    torch.manual_seed(123)
    assert torch.equal(images_of(make_loader(split, batch_size=3, shuffle=False, seed=7), 1), second)
    assert not torch.equal(images_of(make_loader(split, batch_size=4, shuffle=True, seed=8), 1), second)


def test_batches_do_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    split = noise_split(tmp_path)
    alone = make_loader(split, batch_size=4, shuffle=True, seed=7)
    workers = make_loader(split, batch_size=4, shuffle=True, seed=7, num_workers=2)
    resumed = make_loader(split, batch_size=4, shuffle=True, seed=7, num_workers=2)
    before = torch.get_rng_state()
    for epoch in range(3):  # the workers stay alive
        alone.sampler.set_epoch(epoch)
        workers.sampler.set_epoch(epoch)
        for (images, labels), (expected, expected_labels) in zip(workers, alone, strict=True):
            assert torch.equal(images, expected)
            assert torch.equal(labels, expected_labels)
    assert torch.equal(images_of(resumed, 2), images_of(alone, 2))
    assert torch.equal(torch.get_rng_state(), before)


def test_an_epoch_can_end_early(tmp_path: Path) -> None:
    loader = make_loader(noise_split(tmp_path), batch_size=1, shuffle=True, seed=0, num_workers=2)
    expected = order(loader, 1)
    loader.sampler.set_epoch(0)
    next(iter(loader))
    assert order(loader, 1) == expected


@pytest.mark.gpu
@pytest.mark.parametrize("num_workers", [0, 2])
def test_page_locked_memory(split: AbstractSplit, num_workers: int) -> None:
    for images, labels in make_loader(
        split, batch_size=10, shuffle=True, seed=0, pin_memory=True, num_workers=num_workers
    ):
        assert images.is_pinned()
        assert labels.is_pinned()


# ---- undecodable images


@pytest.fixture
def damaged(tmp_path: Path) -> Callable[..., FileSplit]:
    """Return a function that makes a split of eight images, two of them damaged."""
    for number in range(8):
        write_image(tmp_path / f"{number}.png")
    (tmp_path / "2.png").write_bytes(b"")
    (tmp_path / "5.png").write_bytes(encode(random_images(1)[0])[:40])
    return lambda on_corrupt: FileSplit(
        sorted(tmp_path.iterdir()), torch.arange(8), image_size=4, crop=CenterCrop(), on_corrupt=on_corrupt
    )


@pytest.mark.parametrize("num_workers", [0, 2])
def test_stop(damaged: Callable[..., FileSplit], tmp_path: Path, num_workers: int) -> None:
    loader = make_loader(damaged("stop"), batch_size=3, shuffle=False, seed=0, num_workers=num_workers)
    with pytest.raises(DataError) as caught:
        order(loader)
    assert str(caught.value) == (
        f"'{tmp_path / '2.png'}' cannot be decoded: it is empty; restore it, or set `on_corrupt` to 'skip' to leave "
        "such images out."
    )
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("num_workers", [0, 2])
def test_skip(
    damaged: Callable[..., FileSplit], tmp_path: Path, num_workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    split = damaged("skip")
    loader = make_loader(split, batch_size=3, shuffle=False, seed=0, num_workers=num_workers)
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        assert [labels.tolist() for _, labels in loader] == [[0, 1], [3, 4], [6, 7]]
    another = make_loader(split, batch_size=8, shuffle=False, seed=0)
    assert order(another) == [0, 1, 3, 4, 6, 7]
    assert split.skipped == {f"'{tmp_path / '2.png'}'", f"'{tmp_path / '5.png'}'"}
    assert [message.partition(":")[0] for message in caplog.messages] == [
        f"skipped '{tmp_path / '2.png'}'",
        f"skipped '{tmp_path / '5.png'}'",
    ]


def test_a_batch_without_images_is_left_out(damaged: Callable[..., FileSplit]) -> None:
    loader = make_loader(damaged("skip"), batch_size=1, shuffle=False, seed=0)
    assert order(loader) == [0, 1, 3, 4, 6, 7]


def test_a_split_without_decodable_images(tmp_path: Path) -> None:
    (tmp_path / "x.png").touch()
    split = FileSplit(
        [tmp_path / "x.png"] * 3, torch.zeros(3).long(), image_size=4, crop=CenterCrop(), on_corrupt="skip"
    )
    with pytest.raises(DataError, match="no image of the split can be decoded; restore the files"):
        order(make_loader(split, batch_size=2, shuffle=False, seed=0))


# ---- Lightning


class Sums(pl.LightningModule):
    """Module that records the batches it gets from Lightning."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.seen: list[list[float]] = []
        self.num_validated = 0

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        self.seen.append([*labels.tolist(), images.double().mean().item()])
        return self.layer(images.float().mean().view(1, 1)).sum()

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.num_validated += len(batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-6)


def fit(
    make: Callable[[bool], Loader], folder: Path, max_epochs: int, ckpt_path: Path | None = None
) -> tuple[Sums, pl.Trainer]:
    module = Sums()
    trainer = pl.Trainer(
        max_epochs=max_epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, make(True), make(False), ckpt_path=ckpt_path)
    return module, trainer


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated")  # Lightning 2.6 with PyTorch 2.13
@pytest.mark.parametrize("kind", ["memory", "files", "stream"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_lightning_trains_and_resumes(
    kind: str, num_workers: int, image_split: ImageSplit, file_split: FileSplit, tmp_path: Path, write_parquet: Callable
) -> None:
    splits: dict[str, Callable[[], AbstractSplit]] = {
        "memory": lambda: image_split,
        "files": lambda: file_split,
        "stream": lambda: write_stream(tmp_path / "parquet", write_parquet).train,
    }
    split = splits[kind]()

    def make(shuffle: bool) -> Loader:
        return make_loader(split, batch_size=10, shuffle=shuffle, seed=0, drop_last=shuffle, num_workers=num_workers)

    whole, _ = fit(make, tmp_path, 2)
    assert len(whole.seen) == 4
    assert whole.num_validated == 2 * NUM_IMAGES + 20  # the sanity check sees two batches
    assert whole.seen[:2] != whole.seen[2:]
    first, trainer = fit(make, tmp_path, 1)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    resumed, _ = fit(make, tmp_path, 2, tmp_path / "last.ckpt")
    assert first.seen + resumed.seen == whole.seen


# ---- bad arguments


def test_rejects_bad_arguments(split: AbstractSplit) -> None:
    with pytest.raises(ValueError, match=r"`batch_size` \(=0\) must be positive"):
        make_loader(split, batch_size=0, shuffle=True, seed=0)
    with pytest.raises(ValueError, match=r"`batch_size` \(=26\) must not exceed the 25 images .* with `drop_last`"):
        make_loader(split, batch_size=26, shuffle=True, seed=0, drop_last=True)
    with pytest.raises(ValueError, match=r"`num_workers` \(=-1\) must not be negative; pass 0"):
        make_loader(split, batch_size=1, shuffle=True, seed=0, num_workers=-1)


def test_rejects_other_kinds_of_data_sets() -> None:
    with pytest.raises(TypeError, match=r"`split` \(of <class 'list'>\) must be a split of an `ImageDataset`; pass"):
        make_loader([1, 2], batch_size=1, shuffle=True, seed=0)
