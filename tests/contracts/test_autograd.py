"""Reversible execution behaves as plain autograd does: each row against the stored twin, for each kind of block."""

import copy
import threading

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from revnet import ReconstructionError, Reverse, ReversibleBlock, ReversibleSequential, Store
from tests.helpers import (
    CASE,
    DEPTH,
    all_cases,
    all_policies,
    assert_close,
    assert_trains_as_twin,
    gradients,
    mlp,
    stored_twin,
)


def run_step(sequence, x, args, kwargs, seed=1):
    """One training step from a given random state: the output, and the random state after it."""
    torch.manual_seed(seed)
    y = sequence(x, *args, **kwargs)
    y.square().sum().backward()
    return y.detach(), torch.get_rng_state()


@all_policies
@all_cases
def test_output_gradients_buffers_and_random_state_are_the_twins(case, policy):
    sequence = case.sequence(DEPTH, policy)
    twin = stored_twin(sequence)
    x, args, kwargs = case.input(), case.args(), case.kwargs()
    twin_x, twin_args = x.detach().clone().requires_grad_(), copy.deepcopy(args)

    y, state = run_step(sequence, x, args, kwargs)
    expected, expected_state = run_step(twin, twin_x, twin_args, kwargs)

    assert torch.equal(y, expected)
    assert torch.equal(state, expected_state)
    assert_close(x.grad, twin_x.grad)
    assert_close(gradients(sequence), gradients(twin))
    for argument, twin_argument in zip(args, twin_args, strict=True):
        assert_close(argument.grad, twin_argument.grad)
    for (name, buffer), (_, expected_buffer) in zip(sequence.named_buffers(), twin.named_buffers(), strict=True):
        assert torch.equal(buffer, expected_buffer), name


@all_cases
def test_a_pair_runs_as_its_joined_tensor_does(case):
    sequence = case.sequence(2)
    twin = stored_twin(sequence)
    dim = sequence[0].split_dim
    x, args, kwargs = case.input(), case.args(), case.kwargs()
    torch.manual_seed(1)
    expected = twin(x, *args, **kwargs)
    x1, x2 = (half.detach().clone().requires_grad_() for half in x.chunk(2, dim))
    torch.manual_seed(1)
    y1, y2 = sequence((x1, x2), *args, **kwargs)
    assert torch.equal(torch.cat((y1, y2), dim), expected)

    (y1.sum() + y2.square().sum()).backward()
    first, second = expected.chunk(2, dim)
    (first.sum() + second.square().sum()).backward()
    assert_close(torch.cat((x1.grad, x2.grad), dim), x.grad)


@pytest.mark.parametrize("case", [CASE["mlp"], CASE["split-batch"]], ids=lambda c: c.name)
def test_gradcheck_and_gradgradcheck(case):
    sequence = case.sequence(3)
    x = case.input()
    assert torch.autograd.gradcheck(sequence, (x,))
    assert torch.autograd.gradgradcheck(sequence, (x,))


@all_cases
def test_inverse_gives_the_input_and_leaves_the_buffers(case):
    sequence = case.sequence(DEPTH).eval()
    x, args, kwargs = case.input(), case.args(), case.kwargs()
    y = sequence(x, *args, **kwargs)
    buffers = [buffer.clone() for buffer in sequence.buffers()]
    assert_close(sequence.inverse(y, *args, **kwargs), x)
    assert all(torch.equal(now, before) for now, before in zip(sequence.buffers(), buffers, strict=True))


def test_inverse_in_training_uses_the_batch_and_leaves_the_statistics():
    case = CASE["conv"]
    sequence = case.sequence(DEPTH)
    x = case.input()
    y = sequence(x)
    buffers = [buffer.clone() for buffer in sequence.buffers()]
    assert_close(sequence.inverse(y), x)
    assert all(torch.equal(now, before) for now, before in zip(sequence.buffers(), buffers, strict=True))


@all_cases
def test_inverse_is_differentiable(case):
    sequence = case.sequence(2).eval()
    args, kwargs = case.args(), case.kwargs()
    y = case.input()
    x = sequence.inverse(y, *args, **kwargs)
    (grad,) = torch.autograd.grad(sequence(x, *args, **kwargs).sum(), y)
    assert_close(grad, torch.ones_like(y), tolerance=1e-8)


def test_batch_norm_counts_one_step():
    sequence = CASE["conv"].sequence(DEPTH)
    sequence(CASE["conv"].input()).sum().backward()
    counts = [buffer.item() for name, buffer in sequence.named_buffers() if name.endswith("num_batches_tracked")]
    assert counts == [1] * (4 * DEPTH)


