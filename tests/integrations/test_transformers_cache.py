"""The cache of keys and values in transformers, and the forms of the language model there."""

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from transformers import AutoModelForCausalLM, DynamicCache  # noqa: E402

from revnet import FixedPoint  # noqa: E402
from revnet.coupling import Scaled  # noqa: E402
from revnet.models import ReversibleTransformer  # noqa: E402
from revnet.training import load_language_model  # noqa: E402
from revnet.transformers import ReversibleTransformerConfig, ReversibleTransformerForCausalLM  # noqa: E402
from revnet.transformers._reads_caches import CACHE  # noqa: E402

# Notes of transformers about itself.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
OPTIONS = {
    "coupled": {},
    "midpoint": {"form": "midpoint", "step_size": 0.25},
    "leapfrog": {"form": "leapfrog"},
    "stored": {"form": "stored"},
    "exact": {"form": "midpoint", "coupling": "fixed_point"},
    "llama": {
        "num_key_value_heads": 1,
        "norm": "rms",
        "rms_norm_eps": 1e-6,
        "mlp": "swiglu",
        "bias": False,
        "tie_word_embeddings": True,
    },
}
all_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


@pytest.fixture(autouse=True)
def quiet():
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def make_model(**options):
    torch.manual_seed(0)
    config = ReversibleTransformerConfig(
        **{"vocab_size": 50, "dim": 16, "depth": 3, "num_heads": 2, "max_position_embeddings": 64, **options}
    )
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # so that attention is far from uniform
        parameter.data *= 4
    return model.eval()


def make_tokens(rows=3, length=12):
    return torch.randint(50, (rows, length), generator=torch.Generator().manual_seed(1))


def generate(model, tokens, **options):
    return model.generate(tokens, **{"max_new_tokens": 30, "do_sample": False, **options})


def count_positions(model):
    """Return a list to which each call of the embedding appends its number of positions."""
    counts = []
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, y: counts.append(y.shape[1]))
    return counts


@all_options
def test_tokens_with_the_cache_equal_the_ones_without(options):
    model, tokens = make_model(**options), make_tokens()
    expected = generate(model, tokens, use_cache=False)
    assert torch.equal(expected, model.transformer.generate(tokens, 30, temperature=0))
    counts = count_positions(model)
    assert torch.equal(generate(model, tokens), expected)
    assert counts == [12, *[1] * 29]


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding_on_any_side(side):
    model, tokens = make_model(), make_tokens()
    starts = {"left": (0, 7, 11), "right": (0, 0, 0), "both": (0, 3, 11)}[side]
    stops = {"left": (12, 12, 12), "right": (12, 5, 1), "both": (12, 8, 12)}[side]
    places = torch.arange(12)
    mask = torch.stack([(places >= start) & (places < stop) for start, stop in zip(starts, stops, strict=True)]).long()
    for use_cache in (True, False):
        if side != "left":
            with pytest.raises(
                ValueError, match=r"`attention_mask` must be 1 at the end of each row.* pad the prompts"
            ):
                generate(model, tokens, attention_mask=mask, use_cache=use_cache)
            continue
        generated = generate(model, tokens, attention_mask=mask, use_cache=use_cache)
        for row, start in enumerate(starts):
            alone = generate(model, tokens[row : row + 1, start:])
            assert torch.equal(generated[row, 12:], alone[0, 12 - start :])
    model = model.double()
    bound = 1e-12 * float(model(tokens).logits.detach().abs().max())
    with torch.no_grad():
        expected = model(tokens, attention_mask=mask).logits[mask.bool()]
        actual = model(tokens, attention_mask=mask, use_cache=True).logits[mask.bool()]
    assert float((actual - expected).abs().max()) <= bound


def test_other_ways_to_generate():
    model, tokens = make_model(), make_tokens()
    for options in (
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"prefill_chunk_size": 5},
        {"repetition_penalty": 1.3},
    ):
        cached = generate(model, tokens, **options)
        plain = generate(model, tokens, use_cache=False, **{**options, "prefill_chunk_size": None})
        assert torch.equal(cached, plain), options
    embeds = model.get_input_embeddings()(tokens)
    assert torch.equal(generate(model, None, inputs_embeds=embeds), generate(model, tokens)[:, 12:])
    eos = int(generate(model, tokens[:1])[0, 16])
    assert generate(model, tokens[:1], eos_token_id=eos, pad_token_id=eos)[0, -1] == eos


