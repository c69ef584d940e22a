"""A step in the backward pass changes parameters and state as the ordinary step does, bit for bit, or it raises."""

import copy
import gc
import inspect
import weakref
from functools import partial

import pytest
import torch
from torch import distributed, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from revnet import Checkpoint, FixedPoint, Offload, Reverse, ReversibleBlock, ReversibleSequential, Store, set_policy
from revnet.memory import measure, predict
from revnet.optim import StepInBackward

MOMENTUM = partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.01)
CLASSES = sorted(
    (cls for cls in vars(torch.optim).values() if inspect.isclass(cls) and issubclass(cls, Optimizer)),
    key=lambda cls: cls.__name__,
)
NOT_FOR_ALL_PARAMETERS = {"LBFGS", "Muon", "Optimizer", "SparseAdam"}
OPTIMIZERS = {cls.__name__: cls for cls in CLASSES if cls.__name__ not in NOT_FOR_ALL_PARAMETERS}
OPTIMIZERS |= {
    "SGD with momentum": MOMENTUM,
    "AdamW for all at once": partial(AdamW, foreach=True),
    "fused AdamW": partial(AdamW, fused=True),
    "fused SGD": partial(MOMENTUM, fused=True),
    "AdamW with a tensor rate": lambda parameters: AdamW(parameters, lr=torch.tensor(0.01)),
}
if hasattr(torch.optim, "Muon"):
    OPTIMIZERS["Muon"] = lambda parameters: torch.optim.Muon([p for p in parameters if p.dim() == 2])


def mlp():
    return nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 16), nn.Dropout(0.2), nn.GELU(), nn.Linear(16, 4))


def make_model(policy=None, *, is_tied=False, coupling=None, **options):
    """Return a model with a frozen parameter and an unused one; with `is_tied`, two blocks share a function."""
    torch.manual_seed(0)
    functions = [(mlp(), mlp()) for _ in range(3)]
    if is_tied:
        functions[2] = (functions[0][0], functions[2][1])
    blocks = [ReversibleBlock(*pair, **({} if coupling is None else {"coupling": coupling})) for pair in functions]
    blocks[0].f[1].bias.requires_grad_(False)
    sequence = ReversibleSequential(*blocks, **options)
    if policy is not None:
        set_policy(sequence, policy)
    model = nn.Sequential(nn.Linear(6, 8), sequence, nn.Linear(8, 3))
    model.register_parameter("unused", nn.Parameter(torch.ones(2, 2)))
    return model


def inputs():
    return torch.randn(5, 6)


def backward(model, x=None):
    loss = model(inputs() if x is None else x).square().mean()
    loss.backward()
    return loss


def outcome(model, optimizer):
    """Return all bits that training leaves: parameters, and the state of the optimizer."""
    return [parameter.detach().clone() for parameter in model.parameters()], optimizer.state_dict()


def train(make_optimizer, model, *, in_backward, num_steps=3, by_closure=False):
    optimizer = make_optimizer(model.parameters())
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    if in_backward:
        StepInBackward(optimizer)
    torch.manual_seed(1)
    for _ in range(num_steps):

        def closure():
            optimizer.zero_grad()
            return backward(model)

        if by_closure:
            assert optimizer.step(closure).isfinite()
        else:
            closure()
            optimizer.step()
        scheduler.step()
    return outcome(model, optimizer)


def assert_equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_the_ordinary_step(name):
    make = OPTIMIZERS[name]
    expected = train(make, make_model(), in_backward=False)
    assert_equal(train(make, make_model(), in_backward=True), expected)
    assert_equal(train(make, make_model(), in_backward=True, by_closure=True), expected)


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"policy": Store()},
        {"policy": Checkpoint()},
        {"policy": Offload()},
        {"policy": Reverse(), "tolerance": 1e-7},
        {"policy": Reverse(), "coupling": FixedPoint()},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore::revnet.ReconstructionWarning")
def test_equals_the_ordinary_step_under_each_policy(options, is_tied):
    make = partial(make_model, is_tied=is_tied, **options)
    assert_equal(train(AdamW, make(), in_backward=True), train(AdamW, make(), in_backward=False))


def test_equals_the_ordinary_step_with_tied_weights():
    make = partial(make_model, is_tied=True)
    assert_equal(train(AdamW, make(), in_backward=True), train(AdamW, make(), in_backward=False))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # PyTorch's own, while tracing
