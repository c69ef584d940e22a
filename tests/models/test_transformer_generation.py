"""Generation with a cache of keys and values equals generation without."""

import pytest
import torch

from revnet import FixedPoint
from revnet.models import ReversibleTransformer
from revnet.nn.attention import FullAttention, KeyValueCache

TINY = {"vocab_size": 50, "dim": 16, "depth": 3, "num_heads": 4, "max_length": 64}
OPTIONS = {
    "coupled": {},
    "exact": {"coupling": FixedPoint()},
    "midpoint": {"form": "midpoint"},
    "leapfrog": {"form": "leapfrog", "step_size": 0.5},
    "stored": {"form": "stored"},
    "llama": {"num_kv_heads": 2, "norm": "rms", "mlp": "swiglu", "bias": False, "tie_embeddings": True},
}
all_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


def make(**options):
    torch.manual_seed(0)
    model = ReversibleTransformer(**{**TINY, **options})
    for parameter in model.parameters():  # so that attention is far from uniform
        parameter.data *= 4
    return model.eval()


def random_tokens(B=3, T=10):
    return torch.randint(50, (B, T), generator=torch.Generator().manual_seed(1))


def left_padding(lengths, T=10):
    return torch.stack([torch.arange(T) >= T - length for length in lengths])


def largest_difference(a, b):
    return float((a - b).detach().abs().max())


@all_options
def test_cached_logits_equal_the_logits_of_the_whole_text(options):
    """The bound is the rounding that another size of the batch causes, times 100."""
    model, tokens = make(**options).double(), random_tokens(T=40)
    with torch.no_grad():
        expected = model(tokens)
        noise = largest_difference(model(tokens[:1]), expected[:1]) + 1e-15 * float(expected.abs().max())
        cache = KeyValueCache(40)
        parts = [model(part, cache=cache) for part in tokens.split([9, 1, 1, 20, 2, 7], dim=1)]
    # On the grid, a residual may round to a neighboring step.
    bound = 2**-11 * float(expected.abs().max()) if options.get("coupling") else 100 * noise
    assert largest_difference(torch.cat(parts, dim=1), expected) <= bound
    assert cache.get_seq_length() == 40


@all_options
def test_cached_tokens_equal_uncached_tokens(options):
    """The texts get longer than `max_length`, from where on the window moves."""
    model, tokens = make(**options), random_tokens()
    cached, plain = (model.generate(tokens, 60, temperature=0, use_cache=use) for use in (None, False))
    assert torch.equal(cached, plain)
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    first, second = (
        model.generate(tokens, 40, temperature=0.8, top_k=20, top_p=0.9, generator=generator, use_cache=use)
        for generator, use in zip(generators, (True, False), strict=True)
    )
    assert torch.equal(first, second)


@pytest.mark.slow
@all_options
def test_500_cached_tokens_equal_500_uncached_tokens(options):
    model = make(**options, max_length=512)
    cached, plain = (model.generate(random_tokens(B=1), 500, temperature=0, use_cache=use) for use in (True, False))
    assert torch.equal(cached, plain)


def test_a_new_token_reads_only_itself():
    model, lengths = make(), []
    model.embedding.register_forward_hook(lambda module, inputs, y: lengths.append(y.shape[1]))
    model.generate(random_tokens(), 20, use_cache=True)
    assert lengths == [10, *[1] * 19]
    lengths.clear()
    model.generate(random_tokens(), 3, use_cache=False)
    assert lengths == [10, 11, 12]


@pytest.mark.parametrize("use_cache", [None, pytest.param(False, marks=pytest.mark.slow)])
@all_options
def test_prompts_of_several_lengths(options, use_cache):
    model, tokens, lengths = make(**options), random_tokens(), (10, 4, 1)
    generated = model.generate(tokens, 60, mask=left_padding(lengths), temperature=0, use_cache=use_cache)
    for row, length in enumerate(lengths):
        alone = model.generate(tokens[row : row + 1, 10 - length :], 60, temperature=0)
        assert torch.equal(generated[row, 10:], alone[0, length:])


@pytest.mark.parametrize("attention", ["lsh", "hierarchical"])
def test_prompts_of_several_lengths_without_a_cache(attention):
    model = make(attention=attention, bucket_size=4, block_size=4).double()
    tokens, lengths = random_tokens(), (10, 3, 7)
    generated = model.generate(tokens, 12, mask=left_padding(lengths), temperature=0)
    for row, length in enumerate(lengths):
        alone = model.generate(tokens[row : row + 1, 10 - length :], 12, temperature=0)
        assert torch.equal(generated[row, 10:], alone[0, length:])


def test_padding_may_exceed_the_context():
    model, tokens = make(max_length=8), random_tokens(B=2, T=12)
    generated = model.generate(tokens, 5, mask=left_padding((12, 3), T=12), temperature=0)
    for row, length in enumerate((12, 3)):
        alone = model.generate(tokens[row : row + 1, 12 - length :], 5, temperature=0)
        assert torch.equal(generated[row, 12:], alone[0, length:])


