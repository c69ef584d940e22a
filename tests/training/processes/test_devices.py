"""Training, evaluation and prediction in two processes against one, with the same global batches."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from revnet.errors import DataError
from revnet.training import LanguageConfig, NiceConfig, TrainConfig, evaluate, predict_images
from tests.copies import launch_copies
from tests.training.processes import training_programs as programs
from tests.training.samples import RUN_FILES, read_log, write_images, write_text

ROUNDING = 100 * torch.finfo(torch.float32).eps
"""Relative error of a sum in another order, with a margin of 100."""
CIFAR10 = Path(__file__).parents[4] / "shared" / "data" / "cifar10"
RUNS = [("batch norm", "ddp"), ("vit", "fsdp2"), ("lm", "ddp"), ("lm", "fsdp2")]


@dataclass(frozen=True)
class Comparison:
    """Runs by the same settings in one process and in two."""

    configs: Mapping[str, programs.Config]
    one: Mapping[str, tuple[Any, list[float]]]
    """Result and losses of each run in one process."""
    two: Mapping[tuple[str, str], tuple[Any, list[float]]]
    """Result and losses of each run in two processes, by name and strategy."""
    evaluated: programs.Evaluated
    """Evaluation and predictions of the first run in two processes."""


def make_configs(num_updates: int, folder: Path) -> dict[str, programs.Config]:
    """Return settings of small runs on the digits and on a generated text."""
    text = write_text(folder, 60)
    images = {"max_updates": num_updates, "batch_size": 16, "val_fraction": 0.05}
    language = {"length": 16, "dim": 16, "depth": 2, "num_heads": 2, "batch_size": 6, "val_windows": 11}
    return {
        "batch norm": TrainConfig(**images, lr=0.01),
        "vit": TrainConfig(**images, model="revvit_cifar", optimizer="adamw", lr=1e-4),
        "lm": LanguageConfig(data=text, updates_per_epoch=1, epochs=num_updates, **language),
        "nice": NiceConfig(hidden_dim=16, num_couplings=2, max_updates=num_updates, val_fraction=0.05, batch_size=50),
    }


def write_files(folder: Path) -> list[Path]:
    """Return images, one of which is missing."""
    files = write_images(folder / "images", 5)
    return [*files[:2], folder / "missing.png", *files[2:]]


def compare(configs: Mapping[str, programs.Config], runs: list[tuple[str, str]], folder: Path) -> Comparison:
    settings = {
        run: replace(configs[run[0]], strategy=run[1], out_dir=str(folder / f"{run[0]} {run[1]}")) for run in runs
    }
    two, evaluated = launch_copies(programs.train_and_evaluate, {"configs": settings, "files": write_files(folder)})
    names = dict.fromkeys(name for name, _ in runs)
    one = programs.train_all({name: replace(configs[name], out_dir=str(folder / name)) for name in names})
    return Comparison(configs, one, two, evaluated)


@pytest.fixture(scope="module")
def comparison(tmp_path_factory) -> Comparison:
    folder = tmp_path_factory.mktemp("devices")
    return compare(make_configs(4, folder), RUNS, folder)


def assert_same_losses(comparison: Comparison, name: str, strategy: str, *, is_long: bool = False) -> None:
    config, losses = comparison.configs[name], comparison.two[name, strategy][1]
    whole, in_parts = comparison.one[name][1], programs.losses_of_one_process(config, 2, strategy)
    if name == "batch norm":
        # Each process normalizes its part of the batch by itself. The mean of two gradients has the same bits in either
        # order, so nothing differs that 50 updates could amplify.
        by_parts = largest_difference(losses, whole)
        assert by_parts > 1e-3
        assert largest_difference(losses, in_parts) <= (0 if is_long else by_parts / 100)
    else:
        # These are sums in another order: of the parts, and of the norm of gradients.
        eps = torch.finfo(torch.float32).eps * max(whole)
        assert largest_difference(programs.losses_of_one_process(config, 1), whole) <= 100 * eps
        rounding = largest_difference(programs.losses_of_one_process(config, 2), whole)
        assert largest_difference(losses, whole) <= 100 * max(rounding, eps)


def largest_difference(first: list[float], second: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("name", "strategy"), RUNS)
def test_losses_equal_one_process_with_its_batch_in_two_parts(comparison, name, strategy):
    assert_same_losses(comparison, name, strategy)


def last_numbers(folder: Path) -> dict[str, float]:
    """Return the last row of the log of a run."""
    return {name: float(value) for name, value in read_log(folder)[-1].items()}


@pytest.mark.parametrize("run", [run for run in RUNS if run[0] != "batch norm"])
def test_validation_counts_every_sample_once(comparison, run):
    one, two = last_numbers(comparison.one[run[0]][0].folder), last_numbers(comparison.two[run][0].folder)
    # The weights differ by the rounding of all updates.
    assert two["val_loss"] == pytest.approx(one["val_loss"], rel=ROUNDING)
    assert two["train_loss"] == pytest.approx(one["train_loss"], rel=ROUNDING)
    assert two["updates"] == one["updates"]


@pytest.mark.parametrize("run", RUNS)
def test_one_process_writes_the_files(comparison, run):
    result = comparison.two[run][0]
    assert sorted(file.name for file in result.folder.iterdir()) == RUN_FILES
    expected = load_file(comparison.one[run[0]][0].folder / "last.safetensors")
    actual = load_file(result.folder / "last.safetensors")
    assert {name: x.shape for name, x in actual.items()} == {name: x.shape for name, x in expected.items()}
    summary = json.loads((result.folder / "summary.json").read_text())
    assert (summary["num_processes"], summary["strategy"]) == (2, run[1])
    assert "2 processes" in result.report()


def test_ddp_and_fsdp2_train_the_same_weights(comparison):
    ddp, fsdp2 = (
        load_file(comparison.two["lm", strategy][0].folder / "last.safetensors") for strategy in ("ddp", "fsdp2")
    )
    for name, expected in ddp.items():
        assert torch.allclose(fsdp2[name], expected, rtol=ROUNDING, atol=ROUNDING), name


@pytest.mark.parametrize("name", ["vit", "lm"])
def test_fsdp2_divides_parameters_gradients_and_optimizer_state(comparison, name):
    whole, divided = comparison.one[name][0].state_bytes, comparison.two[name, "fsdp2"][0].state_bytes
    assert whole.parameters == whole.gradients
    # Each tensor is divided along its first dimension; process 0 has the larger part.
    tensors = load_file(comparison.one[name][0].folder / "last.safetensors")
    trained = sum(x.numel() * 4 for x in tensors.values())
    assert whole.parameters <= trained
    assert divided.parameters == divided.gradients
    assert (
        whole.parameters / 2
        <= divided.parameters
        <= whole.parameters / 2 + 4 * sum(x[0].numel() for x in tensors.values() if x.dim() and len(x) % 2)
    )
    assert divided.optimizer <= 0.51 * whole.optimizer + 4 * sum(
        2 * x[0].numel() for x in tensors.values() if x.dim() and len(x) % 2
    )
    if (name, "ddp") in comparison.two:
        assert comparison.two[name, "ddp"][0].state_bytes == whole


def test_activations_are_divided_with_the_batch(comparison):
    one, two = comparison.one["batch norm"][0], comparison.two["batch norm", "ddp"][0]
    assert one.peak_bytes / 2 < two.peak_bytes < 0.6 * one.peak_bytes


def test_evaluates_and_predicts_in_two_processes(comparison):
    result = comparison.two[RUNS[0]][0]
    alone, predictions, errors, _ = programs.evaluate_and_predict(result.folder, comparison.evaluated.files)
    for together in (result.test, comparison.evaluated.result):
        assert torch.equal(together.confusion.counts, alone.confusion.counts)
        assert together.num_top5_errors == alone.num_top5_errors
        assert together.cross_entropy == pytest.approx(alone.cross_entropy, rel=ROUNDING)
    # The batches are the same, so the predictions have the same bits.
    assert comparison.evaluated.predictions == predictions
    assert comparison.evaluated.errors == errors
    assert len(errors) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"model": "resnet32"},
            r"^`strategy` \(='fsdp2'\) divides reversible blocks among devices, and resnet32 has none",
        ),
        ({"tolerance": 1e-3}, r"^`tolerance` \(=0.001\) does not go with the `strategy` fsdp2"),
        (
            {"strategy": "ddp", "sync_batch_norm": True},
            r"^`sync_batch_norm` \(=True\) needs GPUs, .* the device is cpu",
        ),
    ],
)
def test_rejects_what_does_not_fit_before_it_starts(settings, message, out_dir):
    settings = {"strategy": "fsdp2", "device": "cpu", "out_dir": out_dir} | settings
    with pytest.raises(ValueError, match=message):
        programs.train_all({"run": TrainConfig(**settings)})
    assert not Path(out_dir).exists()


# ---------------------------------------------------------------------------------------- slow


@pytest.mark.slow
def test_starts_processes_that_evaluate_and_predict(comparison):
    folder, files = comparison.two[RUNS[0]][0].folder, comparison.evaluated.files
    assert evaluate(folder, devices=2).cross_entropy == pytest.approx(evaluate(folder).cross_entropy, rel=ROUNDING)
    with pytest.raises(DataError, match=r"missing\.png"):
        predict_images(folder, files, devices=2)


@pytest.fixture(scope="module")
def long_comparison(tmp_path_factory) -> Comparison:
    folder = tmp_path_factory.mktemp("long")
    configs = make_configs(50, folder)
    runs = [(name, strategy) for name in configs for strategy in ("ddp", "fsdp2")]
    return compare(configs, runs, folder)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", ["batch norm", "vit", "lm", "nice"])
def test_fifty_updates(long_comparison, name, strategy):
    assert_same_losses(long_comparison, name, strategy, is_long=True)


@pytest.mark.slow
@pytest.mark.skipif(not CIFAR10.is_dir(), reason="CIFAR-10 is not at ../shared/data/cifar10")
@pytest.mark.parametrize(
    ("name", "settings"),
    [("batch norm", {"lr": 0.01}), ("vit", {"model": "revvit_cifar", "optimizer": "adamw", "lr": 1e-4})],
)
def test_fifty_updates_on_cifar10(name, settings, tmp_path):
    import pyarrow.parquet as pq

    folder = tmp_path / "cifar10"
    folder.mkdir()
    for part, num_images in (("train", 2000), ("test", 100)):
        file = f"{part}-00000-of-00001.parquet"
        pq.write_table(pq.read_table(CIFAR10 / file).slice(0, num_images), folder / file)
    images = {"data": str(folder), "max_updates": 50, "batch_size": 16, "val_fraction": 0.05, "num_threads": 1}
    runs = [(name, "ddp"), (name, "fsdp2")]
    comparison = compare({name: TrainConfig(**images, **settings)}, runs, tmp_path)
    for run in runs:
        assert_same_losses(comparison, *run, is_long=True)


def start(arguments: list[str], **variables: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", **variables}
    return subprocess.Popen(
        [sys.executable, "-m", *arguments], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "SLURM"])
def test_trains_on_two_nodes(launcher, tmp_path, out_dir):
    config = make_configs(2, tmp_path)["lm"]
    config.save(tmp_path / "config.yaml")
    command = ["revnet.cli.main", "train", "lm", "--config", str(tmp_path / "config.yaml"), "--out-dir", out_dir]
    port = 20_000 + os.getpid() % 10_000
    nodes = []
    for node in (0, 1):
        if launcher == "torchrun":
            options = f"--nnodes 2 --node-rank {node} --nproc-per-node 1 --master-addr 127.0.0.1 --master-port {port}"
            nodes.append(start(["torch.distributed.run", *options.split(), "-m", *command]))
        else:
            variables = {
                "SLURM_JOB_ID": str(port - 15_000),
                "SLURM_STEP_NUM_TASKS": "2",
                "SLURM_STEP_NUM_NODES": "2",
                "SLURM_STEP_NODELIST": "127.0.0.1",
                "SLURM_PROCID": str(node),
                "SLURM_LOCALID": "0",
                "SLURM_NODEID": str(node),
            }
            nodes.append(start(command, **variables))
    outputs = [node.communicate(timeout=200) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert "2 cpu processes on 2 nodes, ddp" in outputs[0][0]
    assert outputs[1][0] == ""
    assert sorted(file.name for file in Path(out_dir).iterdir()) == RUN_FILES


@pytest.mark.slow
def test_processes_of_a_launcher_print_one_error(tmp_path, out_dir):
    Path(out_dir).mkdir()
    (Path(out_dir) / "file").touch()
    command = ["revnet.cli.main", "train", "--out-dir", out_dir]
    options = "--nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint localhost:0"
    launcher = start(["torch.distributed.run", *options.split(), "-m", *command])
    output, errors = launcher.communicate(timeout=200)
    assert launcher.returncode != 0
    assert output == ""
    assert errors.count("revnet train: error: ") == errors.count("is not empty") == 1
