import pytest
import torch
from torch import nn

from revnet import Reverse, ReversibleBlock, ReversibleSequential, Store
from revnet.memory import measure
from revnet.nn import Checkpoint, InvertibleSequential, MultiStreamBlock
from tests.helpers import assert_close, gradients, mlp, squares


def test_two_streams_equal_a_reversible_block():
    f, g = mlp(3), mlp(3)
    x = torch.randn(4, 6)
    assert torch.equal(MultiStreamBlock(f, g)(x), ReversibleBlock(f, g)(x))


@pytest.mark.parametrize("num_streams", [3, 4, 5])
def test_each_stream_is_updated_from_the_previous_one(num_streams):
    block = MultiStreamBlock(*[mlp(2) for _ in range(num_streams)]).double()
    streams = list(torch.randn(num_streams, 4, 2, dtype=torch.float64))
    y = block(tuple(streams))
    for index, function in enumerate(block.functions):
        streams[index] = streams[index] + function(streams[index - 1])
    assert_close(y, tuple(streams), tolerance=1e-14)
    assert torch.equal(block(torch.cat(list(block.inverse(y)), 1)), torch.cat(block(block.inverse(y)), 1))


def test_inverse_returns_the_streams():
    sequence = ReversibleSequential(*[MultiStreamBlock(mlp(2), mlp(2), mlp(2)) for _ in range(4)]).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    assert_close(sequence.inverse(sequence(x)), x, tolerance=1e-12)


def test_streams_of_different_sizes():
    """The first function reads the last stream, and each other function the stream before its own."""
    block = MultiStreamBlock(nn.Linear(4, 2), nn.Linear(2, 3), nn.Linear(3, 4)).double()
    x = tuple(torch.randn(5, size, dtype=torch.float64) for size in (2, 3, 4))
    y = block(x)
    assert [stream.shape[1] for stream in y] == [2, 3, 4]
    assert_close(block.inverse(y), x)


def test_hooks_see_all_streams():
    sequence = ReversibleSequential(*[MultiStreamBlock(mlp(2), mlp(2), mlp(2)) for _ in range(2)])
    seen = []
    sequence[1].register_forward_hook(lambda module, inputs, output: seen.append((len(inputs[0]), len(output))))
    squares(sequence(torch.randn(4, 6))).backward()
    assert seen == [(3, 3)]


def test_memory_does_not_grow_with_depth_and_falls_with_more_streams():
    def measured(depth, num_streams, policy):
        size = 24 // num_streams

        def function():
            return nn.Sequential(nn.Linear(size, size), nn.GELU(), nn.Linear(size, size))

        blocks = [MultiStreamBlock(*[function() for _ in range(num_streams)]) for _ in range(depth)]
        return measure(ReversibleSequential(*blocks, policy=policy), torch.randn(64, 24))

    three = [measured(depth, 3, Reverse()) for depth in (2, 4, 16)]
    assert len({memory.activation_bytes for memory in three}) == 1
    assert measured(16, 3, Reverse()).activation_bytes < measured(16, 2, Reverse()).activation_bytes
    assert measured(16, 3, Store()).activation_bytes > 5 * three[-1].activation_bytes


def test_checkpointed_chain_stores_only_the_inputs_of_functions():
    """A block stores the input of each function once: three streams."""
    blocks = [MultiStreamBlock(*[nn.Linear(8, 8) for _ in range(3)]) for _ in range(6)]
    sequence = ReversibleSequential(*blocks, policy=Checkpoint())
    twin = ReversibleSequential(*blocks, policy=Store())
    x = torch.randn(32, 24)
    assert measure(sequence, x).held_bytes <= measure(twin, x).held_bytes


def test_trains_like_the_twin_with_a_tolerance():
    sequence = ReversibleSequential(*[MultiStreamBlock(mlp(2), mlp(2), mlp(2)) for _ in range(6)], tolerance=1e-5)
    twin = ReversibleSequential(*sequence, policy=Store())
    x = torch.randn(4, 6)
    steps = []
    for module in (sequence, twin):
        module.zero_grad()
        squares(module(x)).backward()
        steps.append(gradients(module))
    assert_close(*steps, tolerance=1e-4)


def test_sequence_rejects_blocks_with_different_numbers_of_streams():
    two, three = ReversibleBlock(mlp(3), mlp(3)), MultiStreamBlock(mlp(2), mlp(2), mlp(2))
    with pytest.raises(ValueError, match=r"`blocks\[1\]` has 3 streams, but `blocks\[0\]` has 2"):
        ReversibleSequential(two, three)
    model = InvertibleSequential(two, three)
    x = torch.randn(4, 6)
    assert len(model) == 2
    assert_close(model.inverse(model(x)), x, tolerance=1e-5)  # roundings of float32


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (
            torch.randn(2, 7),
            ValueError,
            r"size 7 along `split_dim` \(=1\), .*a multiple of `num_streams` \(=3\), .*use 9 channels, or pass 3 ten",
        ),
        (
            (torch.randn(2, 2),) * 2,
            TypeError,
            r"`x` \(=tuple of 2\) must be a tensor, which is split in 3, or 3 tensors",
        ),
        ((torch.randn(2, 2), torch.randn(2, 2), 1), TypeError, r"`x3` \(=int\) must be a tensor"),
    ],
)
def test_rejects_wrong_inputs(x, error, message):
    with pytest.raises(error, match=message):
        MultiStreamBlock(mlp(2), mlp(2), mlp(2))(x)


@pytest.mark.parametrize(
    ("functions", "error", "message"),
    [
        ([mlp(2)], ValueError, r"`functions` \(=1 of them\) must be two or more"),
        ([mlp(2), torch.tanh], TypeError, r"`functions\[1\]` .* must be an nn.Module"),
    ],
)
def test_rejects_wrong_functions(functions, error, message):
    with pytest.raises(error, match=message):
        MultiStreamBlock(*functions)
