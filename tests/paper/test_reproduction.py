import csv
import shutil

import pytest

from revnet.paper.curves import plot_curves
from revnet.paper.report import write_report
from revnet.paper.reproduction import reproduce
from revnet.paper.tables import Row, Table
from revnet.training import TrainingInterrupted
from revnet.training.run.callbacks import RunFiles

# A recipe for digits, since a real table would take hours.
TABLE = Table(
    name="digits-quick",
    recipe="digits/quick",
    num_classes=10,
    rows=(Row(model="revnet38", pair="resnet32", paper_error=1.5, rerun_error=2.5),),
)
SETTINGS = {"epochs": 1, "batch_size": 400}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return the folder of a table with two seeds. Tests share it and must copy it before changing it."""
    folder = tmp_path_factory.mktemp("tables") / "digits"
    reproduce(TABLE, folder, seeds=[0, 1], quiet=True, command="some command", **SETTINGS)
    return folder


def read_csv(folder):
    with (folder / "table.csv").open() as file:
        return list(csv.DictReader(file))


def test_every_seed_has_a_run_and_a_row(finished):
    files = {"table.csv", "table.md", "table.png"}
    assert {path.name for path in finished.iterdir()} == {"revnet38_seed0", "revnet38_seed1"} | files
    rows = read_csv(finished)
    assert [(row["model"], row["seed"], row["num_updates"]) for row in rows] == [
        ("revnet38", "0", "3"),
        ("revnet38", "1", "3"),
    ]
    assert all(row["paper_error"] == "1.5" and row["hardware"] and row["versions"] and row["date"] for row in rows)
    assert int(rows[0]["peak_bytes"]) < int(rows[0]["stored_peak_bytes"]) < int(rows[0]["process_peak_bytes"])


def test_page_shows_runs_and_the_papers_errors(finished):
    page = (finished / "table.md").read_text()
    errors = [float(row["test_error"]) for row in read_csv(finished)]
    assert "- Hardware: " in page
    assert "- Command: `some command`" in page
    assert "budget: 3 updates of 400 images, 32-true" in page
    line = next(line for line in page.splitlines() if line.startswith("| revnet38"))
    assert f"| {errors[0]:.2f}, {errors[1]:.2f} | {sum(errors) / 2:.2f} ± " in line
    assert "| 1.50 | 2.50 |" in line


def test_picture_has_a_curve_and_a_test_error_for_each_run(finished, tmp_path, monkeypatch):
    assert "![Training curves of digits-quick](table.png)" in (finished / "table.md").read_text()
    figures = []
    monkeypatch.setattr("revnet.paper.curves.save", lambda figure, path: figures.append(figure))
    shutil.copytree(finished, tmp_path / "runs")
    write_report(TABLE, tmp_path / "runs", "some command")
    losses, errors = figures[0].axes
    logs = [(finished / f"revnet38_seed{seed}" / "metrics.csv").read_text() for seed in (0, 1)]
    rows = [row for log in logs for row in csv.DictReader(log.splitlines())]
    assert [list(line.get_ydata()) for line in losses.lines] == [[float(row["train_loss"])] for row in rows]
    percent = [float(row["test_error"]) for row in read_csv(finished)]
    assert [line.get_ydata()[0] for line in errors.lines[1::2]] == pytest.approx(percent)
    assert {line.get_color() for line in losses.lines} == {"#4477aa"}


def test_names_the_folder_that_cannot_be_written(finished):
    with pytest.raises(ValueError, match=r"^`out_dir` \(='.*table.md'\) cannot be written: File exists; pass a folder"):
        write_report(TABLE, finished / "table.md", "some command")


@pytest.mark.parametrize("log", ["epoch,train_loss\n1,x\n", "epoch,train_loss,train_accuracy\n", ""])
def test_draws_no_picture_from_a_damaged_log(finished, tmp_path, log):
    folder = shutil.copytree(finished, tmp_path / "runs")
    (folder / "revnet38_seed1" / "metrics.csv").write_text(log)
    with pytest.warns(UserWarning, match=r"table\.png` was not drawn: `.*seed1/metrics\.csv` is missing or damaged"):
        write_report(TABLE, folder, "some command")
    assert not (folder / "table.png").exists(), "it would show other runs"
    page = (folder / "table.md").read_text()
    assert "| revnet38 | 464,890 | 0, 1 |" in page
    assert "png" not in page


def test_a_run_with_damaged_settings_is_left_out(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "runs")
    path = folder / "revnet38_seed0" / "config.yaml"
    path.write_text(path.read_text().replace("seed: 0", "seed: abc"))
    with pytest.warns(UserWarning, match=r"seed0` is left out of the table: .*must be an integer"):
        figures = write_report(TABLE, folder, "some command")
    assert [run.seed for run in figures] == [1]


@pytest.mark.parametrize(("lowest", "scale"), [(0.0, "linear"), (0.5, "log")])
def test_shows_an_error_of_zero(tmp_path, monkeypatch, lowest, scale):
    figures = []
    monkeypatch.setattr("revnet.paper.curves.save", lambda figure, path: figures.append(figure))
    curve = {"epoch": [1.0, 2.0], "train_loss": [1.0, 0.5], "train_accuracy": [0.5, 0.9]}
    plot_curves([("revnet38", lowest, curve)], tmp_path / "table.png", "a title")
    assert figures[0].axes[1].get_yscale() == scale


def test_does_not_repeat_finished_runs(finished):
    before = {path: path.stat().st_mtime_ns for path in finished.glob("*/*")}
    figures = reproduce(TABLE, finished, seeds=[1, 0], quiet=True, command="some command", **SETTINGS)
    assert [run.seed for run in figures] == [0, 1]
    assert {path: path.stat().st_mtime_ns for path in finished.glob("*/*")} == before


def test_continues_an_interrupted_table(tmp_path, monkeypatch):
    write_files = RunFiles.on_train_epoch_end

    def write_files_and_stop(self, trainer, pl_module):
        write_files(self, trainer, pl_module)
        raise KeyboardInterrupt

    settings = SETTINGS | {"epochs": 2}
    with monkeypatch.context() as patch:
        patch.setattr(RunFiles, "on_train_epoch_end", write_files_and_stop)
        with pytest.raises(TrainingInterrupted, match=r"stopped; run the same command again to continue\."):
            reproduce(TABLE, tmp_path, quiet=True, **settings)
    (figures,) = reproduce(TABLE, tmp_path, quiet=True, **settings)
    assert figures.num_updates == 6
    log = (tmp_path / "revnet38_seed0" / "metrics.csv").read_text().splitlines()
    assert len(log) == 3, "a header and two epochs, the first from before the interruption"


@pytest.mark.slow
def test_restarts_a_run_without_a_finished_epoch(tmp_path, finished):
    folder = tmp_path / "revnet38_seed0"
    folder.mkdir()
    shutil.copy(finished / "revnet38_seed0" / "config.yaml", folder)
    (figures,) = reproduce(TABLE, tmp_path, quiet=True, **SETTINGS)
    assert figures.num_updates == 3


def test_merges_runs_of_several_machines(tmp_path, finished):
    for seed in (0, 1):
        shutil.copytree(finished / f"revnet38_seed{seed}", tmp_path / f"revnet38_seed{seed}")
    figures = reproduce(TABLE, tmp_path, report_only=True, quiet=True)
    assert [run.seed for run in figures] == [0, 1]


def test_report_without_runs(tmp_path):
    assert reproduce(TABLE, tmp_path / "none", report_only=True, quiet=True) == []
    assert "No run has finished yet." in (tmp_path / "none" / "table.md").read_text()


def test_compares_pairs_over_their_common_seeds(finished, tmp_path):
    # A ResNet with seed 1 alone, here a renamed copy of the RevNet's run.
    for seed in (0, 1):
        shutil.copytree(finished / f"revnet38_seed{seed}", tmp_path / f"revnet38_seed{seed}")
    shutil.copytree(finished / "revnet38_seed1", tmp_path / "resnet32_seed1")
    table = Table(
        name="pair",
        recipe="cifar10/quick",
        num_classes=10,
        rows=(Row(model="resnet32", pair="revnet38"), Row(model="revnet38", pair="resnet32")),
    )
    write_report(table, tmp_path, "some command")
    assert "revnet38 minus resnet32: +0.00 points over 1 seed (+0.00)." in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": ["resnet33"]}, r"`models` \(=resnet33\) is not in the table digits-quick; it has revnet38"),
        ({"seeds": [0, 0]}, r"`seeds` \(=\[0, 0\]\) must be at least one number, all different"),
        ({"seeds": []}, r"`seeds` \(=\[\]\) must be at least one number, all different"),
        ({"seeds": [-1]}, r"`seed` \(=-1\) must be 0 or more"),
        ({"epochs": 0}, r"`epochs` \(=0\) must be 1 or more"),
        ({"model": "resnet32"}, r"`model` cannot be set for a table"),
        ({"epoch": 3}, r"`epoch` cannot be set for a table"),
    ],
)
def test_rejects_wrong_arguments_before_training(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        reproduce(TABLE, tmp_path / "out", quiet=True, **options)
    assert not (tmp_path / "out").exists()


def test_rejects_runs_with_other_settings(finished):
    with pytest.raises(ValueError, match=r"holds a run of revnet38 with lr = 0.1, not 0.2; pass another folder"):
        reproduce(TABLE, finished, quiet=True, **SETTINGS, lr=0.2)
