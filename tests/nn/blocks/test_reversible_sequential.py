import pickle

import pytest
import torch
from torch import nn

from revnet import Reverse, ReversibleBlock, ReversibleSequential, Store
from tests.helpers import mlp


def block(split_dim=1):
    return ReversibleBlock(mlp(2), mlp(2), split_dim=split_dim)


def test_runs_the_blocks_in_order():
    blocks = [block() for _ in range(3)]
    x = torch.randn(4, 4)
    expected = x
    for module in blocks:
        expected = module(expected)
    assert torch.equal(ReversibleSequential(*blocks)(x), expected)


def test_sequence_has_length_index_and_iterator():
    blocks = [block() for _ in range(3)]
    sequence = ReversibleSequential(*blocks)
    assert len(sequence) == 3
    assert list(sequence) == blocks
    assert sequence[-1] is blocks[-1]


def test_no_blocks_are_the_identity():
    x = torch.randn(2, 4, requires_grad=True)
    y = ReversibleSequential()(x)
    assert torch.equal(y, x)
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_tensor_gives_a_tensor_and_pair_gives_a_pair():
    sequence = ReversibleSequential(block())
    assert isinstance(sequence(torch.randn(2, 4)), torch.Tensor)
    assert isinstance(sequence((torch.randn(2, 2), torch.randn(2, 2))), tuple)
    assert isinstance(sequence.inverse([torch.randn(2, 2), torch.randn(2, 2)]), tuple)


@pytest.mark.parametrize(
    ("blocks", "policy", "error", "message"),
    [
        ([nn.Linear(2, 2)], Reverse(), TypeError, r"`blocks\[0\]` \(=Linear\) must be a reversible block"),
        (
            [block(), block(0)],
            Reverse(),
            ValueError,
            r"`blocks\[1\]` has split_dim=0, but `blocks\[0\]` has split",
        ),
        (
            [block(), block()],
            [Store()],
            ValueError,
            r"`policy` \(of length 1\) must have one entry for each unit \(2\)",
        ),
        ([block()], ["x"], ValueError, r"`policy\[0\]` \(='x'\) must be a policy: `Reverse\(\)`, `Checkpoint\(\)`"),
        ([block()], [None], TypeError, r"`policy\[0\]` \(=None\) must be a policy"),
    ],
)
def test_rejects(blocks, policy, error, message):
    with pytest.raises(error, match=message):
        ReversibleSequential(*blocks, policy=policy)


def test_errors_name_the_block():
    sequence = ReversibleSequential(block(), ReversibleBlock(nn.Linear(2, 3), mlp(2)))
    with pytest.raises(ValueError, match=r"`blocks\.1\.f` returned shape \(4, 3\)"):
        sequence(torch.randn(4, 4))
    with pytest.raises(ValueError, match=r"`x` \(of shape .*\) has size 63 along `split_dim` \(=1\)"):
        sequence(torch.randn(4, 63))


def test_policies_of_the_same_class_are_equal():
    assert Reverse() == Reverse()
    assert Reverse() != Store()


def test_repr_shows_the_policies():
    assert "policy=Reverse()\n" in repr(ReversibleSequential(block(), block()))
    mixed = ReversibleSequential(block(), block(), block(), policy=[Reverse(), Reverse(), Store()])
    assert "policy=[Reverse()] * 2 + [Store()] * 1\n" in repr(mixed)


def test_pickling_keeps_weights_and_policies():
    sequence = ReversibleSequential(block(), block(), policy=[Reverse(), Store()])
    sequence(torch.randn(2, 4)).sum().backward()
    other = pickle.loads(pickle.dumps(sequence))
    assert other.policies == sequence.policies
    x = torch.randn(2, 4)
    assert torch.equal(other(x), sequence(x))
