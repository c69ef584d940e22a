"""Plans fit their budget, nothing that fits is faster, and reports are complete."""

import itertools
import re
from functools import partial

import pytest
import torch
from torch import nn

from revnet import (
    BudgetError,
    Checkpoint,
    FixedPoint,
    Offload,
    PolicySequential,
    PredictionError,
    Reverse,
    ReversibleBlock,
    ReversibleSequential,
    Store,
    set_coupling,
    set_policy,
)
from revnet.memory import MeasuredTiming, max_batch_size, measure, plan, predict
from revnet.memory.planning._planner import POLICIES
from revnet.memory.planning._resized import resized
from revnet.memory.planning._units import set_policies
from revnet.models import RevNet
from revnet.nn._whole_model import policy_holders
from tests.helpers import CASE, Attention, FeedForward, assert_close, gradients, squares

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def small_revnet(num_blocks=(1, 1)):
    return RevNet(num_blocks=num_blocks, widths=(8, 8, 16))


def small_transformer(num_blocks=2):
    blocks = [ReversibleBlock(Attention(8), FeedForward(8), split_dim=-1) for _ in range(num_blocks)]
    return nn.Sequential(PolicySequential(nn.Linear(4, 16), nn.GELU()), ReversibleSequential(*blocks), nn.Linear(16, 2))


MODELS = {
    "revnet": (small_revnet, lambda batch: torch.randn(batch, 3, 8, 8)),
    "transformer": (small_transformer, lambda batch: torch.randn(batch, 10, 4)),
}


def models(slow=()):
    """Return the mark that runs a test for each model; of some, as a slow one."""
    marks = {name: [pytest.mark.slow] if name in slow else [] for name in MODELS}
    params = [pytest.param(*model, id=name, marks=marks[name]) for name, model in MODELS.items()]
    return pytest.mark.parametrize(("make_model", "make_input"), params)


def policies(model):
    return [policy for holder in policy_holders(model).values() for policy in holder.policies]


def everything(model, x, units):
    """Return the peak of every assignment of policies to `units`, each from a step."""
    holders = policy_holders(model)
    choices = [
        [policy for policy in POLICIES if holders[unit.holder].policy_units[unit.index].accepts(policy)]
        for unit in units
    ]
    peaks = {}
    for assignment in itertools.product(*choices):
        places = [(unit.holder, unit.index) for unit in units]
        set_policies(model, dict(zip(places, assignment, strict=True)))
        peaks[assignment] = predict(model, x, optimizer=SGD).peak_bytes
    return peaks


LARGER = {
    "revnet-5": (partial(small_revnet, (2, 2)), MODELS["revnet"][1]),
    "transformer-5": (partial(small_transformer, 4), MODELS["transformer"][1]),
}


