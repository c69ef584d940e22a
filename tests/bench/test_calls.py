"""`count_calls` counts only calls inside revnet, in the forward and the backward pass."""

import gc
import sys

import pytest
import torch
from torch import nn

from revnet import ReversibleBlock
from revnet.bench.calls import count_calls
from revnet.memory import format_bytes


def test_does_not_count_other_code():
    linear = nn.Linear(2, 2)
    calls = count_calls(lambda: linear(torch.randn(1, 2)).sum().backward())
    assert (calls.num_calls, calls.num_files, calls.num_lines) == (0, 0, 0)


def test_counts_calls_and_lines_of_their_file():
    calls = count_calls(lambda: [format_bytes(2**20) for _ in range(3)])
    (path,) = calls.by_file
    assert path.name == "_bytes.py"
    assert calls.num_calls == 3
    assert calls.num_lines == len(path.read_text().splitlines())


def test_counts_the_backward_pass():
    block = ReversibleBlock(nn.Linear(2, 2), nn.Linear(2, 2))
    loss = block(torch.randn(1, 4, requires_grad=True)).sum()
    assert count_calls(loss.backward).num_calls > 0


def test_restores_profiler_and_collector():
    def fail():
        assert not gc.isenabled()
        raise ArithmeticError

    def profile(*_):
        pass

    sys.setprofile(profile)
    try:
        with pytest.raises(ArithmeticError):
            count_calls(fail)
        assert sys.getprofile() is profile
    finally:
        sys.setprofile(None)
    assert gc.isenabled()
