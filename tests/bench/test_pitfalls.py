"""Pitfalls detect wrong gradients, and a crash stays in its process."""

import os
import signal

import pytest
import torch
from torch import nn

from revnet.bench import METHODS, PITFALLS
from revnet.bench import _isolated as isolated
from revnet.bench.methods import PLAIN, Method
from revnet.bench.pitfalls import Pitfall, one_line

OURS = [method for method in METHODS if method.package is None and method.name.startswith("revnet")]
PITFALL = {pitfall.name: pitfall for pitfall in PITFALLS}
QUICK_PITFALLS = [pitfall for pitfall in PITFALLS if not pitfall.is_slow]


@pytest.mark.parametrize("pitfall", QUICK_PITFALLS, ids=lambda pitfall: pitfall.name)
def test_plain_autograd_passes(pitfall):
    assert pitfall.check(PLAIN)[0] == "ok"


@pytest.mark.parametrize("method", OURS, ids=lambda method: method.name)
@pytest.mark.parametrize("pitfall", QUICK_PITFALLS, ids=lambda pitfall: pitfall.name)
def test_this_library_passes(pitfall, method):
    outcome, note = pitfall.check(method)
    assert outcome == "ok", note


class Broken(nn.Module):
    """A wrapper that scales gradients by a tenth or raises an error."""

    def __init__(self, inner, message=None):
        super().__init__()
        self.inner = inner
        self.message = message

    def forward(self, x, **kwargs):
        if self.message:
            raise RuntimeError(self.message)
        y = self.inner(x, **kwargs)
        return y.detach() + 0.1 * (y - y.detach())


def broken(message=None):
    return Method("broken", "", lambda functions, dim: Broken(PLAIN.make(functions, dim), message))


@pytest.mark.parametrize(
    "name", ["dropout", "bfloat16 autocast", "gradient of a leaf input", "frozen input", "double backward"]
)
def test_detects_wrong_gradients(name):
    assert PITFALL[name].check(broken())[0] == "wrong"


def test_reports_the_first_line_of_an_error():
    outcome, note = PITFALL["frozen input"].check(broken("it failed\nlong story"))
    assert (outcome, note) == ("raises", "RuntimeError: it failed")
    assert len(one_line(ValueError("x" * 1000))) == 200


def test_accepts_only_the_expected_error():
    pitfall = PITFALL["output modified before backward"]
    assert pitfall.check(broken("y was modified by an inplace operation"))[0] == "ok"
    assert pitfall.check(broken("no such thing"))[0] == "raises"


def test_nan_is_wrong():
    pitfall = Pitfall("nan", lambda subject: [subject.module(subject.input()).sum() * float("nan")])
    assert pitfall.check(PLAIN)[0] == "wrong"


def test_missing_gradient_counts_as_zeros():
    observations = iter([[torch.zeros(2), None], [None, torch.zeros(2)], [None], [torch.ones(2)]])
    pitfall = Pitfall("none", lambda _: next(observations))
    assert pitfall.check(PLAIN)[0] == "ok"
    assert pitfall.check(PLAIN)[0] == "wrong"


def test_runs_in_a_separate_process():
    assert isolated.check_isolated(PITFALL["batch norm counted once"], PLAIN) == ("ok", "relative distance 0.0e+00")


def test_a_crash_is_an_outcome(monkeypatch):
    monkeypatch.setattr(isolated, "_check", die)
    assert isolated.check_isolated(PITFALL["frozen input"], PLAIN) == ("crashes", "SIGKILL")


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "pitfall", "outcome"),
    [
        ("memcnn", "skip around the blocks", "crashes"),
        ("memcnn", "dropout", "wrong"),
        ("revtorch", "dropout, called twice before backward", "wrong"),
        ("revlib", "double backward", "wrong"),
        ("reformer-pytorch", "backward in evaluation mode", "raises"),
        ("checkpoint", "batch norm counted once", "wrong"),
    ],
)
def test_known_outcomes(name, pitfall, outcome):
    method = next(method for method in METHODS if method.name == name)
    if method.missing():
        pytest.skip(method.missing())
    assert isolated.check_isolated(PITFALL[pitfall], method)[0] == outcome
