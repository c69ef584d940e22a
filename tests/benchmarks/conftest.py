"""What the tests of all benchmarks need."""

import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _import_path(monkeypatch):
    """Put the folder of the scripts on the import path, as when they are run."""
    monkeypatch.syspath_prepend(BENCHMARKS)


@pytest.fixture
def finished_run(tmp_path):
    """A folder with what pages read from a run of `revnet train`."""
    folder = tmp_path / "run"
    folder.mkdir()
    summary = {"model": "revvit_cifar", "data": "cifar10", "num_updates": 1500, "batch_size": 100, "test_images": 10000}
    summary |= {"train_seconds": 90.0, "test_accuracy": 0.5, "peak_bytes": 2**20, "stored_peak_bytes": 3 * 2**20}
    summary["machine"] = ["- Hardware: 2 cores of some processor", "- Command: `revnet train`"]
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "metrics.csv").write_text("epoch,train_loss,train_accuracy\n1,2.0,0.25\n2,1.5,0.45\n")
    return folder
