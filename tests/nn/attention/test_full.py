import pytest
import torch
from torch import nn

from revnet.functional import full_attention, hierarchical_attention
from revnet.nn.attention import CrossAttention, FullAttention, KeyValueCache
from tests.helpers import assert_close


def by_hand(q, k, v, is_causal, mask):
    """Compute attention query by query, over the keys that the query sees."""
    y = torch.empty_like(v)
    B, H, T, D = q.shape
    for b in range(B):
        for i in range(T):
            seen = [j for j in range(T) if (not is_causal or j <= i) and (mask is None or bool(mask[b, j]) or j == i)]
            for h in range(H):
                weights = (k[b, h, seen] @ q[b, h, i] / D**0.5).softmax(0)
                y[b, h, i] = weights @ v[b, h, seen]
    return y


def test_full_attention_equals_the_definition_with_every_mask():
    q, k, v = torch.randn(3, 2, 2, 7, 4, dtype=torch.float64)
    some = torch.rand(2, 7) > 0.4
    nothing = torch.zeros(2, 7, dtype=torch.bool)
    for is_causal in (False, True):
        for mask in (None, some, nothing):
            actual = full_attention(q, k, v, is_causal=is_causal, mask=mask)
            assert_close(actual, by_hand(q, k, v, is_causal, mask), tolerance=1e-12)


def test_full_attention_equals_multihead_attention():
    """Both modules have the same weights."""
    module, x = FullAttention(8, 2).double(), torch.randn(2, 5, 8, dtype=torch.float64)
    other = nn.MultiheadAttention(8, 2, bias=False, batch_first=True).double()
    with torch.no_grad():
        other.in_proj_weight.copy_(module.qkv.weight)
        other.out_proj.weight.copy_(module.project.weight)
    assert_close(module(x), other(x, x, x, need_weights=False)[0], tolerance=1e-12)
    assert repr(module).startswith("FullAttention(\n  num_heads=2, is_causal=False")


def test_rejects_types_that_do_not_fit():
    x = torch.ones(1, 2, 3, 4)
    with pytest.raises(TypeError, match=r"`k` has dtype torch.float64, but `q` has torch.float32; convert one of them"):
        full_attention(x, x.double(), x)
    with torch.autocast("cpu", torch.bfloat16):
        assert full_attention(x, x.bfloat16(), x).dtype == torch.bfloat16
        with pytest.raises(TypeError, match=r"`v` has dtype torch.float64, but `q` has torch.float32"):
            full_attention(x, x, x.double())
    for attend in (full_attention, hierarchical_attention):
        with pytest.raises(
            TypeError, match=r"`q` has dtype torch.complex64, but must be floating-point; pass `q.real`"
        ):
            attend(1j * x, 1j * x, 1j * x)


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        ([True], TypeError, r"`mask` \(=\[True\]\) must be a bool tensor"),
        (torch.tensor(True), ValueError, r"`mask` has shape \(\), but must have the shape of the tokens, \(1, 3\)"),
    ],
)
def test_a_mask_with_a_cache(mask, error, message):
    attention = FullAttention(8, 2, is_causal=True)
    with torch.no_grad(), pytest.raises(error, match=message):
        attention(torch.ones(1, 3, 8), mask=mask, cache=KeyValueCache(9))


@pytest.mark.parametrize("num_features", [1, 5])
def test_a_cache_keeps_the_features_of_values(num_features):
    cache = KeyValueCache(9)
    cache.update(torch.ones(1, 1, 2, 3), torch.ones(1, 1, 2, 4), 0)
    with pytest.raises(
        ValueError, match=rf"`value_states` .* 2, {num_features}\), but the cache is for \(1, 1, T, 4\)"
    ):
        cache.update(torch.ones(1, 1, 2, 3), torch.ones(1, 1, 2, num_features), 0)


def test_a_cache_is_for_one_context():
    attention, cache = CrossAttention(8, 2), KeyValueCache(9)
    with torch.no_grad():
        attention(torch.ones(1, 1, 8), torch.ones(1, 5, 8), cache=cache)
        with pytest.raises(ValueError, match=r"`context` has shape \(1, 4, 8\), but the cache is for another one, of"):
            attention(torch.ones(1, 1, 8), torch.ones(1, 4, 8), cache=cache)


@pytest.mark.parametrize(
    ("q", "k", "v", "options", "message"),
    [
        ((2, 4, 5, 8), (2, 4, 5, 8), (2, 4, 3, 8), {}, r"`v` has shape \(2, 4, 3, 8\), but must have the batch, heads"),
        (
            (2, 4, 5, 8),
            (2, 4, 5, 6),
            (2, 4, 5, 8),
            {},
            r"`k` has shape \(2, 4, 5, 6\), but must have the batch and fea",
        ),
        ((2, 4, 5, 8), (3, 4, 5, 8), (3, 4, 5, 8), {}, r"`k` has shape \(3, 4, 5, 8\), but must have the batch"),
        ((2, 4, 5, 8), (2, 3, 5, 8), (2, 3, 5, 8), {}, "`k` has 3 heads, which must divide the 4 heads of `q`"),
        ((2, 4, 5, 8), (2, 4, 3, 8), (2, 4, 3, 8), {"is_causal": True}, "`q` has 5 tokens, but `k` has only 3"),
        ((2, 4, 5, 8), (2, 4, 3, 8), (2, 4, 3, 8), {"mask": torch.ones(2, 3).bool()}, "`q` has 5 tokens, but"),
    ],
)
def test_rejects_shapes_that_do_not_fit(q, k, v, options, message):
    with pytest.raises(ValueError, match=message):
        full_attention(torch.ones(q), torch.ones(k), torch.ones(v), **options)
