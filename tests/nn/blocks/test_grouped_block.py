import pytest
import torch
from torch import nn

from revnet import (
    Checkpoint,
    FixedPoint,
    Offload,
    ReconstructionError,
    Reverse,
    ReversibleBlock,
    ReversibleSequential,
    Store,
)
from revnet.memory import measure, predict
from revnet.nn import GroupedBlock, MultiStreamBlock, set_coupling
from tests.helpers import assert_close, gradients, mlp, squares, stored_twin

POLICIES = [Reverse(), Reverse(hold=True), Reverse(hold="functions.0", keep="linear"), Checkpoint()]
all_numbers_of_streams = pytest.mark.parametrize("num_streams", [2, 3, 4])


def make_sequence(num_streams, depth=4, size=2, **options):
    blocks = [GroupedBlock(*[mlp(size) for _ in range(num_streams)], split_dim=-1) for _ in range(depth)]
    return ReversibleSequential(*blocks, **options)


def expected_output(sequence, x, num_streams):
    """Compute the equations of Li et al. (2021)."""
    streams = list(x.chunk(num_streams, -1))
    for block in sequence:
        y = streams[1]
        for stream in streams[2:]:
            y = y + stream
        for index, function in enumerate(block.functions):
            y = streams[index] = streams[index] + function(y)
    return torch.cat(streams, -1)


@all_numbers_of_streams
@pytest.mark.parametrize("policy", [*POLICIES, Store(), Offload()], ids=repr)
def test_the_first_function_reads_the_sum_of_the_other_streams(num_streams, policy):
    sequence = make_sequence(num_streams, policy=policy)
    x = torch.randn(5, 2 * num_streams)
    before = x.clone()
    y = sequence(x)
    assert torch.equal(y, expected_output(sequence, x, num_streams))
    squares(y).backward()
    assert torch.equal(x, before), "the input stays"


def test_two_streams_equal_a_reversible_block():
    f, g = mlp(3), mlp(3)
    x = torch.randn(4, 6)
    assert torch.equal(GroupedBlock(f, g)(x), ReversibleBlock(f, g)(x))


def test_only_the_first_function_differs_from_a_multi_stream_block():
    functions = [mlp(2) for _ in range(3)]
    x1, x2, x3 = torch.randn(3, 4, 2)
    y = MultiStreamBlock(*functions)((x1, x2, x3))
    assert torch.equal(y[0], x1 + functions[0](x3))
    y = GroupedBlock(*functions)((x1, x2, x3))
    assert torch.equal(y[0], x1 + functions[0](x2 + x3))


@all_numbers_of_streams
def test_inverse_returns_the_streams(num_streams):
    sequence = make_sequence(num_streams).double()
    x = torch.randn(4, 2 * num_streams, dtype=torch.float64)
    assert_close(sequence.inverse(sequence(x)), x, tolerance=1e-12)


@all_numbers_of_streams
@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_gradients_equal_the_twin(num_streams, policy):
    sequence = make_sequence(num_streams, policy=policy).double()
    twin = stored_twin(sequence)
    x = torch.randn(5, 2 * num_streams, dtype=torch.float64, requires_grad=True)
    twin_x = x.detach().clone().requires_grad_()
    squares(sequence(x)).backward()
    squares(twin(twin_x)).backward()
    if policy == Checkpoint():
        assert all(map(torch.equal, gradients(sequence).values(), gradients(twin).values()))
        assert torch.equal(x.grad, twin_x.grad)
    else:
        # Each of the 4 blocks rounds each stream once, at 2^-53, and a sum adds the errors of all streams.
        tolerance = 100 * 4 * num_streams**2 * 2**-53
        assert_close(gradients(sequence), gradients(twin), tolerance=tolerance)
        assert_close(x.grad, twin_x.grad, tolerance=tolerance)


@all_numbers_of_streams
def test_exact_arithmetic_gives_the_gradients_of_the_twin_bit_for_bit(num_streams):
    sequence = make_sequence(num_streams, depth=8)
    set_coupling(sequence, FixedPoint())
    twin = stored_twin(sequence)
    x = torch.randn(5, 2 * num_streams)
    squares(sequence(x)).backward()
    squares(twin(x)).backward()
    assert all(map(torch.equal, gradients(sequence).values(), gradients(twin).values()))


