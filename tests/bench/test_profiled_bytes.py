"""The profiler reports the bytes of a step that a dispatch mode counts."""

from dataclasses import replace

import pytest
import torch

from revnet.bench._profiled_bytes import profile_step
from revnet.bench._runner import Runner
from revnet.bench.methods import METHODS


@pytest.mark.parametrize("name", ["plain", "checkpoint", "revnet"])
def test_agrees_with_the_dispatch_mode(case, name):
    case = replace(case, stream_shape=(64, 64, 4))
    (method,) = [method for method in METHODS if method.name == name]
    runner = Runner(method, case, case.functions(4, torch.device("cpu")), torch.device("cpu"))
    counted = runner.memory()
    runner.zero_grad()
    x = runner.fresh_input()
    x.grad = torch.zeros_like(x)
    peak_bytes, held_bytes = profile_step(lambda: runner.loss(x))
    # No operator allocates the states of random numbers, nor what kernels use inside.
    assert 0 <= held_bytes - counted.held_bytes <= counted.held_bytes / 10
    assert 0 <= peak_bytes - counted.peak_bytes <= counted.peak_bytes / 10
