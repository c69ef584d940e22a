"""`GroupedBlock` against the grouped reversible block of PyTorch Geometric, on a graph."""

import copy

import pytest
import torch
from torch import nn

from revnet import FixedPoint, Reverse, ReversibleSequential, Store, set_coupling
from revnet.nn import GroupedBlock

geometric = pytest.importorskip("torch_geometric", reason="torch_geometric is not installed")
geometric_nn = pytest.importorskip("torch_geometric.nn")

WIDTH, NUM_NODES = 24, 7
all_numbers_of_groups = pytest.mark.parametrize("num_groups", [2, 3, 4])
# The other library calls a decorator that PyTorch has renamed.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture
def graph():
    """Edges of a ring with some chords."""
    nodes = torch.arange(NUM_NODES)
    return torch.stack([torch.cat([nodes, nodes]), torch.cat([(nodes + 1) % NUM_NODES, (nodes + 3) % NUM_NODES])])


def nodes(**options):
    return torch.randn(NUM_NODES, WIDTH, **options)


def make_convs(num_groups):
    width = WIDTH // num_groups
    return [geometric_nn.GCNConv(width, width) for _ in range(num_groups)]


def make_pair(num_groups, depth=1, dtype=torch.float32, **options):
    """Return the blocks of the other library, which store their activations, and a sequence of the same functions."""
    groups = [make_convs(num_groups) for _ in range(depth)]
    theirs = nn.ModuleList(
        [geometric_nn.GroupAddRev(nn.ModuleList(copy.deepcopy(convs)), disable=True) for convs in groups]
    )
    ours = ReversibleSequential(*[GroupedBlock(*convs, split_dim=-1) for convs in groups], **options)
    return theirs.to(dtype), ours.to(dtype)


def run_theirs(blocks, x, graph):
    for block in blocks:
        x = block(x, graph)
    return x


def step(model, x, graph, run=None):
    """Return the output, and the gradients of the input and of the parameters."""
    x = x.detach().clone().requires_grad_()
    y = model(x, graph) if run is None else run(model, x, graph)
    y.sin().sum().backward()
    return [y.detach(), x.grad, *[parameter.grad for parameter in model.parameters()]]


# The five properties that the other library tests of its block -----------------------------------------------------


@all_numbers_of_groups
def test_inverse_returns_the_nodes(num_groups, graph):
    _, ours = make_pair(num_groups)
    x = nodes()
    y = ours(x, graph)
    assert y.shape == x.shape
    # One sum and one difference of each of the streams, at 2^-24 of values below 10.
    assert (ours.inverse(y, graph) - x).abs().max() < 100 * 2 * num_groups * 10 * 2**-24


@all_numbers_of_groups
def test_backward_pass_runs(num_groups, graph):
    _, ours = make_pair(num_groups)
    x = nodes(requires_grad=True)
    nn.functional.mse_loss(ours(x, graph), nodes()).backward()
    assert x.grad.any()
    assert all(parameter.grad.any() for parameter in ours.parameters())


@all_numbers_of_groups
def test_several_backward_passes_give_the_same_gradients(num_groups, graph):
    _, ours = make_pair(num_groups, depth=3)
    x = nodes(requires_grad=True)
    loss = ours(x, graph).sin().sum()
    first = torch.autograd.grad(loss, [x, *ours.parameters()], retain_graph=True)
    for _ in range(3):
        again = torch.autograd.grad(loss, [x, *ours.parameters()], retain_graph=True)
        assert all(map(torch.equal, first, again))


@all_numbers_of_groups
def test_stored_twin_computes_the_same(num_groups, graph):
    _, ours = make_pair(num_groups, depth=3)
    twin = copy.deepcopy(ours)
    twin.set_policies(Store())
    x = nodes()
    assert torch.equal(ours(x, graph), twin(x, graph))


@all_numbers_of_groups
def test_gradients_equal_the_stored_twin(num_groups, graph):
    depth = 3
    _, ours = make_pair(num_groups, depth, torch.float64)
    twin = copy.deepcopy(ours)
    twin.set_policies(Store())
    x = nodes(dtype=torch.float64)
    for value, expected in zip(step(ours, x, graph), step(twin, x, graph), strict=True):
        # Each block rounds each stream once, at 2^-53, and a sum adds the errors of all streams.
        tolerance = 100 * depth * num_groups**2 * 2**-53
        assert (value - expected).abs().max() <= tolerance * expected.abs().max()


# Beyond them --------------------------------------------------------------------------------------------------------


@all_numbers_of_groups
@pytest.mark.parametrize("depth", [1, 5])
def test_output_and_gradients_equal_the_other_library(num_groups, depth, graph):
    theirs, ours = make_pair(num_groups, depth)
    x = nodes()
    expected, actual = step(theirs, x, graph, run_theirs), step(ours, x, graph)
    assert torch.equal(actual[0], expected[0])
    for value, other in zip(actual[1:], expected[1:], strict=True):
        assert (value - other).abs().max() <= 100 * depth * num_groups**2 * 2**-24 * other.abs().max()


def test_input_and_output_stay(graph):
    """The other library frees the memory of both; reading its output after the backward pass is unsafe."""
    _, ours = make_pair(3, depth=2)
    x = nodes(requires_grad=True)
    before = x.detach().clone()
    y = ours(x, graph)
    after = y.detach().clone()
    y.sum().backward()
    assert torch.equal(x, before)
    assert torch.equal(y, after)


def test_exact_couplings_give_the_gradients_of_the_twin(graph):
    _, ours = make_pair(4, depth=5)
    set_coupling(ours, FixedPoint())
    twin = copy.deepcopy(ours)
    twin.set_policies(Store())
    x = nodes()
    assert all(map(torch.equal, step(ours, x, graph), step(twin, x, graph)))


def test_edge_features_that_want_gradients(graph):
    def conv():
        inner = nn.Linear(2, (WIDTH // 3) ** 2)
        return geometric_nn.NNConv(WIDTH // 3, WIDTH // 3, inner)

    blocks = [GroupedBlock(*[conv() for _ in range(3)], split_dim=-1) for _ in range(2)]
    ours = ReversibleSequential(*blocks, policy=Reverse()).double()
    twin = copy.deepcopy(ours)
    twin.set_policies(Store())
    x, features = nodes(dtype=torch.float64), torch.randn(graph.shape[1], 2, dtype=torch.float64)
    gradients = []
    for model in (ours, twin):
        leaf = features.clone().requires_grad_()
        model(x, graph, leaf).sin().sum().backward()
        gradients.append(leaf.grad)
    assert torch.allclose(*gradients, rtol=1e-10)
