"""The table of `revnet bench --host`: every way of running is in it, computes the same, and is compared with plain."""

import csv
import gc

import pytest
import torch

from revnet.bench import HOST_CASES, HOST_CONTENDERS, Contender, host, host_report, run_host_benchmark
from revnet.bench._step import gradient_error
from revnet.bench.host import HostSubject, HostTimes
from revnet.bench.host_cases import LOOP

CPU = torch.device("cpu")


def fail(*_):
    raise ArithmeticError("on demand\nlong story")


@pytest.mark.filterwarnings("ignore")  # what the peers' old code has to hear from PyTorch
@pytest.mark.parametrize("case", HOST_CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("contender", HOST_CONTENDERS, ids=lambda contender: contender.name)
def test_gradients_are_plain_autograds(contender, case):
    if contender.missing():
        pytest.skip(contender.missing())
    functions = [(f.double(), g.double()) for f, g in case.functions(3, CPU)]
    found = []
    for way in (LOOP, contender):
        subject = HostSubject(way, case, functions)
        subject.clear_gradients()
        (x,) = subject.inputs(1)
        subject.step(x.double())
        found.append([parameter.grad for parameter in subject.parameters])
    # The rounding of three reconstructions; or of fixed-point streams, to 2^-14, which changes a gradient by 2e-4 here.
    assert gradient_error(found[1], found[0]) < (1e-2 if "FixedPoint" in contender.name else 1e-12)


@pytest.fixture
def small(monkeypatch):
    """A page of seconds: two rounds of two blocks; with one contender that is missing and one that fails."""
    contenders = [*HOST_CONTENDERS, Contender("absent", "", fail, "no-such-package-of-revnet")]
    contenders.append(Contender("failing", "", fail))
    for module in (host, host_report):
        monkeypatch.setattr(module, "HOST_CONTENDERS", contenders)
    monkeypatch.setattr(host_report, "measure_host", lambda num_rounds: host.measure_host(num_rounds, num_blocks=2))
    return contenders


def test_every_contender_has_a_row(small, tmp_path, capsys):
    torch.set_num_threads(2)
    page = run_host_benchmark(2, tmp_path / "results", "revnet bench --host --some-flag")
    assert torch.get_num_threads() == 2
    assert gc.get_freeze_count() == 0
    assert page.name.startswith("host_cpu")
    text = page.read_text()
    for part in ("- Hardware: ", "threads used: 1", "- Versions: PyTorch ", "- Date: ", "--host --some-flag`"):
        assert part in text
    told = capsys.readouterr().out
    with page.with_suffix(".csv").open() as file:
        rows = {(row["case"], row["contender"]): row for row in csv.DictReader(file)}
    assert set(rows) == {(case.name, contender.name) for case in HOST_CASES for contender in small}
    for (case, contender), row in rows.items():
        assert f"{case}, {contender}: " in told
        assert row["blocks"] == "2"
        if row["note"]:
            assert f"- {contender}: {row['note']}" in text
            assert not row["ratio_median"]
        else:
            assert text.count(f"\n| {contender} | ") == len(HOST_CASES)
            assert f"| {case} | {contender} | " in text or row["revnet_calls"] == "0"
            assert (row["revnet_calls"] != "0") == contender.startswith("revnet")
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


def test_the_order_changes_and_everyone_has_a_turn_in_each_round():
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
