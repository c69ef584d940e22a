"""The reversible encoder and decoder."""

import pytest
import torch

from revnet import Checkpoint, FixedPoint, Store, set_policy
from revnet.memory import measure, predict
from revnet.models import ReversibleEncoderDecoder
from revnet.models.pretrained.mixin import from_pretrained
from revnet.nn.attention import CrossAttention, KeyValueCache
from tests.helpers import assert_close, gradients

TINY = {"vocab_size": 30, "dim": 16, "encoder_depth": 2, "decoder_depth": 3, "num_heads": 2, "max_length": 32}
OPTIONS = {
    "coupled": {},
    "midpoint": {"form": "midpoint"},
    "leapfrog": {"form": "leapfrog"},
    "stored": {"form": "stored"},
    "llama": {"norm": "rms", "mlp": "swiglu", "bias": False, "num_kv_heads": 1, "tie_embeddings": True},
}
all_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


def make(**options):
    torch.manual_seed(0)
    return ReversibleEncoderDecoder(**{**TINY, **options})


def random_tokens(B, T, seed=1):
    return torch.randint(30, (B, T), generator=torch.Generator().manual_seed(seed))


def batch():
    """Return sources, their mask, and targets."""
    return random_tokens(3, 14), torch.arange(14) < torch.tensor([[14], [5], [9]]), random_tokens(3, 10, seed=2)


def step(model):
    source, mask, tokens = batch()
    model.zero_grad()
    torch.manual_seed(3)
    loss = model(source, tokens[:, :-1], mask, targets=tokens[:, 1:])
    loss.backward()
    return loss.detach()


@all_options
def test_gradients_equal_the_stored_twin(options):
    model, twin = make(**options).double(), make(**options, policy=Store()).double()
    assert torch.equal(step(model), step(twin))
    assert_close(gradients(model), gradients(twin), tolerance=1e-11)
    assert all(parameter.grad is not None for parameter in model.parameters())
    set_policy(model, Checkpoint())
    step(model)
    assert_close(gradients(model), gradients(twin), tolerance=1e-13)


@pytest.mark.parametrize("form", ["coupled", "midpoint", "leapfrog"])
def test_exact_reversal_equals_the_stored_twin_bit_for_bit(form):
    options = {"form": form, "coupling": FixedPoint(), "dropout": 0.2}
    model, twin = make(**options), make(**options, policy=Store())
    for each in (model, twin):
        step(each)
    for (name, gradient), expected in zip(gradients(model).items(), gradients(twin).values(), strict=True):
        assert torch.equal(gradient, expected), name


