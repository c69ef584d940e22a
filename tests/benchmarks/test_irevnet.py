"""`benchmarks/irevnet.py` on a short run."""

import csv
from importlib import import_module

import pytest

from revnet.training import TrainConfig, train


@pytest.fixture
def train_model(tmp_path):
    def train_model(model):
        folder = tmp_path / model
        train(TrainConfig(model=model, epochs=1, max_updates=3, batch_size=100, val_fraction=0.1, out_dir=str(folder)))
        return str(folder)

    return train_model


@pytest.mark.slow
def test_writes_page_table_and_figure(train_model, tmp_path, capsys):
    arguments = [
        train_model("irevnet_cifar"),
        "--data",
        "digits",
        "--num-images",
        "12",
        "--num-shown",
        "3",
        "--depths",
        "1,2",
    ]
    capsys.readouterr()
    import_module("irevnet").main([*arguments, "--out-dir", str(tmp_path)])
    (page,) = tmp_path.glob("*.md")
    text = page.read_text()
    assert capsys.readouterr().out.rstrip() == text.rstrip()
    assert "12 test images went" in text
    assert "\n0 of 768 values differ" in text
    assert (tmp_path / f"{page.stem}.png").exists()
    with (tmp_path / f"{page.stem}.csv").open(newline="") as file:
        one, two = csv.DictReader(file)
    assert int(one["store_bytes"]) < int(two["store_bytes"])
    assert float(two["largest_error"]) < 1e-4  # rounding of float32


def test_rejects_a_run_of_another_model(train_model, capsys):
    with pytest.raises(SystemExit):
        import_module("irevnet").main([train_model("revnet38"), "--data", "digits"])
    assert "holds a RevNet, but must hold an i-RevNet" in capsys.readouterr().err