def test_equals_the_ordinary_step_of_a_compiled_model():
    outcomes = []
    torch._dynamo.reset()
    for in_backward in (True, False):
        model = make_model()
        model.compile(backend="aot_eager")
        outcomes.append(train(MOMENTUM, model.eval(), in_backward=in_backward))
    assert_equal(*outcomes)


def test_sparse_gradients():
    outcomes = []
    for in_backward in (True, False):
        torch.manual_seed(0)
        model = nn.Embedding(10, 4, sparse=True)
        optimizer = torch.optim.SparseAdam(model.parameters())
        if in_backward:
            StepInBackward(optimizer)
        for _ in range(3):
            backward(model, torch.randint(10, (3,)))
            optimizer.step()
            optimizer.zero_grad()
        outcomes.append(outcome(model, optimizer))
    assert_equal(*outcomes)


def train_with_changes(*, in_backward):
    """Load a state with another rate, add a group, and unfreeze a parameter, between steps."""
    model = make_model()
    optimizer = AdamW(model[1].parameters(), lr=0.01)
    if in_backward:
        StepInBackward(optimizer)
    for step in range(6):
        if step == 2:
            state = copy.deepcopy(optimizer.state_dict())
            state["param_groups"][0]["lr"] = 0.3
            optimizer.load_state_dict(state)
        if step == 3:
            optimizer.add_param_group({"params": list(model[0].parameters()), "lr": 0.05})
        if step == 4:
            model[1][0].f[1].bias.requires_grad_(True)
        optimizer.zero_grad()
        torch.manual_seed(step)
        backward(model)
        optimizer.step()
    return outcome(model, optimizer)


def test_groups_rates_and_frozen_parameters_may_change():
    assert_equal(train_with_changes(in_backward=True), train_with_changes(in_backward=False))


def test_several_backward_passes_over_different_parameters():
    outcomes = []
    for in_backward in (True, False):
        torch.manual_seed(0)
        models = nn.ModuleList([nn.Linear(6, 3), nn.Linear(6, 3)])
        optimizer = Adam(models.parameters())
        if in_backward:
            StepInBackward(optimizer)
        for _ in range(3):
            for model in models:
                backward(model)
            optimizer.step()
            optimizer.zero_grad()
        outcomes.append(outcome(models, optimizer))
    assert_equal(*outcomes)


def stepping(make_optimizer=AdamW):
    """Return a model and an optimizer that steps in the backward pass."""
    model = make_model()
    optimizer = make_optimizer(model.parameters())
    StepInBackward(optimizer)
    return model, optimizer


def test_hooks_after_the_step_run_once():
    model, optimizer = stepping()
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(model[0].weight.grad))
    backward(model)
    optimizer.step()
    assert calls == [None]


def test_remove_returns_to_ordinary_steps():
    model = make_model()
    optimizer = SGD(model.parameters(), lr=0.1)
    with StepInBackward(optimizer) as step_in_backward:
        backward(model)
    before = outcome(model, optimizer)
    assert model[0].weight.grad is None
    backward(model)
    assert type(model[0].weight.grad) is torch.Tensor
    assert_equal(outcome(model, optimizer), before)
    step_in_backward.remove()
    StepInBackward(optimizer)


def test_the_optimizer_keeps_the_object_and_nothing_keeps_the_model():
    model, optimizer = stepping()
    backward(model)
    assert repr(model[0].weight.grad) == "UsedGradient(shape=(8, 6))"
    optimizer.step()
    weight = weakref.ref(model[0].weight)
    gc.disable()
    try:
        del model, optimizer
        assert weight() is None
    finally:
        gc.enable()


def test_measuring_does_not_train_the_model():
    model, optimizer = stepping()
    before = outcome(model, optimizer)
    x = inputs()
    for step_in_backward in (False, True):
        options = {"optimizer": optimizer, "step_in_backward": step_in_backward}
        assert measure(model, x, **options) == predict(model, x, **options)
    assert_equal(outcome(model, optimizer), before)
    backward(model)
    assert not torch.equal(model[0].weight, before[0][0])


# Refusals -------------------------------------------------------------------------------------------------------------


def accumulate(model, optimizer):
    backward(model)
    backward(model)


