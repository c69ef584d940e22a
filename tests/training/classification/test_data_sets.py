"""Training, evaluation and resumption on every kind of data set."""

import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from revnet.errors import DataError
from revnet.training import TrainConfig, TrainingInterrupted, evaluate, load_classifier, resume, train
from tests.training.samples import stop_after_epoch, write_image_folder

SAMPLE = Path(__file__).parents[4] / "shared" / "data" / "imagenet-sample"


def write_cifar100(path, num_images=30):
    """Write an archive in the format of CIFAR-100, with noise for images."""
    noise = np.random.default_rng(0)
    files = {"meta": {"fine_label_names": [f"class {i}" for i in range(100)], "coarse_label_names": ["any"]}}
    for part in ("train", "test"):
        pixels = noise.integers(0, 256, (num_images, 3072), dtype=np.uint8)
        labels = [int(label) for label in noise.integers(0, 100, num_images)]
        files[part] = {"data": pixels, "fine_labels": labels, "coarse_labels": [0] * num_images}
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            data = pickle.dumps(content, protocol=2)
            member = tarfile.TarInfo(f"cifar-100-python/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def test_trains_on_the_cifar100_archive(tmp_path):
    archive = write_cifar100(tmp_path / "cifar-100-python.tar.gz")
    settings = {"epochs": 1, "batch_size": 10, "val_fraction": 0, "num_threads": 1}
    result = train(TrainConfig(data=str(archive), out_dir=str(tmp_path / "run"), **settings), quiet=True)
    assert (result.num_updates, result.test.num_images, result.test.data) == (3, 30, "cifar100")
    assert evaluate(tmp_path / "run") == result.test


def test_trains_resumes_and_evaluates_a_folder_of_images(tmp_path, monkeypatch):
    data = write_image_folder(tmp_path / "pets", num_images=8)
    settings = {"data": str(data), "epochs": 2, "batch_size": 6, "image_size": 16, "val_fraction": 0.25}
    settings |= {"num_workers": 2, "num_threads": 1, "color_distortion": True, "model": "revnet38"}
    straight = train(TrainConfig(**settings, out_dir=str(tmp_path / "straight")), quiet=True)
    with monkeypatch.context() as patch:
        stop_after_epoch(patch, 1)
        with pytest.raises(TrainingInterrupted):
            train(TrainConfig(**settings, out_dir=str(tmp_path / "stopped")), quiet=True)
    resumed = resume(tmp_path / "stopped", quiet=True)
    expected, actual = (load_classifier(result.folder).state_dict() for result in (straight, resumed))
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), f"{name}: crops, colors or order differ from the run without a stop"
    assert evaluate(tmp_path / "stopped") == resumed.test
    assert resumed.test.num_images == 24


def test_corrupt_image_stops_the_run_or_is_skipped(tmp_path):
    data = write_image_folder(tmp_path / "pets", num_images=4)
    corrupt = next((data / "train" / "cat").iterdir())
    corrupt.write_bytes(b"")
    settings = {"data": str(data), "epochs": 1, "batch_size": 4, "image_size": 16, "val_fraction": 0, "num_workers": 1}
    with pytest.raises(DataError, match=corrupt.name) as caught:
        train(TrainConfig(**settings, out_dir=str(tmp_path / "stops")), quiet=True)
    assert "\n" not in str(caught.value)
    result = train(TrainConfig(**settings, on_corrupt="skip", out_dir=str(tmp_path / "skips")), quiet=True)
    assert result.num_updates == 3


@pytest.mark.slow
@pytest.mark.skipif(not SAMPLE.is_dir(), reason="the sample of ImageNet is not at ../shared/data/imagenet-sample")
def test_revnet56_memorizes_a_thousand_photographs(tmp_path):
    """Train on whole images of 32x32 without flips, to check that images, labels and gradients belong together."""
    config = TrainConfig(
        data=str(SAMPLE),
        model="revnet56",
        epochs=25,
        batch_size=50,
        lr=0.02,
        schedule="cosine",
        warmup=0.1,
        nesterov=True,
        image_size=32,
        crop_area=(0.95, 1.0),
        horizontal_flip=False,
        val_fraction=0,
        precision="bf16-mixed",
        out_dir=str(tmp_path / "run"),
    )
    train(config, quiet=True)
    rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("train_loss")
    losses = [float(row.split(",")[column]) for row in rows[1:]]
    assert losses[0] > 6.5, "about log(1000) at first"
    assert losses[-1] < 1
