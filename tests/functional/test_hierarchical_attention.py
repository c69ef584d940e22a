"""Comparison with the whole attention matrix, built pair by pair from the definition."""

import pytest
import torch

from revnet.functional import full_attention, hierarchical_attention, lsh_attention
from tests.helpers import assert_close, squares


def level_of(i, j, block_size):
    """Return the finest level on which the blocks of both tokens are equal or neighbors."""
    level = 0
    while abs((i >> level) // block_size - (j >> level) // block_size) > 1:
        level += 1
    return level


def by_hand(q, k, v, *, block_size, is_causal, mask=None):
    B, H, T, D = q.shape
    y = torch.zeros_like(v)
    for b in range(B):
        real = [t for t in range(T) if mask is None or mask[b, t]]

        def group(t, level, real=real):
            return [other for other in real if other >> level == t >> level]

        for i in real:
            seen = [j for j in real if not is_causal or j <= i]
            for h in range(H):
                products = []
                for j in seen:
                    level = level_of(i, j, block_size)
                    queries = group(i, level)
                    query = q[b, h, queries[0]] if is_causal else q[b, h, queries].mean(0)
                    products.append(query @ k[b, h, group(j, level)].mean(0) / D**0.5)
                y[b, h, i] = torch.stack(products).softmax(0) @ v[b, h, seen]
    return y


def random_inputs(T, B=2, H=2, D=4):
    return torch.randn(3, B, H, T, D, dtype=torch.float64)


# (length, block size, levels)
SIZES = [(1, 2, 1), (4, 2, 1), (5, 2, 2), (8, 2, 2), (13, 2, 3), (32, 2, 4), (33, 4, 4), (40, 6, 3), (29, 16, 1)]


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("has_mask", [False, True])
@pytest.mark.parametrize(("T", "block_size", "num_levels"), SIZES)
def test_equals_the_definition(T, block_size, num_levels, is_causal, has_mask):
    q, k, v = random_inputs(T)
    mask = torch.rand(2, T) > 0.3 if has_mask else None
    if has_mask:
        mask[0, 0] = mask[1, -1] = True
    options = {"block_size": block_size, "is_causal": is_causal, "mask": mask}
    actual, expected = hierarchical_attention(q, k, v, **options), by_hand(q, k, v, **options)
    if has_mask:
        actual, expected = (tensor.transpose(1, 2)[mask] for tensor in (actual, expected))
    assert_close(actual, expected, tolerance=1e-12)
    assert 1 + max(level_of(i, j, block_size) for i in range(T) for j in range(T)) == num_levels


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("T", [1, 7, 16])
def test_one_level_is_full_attention(T, is_causal):
    q, k, v = random_inputs(T)
    actual = hierarchical_attention(q, k, v, block_size=8, is_causal=is_causal)
    assert_close(actual, full_attention(q, k, v, is_causal=is_causal), tolerance=1e-12)


@pytest.mark.parametrize("is_causal", [False, True])
def test_equal_tokens_within_groups_are_exact(is_causal):
    """Coarsening equal tokens loses no information."""
    q, k, v = random_inputs(8)
    q, k = (tensor.repeat_interleave(8, dim=2) for tensor in (q, k))
    v = torch.randn(2, 2, 64, 4, dtype=torch.float64)
    actual = hierarchical_attention(q, k, v, block_size=8, is_causal=is_causal)  # groups of at most eight
    assert_close(actual, full_attention(q, k, v, is_causal=is_causal), tolerance=1e-12)


@pytest.mark.parametrize("is_causal", [False, True])
def test_gradients(is_causal):
    q, k, v = (tensor.requires_grad_() for tensor in random_inputs(11, B=1, H=1, D=2))
    mask = torch.rand(1, 11) > 0.2

    def function(q, k, v):
        y = hierarchical_attention(q, k, v, block_size=2, is_causal=is_causal, mask=mask)
        return y[:, :, mask[0]]  # The outputs of masked tokens are meaningless.

    assert torch.autograd.gradcheck(function, (q, k, v))


@pytest.mark.parametrize("is_causal", [False, True])
def test_fully_masked_sequences(is_causal):
    q, k, v = (tensor.requires_grad_() for tensor in random_inputs(11))
    y = hierarchical_attention(q, k, v, block_size=2, is_causal=is_causal, mask=torch.zeros(2, 11, dtype=torch.bool))
    squares(y).backward()
    assert y.isfinite().all()
    assert all(tensor.grad.isfinite().all() for tensor in (q, k, v) if tensor.grad is not None)


def test_large_scores_do_not_overflow():
    q, k, v = (30 * tensor.float() for tensor in random_inputs(40))
    y = hierarchical_attention(q, k, v, block_size=4)
    assert y.isfinite().all()
    assert y.abs().max() <= v.abs().max() * (1 + 1e-5)  # means of values


def test_low_precision_computes_scores_in_float32():
    q, k, v = random_inputs(64)
    low = hierarchical_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), block_size=8)
    assert low.dtype == torch.bfloat16
    # Inputs, scores, weights and values are rounded by 2^-9 each, scores of up to about ten before their exponential.
    assert (low - hierarchical_attention(q, k, v, block_size=8)).abs().max() <= 0.1 * v.abs().max()


