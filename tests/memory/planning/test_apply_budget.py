"""Plans for a model whose code cannot be changed."""

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

from revnet import BudgetError, Checkpoint, PredictionError, ReversibleBlock, ReversibleSequential, apply_budget
from revnet.memory import measure, plan, predict
from revnet.nn import HasPolicies, add_policies


class Block(nn.Module):
    """A residual block with batch norm and dropout."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.conv1(x)))
        return x + self.conv2(torch.dropout(y, 0.1, self.training))


class Network(nn.Module):
    """A network of two stages, with an optional reversible part of two blocks."""

    def __init__(self, *, has_reversible: bool = False):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first = nn.Sequential(*[Block(8) for _ in range(2)])
        self.down = nn.Conv2d(8, 16, 2, 2)
        self.second = nn.Sequential(*[Block(16) for _ in range(2)])
        blocks = [ReversibleBlock(nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)) for _ in range(2)]
        self.reversible = ReversibleSequential(*blocks) if has_reversible else nn.Identity()
        self.head = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.down(self.first(self.stem(x))))
        return self.head(self.reversible(x).mean((2, 3)))


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    model = copy.deepcopy(model)
    torch.manual_seed(1)
    model(x).square().sum().backward()
    return [*[parameter.grad for parameter in model.parameters()], *model.buffers()]


OPTIMIZER = torch.optim.AdamW


@pytest.mark.parametrize("has_reversible", [pytest.param(False, marks=pytest.mark.slow), True])
def test_predicted_peak_is_exact_at_each_budget(has_reversible):
    # One sample, since an error also says which smaller batch fits.
    model, x = Network(has_reversible=has_reversible), torch.randn(1, 3, 32, 32)
    expected, plain = step(model, x), predict(model, x, optimizer=OPTIMIZER)
    with pytest.raises(BudgetError) as caught:
        apply_budget(model, x, budget=1, optimizer=OPTIMIZER)
    least = caught.value.least_bytes
    assert least < plain.peak_bytes
    budgets = [least] if has_reversible else [least, (least + plain.peak_bytes) // 2, 2 * plain.peak_bytes]
    for budget in budgets:
        chosen = apply_budget(model, x, budget=budget, optimizer=OPTIMIZER)
        assert chosen.memory == measure(model, x, optimizer=OPTIMIZER)
        assert chosen.peak_bytes <= budget
        if has_reversible:
            continue
        assert (Checkpoint() in {unit.policy for unit in chosen.units}) == (budget < plain.peak_bytes)
        for actual, wanted in zip(step(model, x), expected, strict=True):
            assert torch.equal(actual, wanted)


def test_plan_lists_the_blocks_that_it_found():
    model = Network(has_reversible=True)
    chosen = apply_budget(model, torch.randn(2, 3, 8, 8), budget="1GiB")
    names = ["first.0", "first.1", "second.0", "second.1"]
    names += [f"reversible.blocks.{index}" for index in range(2)]
    assert [unit.name for unit in chosen.units] == names
    assert chosen.unplanned == ()
    assert all(unit.name.partition(".")[0] in str(chosen) for unit in chosen.units)


def test_plan_is_applied_to_another_copy():
    x = torch.randn(4, 3, 16, 16)
    model, other = Network(), Network()
    with torch.device("meta"):
        chosen = apply_budget(Network(), x, budget="400KiB")
    with pytest.raises(ValueError, match=r"no unit `first\.0`.*after `revnet\.nn\.add_policies`"):
        chosen.apply(other)
    add_policies(other)
    chosen.apply(other)
    assert measure(other, x).peak_bytes == chosen.peak_bytes < measure(model, x).peak_bytes


def test_units_that_run_more_than_once_are_listed():
    model = Network()
    model.first[1] = model.first[0]
    chosen = apply_budget(model, torch.randn(2, 3, 8, 8), budget="1GiB")
    assert chosen.unplanned == ("first.0",)
    assert "first.0 keeps its policy, since it does not run exactly once in a step" in str(chosen)
    with pytest.raises(ValueError, match=r"no units to plan: `first\.0` ran 2 times"):
        apply_budget(model, torch.randn(2, 3, 8, 8), budget="1GiB", blocks="first.*")


@pytest.mark.parametrize("budget", ["1GiB", "200KiB"])
def test_a_unit_that_runs_nothing_costs_nothing(budget):
    model, x = Network(), torch.randn(2, 3, 16, 16)
    model.second[0] = nn.Identity()
    chosen = apply_budget(model, x, budget=budget, blocks=[*model.first, *model.second])
    assert len(chosen.units) == 4
    assert measure(model, x).peak_bytes == chosen.peak_bytes


def test_model_is_unchanged_after_an_error():
    model, x = Network(), torch.randn(2, 3, 8, 8)
    with pytest.raises(BudgetError):
        apply_budget(model, x, budget=1)
    assert type(model.first[0]) is Block
    with pytest.raises(PredictionError):
        apply_budget(model, x[0, 0], budget="1GiB")
    assert not any(isinstance(module, HasPolicies) for module in model.modules())
    apply_budget(model, x, budget="1GiB", blocks="first.*")
    model.first[1].set_policies("checkpoint")
    with pytest.raises(BudgetError):
        apply_budget(model, x, budget=1, blocks="second.*")
    assert model.first[1].policies == (Checkpoint(),)
    assert not isinstance(model.second[0], HasPolicies)


def test_planning_reversible_parts_alone():
    model = nn.Sequential(ReversibleSequential(ReversibleBlock(nn.Linear(2, 2), nn.Linear(2, 2))))
    x = torch.randn(3, 4)
    assert apply_budget(model, x, budget="1GiB").units == plan(model, x, budget="1GiB").units


def test_rejects_a_model_in_a_wrapper():
    with pytest.raises(ValueError, match=r"`model` \(=DataParallel\) wraps the model; pass .* `model\.module`\."):
        apply_budget(nn.DataParallel(Network()), torch.randn(2, 3, 8, 8), budget="1GiB")
    with warnings.catch_warnings(action="ignore"):  # The first call imports TorchScript, which is deprecated.
        compiled = torch.compile(Network())
    with pytest.raises(ValueError, match=r"`model` \(=OptimizedModule\) is compiled; pass the model itself, before"):
        apply_budget(compiled, torch.randn(2, 3, 8, 8), budget="1GiB")


class SelfCheckpointing(Network):
    """A network with a switch of its own, as models of timm and transformers have."""

    grad_checkpointing = True


def test_rejects_a_model_that_recomputes_activations_itself():
    with pytest.raises(ValueError, match=r"`grad_checkpointing`.*is on"):
        apply_budget(SelfCheckpointing(), torch.randn(2, 3, 8, 8), budget="1GiB")