def test_gradient_of_the_encoder_output():
    """The context gets a gradient from every layer of the decoder. The reference is a plain loop."""
    model = make().double()
    _, _, tokens = batch()
    contexts = [torch.randn(3, 7, 32, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    contexts[1].data = contexts[0].data.clone()
    first = model.decode(tokens, contexts[0])
    x1 = x2 = model.embedding(tokens)
    for block in model.decoder:
        x1 = x1 + block.f(x2, context=contexts[1], rotary=model._rotary(10))
        x2 = x2 + block.g(x1)
    second = model.norm(torch.cat((x1, x2), dim=-1))
    assert_close(first, second, tolerance=1e-13)
    weights = torch.randn_like(first)
    for output in (first, second):
        (output * weights).sum().backward()
    assert_close(contexts[0].grad, contexts[1].grad, tolerance=1e-11)


@pytest.mark.parametrize(
    "form", ["coupled", *[pytest.param(form, marks=pytest.mark.slow) for form in ("midpoint", "leapfrog")]]
)
def test_memory_is_flat_in_both_depths_and_predicted(form):
    source, mask, tokens = batch()
    steps = []
    for encoder_depth, decoder_depth in ((2, 2), (2, 9), (9, 2)):
        model = make(form=form, encoder_depth=encoder_depth, decoder_depth=decoder_depth)
        kwargs = {"tokens": tokens, "source_mask": mask, "targets": tokens}
        measured, predicted = (way(model, source, kwargs=kwargs) for way in (measure, predict))
        assert predicted.peak_bytes == measured.peak_bytes
        steps.append(measured.activation_bytes)
    assert len(set(steps)) == 1


def test_masked_source_tokens_have_no_effect():
    model = make().double().eval()
    source, mask, tokens = batch()
    other = torch.where(mask, source, 7)
    assert_close(model(other, tokens, mask), model(source, tokens, mask), tolerance=1e-13)
    alone = model(source[1:2, :5], tokens[1:2])
    assert_close(model(source, tokens, mask)[1:2], alone, tolerance=1e-12)
    empty = model(source, tokens, torch.zeros_like(mask))
    assert empty.isfinite().all()


def test_targets_do_not_see_later_tokens():
    model = make().double().eval()
    source, mask, tokens = batch()
    before = model(source, tokens, mask)
    changed = tokens.clone()
    changed[:, 6] = (changed[:, 6] + 1) % 30
    after = model(source, changed, mask)
    assert torch.equal(after[:, :6], before[:, :6])
    assert not torch.equal(after[:, 6:], before[:, 6:])


@all_options
def test_cached_targets_equal_uncached_targets(options):
    model = make(**options)
    for parameter in model.parameters():
        parameter.data *= 4
    source, mask, _ = batch()
    cached, plain = (
        model.generate(source, 32, start=2, source_mask=mask, temperature=0, use_cache=use) for use in (True, False)
    )
    assert torch.equal(cached, plain)
    assert cached.shape == (3, 33)
    stop = int(cached[0, 5])
    ended = model.generate(source[:1], 32, start=2, source_mask=mask[:1], temperature=0, stop_tokens=stop)
    assert torch.equal(ended[0], cached[0, : cached[0].tolist().index(stop, 1) + 1])


@pytest.mark.slow
def test_learns_what_only_the_source_holds():
    """The target repeats the source, which is one token six times."""
    model = make(dim=32, num_heads=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(100):
        source = torch.randint(30, (32, 1)).repeat(1, 6)
        tokens = torch.cat((torch.ones_like(source[:, :1]), source[:, :-1]), dim=1)
        optimizer.zero_grad()
        loss = model(source, tokens, targets=source)
        loss.backward()
        optimizer.step()
    assert loss < 0.1  # without the source at least log(30) / 6, 0.57, for the first token
    source = torch.tensor([[5], [23]]).repeat(1, 6)
    assert torch.equal(model.generate(source, 6, start=1, temperature=0)[:, 1:], source)


def test_files_keep_the_model(tmp_path):
    model = make(form="midpoint", tie_embeddings=True).eval()
    model.save_pretrained(tmp_path)
    source, mask, tokens = batch()
    assert torch.equal(from_pretrained(tmp_path)(source, tokens, mask), model(source, tokens, mask))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_in_one_graph():
    model = make()
    expected = step(model)
    first = gradients(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(step(compiled), expected)
    assert_close(gradients(model), first, tolerance=1e-5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, s, t: m(s.float(), t), TypeError, r"`source` \(=torch.float32\) must be a tensor of integers"),
        (lambda m, s, t: m(s + 20, t), ValueError, "`source` must be from 0 to 29, but range from"),
        (lambda m, s, t: m(s, t + 20), ValueError, "`tokens` must be from 0 to 29, but range from"),
        (lambda m, s, t: m(s[:2], t), ValueError, r"`context` has shape \(2, 14, 32\), but must have \(3, S, 32\)"),
        (lambda m, s, t: m(s.repeat(1, 3), t), ValueError, "`source` has 42 positions, more than `max_length`"),
        (lambda m, s, t: m(s, t, s), TypeError, r"`source_mask` \(=torch.int64\) must be a bool tensor"),
        (lambda m, s, t: m(s, t, s[:, 1:] > 0), ValueError, r"`source_mask` has shape \(3, 13\)"),
        (lambda m, s, t: m.generate(s, 33, start=1), ValueError, r"`num_new` \(=33\) must be at most 32"),
        (lambda m, s, t: m.generate(s, 3, start=30), ValueError, r"`start` \(=30\) must be at most 29"),
        (lambda m, s, t: m.generate(s, 3, start=1, stop_tokens=31), ValueError, r"`stop_tokens` \(=31\) must be from"),
        (
            lambda m, s, t: m.decode(t, m.encode(s), cache=KeyValueCache(9)),
            ValueError,
            "`cache` must be None while gradients are enabled",
        ),
    ],
)
def test_rejects_wrong_inputs(call, error, message):
    source, _, tokens = batch()
    with pytest.raises(error, match=message) as caught:
        call(make(), source, tokens)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder_depth": 0}, r"`encoder_depth` \(=0\) must be a positive integer"),
        ({"decoder_depth": 1.5}, r"`decoder_depth` \(=1.5\) must be a positive integer"),
        ({"form": "stored", "step_size": 1}, r"`step_size` \(=1\) must be None for the stored form"),
        ({"num_kv_heads": 3}, r"`num_kv_heads` \(=3\) must divide `num_heads`"),
    ],
)
def test_rejects_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_cross_attention_equals_a_reference():
    attention = CrossAttention(8, 4, context_dim=6, num_kv_heads=2).double()
    x, context = torch.randn(2, 3, 8, dtype=torch.float64), torch.randn(2, 5, 6, dtype=torch.float64)
    mask = torch.tensor([[True] * 5, [True, False, True, False, False]])
    q = attention.q(x).view(2, 3, 4, 2).transpose(1, 2)
    k, v = (
        each.view(2, 5, 2, 2).transpose(1, 2).repeat_interleave(2, 1) for each in attention.kv(context).chunk(2, -1)
    )
    scores = (q @ k.mT / 2**0.5).masked_fill(~mask[:, None, None], float("-inf"))
    expected = attention.project((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    assert_close(attention(x, context, mask=mask), expected, tolerance=1e-13)
    assert "num_kv_heads=2" in repr(attention)
    with pytest.raises(ValueError, match=r"`context` has shape \(2, 5, 8\), but must have \(2, S, 6\)"):
        attention(x, torch.randn(2, 5, 8))
    with pytest.raises(ValueError, match=r"`x` has shape \(2, 3, 7\), but must have \(B, T, 8\)"):
        attention(x[..., :7], context)