@pytest.mark.parametrize(
    ("make_model", "make_input"),
    [
        pytest.param(partial(small_transformer, 1), MODELS["transformer"][1], id="transformer-2"),
        pytest.param(*MODELS["transformer"], id="transformer", marks=pytest.mark.slow),
        pytest.param(*MODELS["revnet"], id="revnet", marks=pytest.mark.slow),
        *[pytest.param(*model, id=name, marks=pytest.mark.slow) for name, model in LARGER.items()],
    ],
)
def test_no_assignment_that_fits_is_faster(make_model, make_input):
    """Every assignment is predicted. Its time is the sum of the times that plans report for its policies."""
    model, x = make_model(), make_input(4)
    options = {"optimizer": SGD, "policies": POLICIES}
    whole = plan(model, x, budget="1GiB", **options)
    peaks = everything(model, x, whole.units)
    middle = [whole.points[len(whole.points) * part // 3].peak_bytes for part in range(3)]
    plans = [whole, *[plan(model, x, budget=budget, **options) for budget in middle]]
    extra = {(index, unit.policy): unit.extra_time for planned in plans for index, unit in enumerate(planned.units)}
    compared = 0
    for planned in plans:
        assert planned.peak_bytes == peaks[tuple(unit.policy for unit in planned.units)] <= planned.budget_bytes
        for assignment, peak in peaks.items():
            costs = [extra.get(cost) for cost in enumerate(assignment)]
            if peak <= planned.budget_bytes and None not in costs:
                compared += 1
                assert 1 + sum(costs) >= planned.time_ratio - 1e-9, (assignment, planned)
    assert compared > 5


@pytest.mark.slow  # `test_no_assignment_that_fits_is_faster` compares with every assignment.
@models()
def test_more_budget_gives_no_slower_plan(make_model, make_input):
    model, x = make_model(), make_input(4)
    points = plan(model, x, budget="1GiB", optimizer=SGD).points
    least, most = points[0].peak_bytes, points[-1].peak_bytes
    times = []
    for step in range(3):  # the reported least peak is enough as a budget
        budget = least + (most - least) * step // 2
        planned = plan(model, x, budget=budget, optimizer=SGD)
        assert planned.peak_bytes <= budget
        times.append(planned.time_ratio)
    assert times == sorted(times, reverse=True)
    assert times[-1] == 1


@models(slow=["revnet"])
def test_points_range_from_least_memory_to_plain_autograd(make_model, make_input):
    planned = plan(make_model(), make_input(4), budget="1GiB", optimizer=SGD)
    peaks, ratios = zip(*planned.points, strict=True)
    assert list(peaks) == sorted(set(peaks))
    assert list(ratios) == sorted(set(ratios), reverse=True)
    assert planned.points[-1].time_ratio == planned.time_ratio == 1
    assert list(planned.references) == ["reverse all", "checkpoint all", "plain autograd"]
    policies = {"reverse all": Reverse(), "checkpoint all": Checkpoint(), "plain autograd": Store()}
    for name, point in planned.references.items():
        assert point.time_ratio >= 1
        model = make_model()
        set_policy(model, Checkpoint())  # for units that do not accept the next policy
        set_policy(model, policies[name])
        assert point.peak_bytes == predict(model, make_input(4), optimizer=SGD).peak_bytes
        # No reference is better than the points.
        assert min(ratio for peak, ratio in planned.points if peak <= point.peak_bytes) <= point.time_ratio


@models(slow=["revnet"])
def test_the_planned_peak_equals_the_measured_peak(make_model, make_input):
    model, x = make_model(), make_input(4)
    points = plan(model, x, budget="1GiB", optimizer=SGD).points
    middle = points[len(points) // 2].peak_bytes
    planned = plan(model, x, budget=middle, optimizer=SGD)
    assert len({unit.policy for unit in planned.units}) > 1
    planned.apply(model)
    assert measure(model, x, optimizer=SGD).peak_bytes == planned.peak_bytes <= middle


@models(slow=["transformer"])
def test_a_planned_model_has_the_gradients_of_its_stored_twin(make_model, make_input):
    model, twin = make_model().double(), make_model().double()
    twin.load_state_dict(model.state_dict())
    set_policy(twin, Store())
    x = make_input(4).double()
    points = plan(model, x, budget="1GiB").points
    plan(model, x, budget=points[len(points) // 2].peak_bytes).apply(model)
    for module in (model, twin):
        squares(module(x)).backward()
    assert_close(gradients(model), gradients(twin))


@pytest.mark.slow
def test_the_planned_peak_with_exact_couplings_equals_the_measured_peak():
    model, x = small_revnet(), torch.randn(4, 3, 8, 8)
    set_coupling(model, FixedPoint())
    least = plan(model, x, budget="1GiB", optimizer=SGD).points[0].peak_bytes
    planned = plan(model, x, budget=least, optimizer=SGD)
    planned.apply(model)
    assert Reverse in {type(unit.policy) for unit in planned.units}
    assert measure(model, x, optimizer=SGD).peak_bytes == planned.peak_bytes <= least


def test_planning_does_not_change_the_model():
    model, x = small_revnet(), torch.randn(4, 3, 8, 8)
    set_policy(model, Checkpoint())
    before = policies(model), {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    plan(model, x, budget="1GiB")
    assert policies(model) == before[0]
    assert all(torch.equal(value, before[1][name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and type(parameter) is nn.Parameter for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_plans_on_the_meta_device():
    with torch.device("meta"):
        model = small_revnet()
    planned = plan(model, torch.empty(4, 3, 8, 8, device="meta"), budget="1MB", optimizer=SGD)
    real = small_revnet()
    planned.apply(real)
    assert measure(real, torch.randn(4, 3, 8, 8), optimizer=SGD).peak_bytes == planned.peak_bytes <= 1_000_000


def test_a_budget_error_says_what_is_missing_and_which_batch_fits():
    model, x = small_revnet(), torch.randn(16, 3, 8, 8)
    least = plan(model, x, budget="1GiB", optimizer=SGD).points[0].peak_bytes
    budget = least * 2 // 3
    with pytest.raises(
        BudgetError, match=r"`budget` \(=.* KiB\) is .* KiB below the least .* a batch of \d+ s"
    ) as info:
        plan(model, x, budget=budget, optimizer=SGD)
    assert info.value.least_bytes == least
    assert info.value.missing_bytes == least - budget
    batch = info.value.max_batch_size
    assert 1 < batch < 16
    assert plan(model, x[:batch], budget=budget, optimizer=SGD).peak_bytes <= budget


def test_a_budget_below_the_size_of_the_model():
    with pytest.raises(
        BudgetError, match=r"parameters, their gradients and optimizer state; no batch would fit"
    ) as info:
        plan(small_revnet(), torch.randn(4, 3, 8, 8), budget="10KB", optimizer=SGD)
    assert info.value.max_batch_size == 0


def test_a_budget_that_is_too_small_for_a_loss_of_one_batch_size():
    targets = torch.zeros(4, dtype=torch.long)

    def loss(y):
        return nn.functional.cross_entropy(y, targets)

    with pytest.raises(BudgetError, match="optimizer state; smaller batches fail, so none was found that fits") as info:
        plan(small_revnet(), torch.randn(4, 3, 8, 8), budget="50KiB", optimizer=SGD, loss=loss)
    assert info.value.max_batch_size == 0


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = ReversibleSequential(ReversibleBlock(nn.Linear(2, 2), nn.Linear(2, 2)))

    def forward(self, x):
        return self.blocks(x) if x.sum() > 0 else self.blocks(-x)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"budget": "16 apples"}, ValueError, r"`budget` \(='16 apples'\) must be a number of bytes with a unit"),
        ({"budget": 0}, ValueError, r"`budget` \(=0\) must be positive"),
        ({"budget": None}, TypeError, r"`budget` \(=None\) must be a number of bytes"),
        ({"budget": "1GiB", "timing": "counted"}, TypeError, r"`timing` \(='counted'\) must be a `RooflineTiming\(\)`"),
        ({"budget": "1GiB", "policies": [Reverse]}, TypeError, r"`policies\[0\]` \(=.*Reverse.*\) must be a policy"),
        ({"budget": "1GiB", "policies": "store"}, TypeError, r"`policies` \(='store'\) must be a sequence of policies"),
        ({"budget": "1GiB", "policies": []}, ValueError, "`policies` must hold one policy or more"),
        (
            {"budget": "1GiB", "step_in_backward": 1},
            ValueError,
            r"`step_in_backward` \(=1\) must be True, False or 'auto'",
        ),
        ({"budget": "1GiB", "step_in_backward": "auto"}, ValueError, r"`step_in_backward` needs `optimizer` \(=None\)"),
    ],
)
def test_rejects_wrong_arguments(options, error, message):
    with pytest.raises(error, match=message):
        plan(small_revnet(), torch.randn(2, 3, 8, 8), **options)


def test_rejects_models_that_cannot_be_planned():
    with pytest.raises(PredictionError, match=r"asks for the value of a tensor.*`revnet\.memory\.measure`"):
        plan(Branching(), torch.randn(2, 4), budget="1GiB")
    with pytest.raises(ValueError, match=r"`model` \(=Linear\) has no units to plan; build it from `ReversibleSeq"):
        plan(nn.Linear(2, 2), torch.randn(2, 2), budget="1GiB")


def test_measured_timing_rejects_meta_tensors():
    model = small_revnet()
    with pytest.raises(ValueError, match=r"`timing` \(=MeasuredTiming\) runs steps, but .* on the meta device"):
        plan(model, torch.empty(2, 3, 8, 8, device="meta"), budget="1GiB", timing=MeasuredTiming())


def test_plans_with_offload():
    planned = plan(small_revnet(), torch.randn(2, 3, 8, 8), budget="1GiB", policies=[Reverse(), Offload()])
    # On a CPU, Offload() costs as much as Store(), and comes before it. The stem cannot be reversed.
    assert {unit.policy for unit in planned.units} == {Offload()}


def test_the_largest_batch_fits_and_one_more_does_not():
    model = small_revnet()
    x = torch.empty(3, 3, 8, 8, device="meta")
    for budget in (300_000, 20_000_000):
        batch = max_batch_size(model, x, budget=budget, optimizer=SGD)
        assert predict(model, torch.empty(batch, 3, 8, 8, device="meta"), optimizer=SGD).peak_bytes <= budget
        assert predict(model, torch.empty(batch + 1, 3, 8, 8, device="meta"), optimizer=SGD).peak_bytes > budget


@pytest.mark.slow
def test_the_largest_batch_for_a_huge_budget():
    model, x = small_revnet(), torch.empty(3, 3, 8, 8, device="meta")
    batch = max_batch_size(model, x, budget=2**62)
    assert batch == max_batch_size(model, x, budget="8PiB") > 2**30


class Force(nn.Module):
    """A model that differentiates its output with respect to its input."""

    def __init__(self):
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 1))

    def forward(self, x):
        (force,) = torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)
        return force


def test_the_largest_batch_of_inputs_that_require_gradients():
    model, x = Force(), torch.randn(8, 16, requires_grad=True)
    batch = max_batch_size(model, x, budget=100_000)
    peaks = [predict(model, torch.randn(size, 16, requires_grad=True)).peak_bytes for size in (batch, batch + 1)]
    assert peaks[0] <= 100_000 < peaks[1]


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(4, 8, 6, 6).contiguous(memory_format=torch.channels_last),
        torch.randn(4, 8, 6, 6, requires_grad=True),
        torch.randn(8, 4).T,
        torch.randn(4, 16)[:, ::2],
        torch.randn(1, 8).expand(4, 8),
        torch.randn(4),
        torch.arange(4),
    ],
    ids=["channels last", "gradient", "transposed", "slice", "expanded", "vector", "integers"],
)
def test_resized_inputs_have_the_same_format(x):
    same, larger = resized(x, x.shape), resized(x, (9, *x.shape[1:]))
    assert (same.shape, same.dtype, same.requires_grad) == (x.shape, x.dtype, x.requires_grad)
    assert same.stride() == x.stride()
    assert larger.shape == (9, *x.shape[1:])
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    assert sorted(range(x.dim()), key=larger.stride, reverse=True) == order