@pytest.mark.parametrize("use_cache", [True, False])
def test_rows_end_at_a_stop_token(use_cache):
    model, tokens = make(), random_tokens()
    whole = model.generate(tokens, 30, temperature=0)[:, 10:]
    stops = [int(whole[0, 4]), int(whole[1, 7])]
    ended = model.generate(tokens, 30, temperature=0, stop_tokens=stops, use_cache=use_cache)[:, 10:]
    ends = []
    for row, new in zip(whole.tolist(), ended.tolist(), strict=True):
        end = next((place for place, token in enumerate(row) if token in stops), 29)
        ends.append(end)
        assert new[: end + 1] == row[: min(end + 1, len(new))]
        assert set(new[end:]) <= {new[end]}
    assert ended.shape[1] == max(ends) + 1
    one = model.generate(tokens[:1], 30, temperature=0, stop_tokens=int(whole[0, 0]))
    assert one.shape == (1, 11)


def test_modes_and_random_state_stay():
    model = make().train()
    state = torch.random.get_rng_state()
    model.generate(random_tokens(), 5, temperature=0)
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.generate(random_tokens(), 0).shape == (3, 10)
    assert model.generate(random_tokens(B=1, T=64), 1, use_cache=True).shape == (1, 65)


def test_cache_has_room_for_a_number_of_tokens():
    cache = KeyValueCache(4)
    keys = torch.randn(2, 1, 3, 4)
    first, second = cache.update(keys, 2 * keys, 5)
    assert torch.equal(first, keys)
    assert torch.equal(second, 2 * keys)
    with pytest.raises(ValueError, match=r"`length` \(=4\) of the cache is less than the 6 tokens of the sequence"):
        cache.update(keys, keys, 5)
    with pytest.raises(ValueError, match=r"`key_states` has shape \(1, 1, 1, 4\), but the cache is for \(2, 1, T, 4\)"):
        cache.update(keys[:1, :, :1], keys[:1, :, :1], 5)
    cache.update(keys, keys, 0)
    assert cache.get_seq_length() == 3


TOKENS = random_tokens()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"mask": left_padding((10, 4, 1)).flip(1)}, ValueError, "`mask` must be false only at the start of a row"),
        ({"mask": left_padding((10, 4, 0))}, ValueError, "`mask` must be false only at the start of a row"),
        ({"mask": left_padding((10, 4))}, ValueError, r"`mask` has shape \(2, 10\), but must have the shape"),
        ({"mask": torch.ones(3, 10)}, TypeError, r"`mask` \(=torch.float32\) must be a bool tensor"),
        (
            {"stop_tokens": 50},
            ValueError,
            r"`stop_tokens` \(=50\) must be from 0 to 49, the tokens of this model; take",
        ),
        ({"stop_tokens": [1, 50_256]}, ValueError, r"`stop_tokens` \(=\[1, 50256\]\) must be from 0 to 49"),
        ({"stop_tokens": "."}, TypeError, r"`stop_tokens` \(='\.'\) must be a token or a list of tokens"),
        ({"use_cache": 1}, TypeError, r"`use_cache` \(=1\) must be True or False"),
        (
            {"use_cache": True, "num_new": 56},
            ValueError,
            r"must be None for 65 positions, more than `max_length` \(=64",
        ),
        ({"tokens": TOKENS + 45}, ValueError, "`tokens` must be from 0 to 49, but range from .*; build the model"),
    ],
)
def test_rejects_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message) as caught:
        make().generate(**{"tokens": TOKENS, "num_new": 3, **arguments})
    assert "\n" not in str(caught.value)


def test_rejects_a_cache_where_there_is_none():
    tokens = random_tokens()
    with torch.no_grad():
        for attention in ("lsh", "hierarchical"):
            model = make(attention=attention)
            with pytest.raises(ValueError, match=rf"`attention` \(='{attention}'\) has no cache of keys and values"):
                model.generate(tokens, 3, use_cache=True)
            with pytest.raises(ValueError, match="has no cache of keys and values"):
                model(tokens, cache=KeyValueCache(10))
        with pytest.raises(ValueError, match="an encoder has no cache"):
            make(is_causal=False)(tokens, cache=KeyValueCache(10))
        with pytest.raises(ValueError, match="`cache` must be None in training mode"):
            make().train()(tokens, cache=KeyValueCache(10))
        with pytest.raises(TypeError, match=r"`cache` \(=\(\)\) must be a `KeyValueCache`, or None"):
            make()(tokens, cache=())
        model, cache = make(), KeyValueCache(100)
        for _ in range(6):
            model(tokens, cache=cache)
        with pytest.raises(ValueError, match=r"`tokens` make a sequence of 70 positions .* more than `max_length`"):
            model(tokens, cache=cache)
        with pytest.raises(ValueError, match="`cache` must be None if `is_causal` is False"):
            FullAttention(8, 2)(torch.randn(1, 3, 8), cache=KeyValueCache(3))
    with pytest.raises(ValueError, match="`cache` must be None while gradients are enabled"):
        make()(tokens, cache=KeyValueCache(10))
