"""`gradient_errors` measures correct angles and changes neither the model nor the random state."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from revnet import FixedPoint, Reverse, ReversibleBlock, ReversibleSequential, Store, create_model
from revnet.models import ReversibleTransformer
from revnet.paper import gradient_errors
from revnet.paper.gradient_angle.gradients import ALL, parameter_groups
from tests.helpers import ConvResidual, all_cases, all_reversible_models, assert_same_buffers, mlp, squares


class Network(nn.Module):
    """A scale and blocks with the arguments of a case."""

    def __init__(self, case, policy=None):
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=case.dtype))
        self.blocks = case.sequence(4, policy)
        self.args, self.kwargs = case.args(), case.kwargs()

    def forward(self, x):
        return self.blocks(self.scale * x, *self.args, **self.kwargs)


def convolutions(depth=3, **options):
    return ReversibleSequential(*[ReversibleBlock(ConvResidual(4), ConvResidual(4)) for _ in range(depth)], **options)


@pytest.mark.filterwarnings("ignore:Casting complex values:UserWarning")
@all_cases
def test_changes_nothing_and_is_accurate_in_float64(case):
    model, x = Network(case), case.input(requires_grad=False)
    squares(model(x)).backward()
    before, gradients = copy.deepcopy(model), [parameter.grad.clone() for parameter in model.parameters()]
    buffers = [id(buffer) for buffer in model.buffers()]
    policies, state = model.blocks.policies, torch.get_rng_state()
    errors = gradient_errors(model, squares, x, with_reference=True)
    assert [error.group for error in errors] == ["stem", "blocks", ALL]
    for error in errors:
        assert error.angle_degrees < 1e-9  # the rounding of four reconstructions in float64
        assert error.relative_error < 1e-10
        assert error.reference_angle_degrees == error.reference_relative_error == 0  # the same arithmetic
    assert torch.equal(torch.get_rng_state(), state)
    assert model.blocks.policies is policies
    assert buffers == [id(buffer) for buffer in model.buffers()]
    assert_same_buffers(model, before)
    for parameter, value, gradient in zip(model.parameters(), before.parameters(), gradients, strict=True):
        assert torch.equal(parameter, value)
        assert torch.equal(parameter.grad, gradient)


def test_errors_equal_the_difference_of_two_steps():
    """Residuals that are a thousand times larger lose three digits, which is enough to measure."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), convolutions())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("conv2.weight"):
                parameter.mul_(1e3)
    twin = copy.deepcopy(model)
    twin[1].set_policies(Store())
    x = torch.randn(2, 3, 5, 5)
    errors = {error.group: error for error in gradient_errors(model, squares, x)}
    for network in (model, twin):
        squares(network(x)).backward()
    actual = torch.cat([parameter.grad.double().flatten() for parameter in model.parameters()])
    expected = torch.cat([parameter.grad.double().flatten() for parameter in twin.parameters()])
    assert errors[ALL].relative_error == pytest.approx(float((actual - expected).norm() / expected.norm()))
    assert errors[ALL].relative_error > 1e-6
    cosine = actual @ expected / (actual.norm() * expected.norm())
    assert errors[ALL].angle_degrees == pytest.approx(math.degrees(torch.arccos(cosine.clamp(max=1))), rel=1e-2)


@pytest.mark.parametrize("policy", [Reverse(), Store(), [Reverse(), Store(), Reverse()]])
def test_does_not_depend_on_the_policies(policy):
    model = nn.Sequential(nn.Conv2d(3, 8, 1), convolutions(policy=policy))
    reference = nn.Sequential(copy.deepcopy(model[0]), ReversibleSequential(*copy.deepcopy(list(model[1]))))
    x = torch.randn(2, 3, 5, 5)
    assert gradient_errors(model, squares, x) == gradient_errors(reference, squares, x)


