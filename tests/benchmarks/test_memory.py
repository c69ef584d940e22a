"""`benchmarks/memory.py` with small settings: each table is written, and its numbers are consistent."""

import csv
import resource
from importlib import import_module

import pytest
import torch

from revnet.models import RevNet

TINY = ["--model", "revnet38", "--batch-size", "2", "--num-rounds", "1"]


@pytest.fixture
def run(tmp_path, capsys):
    def run(*arguments: str) -> tuple[str, list[dict[str, str]]]:
        """Return the page and the rows of the only CSV."""
        import_module("memory").main([*arguments, "--out-dir", str(tmp_path)])
        (page,) = tmp_path.glob("*.md")
        (table,) = tmp_path.glob("*.csv")
        assert page.read_text().rstrip().endswith(capsys.readouterr().out.rstrip())
        for picture in tmp_path.glob("*.png"):
            assert f"![{picture.name}]({picture.name})" in page.read_text()
        with table.open(newline="") as file:
            return page.read_text(), list(csv.DictReader(file))

    return run


@pytest.fixture
def tiny(monkeypatch):
    """Replace all models by a network of two blocks."""

    def make(name: str) -> RevNet:
        return RevNet(num_blocks=(2,), widths=(8, 8)).to(memory_format=torch.channels_last)

    names = ("_memory_step", "_memory_prediction", "_memory_plans", "_memory_real")
    for module in [import_module(name) for name in names]:  # import all modules before changing one
        monkeypatch.setattr(module, "make", make)


def test_predictions_equal_the_counts(run, tmp_path, tiny):
    page, rows = run("--prediction", "--models", "revnet38", "--batch-sizes", "1,2")
    assert [(row["model"], row["batch_size"]) for row in rows] == [("revnet38", "1"), ("revnet38", "2")]
    assert all(row["predicted_peak_bytes"] == row["counted_peak_bytes"] for row in rows)
    assert "Equal to the byte: 2 of 2. Largest error: 0.000 %." in page
    assert "`python benchmarks/memory.py --prediction --models revnet38 --batch-sizes 1,2 " in page.replace(
        "`OMP_NUM_THREADS=1 ", "`"
    )
    assert not list(tmp_path.glob("*.png"))
    assert next(tmp_path.glob("*.md")).name.startswith("memory-prediction_")


@pytest.mark.slow
def test_plans_stay_within_their_budgets(run, tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(import_module("_memory_plans"), "SHARES", (0.5,))
    _, rows = run("--plans", *TINY)
    one_policy, plans = rows[:4], rows[4:]
    ways = ["plain autograd", "checkpoint all", "reverse all", "torch.utils.checkpoint"]
    assert [row["way"] for row in one_policy] == ways
    assert float(rows[0]["ratio_median"]) == 1
    assert {row["way"].split(",")[0] for row in plans} == {"plan at 50 %"}
    for row in plans:
        assert int(row["counted_peak_bytes"]) == int(row["predicted_peak_bytes"]) <= int(row["budget_bytes"])
        assert row["ratio_by_counting"] or row["ratio_by_measuring"]
    assert len(list(tmp_path.glob("*.png"))) == 1


@pytest.mark.slow
def test_planning_reports_processor_seconds(run):
    _, rows = run("--planning", "--depths", "2")
    assert {row["num_blocks"] for row in rows} == {"2"}
    assert all(float(row["processor_seconds"]) > 0 and float(row["time_ratio"]) >= 1 for row in rows)


@pytest.mark.slow
def test_real_processes(run, tiny, monkeypatch):
    real = import_module("_memory_real")
    monkeypatch.setattr(real, "in_new_process", lambda function, *args: function(*args))
    monkeypatch.setattr(real, "give_back_freed", lambda: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda num_threads: None)
    page, rows = run("--real", *TINY, "--fraction", "0.8")
    methods = ("revnet38, plain", "revnet38, planned", "resnet32, plain")
    allocators = ("gives back", "default")
    assert [(row["model"], row["allocator"]) for row in rows] == [
        (model, allocator) for model in methods for allocator in allocators
    ]
    plain, planned = rows[0], rows[2]
    assert int(planned["budget_bytes"]) == int(0.8 * int(plain["counted_peak_bytes"]))
    assert int(planned["counted_peak_bytes"]) <= int(planned["budget_bytes"])
    for row in rows:
        constant_bytes = int(row["counted_peak_bytes"]) - int(row["counted_growth_bytes"])
        assert constant_bytes == int(row["process_bytes"]) - int(row["process_growth_bytes"]) > 0
    assert "| revnet38, planned | gives back |" in page


def test_a_new_process_does_not_inherit_the_peak():
    real = import_module("_memory_real")
    gib = 2**20  # in KiB, the unit of `getrusage`
    torch.ones(2**30, dtype=torch.uint8)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > gib
    assert real.in_new_process(resource.getrusage, resource.RUSAGE_SELF).ru_maxrss < gib


def test_checkpointed_network_computes_the_same():
    plans, step = import_module("_memory_plans"), import_module("_memory_step")
    plain, checkpointed = step.make("revnet38"), plans.torch_checkpoint("revnet38").model
    names = {name: _checkpointed_name(name) for name in plain.state_dict()}
    checkpointed.load_state_dict({names[name]: value for name, value in plain.state_dict().items()})
    images = step.images_of("revnet38", 2)
    assert torch.equal(plain(images), checkpointed(images))


def _checkpointed_name(name: str) -> str:
    head, separator, tail = name.partition(".reversible.blocks.")
    if separator:
        index, rest = tail.split(".", 1)
        return f"{head}.reversible.{index}.block.blocks.0.{rest}"
    return name.replace(".downsample.", ".downsample.block.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "revnet39"], "unknown model 'revnet39'; choose from highway20, "),
        (
            ["--real", "--model", "resnet110"],
            "--real needs a reversible --model, not resnet110; choose from revnet38, ",
        ),
        (["--batch-sizes", "4;16"], "--batch-sizes '4;16' must be comma-separated numbers, such as 4,16"),
        (["--num-rounds", "0"], "batch sizes, rounds and depths must be at least 1"),
        (["--fraction", "25"], "--fraction 25.0 must be above 0 and at most 1"),
        (["--out-dir", "no/such"], "--out-dir no/such is not a folder; create it first"),
        (["--real", *TINY, "--fraction", "0.01"], "below the least that this step needs"),
    ],
)
def test_usage_errors(arguments, message, tiny, tmp_path, capsys):
    where = [] if "--out-dir" in arguments else ["--out-dir", str(tmp_path)]
    with pytest.raises(SystemExit, match="2"):
        import_module("memory").main([*arguments, *where])
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
