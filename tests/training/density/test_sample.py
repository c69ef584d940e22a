import matplotlib.image
import numpy as np
import pytest
import torch

from revnet.data import load_dataset
from revnet.errors import DataError
from revnet.training import NiceConfig, sample, train
from revnet.training.density.image_grid import make_grid, save_grid
from revnet.training.density.sample import known_pixels
from tests.training.samples import write_images


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "nice"
    small = {"num_couplings": 2, "hidden_dim": 16, "num_hidden": 1, "batch_size": 400, "max_updates": 3}
    return train(NiceConfig(**small, out_dir=str(folder)), quiet=True).folder


@pytest.mark.parametrize(
    ("missing", "expected"),
    [
        ("top", [[0, 0, 0, 0, 0]] * 1 + [[1, 1, 1, 1, 1]] * 2),
        ("bottom", [[1, 1, 1, 1, 1]] * 2 + [[0, 0, 0, 0, 0]] * 1),
        ("left", [[0, 0, 1, 1, 1]] * 3),
        ("right", [[1, 1, 1, 0, 0]] * 3),
    ],
)
def test_half_of_the_pixels_are_missing(missing, expected):
    assert known_pixels(missing, (2, 3, 5)).int().tolist() == [expected]


def test_random_mask_hides_about_half_of_the_pixels():
    known = known_pixels("random", (1, 100, 100), seed=3)
    assert 0.48 < known.float().mean() < 0.52, "four standard deviations"
    assert torch.equal(known, known_pixels("random", (1, 100, 100), seed=3))


def test_known_pixels_do_not_change(folder, tmp_path):
    sample(folder, num_samples=1, missing="left", num_steps=1, out_dir=tmp_path)
    picture = matplotlib.image.imread(tmp_path / "inpainting_left.png")
    height, width = 3 * 9 + 1, 20 * 9 + 1
    factor = round(1000 / width)
    grid = picture[-height * factor :, -width * factor :, 0]  # below the title, to the right of the labels
    pixels = np.rint(grid[::factor, ::factor] * 255).astype(int)
    original, gap, filled = pixels[1:9, 1:], pixels[10:18, 1:], pixels[19:27, 1:]
    for column in range(20):
        known = slice(9 * column + 4, 9 * column + 8)
        assert (original[:, known] == gap[:, known]).all()
        assert (original[:, known] == filled[:, known]).all()
        assert (gap[:, 9 * column : 9 * column + 4] == 128).all()
    chosen = load_dataset("digits").test.images[::18][:20]
    assert (original[:, :8] == chosen[0, 0].numpy()).all()


def test_returns_and_reports_samples(folder, tmp_path):
    samples = sample(folder, num_samples=7, out_dir=tmp_path / "new" / "folder")
    assert samples.images.shape == (7, 1, 8, 8)
    assert samples.images.dtype == torch.uint8
    assert samples.files == (tmp_path / "new" / "folder" / "samples.png",)
    assert (samples.data, samples.num_test_images) == ("digits", 360)
    assert f"test bits/dim  {samples.test_bits_per_dim:.4f} (360 images of digits)" in samples.report()


def test_samples_at_temperature_zero_are_equal(folder, tmp_path):
    images = sample(folder, num_samples=3, temperature=0.0, out_dir=tmp_path).images
    assert torch.equal(images[0], images[1])
    assert torch.equal(images[0], images[2])


def test_rejects_data_of_another_shape(folder, tmp_path, monkeypatch):
    from tests.training.samples import make_dataset

    other = make_dataset(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), ["any"])
    monkeypatch.setattr("revnet.training.density.images.load_dataset", lambda *_, **__: other)
    with pytest.raises(ValueError, match=r"`data` \(='pets'\) has images of 1x1x3, but .* 1x8x8 \(digits\); pass data"):
        sample(folder, out_dir=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_rejects_an_unknown_part(folder):
    with pytest.raises(ValueError, match=r"`missing` \(='middle'\) must be `top` or `bottom` or `left` or `right`"):
        sample(folder, missing="middle")


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_places_every_image(tmp_path, channels):
    images = torch.randint(0, 255, (5, channels, 3, 4), dtype=torch.uint8)
    grid = make_grid(images, 3)
    assert grid.shape == (channels, 2 * 4 + 1, 3 * 5 + 1)
    assert torch.equal(grid[:, 1:4, 11:15], images[2])
    assert torch.equal(grid[:, 5:8, 6:10], images[4])
    assert (grid[:, :, ::5] == 255).all()
    save_grid(images, tmp_path / "grid.png", num_columns=3)
    picture = matplotlib.image.imread(tmp_path / "grid.png")
    assert picture.shape[:2] == (9 * 62, 16 * 62), "each pixel is a square of 62, for a width of about 1000"
    assert (picture.ndim == 3) == (channels == 3)


def test_grid_has_room_for_its_texts(tmp_path):
    images = torch.zeros(6, 1, 4, 4, dtype=torch.uint8)
    save_grid(images, tmp_path / "plain.png", num_columns=3)
    title = "a title " * 20  # wider than the grid
    save_grid(images, tmp_path / "texts.png", num_columns=3, title=title, row_labels=("original", "filled in"))
    plain, texts = (matplotlib.image.imread(tmp_path / f"{name}.png") for name in ("plain", "texts"))
    is_dark = (texts[:, :, 0] < 0.5) if texts.ndim == 3 else texts < 0.5
    title_height = texts.shape[0] - plain.shape[0]
    assert 0 < is_dark.any(axis=1).argmax() < title_height, "the title is above the grid"
    labels = is_dark[title_height:, : is_dark[-100].argmax()]  # to the left of the first image of the last row
    assert labels[: len(labels) // 2].any()
    assert labels[len(labels) // 2 :].any()


def test_a_damaged_image_can_be_skipped(tmp_path, caplog):
    for part in ("train", "val"):
        write_images(tmp_path / "images" / part / "digit", 12)
    settings = {"num_couplings": 2, "hidden_dim": 8, "num_hidden": 1, "batch_size": 8, "epochs": 1, "image_size": 4}
    run = train(NiceConfig(**settings, data=str(tmp_path / "images"), out_dir=str(tmp_path / "run")), quiet=True)
    damaged = next((tmp_path / "images" / "val").rglob("*.png"))
    damaged.write_bytes(b"")
    with pytest.raises(DataError, match=r"set `on_corrupt` to 'skip'"):
        sample(run.folder, num_samples=1)
    assert sample(run.folder, num_samples=1, on_corrupt="skip").num_test_images == 11
    assert damaged.name in caplog.text
