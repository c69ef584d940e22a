import csv
import json
from dataclasses import replace

import matplotlib.image
import pytest
import torch

from revnet.training import EvaluateResult
from revnet.training.evaluation.confusion import Confusion

COUNTS = 90 * torch.eye(10, dtype=torch.int64)
COUNTS[3, 5] = 57
COUNTS[5, 3] = 43
RESULT = EvaluateResult(
    model="revnet38",
    data="a/b c",
    confusion=Confusion(COUNTS, [f"class{number}" for number in range(10)]),
    num_top5_errors=10,
    cross_entropy=0.25,
    seconds=0.5,
    device="cpu",
)


def test_report_has_accuracy_error_and_count():
    assert (RESULT.num_images, RESULT.num_errors, RESULT.accuracy, RESULT.error) == (1000, 100, 0.9, 0.1)
    assert (RESULT.top5_error, RESULT.images_per_second) == (0.01, 2000)
    assert RESULT.report() == "90.00 % (error 10.00 %, 100 of 1,000 wrong)"


def test_results_compare_their_figures(tmp_path):
    assert replace(RESULT, seconds=3.0, device="cuda", checkpoint=tmp_path, machine=["fast"]) == RESULT
    assert replace(RESULT, num_top5_errors=11) != RESULT
    assert replace(RESULT, confusion=Confusion(COUNTS.T.clone(), RESULT.confusion.class_names)) != RESULT


def test_writes_figures_table_and_picture(tmp_path):
    files = replace(RESULT, machine=["fast"]).save(tmp_path / "new" / "folder")
    assert [file.relative_to(tmp_path).as_posix() for file in files] == [
        f"new/folder/evaluation_a-b-c.{suffix}" for suffix in ("json", "csv", "png")
    ]
    assert sorted(files[0].parent.iterdir()) == sorted(files)  # no temporary file is left
    assert json.loads(files[0].read_text()) == {
        "model": "revnet38",
        "data": "a/b c",
        "checkpoint": None,
        "split_seed": None,
        "num_images": 1000,
        "num_errors": 100,
        "accuracy": 0.9,
        "error": 0.1,
        "num_top5_errors": 10,
        "top5_error": 0.01,
        "cross_entropy": 0.25,
        "seconds": 0.5,
        "images_per_second": 2000,
        "machine": ["fast"],
    }
    with files[1].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert (rows[3]["class"], rows[3]["error"], rows[3]["as class5"]) == ("class3", str(57 / 147), "57")
    assert matplotlib.image.imread(files[2]).std() > 0.05


@pytest.fixture
def no_picture(monkeypatch):
    """Skip the plot, which takes time."""
    monkeypatch.setattr(
        "revnet.training.evaluation.evaluate_result.plot_confusion", lambda confusion, path, title: None
    )


@pytest.mark.usefixtures("no_picture")
def test_json_has_null_for_missing_figures(tmp_path):
    files = replace(RESULT, num_top5_errors=None, cross_entropy=float("nan")).save(tmp_path)
    figures = json.loads(files[0].read_text())
    assert (figures["top5_error"], figures["cross_entropy"]) == (None, None)


@pytest.mark.usefixtures("no_picture")
@pytest.mark.parametrize(
    ("weights", "stem"),
    [
        ("last.safetensors", "evaluation_a-b-c"),
        ("last.ckpt", "evaluation_a-b-c"),
        ("best.safetensors", "evaluation_a-b-c_best"),
        ("v1.2.safetensors", "evaluation_a-b-c_v1.2"),
    ],
)
def test_file_names_depend_on_the_weights(tmp_path, weights, stem):
    files = replace(RESULT, checkpoint=tmp_path / weights).save()
    assert [file.name for file in files] == [f"{stem}.json", f"{stem}.csv", f"{stem}.png"]
    assert {file.parent for file in files} == {tmp_path}


def test_rejects_a_missing_or_invalid_output_dir(tmp_path):
    with pytest.raises(ValueError, match=r"`out_dir` \(=None\) must be given"):
        RESULT.save()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"`out_dir` \(='.*/file'\) cannot be written: File exists; pass a folder"):
        RESULT.save(tmp_path / "file")
