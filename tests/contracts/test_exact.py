"""Exact reversal: every bit equals the stored run of the same network, under all conditions."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from revnet import FixedPoint, ReversibleBlock, ReversibleSequential, Store, set_coupling, set_policy
from revnet.engine import DriftMeter
from revnet.memory import measure, plan, predict
from tests.helpers import (
    CASES,
    DEPTH,
    SAMPLE,
    Attention,
    ConvResidual,
    FeedForward,
    all_policies,
    all_reversible_models,
    gradients,
    leaves,
    mlp,
    squares,
    stored_twin,
)

# These couplings are replaced by the exact one; reversal has no exact form in complex numbers.
EXACT = [
    case
    for case in CASES
    if case.name not in ("complex", "leapfrog") and not case.density and not case.name.startswith("fixed-point")
]
all_exact_cases = pytest.mark.parametrize("case", EXACT, ids=lambda case: case.name)


def single(values):
    """Return the values in float32."""
    return tree_map_only(
        torch.Tensor,
        lambda t: t.detach().float().requires_grad_(t.requires_grad) if t.is_floating_point() else t,
        values,
    )


def assert_same_bits(actual, expected):
    for name, tensor in expected.items():
        assert (actual[name] is None) == (tensor is None), name
        if tensor is not None:
            assert torch.equal(actual[name].view(torch.int32), tensor.view(torch.int32)), name


def assert_steps_as_twin(sequence, inputs, step):
    """Check that gradients, buffers, the random state and the results of `step` equal the twin's, bit for bit."""
    twin = copy.deepcopy(sequence)
    set_policy(twin, Store())
    twin_inputs = copy.deepcopy(inputs)
    meter = DriftMeter()
    returned, states = [], []
    for module, (x, args, kwargs) in ((sequence, inputs), (twin, twin_inputs)):
        torch.manual_seed(1)
        with meter.on():
            returned.append(step(module, x, args, kwargs))
        states.append(torch.get_rng_state())
    assert all(float(record.error) == 0 for record in meter.records)
    for tensor, expected in zip(leaves(returned[0]), leaves(returned[1]), strict=True):
        assert torch.equal(tensor, expected)
    for leaf, twin_leaf in zip(leaves(inputs), leaves(twin_inputs), strict=True):
        assert (leaf.grad is None) == (twin_leaf.grad is None)
        assert leaf.grad is None or torch.equal(leaf.grad, twin_leaf.grad)
    assert_same_bits(gradients(sequence), gradients(twin))
    for buffer, expected in zip(sequence.buffers(), twin.buffers(), strict=True):
        assert torch.equal(buffer, expected)
    assert torch.equal(*states)
    return meter


def exact_sequence(case, policy=None):
    sequence = case.sequence(DEPTH, policy).float()
    set_coupling(sequence, FixedPoint())
    return sequence, single((case.input(), case.args(), case.kwargs()))


@all_policies
@all_exact_cases
def test_every_policy_trains_the_same_network(case, policy):
    sequence, inputs = exact_sequence(case, policy)

    def step(module, x, args, kwargs):
        for _ in range(2):
            y = module(x, *args, **kwargs)
            squares(y).backward()
        return y.detach()

    assert_steps_as_twin(sequence, inputs, step)


@all_exact_cases
def test_under_autocast(case):
    sequence, inputs = exact_sequence(case)

    def step(module, x, args, kwargs):
        with torch.autocast("cpu", torch.bfloat16):
            y = module(x, *args, **kwargs)
        assert y.dtype == torch.float32
        squares(y).backward()

    meter = assert_steps_as_twin(sequence, inputs, step)
    assert {record.dtype for record in meter.records} == {torch.float32}


@pytest.mark.parametrize("name", ["conv-dropout", "attention-context-mask", "tied", "random"])
@pytest.mark.parametrize("how", ["retained", "partial first", "twice", "double"])
def test_uses_of_the_graph(name, how):
    if how == "double" and name.startswith("attention"):
        pytest.skip("PyTorch's fused attention has no second derivative on the CPU")
    (case,) = (case for case in EXACT if case.name == name)
    sequence, inputs = exact_sequence(case)

    def step(module, x, args, kwargs):
        loss = squares(module(x, *args, **kwargs))
        if how == "retained":
            loss.backward(retain_graph=True)
        elif how == "partial first":
            return torch.autograd.grad(loss, list(module.parameters())[:2], retain_graph=True)
        elif how == "twice":
            other = squares(module(x, *args, **kwargs))
            loss.backward()
            other.backward()
            return None
        else:
            (grad,) = torch.autograd.grad(loss, x, create_graph=True)
            squares(grad).backward()
            return grad.detach()
        loss.backward()
        return None

    assert_steps_as_twin(sequence, inputs, step)