def accumulate_after_zero_grad(model, optimizer):
    backward(model)
    optimizer.zero_grad()
    backward(model)


def clip_by_norm(model, optimizer):
    backward(model)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)


def scale(model, optimizer):
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(inputs()).sum()).backward()
    scaler.step(optimizer)


def retain(model, optimizer):
    model(inputs()).sum().backward(retain_graph=True)


def change_the_rate(model, optimizer):
    backward(model)
    optimizer.param_groups[0]["lr"] = 0.5
    optimizer.step()


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (accumulate, r"was used and freed in the backward pass, by `StepInBackward`.*call `optimizer.step\(\)` after"),
        (accumulate_after_zero_grad, r"received a second gradient before `optimizer.step\(\)`.*call `optimizer.step"),
        (clip_by_norm, "cannot be accumulated, clipped, unscaled or reduced"),
        (scale, "cannot be accumulated, clipped, unscaled or reduced"),
        (retain, r"`retain_graph` or `create_graph` \(=True\).*`torch.autograd.grad`"),
        (change_the_rate, r"`lr` of parameter group 0 changed from 0.001 to 0.5 .*change it before"),
    ],
)
def test_refuses_what_needs_gradients_later(act, message):
    model, optimizer = stepping()
    with pytest.raises(RuntimeError, match=message) as error:
        act(model, optimizer)
    assert "\n" not in str(error.value)


def test_refuses_data_parallel_training():
    """Each process would update its parameters before the gradients are averaged."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        model = nn.Linear(6, 3)
        parallel = nn.parallel.DistributedDataParallel(model)
        optimizer = SGD(model.parameters())
        StepInBackward(optimizer)
        with pytest.raises(RuntimeError, match="cannot be accumulated, clipped, unscaled or reduced"):
            backward(parallel)
    finally:
        distributed.destroy_process_group()


def test_a_loaded_checkpoint_ends_a_step_that_failed():
    outcomes = []
    for fails in (True, False):
        model, optimizer = stepping()
        saved = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
        if fails:
            backward(model)  # the step does not end
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        torch.manual_seed(1)
        backward(model)
        optimizer.step()
        outcomes.append(outcome(model, optimizer))
    assert_equal(*outcomes)


class Counting(SGD):
    """Keeps a number for all parameters, in the group or in an attribute."""

    def __init__(self, parameters, *, name):
        super().__init__(parameters, lr=0.1)
        self.name = name

    def step(self, closure=None):
        if self.name == "num_steps":
            self.param_groups[0]["num_steps"] = self.param_groups[0].get("num_steps", 0) + 1
        else:
            self.num_updates = getattr(self, "num_updates", 0) + 1
        return super().step(closure)


@pytest.mark.parametrize("name", ["num_steps", "num_updates"])
def test_refuses_an_optimizer_with_numbers_for_all_parameters(name):
    model, _ = stepping(partial(Counting, name=name))
    with pytest.raises(NotImplementedError, match=f"`optimizer` \\(=Counting\\) writes `{name}` in a step"):
        backward(model)


def hooked(parameters):
    optimizer = SGD(parameters)
    optimizer.register_step_pre_hook(lambda *_: None)
    return optimizer


def wrapped(parameters):
    optimizer = SGD(parameters)
    StepInBackward(optimizer)
    return optimizer


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (torch.optim.LBFGS, NotImplementedError, r"`optimizer` \(=LBFGS\) evaluates the loss several times"),
        (partial(Adam, differentiable=True), NotImplementedError, r"`optimizer` \(=Adam with `differentiable=True`\)"),
        (hooked, NotImplementedError, r"`optimizer` \(=SGD\) has a hook that runs before its step"),
        (wrapped, ValueError, r"`optimizer` \(=SGD\) already steps in the backward pass"),
        (list, TypeError, r"`optimizer` \(=\[.*\) must be a `torch.optim.Optimizer`"),
    ],
)
def test_rejects_wrong_optimizers(make, error, message):
    with pytest.raises(error, match=message):
        StepInBackward(make([nn.Parameter(torch.ones(1))]))


def test_refuses_a_hook_that_comes_later():
    model, optimizer = stepping()
    optimizer.register_step_pre_hook(lambda *_: None)
    with pytest.raises(NotImplementedError, match="has a hook that runs before its step"):
        backward(model)
