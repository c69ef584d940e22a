"""Reversible execution behaves like plain autograd: tests compare it with the stored twin, for every kind of block."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from revnet import Reverse, ReversibleBlock, ReversibleSequential, Store
from tests.helpers import (
    CASE,
    DEPTH,
    all_cases,
    all_policies,
    assert_close,
    assert_same_buffers,
    assert_trains_as_twin,
    gradients,
    leaves,
    mlp,
    residual_functions,
    squares,
    stored_twin,
)


@all_policies
@all_cases
def test_outputs_gradients_buffers_and_random_state_equal_the_twin(case, policy):
    outputs = []

    def step(module, x, args, kwargs):
        y = module(x, *args, **kwargs)
        squares(y).backward()
        outputs.append(y)

    assert_trains_as_twin(case.sequence(DEPTH, policy), case, step)
    assert torch.equal(*outputs)


@pytest.mark.parametrize("case", [case for case in CASE.values() if not case.args()], ids=lambda case: case.name)
def test_single_precision(case):
    sequence = case.sequence(DEPTH).float() if case.dtype.is_floating_point else case.sequence(DEPTH)
    if case.dtype.is_complex:
        for parameter in sequence.parameters():
            parameter.data = parameter.data.to(torch.complex64)
    twin = stored_twin(sequence)
    x = case.input(requires_grad=False).to(torch.complex64 if case.dtype.is_complex else torch.float32)
    outputs = []
    for module in (sequence, twin):
        torch.manual_seed(1)
        outputs.append(module(x))
        squares(outputs[-1]).backward()
    assert torch.equal(*outputs)
    for parameter, expected in zip(sequence.parameters(), twin.parameters(), strict=True):
        assert (parameter.grad - expected.grad).norm() <= 5e-3 * expected.grad.norm() + 1e-4


class Steps(nn.Module):
    """Adds an integer where the input is positive, so that sums and differences are exact in any precision."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, -1.0, 2.0]))

    def forward(self, x):
        return self.weight * (x > 0)


@pytest.mark.filterwarnings("ignore:the streams that begin:revnet.ReconstructionWarning")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_gradients_equal_the_twin_bit_for_bit_without_rounding(dtype):
    sequence = ReversibleSequential(*[ReversibleBlock(Steps(), Steps()) for _ in range(3)]).to(dtype)
    twin = stored_twin(sequence)
    x = torch.randint(-4, 5, (4, 6)).to(dtype)
    for module in (sequence, twin):
        squares(module(x)).backward()
    for parameter, expected in zip(sequence.parameters(), twin.parameters(), strict=True):
        assert torch.equal(parameter.grad, expected.grad)


@pytest.mark.parametrize(
    "case", [CASE[name] for name in ("mlp", "split-batch", "tied", "transposed", "complex")], ids=lambda c: c.name
)
def test_gradcheck_and_gradgradcheck(case):
    sequence = case.sequence(3)
    x = case.input()
    assert torch.autograd.gradcheck(sequence, (x,), fast_mode=case.dtype.is_complex)
    assert torch.autograd.gradgradcheck(sequence, (x,), fast_mode=True)


@all_cases
def test_two_calls_before_backward(case):
    other = case.input()

    def step(module, x, args, kwargs):
        first = squares(module(x, *args, **kwargs))
        (first + 2 * squares(module(other.detach(), *args, **kwargs))).backward()

    assert_trains_as_twin(case.sequence(2), case, step)


@all_cases
def test_applied_to_its_own_output(case):
    """Tied weights: one sequence with two runs in one graph."""

    def step(module, x, args, kwargs):
        squares(module(module(x, *args, **kwargs), *args, **kwargs)).backward()

    assert_trains_as_twin(case.sequence(2), case, step)


