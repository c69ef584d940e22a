"""Options of the layers of a transformer, against references written here."""

import pytest
import torch
import torch.nn.functional as F

from revnet import Store
from revnet.functional import rotary_table, rotate
from revnet.models import ReversibleTransformer
from revnet.nn.attention import FullAttention, HierarchicalAttention
from tests.helpers import assert_close, gradients

TINY = {"vocab_size": 11, "dim": 16, "depth": 3, "num_heads": 4, "max_length": 64}


def make(**options):
    torch.manual_seed(0)
    return ReversibleTransformer(**{**TINY, **options})


def random_tokens(B=2, T=23):
    return torch.randint(11, (B, T), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("has_mask", [False, True])
@pytest.mark.parametrize("num_kv_heads", [1, 2])
@pytest.mark.parametrize("kind", [FullAttention, HierarchicalAttention])
def test_grouped_queries_equal_repeated_keys_and_values(kind, num_kv_heads, has_mask, is_causal):
    grouped = kind(16, 4, is_causal=is_causal, num_kv_heads=num_kv_heads).double()
    plain = kind(16, 4, is_causal=is_causal).double()
    q, kv = grouped.qkv.weight.data.split([16, 2 * num_kv_heads * 4])
    k, v = (
        each.view(num_kv_heads, 4, 16).repeat_interleave(4 // num_kv_heads, 0).flatten(0, 1) for each in kv.chunk(2)
    )
    plain.qkv.weight.data = torch.cat((q, k, v))
    plain.project.weight.data = grouped.project.weight.data
    x, rotary = torch.randn(2, 9, 16, dtype=torch.float64), rotary_table(9, 4, dtype=torch.float64)
    mask = torch.rand(2, 9) > 0.3 if has_mask else None
    assert_close(grouped(x, mask=mask, rotary=rotary), plain(x, mask=mask, rotary=rotary), tolerance=1e-13)
    assert grouped.qkv.out_features == 16 + 2 * num_kv_heads * 4
    assert f"num_kv_heads={num_kv_heads}" in repr(grouped)


def test_default_number_of_heads_changes_nothing():
    tokens = random_tokens()
    assert torch.equal(make(num_kv_heads=4)(tokens), make()(tokens))


def test_one_layer_of_a_llama_equals_a_reference():
    """RMSNorm, rotary positions with another base, grouped queries, SwiGLU, no biases and a tied head."""
    model = make(
        form="stored",
        depth=1,
        num_kv_heads=2,
        norm="rms",
        norm_eps=1e-6,
        mlp="swiglu",
        ff_mult=2.5,
        bias=False,
        tie_embeddings=True,
        rope_theta=500.0,
    ).double()
    torch.nn.init.normal_(model.norm.weight)
    tokens = random_tokens(T=9)
    layer = model.blocks[0]

    def rms(x, norm):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight

    def rotated(x):
        angles = torch.arange(9)[:, None] * 500.0 ** -(torch.arange(0, 4, 2, dtype=torch.float64) / 4)
        cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
        return x * cos + torch.cat((-x[..., 2:], x[..., :2]), dim=-1) * sin

    x = model.embedding(tokens)
    q, k, v = (rms(x, layer.f.norm) @ layer.f.attention.qkv.weight.mT).split([16, 8, 8], dim=-1)
    q = rotated(q.view(2, 9, 4, 4).transpose(1, 2))
    k, v = (each.view(2, 9, 2, 4).transpose(1, 2).repeat_interleave(2, dim=1) for each in (k, v))
    scores = (q @ rotated(k).mT / 2).masked_fill(torch.ones(9, 9).triu(1).bool(), float("-inf"))
    y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    x = x + y @ layer.f.attention.project.weight.mT
    mlp = layer.g.layers[1]
    y = rms(x, layer.g.layers[0])
    x = x + (F.silu(y @ mlp.gate_proj.weight.mT) * (y @ mlp.up_proj.weight.mT)) @ mlp.down_proj.weight.mT
    expected = rms(x, model.norm) @ model.embedding.weight.mT
    assert mlp.gate_proj.out_features == 40
    assert_close(model(tokens), expected, tolerance=1e-13)
    assert not [name for name, _ in model.named_parameters() if "bias" in name]


@pytest.mark.parametrize("form", ["coupled", "midpoint", "stored"])
def test_tied_head_is_the_embedding(form):
    model, tokens = make(form=form, tie_embeddings=True).double(), random_tokens()
    assert model.head.weight is model.embedding.weight
    copies = model.num_features // 16
    features = model.forward_features(tokens)
    expected = F.linear(features, model.embedding.weight.repeat(1, copies), model.head.bias)
    assert_close(model(tokens), expected, tolerance=1e-13)
    twin = make(form=form, tie_embeddings=True, policy=Store()).double()
    for each in (model, twin):
        each(tokens, targets=tokens).backward()
    assert_close(gradients(model), gradients(twin), tolerance=1e-11)


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_last_layers_of_residuals_start_small(mlp):
    model = make(dim=64, mlp=mlp, num_kv_heads=2)
    small = 0.02 / 6**0.5
    for block in model.blocks:
        for layer in (block.f.attention.project, block.g.last_layer):
            assert float(layer.weight.detach().std()) == pytest.approx(small, rel=0.1)
        assert float(block.f.attention.qkv.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
        assert block.g.hidden_dim == 256


def test_rotary_table_starts_anywhere():
    whole = rotary_table(20, 8, base=500.0)
    assert torch.equal(rotary_table(5, 8, start=15, base=500.0), whole[:, 15:])
    x = torch.randn(2, 3, 20, 8)
    by_row = whole[:, None, None].expand(2, 2, 1, 20, 4)
    assert torch.equal(rotate(x, by_row), rotate(x, whole))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_kv_heads": 3}, ValueError, r"`num_kv_heads` \(=3\) must divide `num_heads` \(=4\).*pass 2, or None"),
        ({"num_kv_heads": 8}, ValueError, r"`num_kv_heads` \(=8\) must divide `num_heads` \(=4\).*pass 4, or None"),
        ({"num_kv_heads": 0}, ValueError, r"`num_kv_heads` \(=0\) must be a positive integer"),
        ({"num_kv_heads": 2, "attention": "lsh"}, ValueError, r"`num_kv_heads` \(=2\) must be None for LSH attention"),
        ({"norm": "batch"}, ValueError, r"`norm` \(='batch'\) must be 'layer' or 'rms'"),
        ({"norm_eps": 0}, ValueError, r"`norm_eps` \(=0\) must be a positive number"),
        ({"mlp": "relu"}, ValueError, r"`mlp` \(='relu'\) must be 'gelu' or 'swiglu'"),
        ({"rope_theta": -1}, ValueError, r"`rope_theta` \(=-1\) must be a positive number"),
        ({"bias": None}, TypeError, r"`bias` \(=None\) must be True or False"),
        ({"tie_embeddings": 1}, TypeError, r"`tie_embeddings` \(=1\) must be True or False"),
    ],
)
def test_rejects_wrong_options(options, error, message):
    with pytest.raises(error, match=message) as caught:
        make(**options)
    assert "\n" not in str(caught.value)