@all_cases
def test_called_twice_before_backward(case):
    sequence = case.sequence(2)
    twin = stored_twin(sequence)
    inputs = [case.input(), case.input()]
    twin_inputs = [x.detach().clone().requires_grad_() for x in inputs]
    args, kwargs = case.args(), case.kwargs()
    for module, xs in ((sequence, inputs), (twin, twin_inputs)):
        torch.manual_seed(1)
        sum((index + 1) * module(x, *args, **kwargs).square().sum() for index, x in enumerate(xs)).backward()
    for x, twin_x in zip(inputs, twin_inputs, strict=True):
        assert_close(x.grad, twin_x.grad)
    assert_close(gradients(sequence), gradients(twin))
    for buffer, expected in zip(sequence.buffers(), twin.buffers(), strict=True):
        assert torch.equal(buffer, expected)


@all_cases
def test_applied_to_its_own_output(case):
    """Tied weights: one sequence, two runs, in one graph."""
    sequence = case.sequence(2)

    def step(module, x, args, kwargs):
        module(module(x, *args, **kwargs), *args, **kwargs).square().sum().backward()

    assert_trains_as_twin(sequence, case, step)


@all_cases
def test_autograd_grad_of_some_parameters(case):
    """Only some slots are asked for: the streams walk down through blocks whose gradients nobody wants."""
    sequence = case.sequence(DEPTH)
    twin = stored_twin(sequence)
    x, args, kwargs = case.input(requires_grad=False), case.args(), case.kwargs()
    results = []
    for module in (sequence, twin):
        torch.manual_seed(1)
        y = module(x, *args, **kwargs)
        results.append(torch.autograd.grad(y.square().sum(), list(module[1].g.parameters())))
    assert_close(*results)


@all_cases
def test_retained_graph_and_second_backward(case):
    sequence = case.sequence(DEPTH)

    def step(module, x, args, kwargs):
        loss = module(x, *args, **kwargs).square().sum()
        loss.backward(retain_graph=True)
        loss.backward(retain_graph=True)
        loss.backward()

    assert_trains_as_twin(sequence, case, step)


@all_cases
def test_double_backward(case):
    """A gradient penalty: the loss contains a gradient."""
    sequence = case.sequence(3)

    def step(module, x, args, kwargs):
        with sdpa_kernel(SDPBackend.MATH):  # The fused kernels have no second derivative.
            loss = module(x, *args, **kwargs).square().sum()
            (grad,) = torch.autograd.grad(loss, x, create_graph=True)
            (loss + grad.square().sum()).backward()

    assert_trains_as_twin(sequence, case, step, tolerance=1e-8)


@all_policies
@all_cases
@pytest.mark.parametrize("input_requires_grad", [True, False])
def test_frozen_parameters(case, policy, input_requires_grad):
    sequence = case.sequence(DEPTH, policy)
    for frozen in (sequence[0], sequence[2].f):
        frozen.requires_grad_(False)
    twin = stored_twin(sequence)
    x, args, kwargs = case.input(requires_grad=input_requires_grad), case.args(), case.kwargs()
    twin_x = x.detach().clone().requires_grad_(input_requires_grad)
    run_step(sequence, x, args, kwargs)
    run_step(twin, twin_x, args, kwargs)
    if input_requires_grad:
        assert_close(x.grad, twin_x.grad)
    assert_close(gradients(sequence), gradients(twin))
    assert all(parameter.grad is None for parameter in sequence[0].parameters())


@all_cases
@pytest.mark.parametrize("used", [0, 1])
def test_one_output_unused(case, used):
    sequence = case.sequence(3)
    twin = stored_twin(sequence)
    dim = sequence[0].split_dim
    x, args, kwargs = case.input(), case.args(), case.kwargs()
    results = []
    for module in (sequence, twin):
        x1, x2 = (half.detach().clone().requires_grad_() for half in x.chunk(2, dim))
        torch.manual_seed(1)
        module((x1, x2), *args, **kwargs)[used].square().sum().backward()
        results.append((x1.grad, x2.grad, gradients(module)))
    assert_close(*results)


@all_cases
@pytest.mark.parametrize("no_grad", [torch.no_grad, torch.inference_mode])
def test_without_gradients(case, no_grad):
    sequence = case.sequence(2)
    twin = stored_twin(sequence)
    x, args, kwargs = case.input(), case.args(), case.kwargs()
    outputs = []
    for module in (sequence, twin):
        torch.manual_seed(1)
        with no_grad():
            outputs.append(module(x, *args, **kwargs))
    assert torch.equal(*outputs)
    assert not outputs[0].requires_grad


