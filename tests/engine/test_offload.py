"""`Offload()` with parameters that exist only during a call, as with FSDP, and with transforms of `torch.func`."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from revnet import Offload, PolicySequential, ReversibleBlock, ReversibleSequential, Store, set_policy
from revnet.engine import _offload
from tests.helpers import squares


@pytest.fixture
def device(monkeypatch):
    """Make CPU tensors count as tensors on a GPU."""
    monkeypatch.setattr(_offload, "_is_on_host", lambda tensor: False)


USES = {
    "transposed": lambda x, weight: F.linear(x, weight),
    "itself": lambda x, weight: x * weight[0] + weight.sum() * x,
    "detached": lambda x, weight: F.linear(x, weight.detach()) * weight.sum(),
    "computed": lambda x, weight: F.linear(x, weight.tanh()),
}


class Gathered(nn.Module):
    """Holds a shard, like a module of FSDP. The whole weight has memory only during the passes of the module."""

    def __init__(self, use):
        super().__init__()
        self.shard = nn.Parameter(torch.randn(4, 4))
        self.use, self.num_freed = USES[use], 0
        self.register_forward_pre_hook(lambda module, _: module.gather())
        self.register_forward_hook(lambda module, *_: module.free())
        self.register_full_backward_pre_hook(lambda module, _: module.gather())

    def gather(self):
        if "whole" not in vars(self):
            vars(self)["whole"] = nn.Parameter(torch.empty(4, 4))
        whole = vars(self)["whole"]
        with torch.autograd._unsafe_preserve_version_counter(whole), torch.no_grad():
            whole.untyped_storage().resize_(self.shard.nbytes)
            whole.copy_(self.shard)

    def free(self):
        self.num_freed += 1
        vars(self)["whole"].untyped_storage().resize_(0)

    def forward(self, x):
        return self.use(x, vars(self)["whole"])


@pytest.mark.parametrize("use", USES)
def test_a_parameter_may_be_freed_before_the_next_operation(use, device):
    torch.manual_seed(0)
    model = PolicySequential(nn.Sequential(Gathered(use), nn.Tanh(), Gathered(use)), policy=Offload())
    twin = copy.deepcopy(model)
    set_policy(twin, Store())
    gradients = []
    for module in (model, twin):
        x = torch.linspace(-1, 1, 8).reshape(2, 4).requires_grad_()
        squares(module(x)).backward()
        gathered = [inner for inner in module.modules() if isinstance(inner, Gathered)]
        assert [inner.num_freed for inner in gathered] == [1, 1]
        gradients.append([x.grad, *(vars(inner)["whole"].grad for inner in gathered)])
    assert all(torch.equal(actual, expected) for actual, expected in zip(*gradients, strict=True))


def test_a_gathered_parameter_is_not_copied(device, monkeypatch):
    copied = []
    monkeypatch.setattr(_offload._OnHost, "begin", lambda packed: copied.append(packed._shape))
    PolicySequential(Gathered("transposed"), policy=Offload())(torch.ones(2, 4, requires_grad=True))
    assert copied == [(2, 4)]


def test_memory_that_does_not_come_back_is_an_error(device):
    class Freed(nn.Module):
        def forward(self, x):
            table = torch.ones(3)
            y = x * table
            table.untyped_storage().resize_(0)
            return y

    model, x = PolicySequential(Freed(), policy=Offload()), torch.randn(2, 3, requires_grad=True)
    y = model(x)
    with pytest.raises(RuntimeError, match=r"a tensor of shape \(3,\) was written to before it was copied to the host"):
        y.sum().backward()


MODELS = {
    "sequence": lambda: ReversibleSequential(*[ReversibleBlock(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2)]),
    "other modules": lambda: PolicySequential(nn.Linear(8, 8), nn.Tanh()),
}


@pytest.mark.parametrize("model", MODELS)
def test_reverse_mode_of_torch_func_raises(model):
    model, x = MODELS[model](), torch.randn(3, 8)
    set_policy(model, Offload())
    with pytest.raises(RuntimeError, match=r"cannot be differentiated by `torch.func.grad`.*`set_policy\(model, Store"):
        torch.func.grad(lambda x: squares(model(x)))(x)
    with (
        torch.autograd.graph.disable_saved_tensors_hooks("not in this part"),
        pytest.raises(RuntimeError, match=r"are disabled \(not in this part\)"),
    ):
        model(x)
    squares(model(x)).backward()  # The errors have no lasting effect.
    set_policy(model, Store())
    assert torch.func.grad(lambda x: squares(model(x)))(x).shape == x.shape


def test_torch_func_inside_a_module_raises():
    class Force(nn.Module):
        def forward(self, x):
            return torch.func.grad(lambda x: x.tanh().sum())(x)

    model, x = PolicySequential(Force(), policy=Offload()), torch.randn(2, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"on the host uses `torch.func.grad`.*`create_graph=True`.*`set_policy"):
        model(x)
    x.sin().sum().backward()
    assert torch.equal(x.grad, x.cos())
