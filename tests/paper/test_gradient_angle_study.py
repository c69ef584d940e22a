"""A gradient-angle study of three updates on digits: correct records, and unchanged training."""

import csv
import dataclasses
import re

import pytest
import torch

from revnet.errors import MissingDependencyError
from revnet.paper import GradientAngle, run_gradient_angle
from revnet.paper.gradient_angle import page as page_module
from revnet.paper.gradient_angle.draw import _running_mean
from revnet.paper.gradient_angle.gradients import ALL, GradientError
from revnet.paper.gradient_angle.study import measure_gradient_angle
from revnet.training import TrainConfig, load_classifier, train
from tests.training.samples import newest_checkpoint

CONFIG = TrainConfig(max_updates=3, batch_size=50)
GROUPS = ["stem", "stage 1", "stage 2", "stage 3", "head", ALL]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Return both runs, measured before the first and the last of three updates."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("study"))
        state = torch.get_rng_state()
        yield measure_gradient_angle(CONFIG, GradientAngle(5, with_reference=True), quiet=True)
        torch.set_rng_state(state)


def test_measures_before_the_first_and_last_update(study):
    assert list(study.errors) == [0, 2]
    for errors in study.errors.values():
        assert [error.group for error in errors] == GROUPS
        *stages, head, together = errors
        assert (head.angle_degrees, head.relative_error) == (0, 0)
        assert all(0 < error.angle_degrees < 5 for error in [*stages, together])
        assert all(error.reference_angle_degrees > 0 for error in errors)


def test_the_twins_start_equal(study):
    assert study.reversed.losses[0] == study.stored.losses[0]
    assert [len(run.losses) for run in study.runs.values()] == [3, 3]
    assert study.reversed.losses == pytest.approx(study.stored.losses, rel=0.05)  # rounding, amplified by two updates
    assert list(study.reversed.val_errors) == [3]
    stored = TrainConfig.load(study.stored.result.folder / "config.yaml")
    assert (stored.policy, stored.seed) == ("store", CONFIG.seed)


def test_records_equal_the_log_of_the_run(study):
    for run in study.runs.values():
        with (run.result.folder / "metrics.csv").open() as file:
            (row,) = csv.DictReader(file)
        assert sum(run.losses) / 3 == pytest.approx(float(row["train_loss"]), rel=1e-5)
        assert run.val_errors == {3: pytest.approx(1 - float(row["val_accuracy"]))}


def test_does_not_change_the_training(study, tmp_path):
    alone = train(dataclasses.replace(CONFIG, out_dir=str(tmp_path / "alone")), quiet=True)
    tensors = [load_classifier(folder).state_dict() for folder in (alone.folder, study.reversed.result.folder)]
    assert tensors[0].keys() == tensors[1].keys()
    for name, tensor in tensors[0].items():
        assert torch.equal(tensor, tensors[1][name]), name
    paths = (newest_checkpoint(folder) for folder in (alone.folder, study.reversed.result.folder))
    checkpoints = [torch.load(path, weights_only=True) for path in paths]
    assert checkpoints[0]["callbacks"].keys() == checkpoints[1]["callbacks"].keys()  # so both can be resumed


@pytest.mark.slow
def test_exact_reversal_has_no_error_and_a_page_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exact = measure_gradient_angle(dataclasses.replace(CONFIG, exact=True), GradientAngle(5), quiet=True)
    assert list(exact.errors) == [0, 2]
    for errors in exact.errors.values():
        assert all((error.angle_degrees, error.relative_error) == (0, 0) for error in errors)
    assert exact.reversed.losses == exact.stored.losses
    page = page_module.write_study(exact, tmp_path, "revnet figure gradient-angle --exact")
    assert page.name.startswith("gradient-angle-exact_revnet38_digits_cpu")
    assert page.with_suffix(".png").exists()


