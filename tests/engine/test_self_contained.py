"""Functions that need fewer checks, since they compute from their input, parameters and buffers alone."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, weight_norm
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from revnet import ReconstructionError, ReversibleBlock, ReversibleSequential
from revnet.engine import _self_contained
from revnet.models.resnet import BasicResidual, BottleneckResidual
from revnet.nn import BatchNorm2dBiased, BatchNorm2dUnbiased, Conv2dSame
from tests.helpers import Case, assert_trains_as_twin, stored_twin

FLAT = (nn.Identity(), nn.Flatten(), nn.Unflatten(1, (2, 2)), nn.Linear(4, 4), nn.BatchNorm1d(4))
ACTIVATIONS = (
    *(nn.CELU(), nn.ELU(), nn.GELU(), nn.GLU(), nn.Hardshrink(), nn.Hardsigmoid(), nn.Hardswish(), nn.Hardtanh()),
    *(nn.LeakyReLU(), nn.LogSigmoid(), nn.LogSoftmax(1), nn.Mish(), nn.PReLU(), nn.ReLU(), nn.ReLU6(), nn.SELU()),
    *(nn.SiLU(), nn.Sigmoid(), nn.Softmax(1), nn.Softmin(1), nn.Softplus(), nn.Softshrink(), nn.Softsign()),
    *(nn.Tanh(), nn.Tanhshrink(), nn.Threshold(0.1, 20.0)),
)
OF_SEQUENCES = (
    *(nn.Conv1d(4, 4, 3), nn.ConvTranspose1d(4, 4, 3), nn.InstanceNorm1d(4), nn.LayerNorm(8), nn.RMSNorm(8)),
    *(nn.AvgPool1d(2), nn.MaxPool1d(2), nn.AdaptiveAvgPool1d(2), nn.ZeroPad1d(1), nn.ReflectionPad1d(1)),
)
OF_IMAGES = (
    *(nn.Conv2d(4, 4, 3), nn.ConvTranspose2d(4, 4, 3), nn.BatchNorm2d(4), nn.InstanceNorm2d(4), nn.GroupNorm(2, 4)),
    *(nn.LocalResponseNorm(2), nn.AvgPool2d(2), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(2), nn.ZeroPad2d(1)),
    *(
        nn.ReflectionPad2d(1),
        nn.ChannelShuffle(2),
        nn.PixelShuffle(2),
        nn.PixelUnshuffle(2),
        nn.Upsample(scale_factor=2),
    ),
    *(
        BatchNorm2dBiased(4),
        BatchNorm2dUnbiased(4),
        Conv2dSame(4, 4, 3, 2),
        BasicResidual(4, 4),
        BottleneckResidual(4, 4),
    ),
)
OF_VOLUMES = (
    *(nn.Conv3d(4, 4, 3), nn.ConvTranspose3d(4, 4, 3), nn.BatchNorm3d(4), nn.InstanceNorm3d(4)),
    *(nn.AvgPool3d(2), nn.MaxPool3d(2), nn.AdaptiveAvgPool3d(2), nn.ZeroPad3d(1), nn.ReflectionPad3d(1)),
)
MODULES = [
    *((module, (4, 4)) for module in (nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)), *FLAT, *ACTIVATIONS)),
    *((module, (4, 4, 8)) for module in OF_SEQUENCES),
    *((module, (4, 4, 8, 8)) for module in OF_IMAGES),
    *((module, (4, 4, 8, 8, 8)) for module in OF_VOLUMES),
]
"""Every class that is known, and the shape of an input."""


class Linear(nn.Linear):
    """A user's class, which may do anything."""


class Noise(nn.Module):
    """Draws random numbers."""

    def forward(self, x):
        return x + torch.rand_like(x)


def with_hook(kind):
    module = nn.Linear(2, 2)
    getattr(module, f"register_{kind}")(lambda *_: None)
    return module


def with_own_forward():
    module = nn.Linear(2, 2)
    module.forward = torch.relu
    return module


def with_tensor():
    module = nn.Linear(2, 2)
    module.scale = torch.ones(2)
    return module


def compiled():
    module = nn.Linear(2, 2)
    module.compile(backend="eager")
    return module


OTHERS = {
    "subclass": lambda: Linear(2, 2),
    "user's module": Noise,
    "dropout": lambda: nn.Dropout(0.5),
    "dropout of nothing": lambda: nn.Dropout(0.0),
    "randomized relu": nn.RReLU,
    "attention": lambda: nn.MultiheadAttention(2, 1),
    "older weight norm": lambda: weight_norm(nn.Linear(2, 2)),
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(2, 2)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(2, 2)),
    "forward hook": lambda: with_hook("forward_hook"),
    "forward pre-hook": lambda: with_hook("forward_pre_hook"),
    "backward hook": lambda: with_hook("full_backward_hook"),
    "backward pre-hook": lambda: with_hook("full_backward_pre_hook"),
    "own forward": with_own_forward,
    "tensor in an attribute": with_tensor,
    "compiled": compiled,
}


