"""Errors name what the user typed: flags, not parameters of Python."""

import re

import pytest

from revnet.cli._flag_names import name_flags
from revnet.cli._options import list_options
from revnet.cli.evaluate import evaluate
from revnet.cli.train import train

LINES = {
    "train --data nosuch": "--data",
    "train --data no/such": "--data",
    "train --data empty": "--data",
    "train --data hub:x": "--data",
    "train --model nosuch": "--model",
    "train --device 2": "--device",
    "train --devices cuda": "--devices",
    "train --val-fraction 0.9999": "--val-fraction",
    "train --val-fraction 2": "--val-fraction",
    "train --image-size 32": "--image-size",
    "train --preprocess imagenet": "--preprocess",
    "train --out-dir /proc/x": "--out-dir",
    "train --memory-budget 3": "--memory-budget",
    "train --model tests.training.own_code:tiny_revnet --memory-budget 3KiB": "--memory-budget",
    "train --decay-at [1,2]": "--decay-at",
    "train --crop-area [1,0]": "--crop-area",
    "train --freeze xyz": "--freeze",
    "train --class-weights [1]": "--class-weights",
    "train --logger xyz": "--logger",
    "train --cutout 100": "--cutout",
    "train --randaugment 3": "--randaugment",
    "train --batch-size 100000": "--batch-size",
    "train --optimizer adamw --nesterov": "--nesterov",
    "train --ema-decay 0.9 --memory-budget 1GiB": "--ema-decay",
    "train --step-in-backward --max-grad-norm 1": "--step-in-backward",
    "train nice --data nosuch": "--data",
    "train nice --data no/such": "--data",
    "train nice --num-couplings 3": "--num-couplings",
    "train lm --data nosuch": "--data",
    "train lm --data .": "--data",
    "train lm --dim 7": "--dim",
    "evaluate nosuch --device 3": "--device",
    "evaluate nosuch --batch-size 0": "--batch-size",
    "predict nosuch x.png --top 0": "--top",
    "sample nosuch --device xx": "--device",
    "sample nosuch --temperature -1": "--temperature",
    "generate nosuch --device xx": "--device",
    "generate nosuch --num 0": "--num",
    "memory revnet38 --device xx": "--device",
    "memory revnet38 --batch 0": "--batch",
    "plan revnet38 --budget 3": "--budget",
    "plan tests.training.own_code:converted --input-shape [1,8,8] --budget 3KiB": "--budget",
    "plan revnet38 --devices 7 --strategy pipeline --batch 28": "MODEL",
    "doctor revnet38 --data nosuch": "--data",
    "doctor revnet38 --data no/such": "--data",
    "doctor revnet38 --data digits --image 32": "--image",
    "doctor revnet38 --batch 3000 --data digits": "--batch",
    "bench --device xx": "--device",
    "bench --num-rounds 0": "--num-rounds",
    "figure gradient-angle --data nosuch": "--data",
    "figure gradient-angle --model resnet32": "--model",
    "figure complexity --every 3": "--every",
    "reproduce cifar10 --data nosuch": "--data",
    "reproduce cifar10 --models xx": "--models",
    "reproduce cifar10 --epochs 0": "--epochs",
    "reproduce cifar10 --device xx": "--device",
    "reproduce cifar10 --precision xx": "--precision",
}
"""Command lines, and the word that their error is about."""


@pytest.mark.parametrize("line", LINES)
def test_error_names_the_flag(revnet, tmp_path, monkeypatch, line):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    code, _, errors = revnet(*line.split())
    assert code == 2
    assert errors.count("\n") == 1
    assert f"`{LINES[line]}`" in errors
    parameters = {"name", "name_or_path", "path", "paths", "fraction", "repository", "kind", "num_samples", "num_steps"}
    parameters |= {option.name for option in list_options(train)}
    assert set(re.findall(r"`(\w+)`", errors)) & parameters == set()


@pytest.mark.parametrize(
    ("message", "arguments", "expected"),
    [
        ("`batch_size` (=3) must be even.", (), "`--batch-size` (=3) must be even."),
        ("`checkpoint` (=3) is broken; pass another.", (), "`CHECKPOINT` (=3) is broken; pass another."),
        ("`name_or_path` (='x') is unknown.", (), "`--data` (='x') is unknown."),
        ("`data` does not exist; pass a file.", ("run", "--data", "data"), "`data` does not exist; pass a file."),
        ("`data` (='data') does not exist.", ("run", "--data", "data"), "`--data` (='data') does not exist."),
        ("`lr` and `last.ckpt` and `DATA` stay.", (), "`lr` and `last.ckpt` and `DATA` stay."),
    ],
)
def test_parameters_become_flags(message, arguments, expected):
    assert name_flags(message, list_options(evaluate), arguments) == expected