def read(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_writes_page_tables_and_figure(study, tmp_path):
    page = page_module.write_study(study, tmp_path, "revnet figure gradient-angle --some-flag")
    stem = page.name.removesuffix(".md")
    assert re.fullmatch(r"gradient-angle_revnet38_digits_cpu\d+_\d{4}-\d\d-\d\d", stem)
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{stem}{end}" for end in (".md", ".csv", "_curves.csv", ".png")
    }
    text = page.read_text()
    for part in (
        "- Hardware: ",
        "threads used: 1",
        "- Versions: PyTorch ",
        "- Date: ",
        "revnet figure gradient-angle --some-flag`",
        "data digits, model revnet38, epochs 60, max_updates 3, batch_size 50, seed 0, lr 0.1, precision 32-true",
        f"![{stem}.png]({stem}.png)",
        "before 2 of its 3 updates",
        "| head | 0 | 0 | 0 | 0 | 0 | 0 | ",
        "| training loss, mean of the last 1 | ",
        "| validation error after the last epoch | ",
        "| test error, last weights | ",
    ):
        assert part in text
    # Which update first differs by rounding depends on the release of PyTorch.
    assert re.search(r"equal, bit for bit(, up to update \d;|\.)", text)
    angles = read(tmp_path / f"{stem}.csv")
    assert [(row["update"], row["group"]) for row in angles] == [(u, group) for u in "02" for group in GROUPS]
    assert float(angles[0]["angle_degrees"]) == study.errors[0][0].angle_degrees
    assert float(angles[-1]["reference_relative_error"]) == study.errors[2][-1].reference_relative_error
    curves = read(tmp_path / f"{stem}_curves.csv")
    assert [float(row["stored_loss"]) for row in curves] == study.stored.losses
    assert [row["update"] for row in curves] == ["0", "1", "2"]
    assert [row["reversed_val_error"] for row in curves] == ["", "", str(study.reversed.val_errors[3])]
    assert (tmp_path / f"{stem}.png").read_bytes().startswith(b"\x89PNG")


def test_names_the_folder_that_cannot_be_written(study, tmp_path):
    with pytest.raises(ValueError, match=r"^`out_dir` \(='.*/missing'\) cannot be written: No such file or directory;"):
        page_module.write_study(study, tmp_path / "missing", "some command")


def test_page_of_equal_gradients_without_validation(study, tmp_path):
    """There is no validation set, all gradients are equal, and one loss is NaN."""
    equal = {update: [GradientError(group, 0.0, 0.0) for group in GROUPS] for update in study.errors}
    runs = {
        name: dataclasses.replace(run, val_errors={}, losses=[1.0, 0.0, float("nan")])
        for name, run in study.runs.items()
    }
    empty = dataclasses.replace(study, errors=equal, **runs)
    page = page_module.write_study(empty, tmp_path, "some command")
    text = page.read_text()
    assert "| all | 0 | 0 | 0 | 0 | 0 | 0 |\n" in text
    assert "reference" not in text
    assert "validation" not in text
    assert page.with_suffix(".png").stat().st_size > 0


def test_curves_are_smoothed_by_running_means():
    assert _running_mean([1.0, 3.0, 5.0, 7.0], 2) == [2.0, 4.0, 6.0]
    assert _running_mean([1.0, 3.0], 1) == [1.0, 3.0]


@pytest.mark.parametrize(
    ("settings", "options", "error", "message"),
    [
        ({"model": "resnet32"}, {}, ValueError, r"`model` \(='resnet32'\) has no reversible block"),
        ({"model": "revnet83"}, {}, ValueError, "did you mean 'revnet38'"),
        (
            {"policy": "store"},
            {},
            ValueError,
            r"`policy` \(='store'\) must not be set, since both policies are run; leave it out",
        ),
        (
            {"out_dir": "x"},
            {},
            ValueError,
            r"`out_dir` \(='x'\) must not be set, since there are two runs; leave it out",
        ),
        ({}, {"every": 0}, ValueError, r"`every` \(=0\) must be at least 1; 50 is usual"),
        ({}, {"every": 2.5}, TypeError, r"`every` \(=2.5\) must be an integer"),
        ({}, {"every": True}, TypeError, r"`every` \(=True\) must be an integer"),
    ],
)
def test_rejects_wrong_settings_before_training(tmp_path, monkeypatch, settings, options, error, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        run_gradient_angle(TrainConfig(**settings), tmp_path / "out", "some command", quiet=True, **options)
    assert not list(tmp_path.iterdir())


def test_requires_matplotlib_before_training(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(MissingDependencyError, match="a figure needs matplotlib, which is not installed"):
        run_gradient_angle(CONFIG, tmp_path / "out", "some command")
    assert not list(tmp_path.iterdir())
