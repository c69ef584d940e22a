import csv
import shutil

import pytest

from revnet.paper.reproduction import reproduce
from revnet.paper.tables import Row, Table
from revnet.training import TrainingInterrupted
from revnet.training.run.callbacks import RunFiles

# The recipe for digits, in the place of a table that would take hours.
TABLE = Table(
    name="digits-quick",
    recipe="digits/quick",
    num_classes=10,
    rows=(Row(model="revnet38", pair="resnet32", paper_error=1.5, rerun_error=2.5),),
)
SETTINGS = {"epochs": 1, "batch_size": 400}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A table of two seeds. Shared by many tests: copy it before changing anything."""
    folder = tmp_path_factory.mktemp("tables") / "digits"
    reproduce(TABLE, folder, seeds=[0, 1], quiet=True, command="some command", **SETTINGS)
    return folder


def read_csv(folder):
    with (folder / "table.csv").open() as file:
        return list(csv.DictReader(file))


def test_every_seed_has_a_run_and_a_row(finished):
    assert {path.name for path in finished.iterdir()} == {"revnet38_seed0", "revnet38_seed1", "table.csv", "table.md"}
    rows = read_csv(finished)
    assert [(row["model"], row["seed"], row["num_updates"]) for row in rows] == [
        ("revnet38", "0", "3"),
        ("revnet38", "1", "3"),
    ]
    assert all(row["paper_error"] == "1.5" and row["hardware"] and row["versions"] and row["date"] for row in rows)
    assert int(rows[0]["peak_bytes"]) < int(rows[0]["stored_peak_bytes"]) < int(rows[0]["process_peak_bytes"])


def test_the_page_says_what_ran_and_stands_beside_the_paper(finished):
    page = (finished / "table.md").read_text()
    errors = [float(row["test_error"]) for row in read_csv(finished)]
    assert "- Hardware: " in page
    assert "- Command: `some command`" in page
    assert "budget: 3 updates of 400 images, 32-true" in page
    line = next(line for line in page.splitlines() if line.startswith("| revnet38"))
    assert f"| {errors[0]:.2f}, {errors[1]:.2f} | {sum(errors) / 2:.2f} ± " in line
    assert "| 1.50 | 2.50 |" in line


def test_finished_runs_are_not_made_again(finished):
    before = {path: path.stat().st_mtime_ns for path in finished.glob("*/*")}
    figures = reproduce(TABLE, finished, seeds=[1, 0], quiet=True, command="some command", **SETTINGS)
    assert [run.seed for run in figures] == [0, 1]
    assert {path: path.stat().st_mtime_ns for path in finished.glob("*/*")} == before


def test_a_stopped_table_goes_on(tmp_path, monkeypatch):
    write_files = RunFiles.on_train_epoch_end

    def write_files_and_stop(self, trainer, pl_module):
        write_files(self, trainer, pl_module)
        raise KeyboardInterrupt

    settings = SETTINGS | {"epochs": 2}
    with monkeypatch.context() as patch:
        patch.setattr(RunFiles, "on_train_epoch_end", write_files_and_stop)
        with pytest.raises(TrainingInterrupted, match=r"stopped; the same command goes on\."):
            reproduce(TABLE, tmp_path, quiet=True, **settings)
    (figures,) = reproduce(TABLE, tmp_path, quiet=True, **settings)
    assert figures.num_updates == 6
    log = (tmp_path / "revnet38_seed0" / "metrics.csv").read_text().splitlines()
    assert len(log) == 3, "a header and both epochs, the first from before the stop"


def test_a_run_that_finished_no_epoch_starts_again(tmp_path, finished):
    folder = tmp_path / "revnet38_seed0"
    folder.mkdir()
    shutil.copy(finished / "revnet38_seed0" / "config.yaml", folder)
    (figures,) = reproduce(TABLE, tmp_path, quiet=True, **SETTINGS)
    assert figures.num_updates == 3


def test_runs_of_several_machines_are_put_together(tmp_path, finished):
    for seed in (0, 1):
        shutil.copytree(finished / f"revnet38_seed{seed}", tmp_path / f"revnet38_seed{seed}")
    figures = reproduce(TABLE, tmp_path, report_only=True, quiet=True)
    assert [run.seed for run in figures] == [0, 1]


def test_an_empty_report_says_so(tmp_path):
    assert reproduce(TABLE, tmp_path / "none", report_only=True, quiet=True) == []
    assert "No run has finished yet." in (tmp_path / "none" / "table.md").read_text()


def test_pairs_are_compared_over_the_seeds_that_both_have(finished, tmp_path):
    # A ResNet of which only seed 1 is there: here a renamed copy of the RevNet's run, with one error more.
    for seed in (0, 1):
        shutil.copytree(finished / f"revnet38_seed{seed}", tmp_path / f"revnet38_seed{seed}")
    shutil.copytree(finished / "revnet38_seed1", tmp_path / "resnet32_seed1")
    table = Table(
        name="pair",
        recipe="cifar10/quick",
        num_classes=10,
        rows=(Row(model="resnet32", pair="revnet38"), Row(model="revnet38", pair="resnet32")),
    )
    from revnet.paper.report import write_report

    write_report(table, tmp_path, "some command")
    assert "revnet38 less resnet32: +0.00 points over 1 seed (+0.00)." in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": ["resnet33"]}, r"`models` \(=resnet33\) is not in the table digits-quick; it has revnet38"),
        ({"seeds": [0, 0]}, r"`seeds` \(=\[0, 0\]\) must be different numbers"),
        ({"seeds": []}, r"`seeds` \(=\[\]\) must be different numbers, at least one"),
        ({"seeds": [-1]}, r"`seed` \(=-1\) must be 0 or more"),
        ({"epochs": 0}, r"`epochs` \(=0\) must be 1 or more"),
        ({"model": "resnet32"}, r"`model` is no setting that a table leaves open"),
        ({"epoch": 3}, r"`epoch` is no setting that a table leaves open"),
    ],
)
def test_what_makes_no_sense_is_refused_before_a_run_starts(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        reproduce(TABLE, tmp_path / "out", quiet=True, **options)
    assert not (tmp_path / "out").exists()


def test_runs_of_other_settings_are_not_mixed(finished):
    with pytest.raises(ValueError, match=r"holds a run of revnet38 with lr = 0.1, not 0.2; pass another folder"):
        reproduce(TABLE, finished, quiet=True, **SETTINGS, lr=0.2)