def saved_by(module, x):
    """Return shape and dtype of each tensor that autograd saves, and whether it is the module's or computed."""
    own, saved = {*map(id, module.parameters()), *map(id, module.buffers())}, []

    def pack(tensor):
        saved.append((tensor.shape, tensor.dtype, id(tensor) in own or id(tensor._base) in own))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x)
    return saved


def test_every_known_class_is_tested():
    assert {type(module) for module, _ in MODULES} == set(_self_contained._FORWARDS)


@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(("module", "shape"), MODULES, ids=lambda value: type(value).__name__)
def test_known_module_draws_nothing_and_saves_the_same(module, shape, mode):
    module = module.train(mode)
    assert _self_contained.is_self_contained(module.modules())
    before = torch.get_rng_state()
    parameters = [parameter.detach().clone() for parameter in module.parameters()]
    inputs = [
        torch.randn(shape, generator=torch.Generator().manual_seed(seed), requires_grad=True) for seed in range(2)
    ]
    first, second = [saved_by(module, x) for x in inputs]
    assert first == second
    assert torch.equal(torch.get_rng_state(), before)
    for parameter, value in zip(module.parameters(), parameters, strict=True):
        assert torch.equal(parameter, value)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS.keys())
def test_other_functions_are_checked_in_full(make):
    function = nn.Sequential(nn.Linear(2, 2), make())
    assert not _self_contained.is_self_contained(function.modules())
    assert _self_contained.is_self_contained(function[0].modules())


def test_class_whose_forward_was_replaced_is_checked_in_full(monkeypatch):
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: x)
    assert not _self_contained.is_self_contained(nn.Linear(2, 2).modules())


def block():
    return ReversibleBlock(*[nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)) for _ in range(2)])


CASE = Case("", block, (2, 8))


def step(module, x, args, kwargs):
    module(x).square().sum().backward()


def plans_of(sequence):
    return sequence._schedule().segments[0][1].plans


@pytest.fixture
def trained():
    """A sequence whose functions were found to be self-contained in an earlier step."""
    sequence = CASE.sequence(3)
    step(sequence, CASE.input(), (), {})
    assert all(plan.is_self_contained for plan in plans_of(sequence))
    sequence.zero_grad()
    return sequence


class NoisyFunctions(TorchFunctionMode):
    """Adds noise to every hyperbolic tangent."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return result + torch.rand_like(result) if func is torch.tanh else result


class NoisyOperators(TorchDispatchMode):
    """Adds noise to every hyperbolic tangent, below autograd."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return result.add_(torch.rand_like(result)) if func is torch.ops.aten.tanh.default else result


def hook(function):
    function[1].register_forward_hook(lambda module, args, result: result + torch.rand_like(result))


def own_forward(function):
    function[1].forward = lambda x: torch.tanh(x) + torch.rand_like(x)


def another_module(function):
    function.append(Noise())


@pytest.mark.parametrize("change", [hook, own_forward, another_module])
def test_change_after_earlier_steps_is_noticed(trained, change):
    for block in trained:
        change(block.f)
    assert_trains_as_twin(trained, CASE, step)
    assert not any(plan.is_self_contained for plan in plans_of(trained)[::2])


def test_mode_that_draws_random_numbers_is_noticed(trained):
    with NoisyOperators():
        assert_trains_as_twin(trained, CASE, step)


def test_mode_that_draws_random_numbers_only_in_the_forward_pass_raises(trained):
    """PyTorch's backward pass does not run under function modes."""
    with NoisyFunctions(), pytest.raises(ReconstructionError, match="did not draw the same random numbers"):
        step(trained, CASE.input(), (), {})


def test_change_of_the_dtype_is_noticed(trained):
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-9)):
        case = Case("", block, (2, 8), dtype=dtype)
        trained.to(dtype).zero_grad()
        assert_trains_as_twin(trained, case, step, tolerance=tolerance)


def test_module_that_changes_between_forward_and_backward_raises():
    activations = [nn.LeakyReLU(0.01) for _ in range(4)]
    functions = [nn.Sequential(nn.Linear(16, 16), activation) for activation in activations]
    sequence = ReversibleSequential(ReversibleBlock(*functions[:2]), ReversibleBlock(*functions[2:]))
    x = torch.randn(8, 32).requires_grad_()
    sequence(x).square().sum().backward()
    y = sequence(x)
    for activation in activations:
        activation.negative_slope = 0.5
    with pytest.raises(ReconstructionError, match="different numbers"):
        y.square().sum().backward()


def test_tensor_in_a_parameters_place_is_checked_in_full(trained):
    """`functional_call` may put tensors there that were computed elsewhere."""
    twin = stored_twin(trained)
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 8, dtype=torch.float64)
    gradients = []
    for module in (trained, twin):
        values = {name: parameter.detach() * scale for name, parameter in module.named_parameters()}
        y = torch.func.functional_call(module, values, (x.clone().requires_grad_(),))
        gradients += torch.autograd.grad(y.square().sum(), scale)
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)