def test_the_largest_batch_where_one_sample_is_impossible():
    """Batch norm needs two samples."""
    model = nn.Sequential(nn.Linear(4, 64), nn.BatchNorm1d(64))
    x = torch.randn(8, 4)
    two = predict(model, torch.randn(2, 4)).peak_bytes
    assert max_batch_size(model, x, budget=two) == 2
    assert max_batch_size(model, x, budget=two - 1) == 0
    with pytest.raises(PredictionError, match="Expected more than 1 value per channel"):
        max_batch_size(model, torch.randn(1, 4), budget=two)


def test_the_largest_batch_of_inputs_without_elements():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x):
            return self.weight * 2

    for x in (torch.empty(8, 0), torch.tensor(1.0)):
        message = (
            r"`inputs` \(of shape \(.*\)\) do not make a step larger: even [\d,]+ samples fit `budget` \(=9.8 KiB\)"
        )
        with pytest.raises(ValueError, match=message):
            max_batch_size(Constant(), x, budget=10_000)


def test_the_largest_batch_of_several_arguments():
    case = CASE["attention-context-mask"]
    sequence = case.sequence(2)
    args = (case.input(), *case.args())
    batch = max_batch_size(sequence, *args, budget="1MB", kwargs=case.kwargs())
    assert batch > 2
    assert max_batch_size(sequence, *args, budget="1KB", kwargs=case.kwargs()) == 0
    with pytest.raises(ValueError, match="`inputs` hold no tensor"):
        max_batch_size(sequence, budget="1MB")


