"""Comparison with the definition: for each query, the softmax over all keys of any round, counted once."""

import math

import pytest
import torch

from revnet.functional import lsh_attention
from tests.helpers import assert_close, squares


def buckets_by_hand(qk, num_bits, num_hashes):
    """Return the direction of each random basis that a vector is nearest to, with the function's random numbers."""
    B, H, T, D = qk.shape
    buckets = torch.zeros(num_hashes, B, H, T, dtype=torch.long)
    for bits in {0: [], 7: [4, 3], 13: [5, 4, 4]}.get(num_bits, [num_bits]):
        rotations = torch.randn(num_hashes, 1, H, D, 2 ** (bits - 1)).to(qk)
        for r in range(num_hashes):
            for b in range(B):
                for h in range(H):
                    for t in range(T):
                        projected = rotations[r, 0, h].T @ qk[b, h, t]
                        best = max(range(2**bits), key=lambda i: [*projected, *-projected][i].item())
                        buckets[r, b, h, t] = buckets[r, b, h, t] * 2**bits + best
    return buckets


def seen_by_hand(buckets, bucket_size, is_causal, mask):
    """Return the tokens that a round finds for each token of one sequence and head."""
    T, chunk_size = len(buckets), min(2 * bucket_size, len(buckets))
    real = [True] * T if mask is None else mask.tolist()
    order = sorted(range(T), key=lambda t: (not real[t], real[t] * buckets[t].item(), t))
    seen = []
    for i in range(T):
        bucket = (
            [j for j in order if buckets[j] == buckets[i] and real[j]] if real[i] else [j for j in order if not real[j]]
        )
        if is_causal:
            seen.append([j for j in bucket if j <= i][-chunk_size - 1 :])
        else:
            chunk = order.index(i) // chunk_size
            seen.append([j for j in bucket if chunk - order.index(j) // chunk_size in (0, 1)])
    return seen


def by_hand(qk, v, *, bucket_size, num_hashes, is_causal, mask=None):
    B, H, T, D = qk.shape
    num_bits = max(0, round(math.log2(T / bucket_size)))
    buckets = buckets_by_hand(qk, num_bits, num_hashes)
    keys = qk / (qk.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    y = torch.zeros_like(v)
    for b in range(B):
        for h in range(H):
            rounds = [
                seen_by_hand(round_buckets[b, h], bucket_size, is_causal, None if mask is None else mask[b])
                for round_buckets in buckets
            ]
            for i in range(T):
                seen = sorted(set().union(*[tokens[i] for tokens in rounds]) - {i}) or [i]
                weights = (keys[b, h, seen] @ qk[b, h, i] / D**0.5).softmax(0)
                y[b, h, i] = weights @ v[b, h, seen]
    return y


def random_inputs(T, B=2, H=2, D=4):
    return torch.randn(2, B, H, T, D, dtype=torch.float64)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("has_mask", [False, True])
@pytest.mark.parametrize(
    ("T", "bucket_size", "num_hashes"),
    [(1, 4, 2), (5, 4, 3), (6, 4, 1), (16, 4, 1), (16, 4, 3), (37, 3, 4), (64, 2, 2), (50, 50, 2)],
)
def test_equals_the_definition(T, bucket_size, num_hashes, is_causal, has_mask):
    qk, v = random_inputs(T)
    options = {"bucket_size": bucket_size, "num_hashes": num_hashes, "is_causal": is_causal}
    options["mask"] = torch.rand(2, T) > 0.3 if has_mask else None
    torch.manual_seed(1)
    actual = lsh_attention(qk, v, **options)
    torch.manual_seed(1)
    assert_close(actual, by_hand(qk, v, **options), tolerance=1e-10)  # scores of -1e5 leave eleven digits


@pytest.mark.parametrize("is_causal", [False, True])
def test_many_buckets_use_several_hashes(is_causal):
    qk, v = random_inputs(128, B=1, H=1)
    options = {"bucket_size": 1, "num_hashes": 2, "is_causal": is_causal}
    torch.manual_seed(1)
    actual = lsh_attention(qk, v, **options)
    torch.manual_seed(1)
    assert_close(actual, by_hand(qk, v, **options), tolerance=1e-10)


@pytest.mark.parametrize("T", [1, 2, 11, 22])
@pytest.mark.parametrize("is_causal", [False, True])
def test_one_bucket_equals_full_attention(T, is_causal):
    """They are equal for any number of rounds, and no random number is drawn."""
    qk, v = random_inputs(T)
    state = torch.get_rng_state()
    actual = lsh_attention(qk, v, bucket_size=16, num_hashes=5, is_causal=is_causal)
    assert torch.equal(torch.get_rng_state(), state)
    keys = qk / (qk.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    scores = qk @ keys.mT / 2
    if is_causal:
        scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
    scores = scores.masked_fill(torch.eye(T).bool(), -1e5)
    assert_close(actual, scores.softmax(-1) @ v, tolerance=1e-10)


def test_no_tokens():
    qk, v = (tensor[:, :, :0].requires_grad_() for tensor in random_inputs(4))
    y = lsh_attention(qk, v)
    assert y.shape == v.shape
    gradients = torch.autograd.grad(y.sum(), (qk, v))
    assert [gradient.shape for gradient in gradients] == [qk.shape, v.shape]


def test_more_rounds_miss_less():
    """The weight that full attention gives to missed keys decreases."""
    qk, _ = random_inputs(256, B=1, H=1, D=8)
    one_hot = torch.eye(256, dtype=torch.float64).expand(1, 1, 256, 256)  # so that the outputs are the weights
    full = lsh_attention(qk, one_hot, bucket_size=256)
    missed = []
    for num_hashes in (1, 2, 4, 8, 16):
        is_seen = lsh_attention(qk, one_hot, bucket_size=16, num_hashes=num_hashes) > 0
        missed.append((full * ~is_seen).sum(-1).mean().item())
    assert missed == sorted(missed, reverse=True)
    assert missed[0] > 2 * missed[-1]


@pytest.mark.parametrize("is_causal", [False, True])
def test_gradients(is_causal):
    """Compare with finite differences for fixed random numbers. No vector lies between two buckets."""
    qk, v = (tensor.requires_grad_() for tensor in random_inputs(10, B=1, H=1, D=2))

    def function(qk, v):
        torch.manual_seed(1)
        return lsh_attention(qk, v, bucket_size=2, num_hashes=2, is_causal=is_causal)

    # Steps of 1e-6 on outputs that carry eleven digits.
    assert torch.autograd.gradcheck(function, (qk, v), atol=1e-4)


def test_low_precision_computes_scores_in_float32():
    qk, v = random_inputs(64)
    torch.manual_seed(1)
    low = lsh_attention(qk.bfloat16(), v.bfloat16(), bucket_size=64)
    assert low.dtype == torch.bfloat16
    # Inputs, scores, weights and values are rounded by 2^-9 each, scores of up to about ten before their exponential.
    assert (low - lsh_attention(qk, v, bucket_size=64)).abs().max() <= 0.1 * v.abs().max()


def test_zero_vectors():
    qk, v = random_inputs(40)
    qk = torch.zeros_like(qk).requires_grad_()
    squares(lsh_attention(qk, v, bucket_size=4)).backward()
    assert qk.grad.isfinite().all()