@all_cases
def test_gradients_accumulate_over_micro_batches(case):
    batches = [case.input(requires_grad=False) for _ in range(3)]

    def step(module, x, args, kwargs):
        for batch in batches:
            squares(module(x + batch, *args, **kwargs)).backward()

    assert_trains_as_twin(case.sequence(2), case, step)


@all_cases
def test_autograd_grad_of_some_parameters(case):
    """Only some slots are read: the streams walk down through blocks whose gradients are not needed."""

    def step(module, x, args, kwargs):
        loss = squares(module(x.detach(), *args, **kwargs))
        return torch.autograd.grad(loss, list(residual_functions(module[1])[-1].parameters()))

    assert_trains_as_twin(case.sequence(DEPTH), case, step)


@all_policies
@all_cases
def test_autograd_grad_of_everything_at_once(case, policy):
    def step(module, x, args, kwargs):
        unused = torch.zeros(1, requires_grad=True)
        wanted = [leaf for leaf in (x, *module.parameters(), *leaves((args, kwargs)), unused) if leaf.requires_grad]
        grads = torch.autograd.grad(squares(module(x, *args, **kwargs)), wanted, allow_unused=True)
        assert grads[-1] is None
        with pytest.raises(RuntimeError, match="appears to not have been used in the graph"):
            torch.autograd.grad(squares(module(x, *args, **kwargs)), [x, unused])
        return grads[:-1]

    assert_trains_as_twin(case.sequence(DEPTH, policy), case, step)


@all_policies
@all_cases
def test_retained_graph_and_second_backward(case, policy):
    def step(module, x, args, kwargs):
        loss = squares(module(x, *args, **kwargs))
        loss.backward(retain_graph=True)
        loss.backward(retain_graph=True)
        loss.backward()
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            loss.backward()

    assert_trains_as_twin(case.sequence(DEPTH, policy), case, step)


@all_policies
@all_cases
def test_double_backward(case, policy):
    """A gradient penalty: the loss contains a gradient."""
    if case.name == "recurrent":
        pytest.skip("PyTorch's fused GRU has no second derivative on the CPU")

    def step(module, x, args, kwargs):
        with sdpa_kernel(SDPBackend.MATH):  # The fused kernels have no second derivative.
            loss = squares(module(x, *args, **kwargs))
            grads = torch.autograd.grad(loss, [x, *module.parameters()], create_graph=True)
            (loss + sum(squares(grad) for grad in grads)).backward()

    assert_trains_as_twin(case.sequence(DEPTH, policy), case, step, tolerance=1e-7)  # Values near 1e3.


def saved_tensors(y):
    """Return all saved tensors of the graph of `y`, read through `grad_fn`."""
    nodes, tensors = [y.grad_fn], []
    for node in nodes:
        names = [name for name in sorted(dir(node)) if name.startswith("_saved_")]
        tensors += [
            value.clone() for value in (getattr(node, name) for name in names) if isinstance(value, torch.Tensor)
        ]
        nodes += [following for following, _ in node.next_functions if following and following not in nodes]
    return tensors


@all_cases
def test_saved_tensors_can_be_read_before_backward(case):
    """They are read from the last to the first and back again. Each read outside of a backward pass rebuilds them."""
    if case.name == "group-and-instance-norm":
        pytest.skip("instance norm saves a copy of its running statistics, which its backward pass does not read")

    def step(module, x, args, kwargs):
        y = module(x, *args, **kwargs)
        seen = saved_tensors(y)
        assert_close(list(reversed(saved_tensors(y))), list(reversed(seen)))
        squares(y).backward()
        return seen

    assert_trains_as_twin(case.sequence(2), case, step)


@all_cases
def test_backward_into_some_leaves(case):
    def step(module, x, args, kwargs):
        first, *others = residual_functions(module[1])
        squares(module(x, *args, **kwargs)).backward(inputs=[x, *first.parameters()])
        assert all(parameter.grad is None for function in others for parameter in function.parameters())

    assert_trains_as_twin(case.sequence(3), case, step)


