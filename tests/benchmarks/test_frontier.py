"""`benchmarks/frontier.py` with small settings: its page, table and picture are written, and its figures agree."""

import csv
import dataclasses
from concurrent.futures import Future
from importlib import import_module
from pathlib import Path

import pytest
import torch

from revnet.bench._torch_methods import Loop
from tests.helpers import ConvResidual

SMALL = {"conv": (2, 32, 8, 8), "transformer": (1, 8, 256), "bottleneck": (2, 128, 4, 4)}


class InThisProcess:
    """Stands for a pool of processes, which would not see what a test replaces."""

    def __init__(self, *args, **kwargs):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *args):
        pass

    def submit(self, function, *args):
        future = Future()
        future.set_result(function(*args))
        return future


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    frontier = import_module("frontier")
    monkeypatch.setattr(frontier, "ProcessPoolExecutor", InThisProcess)
    for name, shape in SMALL.items():
        monkeypatch.setitem(frontier.WORKLOADS, name, dataclasses.replace(frontier.WORKLOADS[name], stream_shape=shape))

    def run(*arguments: str) -> tuple[str, list[dict[str, str]]]:
        """Return the page and the rows of the CSV."""
        frontier.main(["--depth", "4", "--num-rounds", "1", *arguments, "--out-dir", str(tmp_path)])
        (page,) = tmp_path.glob("*.md")
        assert capsys.readouterr().out.rstrip() == page.read_text().rstrip()
        if not page.with_suffix(".csv").exists():
            return page.read_text(), []
        picture = page.with_suffix(".png")
        assert picture.exists()
        assert f"![{picture.name}]({picture.name})" in page.read_text()
        with page.with_suffix(".csv").open(newline="") as file:
            return page.read_text(), list(csv.DictReader(file))

    return run


@pytest.mark.parametrize("kind", ["SelectiveBlocks", "CheckpointedFunctions"])
def test_checkpoints_that_keep_outputs_compute_the_same(kind):
    functions = [(ConvResidual(2), ConvResidual(2)) for _ in range(2)]
    parameters = [parameter for pair in functions for function in pair for parameter in function.parameters()]
    x, results = torch.randn(2, 4, 5, 5, requires_grad=True), []
    checkpointed = getattr(import_module("_frontier_variants"), kind)(functions, 1, (("convolution", 0),))
    for module in (checkpointed, Loop(functions, 1)):
        y = module(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *parameters])])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.slow
def test_writes_page_table_and_picture(run):
    page, rows = run("--workloads", "bottleneck")
    assert {row["precision"] for row in rows} == {"float32", "bf16 autocast"}
    shares = {row["variant"]: float(row["share"]) for row in rows if row["precision"] == "float32"}
    assert shares["Store()"] == 1
    assert shares["Reverse()"] < shares["keep c1, c2"] < shares["hold f, g + c1, c2"] < 1
    assert all(float(row["ratio"]) > 0 for row in rows)
    assert "## bottleneck, float32" in page
    assert "| Store() | 0." in page.partition("## FLOPs of a step")[2]


@pytest.mark.slow
def test_runs_every_variant_of_all_workloads(run):
    _, rows = run("--workloads", "conv,transformer", "--page-faults")
    assert {row["note"] for row in rows if row["family"] != "library"} == {""}


@pytest.mark.slow
def test_compares_with_another_checkout(run):
    page, _ = run("--before", str(Path(__file__).parents[2]))
    assert "| digits, Reverse() | " in page
    assert "| conv, Reverse(keep=...) | " in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workloads", "conf"], "--workloads has the unknown name conf"),
        (["--time-depth", "6"], "--depth and --time-depth must be multiples of 4"),
        (["--before", "missing"], "--before missing is not a checkout of revnet"),
    ],
)
def test_usage_errors(run, capsys, arguments, message):
    with pytest.raises(SystemExit):
        run(*arguments)
    assert message in capsys.readouterr().err
