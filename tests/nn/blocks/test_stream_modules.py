import pytest
import torch
from torch import nn

from revnet import ReversibleBlock, ReversibleSequential
from revnet.coupling import Scaled
from revnet.memory import measure, predict
from revnet.nn import DuplicateStreams, JoinStreams
from tests.helpers import mlp


def test_every_join():
    streams = (torch.tensor([[1.0]]), torch.tensor([[2.0]]), torch.tensor([[6.0]]))
    values = {join: JoinStreams(join)(streams).tolist() for join in ("first", "last", "mean", "sum", "concatenate")}
    assert values == {
        "first": [[1.0]],
        "last": [[6.0]],
        "mean": [[3.0]],
        "sum": [[9.0]],
        "concatenate": [[1.0, 2.0, 6.0]],
    }


def test_copies_no_memory():
    x = torch.rand(3)
    assert all(stream is x for stream in DuplicateStreams(3)(x))


def test_a_network_of_two_step_updates():
    blocks = [ReversibleBlock(mlp(4), mlp(4), coupling=Scaled.midpoint(0.25)) for _ in range(3)]
    model = nn.Sequential(DuplicateStreams(), ReversibleSequential(*blocks), JoinStreams()).double()
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    before = now = x
    for block in blocks:
        for function in (block.f, block.g):
            before, now = now, before + 0.5 * function(now)
    y = model(x)
    assert torch.equal(y, now)
    inputs = [x, *model.parameters()]
    pairs = zip(torch.autograd.grad(y.sum(), inputs), torch.autograd.grad(now.sum(), inputs), strict=True)
    assert max((one - other).abs().max() for one, other in pairs) < 1e-13
    assert predict(model, x).peak_bytes == measure(model, x).peak_bytes


def test_options_are_printed():
    assert repr(DuplicateStreams()) == "DuplicateStreams()"
    assert repr(DuplicateStreams(3)) == "DuplicateStreams(num_streams=3)"
    assert repr(JoinStreams("concatenate", dim=2)) == "JoinStreams('concatenate', dim=2)"


def test_bad_input():
    with pytest.raises(ValueError, match=r"`num_streams` \(=1\) must be an integer of at least 2"):
        DuplicateStreams(1)
    with pytest.raises(ValueError, match=r"`join` \(='middle'\)"):
        JoinStreams("middle")
    with pytest.raises(TypeError, match=r"`dim` \(=1.5\) must be an integer"):
        JoinStreams("concatenate", dim=1.5)
    with pytest.raises(TypeError, match="`x` must be a tensor, which becomes 2 streams, not tuple"):
        DuplicateStreams()((torch.zeros(1), torch.zeros(1)))
    with pytest.raises(TypeError, match=r"`streams` must be a tuple of tensors, not .*put `DuplicateStreams"):
        JoinStreams()(torch.zeros(1))
    with pytest.raises(TypeError, match="`streams` must be a tuple of tensors, not tuple of 0"):
        JoinStreams("mean")(())