@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize("name", ["mlp", "attention", "tied"])
def test_jacobian_and_hessian(name, vectorize):
    def step(module, x, args, kwargs):
        x = x.detach()[:1]
        with sdpa_kernel(SDPBackend.MATH):
            jacobian = torch.autograd.functional.jacobian(module, x, vectorize=vectorize)
            return jacobian, torch.autograd.functional.hessian(lambda x: squares(module(x)), x, vectorize=vectorize)

    assert_trains_as_twin(CASE[name].sequence(2), CASE[name], step)


@all_cases
def test_anomaly_mode(case):
    def step(module, x, args, kwargs):
        with warnings.catch_warnings(action="ignore"), torch.autograd.detect_anomaly():
            squares(module(x, *args, **kwargs)).backward()

    assert_trains_as_twin(case.sequence(2), case, step)


@all_cases
def test_outer_saved_tensors_hooks(case):
    """`save_on_cpu` gets only the remaining tensors, because the sequence's own hooks are the inner ones."""

    def step(module, x, args, kwargs):
        with torch.autograd.graph.save_on_cpu():
            loss = squares(module(x.tanh(), *args, **kwargs).tanh())
        loss.backward()

    assert_trains_as_twin(case.sequence(2), case, step)


@all_policies
@all_cases
@pytest.mark.parametrize("input_requires_grad", [True, False])
def test_frozen_parameters(case, policy, input_requires_grad):
    sequence = case.sequence(DEPTH, policy)
    for frozen in (sequence[0], residual_functions(sequence[2])[0]):
        frozen.requires_grad_(False)

    def step(module, x, args, kwargs):
        squares(module(x.requires_grad_(input_requires_grad), *args, **kwargs)).backward()
        assert all(parameter.grad is None for parameter in module[0].parameters())

    assert_trains_as_twin(sequence, case, step)


@all_cases
@pytest.mark.parametrize("used", [0, 1])
def test_one_output_unused(case, used):
    def step(module, x, args, kwargs):
        pair = x.chunk(module[0].num_streams, module[0].split_dim)
        squares(module(pair, *args, **kwargs)[used]).backward()

    assert_trains_as_twin(case.sequence(3), case, step)


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
    with torch.no_grad():
        assert_same_buffers(sequence, twin)


@all_cases
def test_evaluation_mode_has_gradients(case):
    def step(module, x, args, kwargs):
        squares(module.eval()(x, *args, **kwargs)).backward()

    if case.name == "recurrent":
        pytest.skip("PyTorch's fused GRU has no gradient in evaluation mode")
    assert_trains_as_twin(case.sequence(DEPTH), case, step)


@all_cases
def test_switched_to_evaluation_before_backward(case):
    """A validation pass between forward and backward must not change the replay."""

    def step(module, x, args, kwargs):
        loss = squares(module(x, *args, **kwargs))
        module.eval()
        with torch.no_grad():
            module(x, *args, **kwargs)
        loss.backward()
        assert not any(child.training for child in module.modules())

    assert_trains_as_twin(case.sequence(2), case, step)


def test_batch_norm_counts_one_step():
    sequence = CASE["conv"].sequence(DEPTH)
    sequence(CASE["conv"].input()).sum().backward()
    counts = [buffer.item() for name, buffer in sequence.named_buffers() if name.endswith("num_batches_tracked")]
    assert counts == [1] * (4 * DEPTH)


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


@all_policies
@all_cases
def test_backward_never_called_and_loss_that_ignores_the_output(case, policy):
    def step(module, x, args, kwargs):
        module(x, *args, **kwargs)
        ignored = squares(module(x, *args, **kwargs))
        (x.real.sum() + 0 * ignored.detach()).backward()
        squares(module(x, *args, **kwargs)).backward()

    assert_trains_as_twin(case.sequence(2, policy if not isinstance(policy, list) else policy[2:]), case, step)
