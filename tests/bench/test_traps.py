"""Traps tell right from wrong, and a crash stays in its process."""

import os
import signal

import pytest
import torch
from torch import nn

from revnet.bench import CONTENDERS, TRAPS
from revnet.bench import _isolated as isolated
from revnet.bench.contenders import PLAIN, Contender
from revnet.bench.traps import Trap, one_line

OURS = [contender for contender in CONTENDERS if contender.package is None and contender.name.startswith("revnet")]
TRAP = {trap.name: trap for trap in TRAPS}
QUICK_TRAPS = [trap for trap in TRAPS if not trap.is_slow]


@pytest.mark.parametrize("trap", QUICK_TRAPS, ids=lambda trap: trap.name)
def test_plain_autograd_passes(trap):
    assert trap.check(PLAIN)[0] == "ok"


@pytest.mark.parametrize("contender", OURS, ids=lambda contender: contender.name)
@pytest.mark.parametrize("trap", QUICK_TRAPS, ids=lambda trap: trap.name)
def test_this_library_passes(trap, contender):
    outcome, note = trap.check(contender)
    assert outcome == "ok", note


class Broken(nn.Module):
    """Scales the gradients of what it holds by a tenth, or raises."""

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
    return Contender("broken", "", lambda functions, dim: Broken(PLAIN.make(functions, dim), message))


@pytest.mark.parametrize(
    "name", ["dropout", "bfloat16 autocast", "gradient of a leaf input", "frozen input", "double backward"]
)
def test_a_wrong_gradient_is_found(name):
    assert TRAP[name].check(broken())[0] == "wrong"


def test_an_error_is_told_in_one_line():
    outcome, note = TRAP["frozen input"].check(broken("it failed\nlong story"))
    assert (outcome, note) == ("raises", "RuntimeError: it failed")
    assert len(one_line(ValueError("x" * 1000))) == 200


def test_refusing_a_modified_output_is_right_and_another_error_is_not():
    trap = TRAP["output modified before backward"]
    assert trap.check(broken("y was modified by an inplace operation"))[0] == "ok"
    assert trap.check(broken("no such thing"))[0] == "raises"


def test_a_gradient_that_is_not_a_number_is_wrong():
    trap = Trap("nan", lambda specimen: [specimen.module(specimen.input()).sum() * float("nan")])
    assert trap.check(PLAIN)[0] == "wrong"


def test_no_gradient_counts_as_zeros():
    seen = iter([[torch.zeros(2), None], [None, torch.zeros(2)], [None], [torch.ones(2)]])
    trap = Trap("none", lambda _: next(seen))
    assert trap.check(PLAIN)[0] == "ok"
    assert trap.check(PLAIN)[0] == "wrong"


def test_a_trap_runs_in_a_process_of_its_own():
    assert isolated.check_isolated(TRAP["batch norm counted once"], PLAIN) == ("ok", "relative distance 0.0e+00")


def test_a_crash_is_an_outcome(monkeypatch):
    monkeypatch.setattr(isolated, "_check", die)
    assert isolated.check_isolated(TRAP["frozen input"], PLAIN) == ("crashes", "SIGKILL")


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "trap", "outcome"),
    [
        ("memcnn", "skip around the blocks", "crashes"),
        ("memcnn", "dropout", "wrong"),
        ("revtorch", "dropout, called twice before backward", "wrong"),
        ("revlib", "double backward", "wrong"),
        ("reformer-pytorch", "backward in evaluation mode", "raises"),
        ("checkpoint", "batch norm counted once", "wrong"),
    ],
)
def test_known_outcomes(name, trap, outcome):
    contender = next(contender for contender in CONTENDERS if contender.name == name)
    if contender.missing():
        pytest.skip(contender.missing())
    assert isolated.check_isolated(TRAP[trap], contender)[0] == outcome