def short_hierarchical(q, k, v):
    return hierarchical_attention(q, k, v, block_size=4)


def short_lsh(q, k, v):
    return lsh_attention(q, v, bucket_size=8)


def second_derivative(attend, *, is_linear, how):
    """Differentiate a penalty on the gradient of a loss by the weight of a projection."""
    weight = torch.randn(4, 4, requires_grad=True)
    x, factors = torch.randn(1, 1, 8, 4, requires_grad=True), torch.randn(1, 1, 8, 4)
    h = x @ weight
    y = attend(h, h, x)
    loss = (y * factors).sum() if is_linear else squares(y)
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    penalty = loss + squares(grad)
    if how == "grad":
        torch.autograd.grad(penalty, weight)
    else:
        penalty.backward(inputs=None if how == "all leaves" else [weight])


# PyTorch's compiler makes an instance of every `autograd.Function`, for which it warns.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # also by the compiler
@pytest.mark.parametrize("how", ["all leaves", "one leaf", "grad"])
@pytest.mark.parametrize("is_linear", [True, False])
@pytest.mark.parametrize("attend", [short_hierarchical, short_lsh])
@pytest.mark.parametrize("is_compiled", [False, True])
def test_second_derivatives_raise(attend, is_linear, how, is_compiled):
    if is_compiled:
        attend = torch.compile(attend, backend="eager")
    with pytest.raises(NotImplementedError, match="`hierarchical_attention` and `lsh_attention` have no second deriv"):
        second_derivative(attend, is_linear=is_linear, how=how)


@pytest.mark.parametrize("attend", [short_hierarchical, short_lsh])
def test_a_graph_of_the_gradient_may_exist(attend):
    x = torch.randn(1, 1, 8, 4, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(squares(attend(x, x, x)), x)
    y = attend(x, x, x)
    assert_close(torch.autograd.grad(squares(y), x, create_graph=True), expected, tolerance=0)
    vectors = torch.randn(2, *y.shape, dtype=torch.float64)
    batched = torch.autograd.grad(y, x, vectors, is_grads_batched=True, retain_graph=True)[0]
    alone = torch.stack([torch.autograd.grad(y, x, vector, retain_graph=True)[0] for vector in vectors])
    assert_close(batched, alone, tolerance=1e-12)
    with pytest.raises(NotImplementedError, match="no second derivatives"):
        torch.autograd.grad(y, x, vectors, is_grads_batched=True, create_graph=True)


# PyTorch warns of what it vectorizes by a loop; its rules for forward mode use a deprecated function.
@pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:.*torch.jit.script")
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kind", ["hierarchical", "lsh"])
def test_transforms_of_functions(kind, is_causal):
    """They use ordinary autograd, which has second derivatives."""
    q, k, v = random_inputs(9, B=1, H=1)
    mask = torch.tensor([[True] * 4 + [False] + [True] * 4])

    def attend(q, k, v):
        if kind == "hierarchical":
            return hierarchical_attention(q, k, v, block_size=2, is_causal=is_causal, mask=mask)
        generator = torch.Generator().manual_seed(0)
        return lsh_attention(q, v, bucket_size=2, is_causal=is_causal, mask=mask, generator=generator)

    def loss(q):
        return squares(attend(q, k.detach(), v.detach()))

    q = q.detach()
    leaf = q.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    assert_close(torch.func.grad(loss)(q), expected, tolerance=1e-12)
    tangent = torch.randn_like(q)
    assert_close(torch.func.jvp(loss, (q,), (tangent,))[1], (expected * tangent).sum(), tolerance=1e-12)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, tangent)
        assert_close(torch.autograd.forward_ad.unpack_dual(loss(dual)).tangent, (expected * tangent).sum())
    both = torch.func.vmap(loss, randomness="same")(torch.stack((q, 2 * q)))
    assert_close(both, torch.stack((loss(q), loss(2 * q))), tolerance=1e-12)
    second = torch.func.jvp(torch.func.grad(loss), (q,), (tangent,))[1]
    step = 1e-6 * tangent
    assert_close(second, (torch.func.grad(loss)(q + step) - torch.func.grad(loss)(q - step)) / 2e-6, tolerance=1e-6)
