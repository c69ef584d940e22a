import csv
import math

import pytest
import torch
from PIL import Image

from revnet.data import load_dataset
from revnet.errors import DataError
from revnet.training import NiceConfig, load_density, score_images, train
from revnet.training.density.score import save_scores


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a run and the first five test images of the digits."""
    folder = tmp_path_factory.mktemp("score")
    small = {"num_couplings": 2, "hidden_dim": 16, "num_hidden": 1, "batch_size": 400, "max_updates": 3}
    train(NiceConfig(**small, out_dir=str(folder / "run")), quiet=True)
    for number, image in enumerate(load_dataset("digits").test.images[:5]):
        Image.fromarray(image[0].numpy()).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def files(folder):
    return [folder / f"{number}.png" for number in range(5)]


def test_score_is_the_density_of_the_pixels(folder, files):
    scores = score_images(folder / "run", files, num_draws=64)
    density, images = load_density(folder / "run"), load_dataset("digits").test.images[:5]
    with torch.no_grad():
        draws = torch.stack([density(images, torch.Generator().manual_seed(seed)) for seed in range(64)])
    for score, own in zip(scores, draws.unbind(1), strict=True):
        standard_error = (2 * own.var() / 64).sqrt()  # both are means over 64 draws
        assert score.bits_per_dim == pytest.approx(float(own.mean()), abs=5 * float(standard_error))
        assert score.log_prob == pytest.approx(-score.bits_per_dim * 64 * math.log(2))
    assert [score.path for score in scores] == files


def test_score_does_not_depend_on_the_other_images(folder, files):
    together = score_images(folder / "run", files)
    reversed_order = score_images(folder / "run", files[::-1])
    assert together == reversed_order[::-1]
    (alone,) = score_images(folder / "run", files[2:3])
    assert alone.bits_per_dim == pytest.approx(together[2].bits_per_dim, rel=1e-5)  # other kernels for other batches
    assert score_images(folder / "run", files, seed=1) != together


def test_file_that_is_not_an_image(folder, files, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_text("text")
    errors = []
    scores = score_images(folder / "run", [bad, *files], on_error=errors.append)
    assert [score.path for score in scores] == files
    assert [str(bad) in str(error) for error in errors] == [True]
    with pytest.raises(DataError, match=r"bad.png' cannot be decoded"):
        score_images(folder / "run", [bad])


def test_saves_a_table(folder, files, tmp_path):
    scores = score_images(folder / "run", files)
    save_scores(scores, tmp_path / "scores.csv")
    with (tmp_path / "scores.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["file", "bits_per_dim", "log_prob"]
    assert [(row[0], float(row[1]), float(row[2])) for row in rows[1:]] == [
        (str(score.path), score.bits_per_dim, score.log_prob) for score in scores
    ]


def test_rejects_wrong_arguments(folder, files):
    with pytest.raises(TypeError, match=r"`paths` \(='.*'\) must be a list of files"):
        score_images(folder / "run", str(files[0]))
    with pytest.raises(ValueError, match=r"`num_draws` \(=0\) must be 1 or more"):
        score_images(folder / "run", files, num_draws=0)
