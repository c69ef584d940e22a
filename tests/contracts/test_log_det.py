"""Log-determinants equal the stored twin's and autograd's Jacobian, and the memory saving is kept."""

import gc

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from revnet import Reverse, ReversibleBlock, ReversibleSequential, Store
from revnet.coupling import Affine
from revnet.engine._rebuild import Rebuilder
from revnet.memory import measure
from revnet.nn import CouplingLayer, MomentumBlock
from tests.helpers import (
    CASE,
    CASES,
    DEPTH,
    all_policies,
    assert_close,
    assert_trains_as_twin,
    mlp,
    scaling_mlp,
    squares,
)

DENSITIES = [case for case in CASES if case.density]
all_densities = pytest.mark.parametrize("case", DENSITIES, ids=lambda case: case.name)


@all_policies
@pytest.mark.parametrize("case", [*DENSITIES, CASE["attention-context-mask"]], ids=lambda case: case.name)
def test_step_equals_the_twin(case, policy):
    def step(module, x, args, kwargs):
        y, log_det = module.forward_with_log_det(x, *args, **kwargs)
        weights = torch.arange(1.0, 1 + len(x), dtype=torch.float64)
        (squares(y) - (weights * log_det.exp()).sum()).backward()
        return y, log_det

    assert_trains_as_twin(case.sequence(DEPTH, policy), case, step)


@all_densities
def test_step_on_the_log_determinant_alone_equals_the_twin(case):
    def step(module, x, args, kwargs):
        log_det = module.forward_with_log_det(x, *args, **kwargs)[1]
        (log_det.square().sum() + 0 * sum(p.sum() for p in module.parameters()) + 0 * x.sum()).backward()
        return log_det

    assert_trains_as_twin(case.sequence(DEPTH), case, step)


@all_densities
def test_equals_the_log_determinant_of_the_jacobian(case):
    module = case.sequence(DEPTH).eval()
    x = case.input(requires_grad=False)
    y, log_det = module.forward_with_log_det(x)
    assert torch.equal(y, module(x))
    assert torch.equal(log_det, module.log_det(x))
    for index in range(len(x)):
        jacobian = torch.autograd.functional.jacobian(lambda v: module(v[None])[0], x[index])
        expected = jacobian.view(x[index].numel(), -1).slogdet().logabsdet
        assert_close(log_det[index], expected, tolerance=1e-11)
        assert expected.abs() > 1e-3


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.name != "split-batch" and not case.density], ids=lambda case: case.name
)
def test_is_zero_for_volume_preserving_couplings(case):
    x = case.input()
    with sdpa_kernel(SDPBackend.MATH):
        _, log_det = case.sequence(1).forward_with_log_det(x, *case.args(), **case.kwargs())
    assert torch.equal(log_det, torch.zeros(len(x), dtype=torch.float64))


def test_gradients_pass_gradcheck():
    sequence = ReversibleSequential(
        ReversibleBlock(scaling_mlp(2), scaling_mlp(2), coupling=Affine()),
        MomentumBlock(mlp(2)),
        CouplingLayer(scaling_mlp(2), updates=1, coupling=Affine("sigmoid")),
    ).double()
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(sequence.forward_with_log_det, x)
    assert torch.autograd.gradgradcheck(sequence.forward_with_log_det, x)


def test_two_backward_passes_over_one_graph():
    case = CASE["affine"]

    def step(module, x, args, kwargs):
        y, log_det = module.forward_with_log_det(x)
        log_det.sum().backward(retain_graph=True)
        squares(y).backward()

    assert_trains_as_twin(case.sequence(DEPTH), case, step)


def test_blocks_with_hooks():
    sequence = CASE["affine"].sequence(3)
    x = CASE["affine"].input()
    expected = sequence.log_det(x)
    seen = []
    sequence[1].register_forward_hook(lambda *_: seen.append("block"))
    assert torch.equal(sequence.log_det(x), expected)
    assert seen == ["block"]


def test_memory_is_flat_in_depth():
    def activation_bytes(depth, policy):
        blocks = [ReversibleBlock(scaling_mlp(8), scaling_mlp(8), coupling=Affine()) for _ in range(depth)]
        density = Density(ReversibleSequential(*blocks, policy=policy))
        return measure(density, torch.randn(32, 16), loss=lambda y: y[0].square().sum() - y[1].sum()).activation_bytes

    assert activation_bytes(4, Reverse()) == activation_bytes(8, Reverse()) == activation_bytes(32, Reverse())
    assert activation_bytes(32, Store()) > 10 * activation_bytes(32, Reverse())


class Density(torch.nn.Module):
    def __init__(self, sequence):
        super().__init__()
        self.sequence = sequence

    def forward(self, x):
        return self.sequence.forward_with_log_det(x)


def test_nothing_remains_allocated():
    """Reference cycles, which only the garbage collector would break, do not occur."""

    def num_runs():
        return sum(type(instance) is Rebuilder for instance in gc.get_objects())

    sequence = CASE["affine"].sequence(3)
    gc.collect()
    gc.disable()
    try:
        before = num_runs()
        y, log_det = sequence.forward_with_log_det(CASE["affine"].input())
        assert num_runs() == before + 1
        del y, log_det
        assert num_runs() == before
        y, log_det = sequence.forward_with_log_det(CASE["affine"].input())
        (squares(y) + log_det.sum()).backward()
        del y, log_det
        assert num_runs() == before
    finally:
        gc.enable()


def test_splitting_samples_raises():
    block = CASE["split-batch"].make_block().double()
    with pytest.raises(ValueError, match=r"`split_dim` \(=0\) must not be the batch dim.*split along the features"):
        block.log_det(CASE["split-batch"].input())


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # PyTorch's own
@pytest.mark.parametrize("case", [CASE["affine"], CASE["momentum"], CASE["mlp"]], ids=lambda case: case.name)
def test_compiled_sequence_trains_like_the_twin(case):
    def step(module, x, args, kwargs):
        if module.policies[0] == Reverse():
            module = torch.compile(Density(module), backend="aot_eager", fullgraph=True)
            y, log_det = module(x)
        else:
            y, log_det = module.forward_with_log_det(x)
        (squares(y) - (log_det * torch.arange(1.0, 1 + len(x), dtype=torch.float64)).sum()).backward()
        return y, log_det

    assert_trains_as_twin(case.sequence(DEPTH), case, step)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # PyTorch's own
def test_mixed_sequence_compiles():
    """Stored blocks are traced as they are, and their log-determinants are added to the operator's."""
    sequence = CASE["affine"].sequence(DEPTH, [Reverse(), Store(), Reverse(), Store()])
    compiled = torch.compile(Density(sequence), backend="aot_eager", fullgraph=True)
    x = CASE["affine"].input()
    assert_close(compiled(x), sequence.forward_with_log_det(x))
