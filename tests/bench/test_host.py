"""The benchmark of `revnet bench --host`: all methods compute the same and appear in the table."""

import csv
import gc

import pytest
import torch

from revnet.bench import host, host_report, run_host_benchmark
from revnet.bench._runner import gradient_error
from revnet.bench.host import HostRunner, HostTimes
from revnet.bench.host_cases import HOST_CASES, HOST_METHODS, LOOP
from revnet.bench.methods import Method
from tests.bench.methods import marked

CPU = torch.device("cpu")


def fail(*_):
    raise ArithmeticError("on demand\nlong story")


@pytest.mark.filterwarnings("ignore")  # PyTorch warns about old code in other libraries
@pytest.mark.parametrize("case", HOST_CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("method", marked(HOST_METHODS))
def test_gradients_equal_plain_autograd(method, case):
    if method.missing():
        pytest.skip(method.missing())
    functions = [(f.double(), g.double()) for f, g in case.functions(3, CPU)]
    gradients = []
    for candidate in (LOOP, method):
        runner = HostRunner(candidate, case, functions)
        runner.clear_gradients()
        (x,) = runner.inputs(1)
        runner.step(x.double())
        gradients.append([parameter.grad for parameter in runner.parameters])
    # Rounding of three reconstructions, or of fixed-point streams to 2^-14, which changes a gradient by 2e-4 here.
    assert gradient_error(gradients[1], gradients[0]) < (1e-2 if "FixedPoint" in method.name else 1e-12)


@pytest.fixture
def small(monkeypatch):
    """Run two rounds of two blocks, with one library that is missing and one method that fails."""
    methods = [method for method in HOST_METHODS if not method.is_compiled]
    methods += [Method("absent", "", fail, "no-such-package-of-revnet"), Method("failing", "", fail)]
    for module in (host, host_report):
        monkeypatch.setattr(module, "HOST_METHODS", methods)
    monkeypatch.setattr(host_report, "measure_host", lambda num_rounds: host.measure_host(num_rounds, num_blocks=2))
    return methods


def test_every_method_has_a_row(small, tmp_path, capsys):
    torch.set_num_threads(2)
    page = run_host_benchmark(2, tmp_path / "results", "revnet bench --host --some-flag")
    assert torch.get_num_threads() == 2
    assert gc.get_freeze_count() == 0
    assert page.name.startswith("host_cpu")
    text = page.read_text()
    for part in ("- Hardware: ", "threads used: 1", "- Versions: PyTorch ", "- Date: ", "--host --some-flag`"):
        assert part in text
    output = capsys.readouterr().out
    assert output.count("no-such-package-of-revnet") == 2, "the package and the command, once"
    with page.with_suffix(".csv").open() as file:
        rows = {(row["case"], row["method"]): row for row in csv.DictReader(file)}
    assert set(rows) == {(case.name, method.name) for case in HOST_CASES for method in small}
    for (case, method), row in rows.items():
        assert (f"{case}, {method}: " in output) != row["note"].startswith("not installed")
        assert row["blocks"] == "2"
        if row["note"]:
            assert f"- {method}: {row['note']}" in text
            assert not row["ratio_median"]
        else:
            assert text.count(f"\n| {method} | ") == len(HOST_CASES)
            assert f"| {case} | {method} | " in text or row["revnet_calls"] == "0"
            assert (row["revnet_calls"] != "0") == method.startswith("revnet")
            assert float(row["step_seconds"]) / 4e-6 == pytest.approx(float(row["half_block_microseconds"]))
    for case in HOST_CASES:
        assert rows[case.name, "plain"]["ratio_median"] == rows[case.name, "plain"]["least_over_least"] == "1.0"
        assert rows[case.name, "absent"]["note"].startswith("not installed: pip install --no-deps ")
        assert rows[case.name, "failing"]["note"] == "ArithmeticError: on demand"
        assert not rows[case.name, "revnet, Reverse()"]["note"]


def test_times_are_compared_within_the_round():
    times = HostTimes.of([2.0, 20.0, 3.0], [1.0, 10.0, 2.0])
    assert times.over_plain.median == 2.0
    assert times.least_over_least == 2.0
    assert times.step_seconds == 3.0


def test_each_round_runs_all_methods_in_a_new_order():
    turns = []

    class Recorder:
        def __init__(self, name):
            self.name = name

        def turn_seconds(self):
            turns.append(self.name)
            return 1.0

    seconds = host._rounds({name: Recorder(name) for name in "abcd"}, 6)
    assert seconds == {name: [1.0] * 6 for name in "abcd"}
    rounds = ["".join(turns[start : start + 4]) for start in range(0, 24, 4)]
    assert all(sorted(order) == list("abcd") for order in rounds)
    assert len(set(rounds)) > 1