def test_large_batch_norms():
    sequence = ReversibleSequential(*[ReversibleBlock(ConvResidual(8), ConvResidual(8)) for _ in range(2)])
    set_coupling(sequence, FixedPoint())
    x = torch.randn(8, 16, 32, 32, requires_grad=True)
    assert x.numel() // 2 >= 2**16
    assert_steps_as_twin(sequence, (x, (), {}), lambda module, x, args, kwargs: squares(module(x)).backward())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_inputs_of_any_precision(dtype):
    """Streams of 32 bits for functions of 16, without autocast; the output has the dtype of the input."""
    sequence = ReversibleSequential(*[ReversibleBlock(mlp(4), mlp(4)) for _ in range(6)]).to(dtype)
    twin = stored_twin(sequence)
    for module in (sequence, twin):
        set_coupling(module, FixedPoint())
    x = torch.randn(4, 8, dtype=dtype)
    for module in (sequence, twin):
        y = module(x)
        assert y.dtype == dtype
        squares(y.double()).backward()
    for parameter, expected in zip(sequence.parameters(), twin.parameters(), strict=True):
        assert torch.equal(parameter.grad, expected.grad)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@all_reversible_models
def test_models(make_model, autocast):
    model = make_model()
    set_coupling(model, FixedPoint())
    is_text = any(isinstance(module, nn.Embedding) for module in model.modules())
    x = torch.randint(0, 10, (2, 16)) if is_text else torch.randn(2, 3, 32, 32)

    def step(module, x, args, kwargs):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = module(x)
        squares(y.float()).backward()
        return y.detach()

    assert_steps_as_twin(model, (x, (), {}), step)


def test_inverse_is_exact():
    sequence = ReversibleSequential(*[ReversibleBlock(ConvResidual(4), ConvResidual(4)) for _ in range(64)]).eval()
    set_coupling(sequence, FixedPoint(14))
    x = (torch.randn(2, 8, 4, 4) * 2**14).round() / 2**14
    with torch.no_grad():
        assert torch.equal(sequence.inverse(sequence(x)), x)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["conv", "transformer"])
def test_sixty_four_blocks_after_ten_steps(kind):
    """The final weights, bit for bit, and the memory of one block; benchmarks/exact.py takes a thousand blocks."""
    torch.manual_seed(0)
    if kind == "conv":
        blocks = [ReversibleBlock(nn.Sequential(ConvResidual(4), nn.Dropout(0.1)), ConvResidual(4)) for _ in range(64)]
        x = torch.randn(2, 8, 4, 4)
    else:
        blocks = [
            ReversibleBlock(nn.Sequential(Attention(4), nn.Dropout(0.1)), FeedForward(4), split_dim=-1)
            for _ in range(64)
        ]
        x = torch.randn(2, 4, 8)
    sequence = ReversibleSequential(*blocks)
    set_coupling(sequence, FixedPoint())
    twin = stored_twin(sequence)
    assert measure(sequence[:2], x).held_bytes == measure(sequence, x).held_bytes
    for module in (sequence, twin):
        optimizer = torch.optim.SGD(module.parameters(), lr=1e-3, momentum=0.9)
        torch.manual_seed(1)
        for _ in range(10):
            optimizer.zero_grad()
            module(x).square().mean().backward()
            optimizer.step()
    for (name, tensor), expected in zip(sequence.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(tensor, expected), name


def test_memory_equals_floating_point_reversal_at_any_depth():
    def stack(depth, coupling=None):
        sequence = ReversibleSequential(*[ReversibleBlock(ConvResidual(8), ConvResidual(8)) for _ in range(depth)])
        if coupling is not None:
            set_coupling(sequence, coupling)
        return sequence

    x = torch.randn(4, 16, 16, 16)
    stream = x.numel() // 2 * 4
    for depth in (4, 16):
        exact = measure(stack(depth, FixedPoint()), x)
        assert exact.held_bytes == measure(stack(depth), x).held_bytes == 2 * stream + SAMPLE + 4
        assert exact == predict(stack(depth, FixedPoint()), x)
        # A residual in steps of the grid takes one more stream while it is computed.
        assert exact.activation_bytes <= measure(stack(depth), x).activation_bytes + stream
        wide = measure(stack(depth, FixedPoint(is_wide=True)), x)
        assert wide.held_bytes == 2 * 2 * stream + 2 * SAMPLE + 4


def test_plan_counts_exact_reversal():
    model = ReversibleSequential(*[ReversibleBlock(ConvResidual(8), ConvResidual(8)) for _ in range(4)])
    set_coupling(model, FixedPoint())
    x = torch.randn(4, 16, 16, 16)
    budget = predict(model, x).peak_bytes + 300_000
    plan(model, x, budget=budget).apply(model)
    assert predict(model, x).peak_bytes == measure(model, x).peak_bytes <= budget
