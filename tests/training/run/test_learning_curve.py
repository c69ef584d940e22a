import matplotlib.image
import pytest

from revnet.training.run.learning_curve import plot_learning_curve

ROW = {"epoch": 1, "updates": 10, "lr": 0.1, "train_loss": 2.0, "train_accuracy": 0.5}


def test_run_without_accuracy_has_one_panel(tmp_path):
    rows = [{"epoch": n, "updates": n, "lr": 1 / n, "train_loss": -1.0 / n, "val_loss": 1.0} for n in range(1, 9)]
    plot_learning_curve(rows, tmp_path / "curve.png", "a density of images", loss_name="bits per dimension")
    height, width, _ = matplotlib.image.imread(tmp_path / "curve.png").shape
    assert (height, width) == (540, 900)


@pytest.mark.parametrize(
    "rows",
    [
        [ROW],
        [ROW, ROW | {"epoch": 2, "lr": 0.01, "train_loss": 1.0}],
        [ROW | {"val_loss": 3.0, "val_accuracy": 0.25}, ROW | {"epoch": 2, "val_loss": 2.0, "val_accuracy": 0.5}],
        [ROW | {"train_loss": 0.0}],
    ],
    ids=["one epoch", "no validation", "validation", "loss of zero"],
)
def test_draws_every_kind_of_run(tmp_path, rows):
    plot_learning_curve(rows, tmp_path / "curve.png", "a model on some data")
    picture = matplotlib.image.imread(tmp_path / "curve.png")
    assert picture.std() > 0.05  # something is drawn
    assert [path.name for path in tmp_path.iterdir()] == ["curve.png"]


def test_draws_a_validation_that_is_rarer_than_epochs(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr("revnet.training.run.learning_curve.save", lambda figure, path: figures.append(figure))
    validated = {"val_loss": 3.0, "val_accuracy": 0.25}
    rows = [ROW | {"epoch": epoch} | (validated if epoch % 2 == 0 else {}) for epoch in range(1, 5)]
    plot_learning_curve(rows, tmp_path / "curve.png", "a model on some data")
    lines = [{line.get_label(): line for line in axes.lines}["validation"] for axes in figures[0].axes]
    assert [line.get_xydata().tolist() for line in lines] == [[[2, 3.0], [4, 3.0]], [[2, 25.0], [4, 25.0]]]
