"""The further arguments of residual functions: contexts, masks, nested structures, and the streams themselves."""

import pytest
import torch
from torch import nn

from revnet import ReversibleBlock, ReversibleSequential
from tests.helpers import CASE, all_policies, assert_close, assert_trains_as_twin, gradients, squares, stored_twin


@all_policies
@pytest.mark.parametrize("name", ["attention-context-mask", "nested-arguments"])
def test_arguments_computed_by_earlier_modules(name, policy):
    """Gradients flow through every block into the module that computes the context."""

    def step(module, x, args, kwargs):
        computed, computed_kwargs = torch.utils._pytree.tree_map_only(torch.Tensor, torch.sin, (args, {}))
        squares(module(x, *computed, **kwargs, **computed_kwargs)).backward()

    assert_trains_as_twin(CASE[name].sequence(4, policy), CASE[name], step)


def test_only_the_arguments_need_gradients():
    """Only the context has slots."""
    case = CASE["nested-arguments"]

    def step(module, x, args, kwargs):
        squares(module.requires_grad_(False)(x.requires_grad_(False), *args, **kwargs)).backward()
        assert args[0]["shifts"][0].grad.any()

    assert_trains_as_twin(case.sequence(3), case, step)


def test_streams_as_arguments():
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


def test_argument_is_a_view_of_the_input():
    def step(module, x, args, kwargs):
        squares(module(x, x[..., 4:])).backward()

    assert_trains_as_twin(CASE["attention"].sequence(3), CASE["attention"], step)


def test_output_is_an_argument_of_the_next_sequence():
    other = CASE["attention"].sequence(2)

    def step(module, x, args, kwargs):
        y = module(x)
        squares(other(y, y[..., :4]) + y).backward()

    assert_trains_as_twin(CASE["attention"].sequence(2), CASE["attention"], step)


class AddsUp(nn.Module):
    """Reads a list of contexts."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, contexts):
        return torch.tanh(self.linear(x) * sum(contexts))


@all_policies
def test_a_list_may_change_before_the_backward_pass(policy):
    blocks = [ReversibleBlock(AddsUp(), AddsUp()) for _ in range(4)]
    sequence = ReversibleSequential(*blocks, policy=policy).double()
    twin = stored_twin(sequence)
    x, context = torch.randn(3, 8, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    for module in (sequence, twin):
        contexts = [context, context.sin()]
        y = module(x, contexts)
        contexts.append(context.cos())
        squares(y).backward()
    assert_close(gradients(sequence), gradients(twin))


class Hooked(nn.Module):
    """Registers a hook on an argument in each run."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, contexts):
        contexts[0].register_hook(lambda gradient: gradient / 2)
        return torch.tanh(self.linear(x) * contexts[0])


@all_policies
def test_a_hook_on_an_argument_runs_once(policy):
    sequence = ReversibleSequential(*[ReversibleBlock(Hooked(), Hooked()) for _ in range(4)], policy=policy).double()
    twin = stored_twin(sequence)
    x, context = (torch.randn(3, size, dtype=torch.float64) for size in (8, 4))
    results = []
    for module in (sequence, twin):
        leaf = context.clone().requires_grad_()
        squares(module(x, [leaf * 1])).backward()
        results.append((leaf.grad, gradients(module)))
    assert_close(*results)


class Tied(nn.Module):
    """Computes with its argument, and holds its own parameter or buffer."""

    def __init__(self, *, is_buffer: bool):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        if is_buffer:
            self.register_buffer("table", torch.randn(4, 4))
        else:
            self.table = nn.Parameter(torch.randn(4, 4))

    def forward(self, x, table):
        return torch.tanh(self.linear(x @ table) @ self.table)


@all_policies
@pytest.mark.parametrize("is_buffer", [False, True])
@pytest.mark.parametrize("is_view", [False, True])
def test_an_argument_may_be_a_parameter_or_a_buffer_of_a_function(policy, is_buffer, is_view):
    blocks = [ReversibleBlock(Tied(is_buffer=is_buffer), Tied(is_buffer=is_buffer)) for _ in range(4)]
    sequence = ReversibleSequential(*blocks, policy=policy).double()
    twin = stored_twin(sequence)
    x = torch.randn(3, 8, dtype=torch.float64)
    for module in (sequence, twin):
        table = module.blocks[1].f.table
        squares(module(x, table.t() if is_view else table)).backward()
    assert_close(gradients(sequence), gradients(twin))


class GraphConvolution(nn.Module):
    """Averages over neighbors, which a sparse matrix names."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x, neighbors):
        return torch.tanh(self.linear(torch.sparse.mm(neighbors, x)))


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_sparse_arguments(layout, requires_grad):
    """They have no storage that identifies them."""
    blocks = [ReversibleBlock(GraphConvolution(), GraphConvolution()) for _ in range(3)]
    sequence = ReversibleSequential(*blocks).double()
    twin = stored_twin(sequence)
    x = torch.randn(4, 6, dtype=torch.float64)
    dense = torch.eye(4, dtype=torch.float64).roll(1, 0) / 2 + torch.eye(4, dtype=torch.float64)
    results = []
    for module in (sequence, twin):
        neighbors = dense.to_sparse(layout=layout).requires_grad_(requires_grad)
        squares(module(x, neighbors)).backward()
        results.append([gradients(module), neighbors.grad.to_dense() if requires_grad else None])
    assert_close(*results)


class Holding(nn.Module):
    """Reads a tensor that is neither an argument nor a parameter."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.held = torch.randn(3, dtype=torch.float64, requires_grad=True)

    def forward(self, x):
        return torch.tanh(self.linear(x) * self.held)


def test_tensor_held_by_a_function():
    sequence = ReversibleSequential(*[ReversibleBlock(Holding(), Holding()) for _ in range(3)]).double()
    twin = stored_twin(sequence)
    x = torch.randn(4, 6, dtype=torch.float64)
    results = []
    for module in (sequence, twin):
        squares(module(x)).backward()
        results.append([gradients(module), [block.f.held.grad for block in module]])
    assert_close(*results)


class Mutating(nn.Module):
    """Writes its result into its argument, like a cache."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x, cache):
        y = torch.tanh(self.linear(x) + cache)
        cache += 1
        return y


def test_a_function_that_writes_to_its_argument_raises():
    """The replay would read the values that the forward pass wrote."""
    sequence = ReversibleSequential(*[ReversibleBlock(Mutating(), Mutating()) for _ in range(2)])
    loss = sequence(torch.randn(4, 6), torch.zeros(3)).sum()
    with pytest.raises(RuntimeError, match=r"argument of shape .* was modified in place after the forward pass"):
        loss.backward()