@all_cases
def test_evaluation_mode_has_gradients(case):
    def step(module, x, args, kwargs):
        module.eval()
        module(x, *args, **kwargs).square().sum().backward()

    assert_trains_as_twin(case.sequence(DEPTH), case, step)


@all_cases
def test_switched_to_evaluation_before_backward(case):
    """A validation pass between forward and backward must not change what is recomputed."""
    sequence = case.sequence(2)

    def step(module, x, args, kwargs):
        loss = module(x, *args, **kwargs).square().sum()
        module.eval()
        with torch.no_grad():
            module(x, *args, **kwargs)
        loss.backward()
        assert not any(child.training for child in module.modules())

    assert_trains_as_twin(sequence, case, step)


@pytest.mark.parametrize("input_requires_grad", [True, False])
@pytest.mark.parametrize("cache_enabled", [True, False])
@pytest.mark.parametrize("backward_inside", [True, False])
@pytest.mark.parametrize("name", ["conv", "attention", "attention-context-mask", "mlp"])
def test_autocast(name, cache_enabled, backward_inside, input_requires_grad):
    case = CASE[name]
    sequence = case.sequence(3).float()
    twin = stored_twin(sequence)
    x = case.input().detach().float().requires_grad_(input_requires_grad)
    args = tuple(arg.detach().float() for arg in case.args())
    twin_x = x.detach().clone().requires_grad_(input_requires_grad)
    for module, start in ((sequence, x), (twin, twin_x)):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache_enabled):
            # Twice, so that the second call meets the first one's cached casts.
            loss = module(start, *args, **case.kwargs()).square().sum()
            loss = loss + module(start, *args, **case.kwargs()).sum()
            assert loss.dtype is torch.float32
            if backward_inside:
                loss.backward()
        if not backward_inside:
            loss.backward()
    # A rebuilt float32 stream may round to another bfloat16: one unit in the last place is 2^-8, seldom, of many terms.
    for parameter, expected in zip(sequence.parameters(), twin.parameters(), strict=True):
        assert (parameter.grad - expected.grad).norm() <= 1e-3 * expected.grad.norm()
    if input_requires_grad:
        assert (x.grad - twin_x.grad).norm() <= 1e-3 * twin_x.grad.norm()


def test_forward_without_autocast_backward_inside_it():
    case = CASE["conv"]
    sequence = case.sequence(3).float()
    twin = stored_twin(sequence)
    x = case.input(requires_grad=False).float()
    for module in (sequence, twin):
        loss = module(x).square().sum()
        with torch.autocast("cpu", torch.bfloat16):
            loss.backward()
    # The twin's own backward runs partly in bfloat16 then; the recomputation must not.
    assert_close(gradients(sequence), gradients(twin), tolerance=1e-4)


def test_module_and_tensor_hooks_see_what_the_twins_see():
    case = CASE["conv"]
    sequence = case.sequence(3)
    twin = stored_twin(sequence)
    x = case.input(requires_grad=False)
    seen = []
    for module in (sequence, twin):
        record = []
        module[1].f.conv1.weight.register_hook(lambda grad, record=record: record.append(grad.clone()))
        module[1].f.register_full_backward_hook(lambda _, __, grads, record=record: record.append(grads[0].clone()))
        module(x).square().sum().backward()
        seen.append(record)
    assert len(seen[0]) == 2
    assert_close(*seen)


def test_parameters_swapped_by_functional_call():
    """The forward pass ran on other parameters than the module holds by the time of backward."""
    sequence = CASE["mlp"].sequence(3)
    twin = stored_twin(sequence)
    x = CASE["mlp"].input()
    results = []
    for module in (sequence, twin):
        torch.manual_seed(1)
        parameters = {n: torch.randn_like(p).requires_grad_() for n, p in module.named_parameters()}
        y = torch.func.functional_call(module, parameters, (x,))
        results.append(torch.autograd.grad(y.square().sum(), list(parameters.values())))
    assert_close(*results)


def test_checkpoint_inside_and_outside():
    class Checkpointed(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=False)

    blocks = [ReversibleBlock(mlp(3), mlp(3)).double() for _ in range(3)]
    inside = ReversibleSequential(*[ReversibleBlock(Checkpointed(b.f), Checkpointed(b.g)) for b in blocks])
    twin = ReversibleSequential(*blocks, policy=Store())
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(twin(x).square().sum(), x)
    assert_close(torch.autograd.grad(inside(x).square().sum(), x)[0], expected)
    outside = ReversibleSequential(*blocks)
    y = checkpoint(outside, x, use_reentrant=False)
    assert_close(torch.autograd.grad(y.square().sum(), x)[0], expected)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # Dynamo looks at that of every input