def test_the_report_has_all_tables():
    model, x = small_revnet(), torch.empty(4, 3, 8, 8, device="meta")
    points = plan(model, x, budget="1GiB").points
    text = str(plan(model, x, budget=points[len(points) // 2].peak_bytes))
    for words in ("budget", "peak", "step time", "stem", "stages.1.downsample", "storing saves, per MiB"):
        assert words in text
    for name in ("reverse all", "checkpoint all", "plain autograd", "next faster plan"):
        assert name in text


# Step in the backward pass --------------------------------------------------------------------------------------------


def wide_blocks():
    """Return two blocks whose gradients need more memory than their activations."""
    return ReversibleSequential(*[ReversibleBlock(nn.Linear(32, 32), nn.Linear(32, 32)) for _ in range(2)])


def test_plans_with_the_step_in_the_backward_pass():
    """Parameters and momentum take 33 KiB, all gradients 16.5 KiB, and the budget is between."""
    model, x = wide_blocks(), torch.randn(4, 64)
    options = {"optimizer": SGD, "budget": "48KiB"}
    with pytest.raises(
        BudgetError, match=r"but the optimizer's step in the backward pass \(`step_in_backward`\) would make"
    ):
        plan(model, x, **options)
    planned = plan(model, x, **options, step_in_backward="auto")
    assert planned.step_in_backward
    assert re.search("^optimizer +StepInBackward", str(planned), re.MULTILINE)
    planned.apply(model)
    measured = measure(model, x, optimizer=SGD, step_in_backward=True)
    assert planned.peak_bytes == measured.peak_bytes <= 48 * 2**10
    assert max_batch_size(model, x, **options) == 0
    assert max_batch_size(model, x, **options, step_in_backward=True) >= 4


def test_the_step_stays_ordinary_if_that_is_as_fast():
    model, x, options = wide_blocks(), torch.randn(4, 64), {"optimizer": SGD, "budget": "1GiB"}
    automatic = plan(model, x, **options, step_in_backward="auto")
    assert not automatic.step_in_backward
    assert "StepInBackward" not in str(automatic)
    # The times do not include the optimizer, wherever its step runs.
    chosen = plan(model, x, **options, step_in_backward=True)
    assert chosen.step_in_backward
    assert chosen.references["reverse all"].time_ratio == automatic.references["reverse all"].time_ratio


def test_no_plan_fits_with_either_step():
    model, x = wide_blocks(), torch.randn(4, 64)
    with pytest.raises(BudgetError, match="no batch would fit") as error:
        plan(model, x, budget="1KiB", optimizer=SGD, step_in_backward="auto")
    peaks = [predict(model, x, optimizer=SGD, step_in_backward=choice).peak_bytes for choice in (False, True)]
    assert error.value.least_bytes <= min(peaks)


def test_draws_a_plan(tmp_path):
    pytest.importorskip("matplotlib")
    planned = plan(small_revnet(), torch.empty(2, 3, 8, 8, device="meta"), budget="1GiB")
    planned.plot(tmp_path / "plan.png", title="small")
    assert (tmp_path / "plan.png").stat().st_size > 1000


def test_an_optimizer_of_the_model_is_taken_where_no_batch_fits():
    model = PolicySequential(nn.Linear(64, 64))
    messages = []
    for optimizer in (torch.optim.AdamW, torch.optim.AdamW(model.parameters())):
        with pytest.raises(BudgetError, match="no batch would fit") as caught:
            plan(model, torch.ones(8, 64), budget="1 KiB", optimizer=optimizer)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
