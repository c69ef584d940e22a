import pytest
import torch
from torch import nn

import revnet
from revnet import FixedPoint, ReversibleBlock, ReversibleSequential, create_model, set_coupling
from revnet.conversion import BDIA, Adapter, Dr2Net
from revnet.numerics import find_nondeterministic
from tests.helpers import ConvResidual, mlp


class Drifting(nn.Module):
    """Returns a different value each time, like a kernel with atomic additions."""

    def __init__(self, scale, *, in_backward=False):
        super().__init__()
        self.layers = mlp(2)
        self.scale = scale
        self.in_backward = in_backward
        self.count = 0

    def forward(self, x):
        self.count += 1
        y = self.layers(x)
        if self.in_backward and y.requires_grad:
            y.register_hook(lambda grad: grad * (1 + self.scale * self.count))
            return y
        return y * (1 + self.scale * self.count)


def test_names_nondeterministic_functions():
    blocks = [ReversibleBlock(mlp(2), mlp(2)) for _ in range(3)]
    blocks[1].g = Drifting(1e-6)
    blocks[2].f = Drifting(1e-3, in_backward=True)
    model = nn.Sequential(nn.Linear(3, 4), ReversibleSequential(*blocks))
    first, second = find_nondeterministic(model, torch.randn(5, 3))
    assert first.name == "1.blocks.1.g"
    assert 1e-7 < first.output_error < 1e-5
    assert second.name == "1.blocks.2.f"
    assert second.output_error == 0
    assert 1e-4 < second.gradient_error < 1e-2


def test_random_functions_and_statistics_count_as_deterministic():
    blocks = [ReversibleBlock(nn.Sequential(ConvResidual(3), nn.Dropout(0.3)), ConvResidual(3)) for _ in range(2)]
    model = ReversibleSequential(*blocks)
    set_coupling(model, FixedPoint())
    x = torch.randn(2, 6, 5, 5)
    buffers = [buffer.clone() for buffer in model.buffers()]
    state = torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert find_nondeterministic(model, x) == ()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(now, before) for now, before in zip(model.buffers(), buffers, strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_runs_all_functions_of_a_network():
    model = create_model("revnet38")
    calls = []
    for name, module in model.named_modules():
        if name.endswith((".f", ".g")):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    assert find_nondeterministic(model, torch.randn(2, 3, 8, 8), num_runs=2) == ()
    assert len(calls) == 3 * len(set(calls)) == 3 * 18


class Residual(nn.Module):
    """An ordinary residual block."""

    def __init__(self):
        super().__init__()
        self.norm, self.branch, self.last = nn.BatchNorm1d(2), mlp(2), nn.Linear(2, 2)
        self.adapter = nn.Linear(2, 2)

    def forward(self, x):
        x = x + self.branch(self.norm(x))
        return x + self.last(x)


@pytest.mark.parametrize(
    ("method", "branches"),
    [
        (Dr2Net(0.5, 0.5), None),
        (Dr2Net(0.5, 0.5), ["norm branch", "last"]),
        (Dr2Net(1, 0), None),
        (BDIA(), ["norm branch", "last"]),
        (Adapter(), None),
    ],
    ids=str,
)
def test_names_nondeterministic_converted_blocks(method, branches):
    model = nn.Sequential(nn.Linear(3, 2), nn.Sequential(*[Residual() for _ in range(4)]))
    model[1][2].branch = Drifting(1e-3)
    model[1][3].adapter = Drifting(1e-3)
    revnet.convert(model, method, blocks="1", branches=branches)
    buffers = [buffer.clone() for buffer in model.buffers()]
    names = [found.name for found in find_nondeterministic(model, torch.randn(5, 3))]
    assert names == ["1.2"] + ["1.3.adapter"] * isinstance(method, Adapter)
    assert all(torch.equal(now, before) for now, before in zip(model.buffers(), buffers, strict=True))


def test_rejects_wrong_arguments():
    with pytest.raises(ValueError, match=r"`model` \(=Linear\) has no reversible block"):
        find_nondeterministic(nn.Linear(2, 2), torch.randn(1, 2))
    with pytest.raises(ValueError, match=r"`num_runs` \(=1\) must be an integer of at least 2"):
        find_nondeterministic(create_model("revnet38"), torch.randn(1, 3, 8, 8), num_runs=1)
    for num_runs in ("3", None, 2.5):
        with pytest.raises(ValueError, match=r"`num_runs` \(=.*\) must be an integer of at least 2"):
            find_nondeterministic(create_model("revnet38"), torch.randn(1, 3, 8, 8), num_runs=num_runs)
    with pytest.raises(TypeError, match=r"`kwargs` \(=int\) must be a dict"):
        find_nondeterministic(create_model("revnet38"), torch.randn(1, 3, 8, 8), kwargs=3)
    with pytest.raises(TypeError, match=r"`model` \(=type\) must be a module"):
        find_nondeterministic(nn.Linear, torch.randn(1, 2))