def test_a_cache_continues():
    model, tokens = make_model().double(), make_tokens()
    with torch.no_grad():
        output = model(tokens[:, :7], use_cache=True)
        cache = output[CACHE]
        assert isinstance(cache, DynamicCache)
        rest = model(tokens[:, 7:], **{CACHE: cache}).logits
        expected = model(tokens).logits
    assert cache.get_seq_length() == 12
    torch.testing.assert_close(torch.cat((output.logits, rest), dim=1), expected, rtol=1e-12, atol=1e-12)
    whole = torch.cat((tokens, tokens[:, :3]), dim=1)
    assert torch.equal(generate(model, whole, **{CACHE: cache}), generate(model, whole))


@pytest.mark.parametrize("attention", ["lsh", "hierarchical"])
def test_other_attentions_have_no_cache(attention):
    model, tokens = make_model(attention=attention, block_size=4, bucket_size=8), make_tokens()
    counts = count_positions(model)
    generate(model, tokens, max_new_tokens=3, use_cache=True)
    assert counts == [12, 13, 14]
    with torch.no_grad():
        assert CACHE not in model(tokens, use_cache=True)
        with pytest.raises(ValueError, match=f"`attention` .='{attention}'. has no cache of keys and values"):
            model(tokens, **{CACHE: DynamicCache()})


@all_options
def test_files_and_wrapping_keep_the_form(tmp_path, options):
    model, tokens = make_model(**options), make_tokens()
    wrapped = ReversibleTransformerForCausalLM.from_transformer(model.transformer)
    for name in ("form", "step_size", "num_kv_heads", "norm", "norm_eps", "mlp", "bias", "tie_word_embeddings"):
        assert getattr(wrapped.config, name) == getattr(model.config, name), name
    wrapped.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    if "coupling" in options:
        assert loaded.transformer.blocks[0].coupling == FixedPoint()
    characters = "".join(map(chr, range(50, 100)))
    loaded.config.characters = characters
    loaded.save_weights(tmp_path / "weights.safetensors")
    back = load_language_model(tmp_path / "weights.safetensors")
    assert torch.equal(back(tokens), model(tokens).logits)
    assert back.model.form == model.transformer.form


def test_training_ignores_use_cache():
    model, tokens = make_model().train(), make_tokens()
    output = model(tokens, labels=tokens, use_cache=True)
    output.loss.backward()
    assert CACHE not in output


def test_refuses_what_a_cache_cannot_do():
    model, tokens = make_model(), make_tokens()
    with pytest.raises(ValueError, match="must be left out in training mode"):
        make_model().train()(tokens, **{CACHE: DynamicCache()})
    with pytest.raises(ValueError, match="`cache` must be None while gradients are enabled"):
        model(tokens, **{CACHE: DynamicCache()})
    with pytest.raises(TypeError, match="must be a `DynamicCache` of transformers; other caches are not supported"):
        generate(model, tokens, cache_implementation="static")
    with pytest.raises(ValueError, match=r"has 65 positions, more than `max_position_embeddings` \(=64\)"):
        generate(model, tokens, max_new_tokens=60)
    with torch.no_grad(), pytest.raises(NotImplementedError, match="packed into one row"):
        model(tokens, position_ids=torch.arange(12)[None] % 6, use_cache=True)
    with torch.no_grad():
        cache = model(tokens, use_cache=True)[CACHE]
    with torch.no_grad(), pytest.raises(NotImplementedError, match="must go on where the tokens in"):
        model(tokens[:, :2], position_ids=torch.tensor([[20, 21]]), **{CACHE: cache})
    with torch.no_grad(), pytest.raises(ValueError, match=r"`attention_mask` has shape \(3, 5\)"):
        model(tokens[:, :5], attention_mask=torch.ones(3, 5), **{CACHE: cache})


def test_refuses_to_wrap_changed_parts():
    base = {"vocab_size": 9, "dim": 8, "depth": 1, "num_heads": 2}
    changed = ReversibleTransformer(**base)
    changed.blocks[0].g.layers[2] = torch.nn.ReLU()
    with pytest.raises(ValueError, match=r"has a ReLU as `blocks.blocks.0.g.layers.2`, which a config cannot"):
        ReversibleTransformerForCausalLM.from_transformer(changed)
    wide = ReversibleTransformer(**base, form="midpoint", coupling=Scaled.momentum(0.9))
    with pytest.raises(ValueError, match="has the coupling Scaled"):
        ReversibleTransformerForCausalLM.from_transformer(wide)