@pytest.mark.parametrize("name", ["conv", "attention"])
def test_compiled_residual_functions(name):
    """AOTAutograd's own graph, without the compiler behind it."""
    case = CASE[name]
    sequence = case.sequence(2)
    twin = stored_twin(sequence)
    x = case.input()
    twin_x = x.detach().clone().requires_grad_()
    for block in sequence:
        block.f.compile(backend="aot_eager")
        block.g.compile(backend="aot_eager")
    for module, start in ((sequence, x), (twin, twin_x)):
        module(start).square().sum().backward()
    assert_close(x.grad, twin_x.grad)
    assert_close(gradients(sequence), gradients(twin))
    for buffer, expected in zip(sequence.buffers(), twin.buffers(), strict=True):
        assert_close(buffer, expected)


def test_sequence_within_a_residual_function():
    def nested(policy):
        torch.manual_seed(3)
        inner = [
            ReversibleSequential(*[ReversibleBlock(mlp(2), mlp(2)) for _ in range(2)], policy=policy) for _ in range(4)
        ]
        blocks = [ReversibleBlock(inner[0], inner[1]), ReversibleBlock(inner[2], inner[3])]
        return ReversibleSequential(*blocks, policy=policy).double()

    x = torch.randn(3, 8, dtype=torch.float64)
    results = []
    for policy in (Reverse(), Store()):
        sequence = nested(policy)
        sequence(x).square().sum().backward()
        results.append(gradients(sequence))
    assert_close(*results)


def test_streams_that_are_arguments_too():
    sequence = CASE["attention"].sequence(3)
    twin = stored_twin(sequence)
    results = []
    for module in (sequence, twin):
        torch.manual_seed(1)
        x = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
        y1, y2 = module((x, x), x)
        (y1 * y2).sum().backward()
        results.append((x.grad, gradients(module)))
    assert_close(*results)


class Energy(nn.Module):
    """Differentiates inside its own forward: a residual that is the gradient of an energy."""

    def __init__(self):
        super().__init__()
        self.layers = mlp(3)

    def forward(self, x):
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            return torch.autograd.grad(self.layers(x).square().sum(), x, create_graph=True)[0]


def test_residual_function_that_differentiates_inside_itself():
    sequence = ReversibleSequential(*[ReversibleBlock(Energy(), Energy()) for _ in range(2)]).double()
    twin = stored_twin(sequence)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    results = [torch.autograd.grad(module(x).square().sum(), [x, *module.parameters()]) for module in (sequence, twin)]
    assert_close(*results)


class ScaledOnce(torch.autograd.Function):
    """Asks for its saved tensors twice in one backward."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx, grad):
        _, weight = ctx.saved_tensors
        x, _ = ctx.saved_tensors
        return grad * weight, (grad * x).sum(0)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))

    def forward(self, x):
        return ScaledOnce.apply(x.tanh(), self.weight)


def test_custom_function_that_unpacks_twice():
    sequence = ReversibleSequential(*[ReversibleBlock(Scaled(), Scaled()) for _ in range(3)]).double()
    twin = stored_twin(sequence)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    results = [torch.autograd.grad(module(x).square().sum(), [x, *module.parameters()]) for module in (sequence, twin)]
    assert_close(*results)


def test_backward_never_called_and_loss_that_ignores_the_output():
    sequence = CASE["conv"].sequence(2)
    x = CASE["conv"].input()
    sequence(x)
    sequence(x).detach().sum()
    sequence(x).sum().backward()
    twin = stored_twin(sequence)
    twin.zero_grad()
    expected = x.grad.clone()
    x.grad = None
    twin(x).sum().backward()
    assert_close(expected, x.grad)


@pytest.mark.parametrize("touch", [lambda y: y.relu_(), lambda y: y[:, :1].zero_(), lambda y: y.detach().add_(1)])
def test_output_modified_in_place_raises(touch):
    sequence = CASE["conv"].sequence(2)
    y = sequence(CASE["conv"].input())
    loss = y.sum()
    touch(y)
    with pytest.raises(
        ReconstructionError,
        match="modified by an inplace operation: an output",
    ):
        loss.backward()


def test_input_modified_in_place_is_harmless():
    """Nothing of the input is kept, so this is right even where plain autograd has to raise."""
    sequence = CASE["conv"].sequence(2)
    twin = stored_twin(sequence)
    x = CASE["conv"].input(requires_grad=False)
    twin(x.clone()).square().sum().backward()
    y = sequence(x)
    x.zero_()
    y.square().sum().backward()
    assert_close(gradients(sequence), gradients(twin))


@pytest.mark.parametrize("what", ["weight", "bias", "argument"])
def test_parameter_or_argument_modified_before_backward_raises(what):
    case = CASE["attention-context-mask"]
    sequence = case.sequence(2)
    args = case.args()
    loss = sequence(case.input(), *args, **case.kwargs()).sum()
    target = {"weight": sequence[0].g.layers[0].weight, "bias": sequence[0].g.layers[0].bias, "argument": args[0]}[what]
    with torch.no_grad():
        target.add_(1)
    with pytest.raises(RuntimeError, match="modified"):
        loss.backward()


class Counting(nn.Module):
    """Takes another path each time it runs."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.linear(x.tanh() if self.calls > 2 else x).sigmoid()