@all_reversible_models
def test_modules_after_the_last_block_have_equal_gradients(make_model):
    model = make_model()
    is_exact = any(FixedPoint() == getattr(module, "coupling", None) for module in model.modules())
    x = torch.randint(10, (4, 16)) if isinstance(model, ReversibleTransformer) else torch.randn(4, 3, 16, 16)

    def loss(logits):
        logits = logits.flatten(0, -2)
        return F.cross_entropy(logits, torch.arange(len(logits)) % 10)

    errors = gradient_errors(model, loss, x, with_reference=True)
    *stages, head, together = errors
    assert (head.group, together.group) == ("head", ALL)
    assert (head.angle_degrees, head.relative_error) == (0, 0)
    assert head.reference_angle_degrees > 0
    # Rounding of float32, which may move ReLU inputs across zero, or exactly 0.
    assert all(error.angle_degrees < 20 for error in stages)
    assert not is_exact or together.relative_error == 0
    assert len({error.group for error in stages}) == len(stages) >= 2


def test_forward_pass_under_autocast():
    model, x = convolutions(), torch.randn(2, 8, 5, 5)
    autocast_states = []

    def loss(output):
        autocast_states.append(torch.is_autocast_enabled("cpu"))
        return squares(output)

    low = gradient_errors(
        model, loss, x, with_reference=True, forward_context=lambda: torch.autocast("cpu", torch.bfloat16)
    )
    assert autocast_states == [True, True, False]  # not in float64
    full = gradient_errors(model, loss, x, with_reference=True)
    assert low[-1].reference_angle_degrees > 100 * full[-1].reference_angle_degrees


def test_keeps_evaluation_mode():
    model, x = convolutions().eval(), torch.randn(2, 8, 5, 5)
    assert gradient_errors(model, squares, x)[-1].relative_error < 1e-3
    assert not model.training


class Divided(nn.Module):
    """A parameter, a stem, stages with a layer between them, and a head that shares the stem."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(6))
        self.stem = nn.Linear(6, 6)
        self.stages = nn.ModuleList([ReversibleSequential(ReversibleBlock(mlp(3), mlp(3))) for _ in range(2)])
        self.between = nn.Linear(6, 6)
        self.more = ReversibleSequential(ReversibleBlock(mlp(3), mlp(3)), ReversibleBlock(mlp(3), mlp(3)))
        self.norm = nn.LayerNorm(6)
        self.head = self.stem


def test_parameter_groups():
    model = Divided()
    model.stages[1].requires_grad_(False)
    model.norm.bias.requires_grad_(False)
    groups = parameter_groups(model)
    assert list(groups) == ["stem", "stage 1", "between", "more", "head", ALL]
    assert groups["stem"] == ["token", "stem.weight", "stem.bias"]
    assert groups["head"] == ["norm.weight"]  # shared weights belong to the first group
    assert groups[ALL] == [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert sum(len(names) for names in groups.values()) == 2 * len(groups[ALL])


def test_parameter_groups_of_a_revnet():
    with torch.device("meta"):
        groups = parameter_groups(create_model("revnet38"))
    assert list(groups) == ["stem", "stage 1", "stage 2", "stage 3", "head", ALL]


def test_zero_gradients_have_no_angle():
    model = nn.Sequential(convolutions(2), nn.Conv2d(8, 2, 1))
    *_, head, _ = gradient_errors(model, lambda output: 0 * output.sum(), torch.randn(2, 8, 5, 5))
    assert (head.group, head.angle_degrees, head.relative_error) == ("head", 0, 0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: create_model("resnet32"), r"`model` \(=ResNet\) has no reversible block, so nothing is rebuilt"),
        (
            lambda: nn.Sequential(convolutions(), ReversibleBlock(mlp(4), mlp(4))),
            r"`model` \(=Sequential\) has the block `1` outside a ReversibleSequential, where it cannot be stored",
        ),
        (lambda: convolutions().requires_grad_(False), "has no parameter that requires a gradient; unfreeze one"),
    ],
)
def test_rejects_models_without_a_stored_twin(make, message):
    with pytest.raises(ValueError, match=message):
        gradient_errors(make(), squares, torch.randn(2, 8, 5, 5))


def test_an_exception_leaves_the_model_unchanged():
    model = convolutions()
    policies, before = model.policies, copy.deepcopy(model)
    with pytest.raises(ZeroDivisionError):
        gradient_errors(model, lambda output: 1 / 0, torch.randn(2, 8, 5, 5))
    assert model.policies is policies
    assert_same_buffers(model, before)