def test_second_derivatives_pass_the_check_of_pytorch():
    sequence = make_sequence(3, depth=2).double()
    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(sequence, x)
    assert torch.autograd.gradgradcheck(sequence, x)


@pytest.mark.parametrize("policy", [*POLICIES, Store()], ids=repr)
def test_memory_is_predicted_to_the_byte(policy):
    sequence = make_sequence(3, size=4, policy=policy)
    x = torch.randn(16, 12)
    squares(sequence(x)).backward()
    sequence.zero_grad(set_to_none=True)
    assert predict(sequence, x).peak_bytes == measure(sequence, x).peak_bytes


def test_memory_does_not_grow_with_depth():
    def bytes_of(depth, policy):
        return measure(make_sequence(4, depth, 8, policy=policy), torch.randn(64, 32)).activation_bytes

    assert bytes_of(3, Reverse()) == bytes_of(12, Reverse())
    assert bytes_of(12, Store()) > 5 * bytes_of(12, Reverse())


def test_trains_like_the_twin_with_a_tolerance():
    sequence = make_sequence(3, 6, tolerance=1e-5)
    twin = ReversibleSequential(*sequence, policy=Store())
    x = torch.randn(4, 6)
    steps = []
    for module in (sequence, twin):
        module.zero_grad()
        squares(module(x)).backward()
        steps.append(gradients(module))
    assert_close(*steps, tolerance=1e-4)


class Counter(nn.Module):
    """A function that returns something else each time."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.linear(torch.tanh(x * self.calls))


@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_function_that_changes_raises(position):
    functions = [mlp(2) for _ in range(3)]
    functions[position] = Counter()
    blocks = [GroupedBlock(*[mlp(2) for _ in range(3)]), GroupedBlock(*functions)]
    loss = squares(ReversibleSequential(*blocks)(torch.randn(8, 6)))
    with pytest.raises(ReconstructionError, match=rf"blocks.1.functions.{position}` returned different numbers"):
        loss.backward()


def test_sums_that_cancel_do_not_look_like_a_changed_function():
    """The sum of two streams that nearly cancel has a large relative error."""
    sequence = make_sequence(3, 6)
    x = torch.randn(64, 6)
    x[:, 4:] = -x[:, 2:4]
    squares(sequence(1e3 * x)).backward()
    assert all(gradient.isfinite().all() for gradient in gradients(sequence).values())


def test_hooks_see_all_streams():
    sequence = make_sequence(3, 2)
    seen = []
    sequence[1].register_forward_hook(lambda module, inputs, output: seen.append((len(inputs[0]), len(output))))
    squares(sequence(torch.randn(4, 6))).backward()
    assert seen == [(3, 3)]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # read by the compiler
def test_compiled_functions_give_the_same_gradients():
    sequence = make_sequence(3, 2).double()
    twin = stored_twin(sequence)
    for block in sequence:
        block.compile(backend="aot_eager")
    x = torch.randn(4, 6, dtype=torch.float64)
    squares(sequence(x)).backward()
    squares(twin(x)).backward()
    assert_close(gradients(sequence), gradients(twin), tolerance=1e-12)


def test_rejects_streams_of_different_shapes():
    block = GroupedBlock(nn.Identity(), nn.Identity(), nn.Identity())
    with pytest.raises(
        ValueError, match=r"the streams of a sum have the shapes \(4, 2\) and \(4, 1\); pass streams of"
    ):
        block((torch.randn(4, 2), torch.randn(4, 2), torch.randn(4, 1)))


@pytest.mark.parametrize(
    ("functions", "error", "message"),
    [
        ([mlp(2)], ValueError, r"`functions` \(=1 of them\) must be two or more"),
        ([mlp(2), torch.tanh], TypeError, r"`functions\[1\]` .* must be an nn.Module"),
    ],
)
def test_rejects_wrong_functions(functions, error, message):
    with pytest.raises(error, match=message):
        GroupedBlock(*functions)
