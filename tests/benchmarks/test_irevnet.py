"""`benchmarks/irevnet.py` on a short run."""

import csv
from importlib import import_module

import pytest

from revnet.training import TrainConfig, train


@pytest.fixture
def train_model(tmp_path):
    def train_model(model, seed=0):
        folder = tmp_path / f"{model}_seed{seed}"
        settings = {"epochs": 1, "max_updates": 3, "batch_size": 100, "val_fraction": 0.1, "out_dir": str(folder)}
        train(TrainConfig(model=model, seed=seed, **settings))
        return str(folder)

    return train_model


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_writes_page_tables_and_figure(train_model, tmp_path, capsys):
    arguments = [
        train_model("irevnet_cifar", seed=3),
        train_model("irevnet_cifar", seed=4),
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
    import_module("irevnet").main([*arguments, "--out-dir", str(tmp_path), "--note", "It was short."])
    (page,) = tmp_path.glob("*.md")
    text = page.read_text()
    assert capsys.readouterr().out.rstrip() == text.rstrip()
    assert "\n- It was short.\n" in text
    assert "| seed 3 | 1 |" in text
    assert "| mean, standard deviation | 1 |" in text
    assert "| published i-RevNet | 200 | 5.5 % |" in text
    assert "\n- Run: Hardware: " in text
    assert (tmp_path / f"{page.stem}.png").exists()
    for row, seed in zip(read(tmp_path / f"{page.stem}_round_trip.csv"), ("3", "4"), strict=True):
        assert (row["seed"], row["images"], row["changed_values"], row["values"]) == (seed, "12", "0", "768")
    assert [row["seed"] for row in read(tmp_path / f"{page.stem}_training.csv")] == ["3", "4"]
    one, two = read(tmp_path / f"{page.stem}_depth.csv")
    assert int(one["store_bytes"]) < int(two["store_bytes"])
    assert float(two["largest_error"]) < 1e-4  # rounding of float32


def test_rejects_a_run_of_another_model(train_model, capsys):
    with pytest.raises(SystemExit):
        import_module("irevnet").main([train_model("revnet38"), "--data", "digits"])
    assert "holds a RevNet, but must hold an i-RevNet" in capsys.readouterr().err
