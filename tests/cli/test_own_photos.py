"""A folder of photographs as people have them: 212 images of four classes, with spaces and umlauts in the names."""

import csv
import json
from pathlib import Path

import pytest

from revnet.cli.main import main
from revnet.data import load_dataset

CIFAR10 = Path(__file__).parents[3] / "shared" / "data" / "cifar10" / "test-00000-of-00001.parquet"
CLASSES = {0: "große Flugzeuge", 1: "Autos & Züge", 7: "Pferde (müde)", 8: "Schiffe"}
NUM_IMAGES = 53  # of each class
SETTINGS = ["--model", "revnet38", "--image-size", "32", "--epochs", "3", "--num-workers", "0", "--num-threads", "1"]

pytestmark = pytest.mark.skipif(not CIFAR10.is_file(), reason="CIFAR-10 is not at ../shared/data/cifar10")


def write_photos(folder: Path) -> None:
    """Write the first images of each class as PNG files."""
    from pyarrow.parquet import read_table

    rows = read_table(CIFAR10, columns=["img", "label"]).slice(0, 1000).to_pylist()
    for label, name in CLASSES.items():
        encoded = [row["img"]["bytes"] for row in rows if row["label"] == label]
        (folder / name).mkdir(parents=True)
        for number in range(NUM_IMAGES):
            (folder / name / f"Übung {number}.png").write_bytes(encoded[number])


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos") / "Meine schönen Fotos"
    write_photos(folder)
    return folder


@pytest.fixture(scope="module")
def run(photos, tmp_path_factory):
    """Return the folder of a run of three epochs, started by the command."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", "--data", str(photos), *SETTINGS, "--out-dir", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def answers(photos, run):
    """Return the answer for each image, as `revnet predict` writes it."""
    table = run / "answers.jsonl"
    assert main(["predict", str(run / "last.safetensors"), str(photos), "--top", "4", "--jsonl", str(table)]) == 0
    rows = [json.loads(line) for line in table.read_text(encoding="utf-8").splitlines()]
    assert [row["file"] for row in rows] == sorted(map(str, photos.rglob("*.png")))
    assert len(rows) == 212
    return {Path(row["file"]): row["answers"][0]["class"] for row in rows}


def right_share(answers, split):
    files = [Path(split.file(index)) for index in range(len(split))]
    return sum(answers[file] == file.parent.name for file in files) / len(files)


def test_predictions_equal_the_evaluation(run, photos, answers, revnet):
    code, output, _ = revnet("evaluate", run / "last.safetensors")
    assert code == 0
    assert (
        "data           Meine schönen Fotos, 44 test images of 4 classes, a fifth of each class, chosen by seed 0"
        in (output.splitlines())
    )
    evaluated = json.loads((run / "evaluation_Meine-schönen-Fotos.json").read_text())
    assert evaluated["accuracy"] == json.loads((run / "summary.json").read_text())["test_accuracy"]
    assert right_share(answers, load_dataset(photos).test) == evaluated["accuracy"]


def test_photographs_are_predicted_as_they_were_trained(run, photos, answers):
    """The answers are at least as right as they were during the last epoch, before its updates."""
    with (run / "metrics.csv").open() as file:
        train_accuracy = float(list(csv.DictReader(file))[-1]["train_accuracy"])
    training, _ = load_dataset(photos).holdout(0.1, 0)
    assert set(answers.values()) == set(CLASSES.values())
    assert right_share(answers, training) >= train_accuracy