def test_function_that_does_something_else_the_second_time_raises():
    sequence = ReversibleSequential(ReversibleBlock(Counting(), Counting()), ReversibleBlock(Counting(), Counting()))
    for block in sequence:
        block.f.calls = block.g.calls = 2
    loss = sequence(torch.randn(2, 6)).sum()
    for block in sequence:
        block.f.calls = block.g.calls = -10
    with pytest.raises(ReconstructionError, match=r"`blocks\.1\.g` did something else when it ran again.*Store"):
        loss.backward()


class Failing(nn.Module):
    """Fails on demand, after having drawn random numbers and updated buffers."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 3))
        self.fails = False

    def forward(self, x):
        y = self.inner(x)
        if self.fails:
            raise ArithmeticError("on demand")
        return y


def test_exception_in_recomputation_leaves_no_trace():
    sequence = ReversibleSequential(*[ReversibleBlock(Failing(), mlp(3)) for _ in range(3)]).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    torch.manual_seed(1)
    loss = sequence(x).square().sum()
    before = [buffer.clone() for buffer in sequence.buffers()]
    state = torch.get_rng_state()
    sequence[1].f.fails = True
    with pytest.raises(ArithmeticError, match="on demand"):
        loss.backward(retain_graph=True)
    assert all(torch.equal(now, then) for now, then in zip(sequence.buffers(), before, strict=True))
    assert torch.equal(torch.get_rng_state(), state)

    sequence[1].f.fails = False
    sequence.zero_grad()
    loss.backward()
    twin = stored_twin(sequence)
    twin.zero_grad()
    torch.manual_seed(1)
    twin(x).square().sum().backward()
    assert_close(gradients(sequence), gradients(twin))


def test_nan_and_inf_pass_through_as_in_the_twin():
    sequence = CASE["mlp"].sequence(2)
    twin = stored_twin(sequence)
    x = CASE["mlp"].input(requires_grad=False)
    x[0, 0], x[1, 1] = float("nan"), float("inf")
    for module in (sequence, twin):
        module(x).sum().backward()
    for parameter, expected in zip(sequence.parameters(), twin.parameters(), strict=True):
        assert torch.equal(parameter.grad.isnan(), expected.grad.isnan())


@pytest.mark.parametrize("shape", [(0, 6, 5, 5)])
def test_empty_batch(shape):
    sequence = CASE["conv"].sequence(2).eval()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = sequence(x)
    y.sum().backward()
    assert y.shape == shape
    assert x.grad.shape == shape


def test_channels_last_stays_channels_last():
    sequence = CASE["conv"].sequence(3).to(memory_format=torch.channels_last)
    twin = stored_twin(sequence)
    x = CASE["conv"].input(requires_grad=False).to(memory_format=torch.channels_last)
    for module in (sequence, twin):
        y = module(x)
        assert y.is_contiguous(memory_format=torch.channels_last)
        y.square().sum().backward()
    assert_close(gradients(sequence), gradients(twin))


def test_two_threads_train_two_models():
    case = CASE["conv"]
    sequences = [case.sequence(3) for _ in range(2)]
    twins = [stored_twin(sequence) for sequence in sequences]
    x = case.input(requires_grad=False)

    def train(module):
        for _ in range(5):
            module(x).square().sum().backward()

    threads = [threading.Thread(target=train, args=(sequence,)) for sequence in sequences]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for sequence, twin in zip(sequences, twins, strict=True):
        train(twin)
        assert_close(gradients(sequence), gradients(twin))


def test_deepcopy_and_state_dict():
    sequence = CASE["conv"].sequence(2)
    sequence(CASE["conv"].input()).sum().backward()
    other = copy.deepcopy(sequence)
    other.load_state_dict(sequence.state_dict())
    x = CASE["conv"].input()
    assert torch.equal(sequence.eval()(x), other.eval()(x))
