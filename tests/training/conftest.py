from pathlib import Path

import pytest

from revnet.training import TrainConfig, TrainResult, train


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """A run of two epochs in a folder that many tests share: copy it before you change anything."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    return train(TrainConfig(epochs=2, out_dir=str(folder)), quiet=True)


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes as long as the rest of a short run; the runs of fixtures, as above, draw."""
    monkeypatch.setattr(
        "revnet.training.run.execute.plot_learning_curve", lambda rows, path, title, **options: path.touch()
    )


@pytest.fixture
def out_dir(tmp_path: Path) -> str:
    return str(tmp_path / "run")
