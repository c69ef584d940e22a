"""Properties that all attention layers share."""

from functools import partial

import pytest
import torch

from revnet import Reverse, ReversibleBlock, ReversibleSequential, Store
from revnet.coupling import FixedPoint
from revnet.functional import full_attention, hierarchical_attention, lsh_attention, rotary_table, rotate
from revnet.nn.attention import FullAttention, HierarchicalAttention, LSHAttention
from tests.helpers import FeedForward, assert_close, gradients, squares

MODULES = {
    "full": FullAttention,
    "lsh": partial(LSHAttention, bucket_size=4, num_hashes=2),
    "hierarchical": partial(HierarchicalAttention, block_size=4),
}
all_modules = pytest.mark.parametrize("make", MODULES.values(), ids=MODULES.keys())
directions = pytest.mark.parametrize("is_causal", [False, True])


def random_input(B=2, T=30, D=8):
    return torch.randn(B, T, D, dtype=torch.float64)


@directions
@all_modules
def test_heads_apply_the_function_to_projections(make, is_causal):
    module, x, rotary = make(8, 2, is_causal=is_causal).double(), random_input(), rotary_table(30, 4).double()
    mask = torch.rand(2, 30) > 0.3

    def heads(weight):
        return (x @ weight.T).unflatten(2, (2, 4)).transpose(1, 2)

    options = {"is_causal": is_causal, "mask": mask}
    torch.manual_seed(1)
    if isinstance(module, LSHAttention):
        qk = rotate(heads(module.qk.weight), rotary)
        y = lsh_attention(qk, heads(module.v.weight), bucket_size=4, num_hashes=2, **options)
    else:
        q, k, v = map(heads, module.qkv.weight.chunk(3))
        function = (
            full_attention if isinstance(module, FullAttention) else partial(hierarchical_attention, block_size=4)
        )
        y = function(rotate(q, rotary), rotate(k, rotary), v, **options)
    expected = y.transpose(1, 2).reshape(2, 30, 8) @ module.project.weight.T
    torch.manual_seed(1)
    assert_close(module(x, mask=mask, rotary=rotary), expected, tolerance=1e-12)


@directions
@all_modules
def test_gradients_in_reversible_blocks_equal_the_stored_twin(make, is_causal):
    """Random numbers are the same in both calls of a function."""
    blocks = [
        ReversibleBlock(make(8, 2, is_causal=is_causal), FeedForward(8), split_dim=-1, coupling=FixedPoint())
        for _ in range(3)
    ]
    x = torch.randn(2, 30, 16)
    results = []
    for policy in (Reverse(), Store()):
        sequence = ReversibleSequential(*blocks, policy=policy)
        sequence.zero_grad()
        torch.manual_seed(1)
        squares(sequence(x, mask=torch.ones(2, 30, dtype=torch.bool))).backward()
        results.append((gradients(sequence), torch.get_rng_state()))
    for name, gradient in results[0][0].items():
        assert torch.equal(gradient, results[1][0][name]), name
    assert torch.equal(results[0][1], results[1][1])


def test_rotations_are_random_in_training_and_fixed_in_evaluation():
    module, x = LSHAttention(8, 2, bucket_size=2, num_hashes=1).double(), random_input()
    assert not torch.equal(module(x), module(x))
    module.eval()
    state = torch.get_rng_state()
    assert torch.equal(module(x), module(x))
    assert torch.equal(torch.get_rng_state(), state)


@all_modules
def test_rejects_wrong_shapes_and_options(make):
    module = make(8, 2).double()
    with pytest.raises(ValueError, match=r"`x` has shape \(2, 30, 6\), but must have \(B, T, 8\)"):
        module(random_input(D=6))
    with pytest.raises(ValueError, match=r"`x` has shape \(30, 8\), but must have \(B, T, 8\)"):
        module(random_input()[0])
    with pytest.raises(ValueError, match=r"`mask` has shape \(30,\), but must have the shape of the tokens, \(2, 30\)"):
        module(random_input(), mask=torch.ones(30, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"`mask` \(=torch.uint8\) must be a bool tensor"):
        module(random_input(), mask=torch.ones(2, 30, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"`rotary` has shape \(2, 29, 2\), but must have \(2, 30, 2\)"):
        module(random_input(), rotary=rotary_table(29, 4))
    with pytest.raises(ValueError, match=r"`dim` \(=9\) must be a multiple of `num_heads` \(=2\), which share it"):
        make(9, 2)
    with pytest.raises(ValueError, match=r"`num_heads` \(=0\) must be a positive integer"):
        make(8, 0)


@pytest.mark.parametrize("name", ["lsh", "hierarchical"])
def test_rejects_numbers_of_documents(name):
    message = r"`mask` \(=torch.int64\) must be a bool tensor, .*; numbers of documents are for full attention"
    with pytest.raises(TypeError, match=message):
        MODULES[name](8, 2).double()(random_input(), mask=torch.ones(2, 30, dtype=torch.long))


@pytest.mark.parametrize("name", ["lsh", "hierarchical"])
def test_double_backward_raises(name):
    x = random_input().requires_grad_()
    (grad,) = torch.autograd.grad(squares(MODULES[name](8, 2).double()(x)), x, create_graph=True)
    with pytest.raises(RuntimeError, match="have no second derivatives, but their gradient was differentiated"):
        grad.sum().backward()


def test_repr_shows_the_options():
    assert "num_heads=2, is_causal=True" in repr(FullAttention(8, 2, is_causal=True))
    assert "num_heads=2, is_causal=False, bucket_size=64, num_hashes=4" in repr(LSHAttention(8, 2))
    assert "num_heads=2, is_causal=False, block_size=64" in repr(HierarchicalAttention(8, 2))
