import pytest
import torch
import torch.nn.functional as F

from revnet import Additive, Reverse, Store
from revnet.memory import measure, predict
from revnet.models import ReversibleTransformer
from revnet.models._sampling import draw_tokens
from revnet.models.reversible_transformer import (
    h_transformer_base,
    h_transformer_large,
    h_transformer_small,
    reformer_enwik8,
)
from tests.helpers import assert_close, gradients

TINY = {"vocab_size": 11, "dim": 8, "depth": 3, "num_heads": 2, "max_length": 64}


def make(**options):
    return ReversibleTransformer(**{**TINY, **options})


def random_tokens(B, T, vocab_size=11):
    return torch.randint(vocab_size, (B, T))


def step(model, tokens, mask=None):
    torch.manual_seed(1)
    logits = model(tokens, mask)
    F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
    return logits.detach()


OPTIONS = {
    "full": {},
    "full-encoder": {"is_causal": False},
    "full-dropout-chunks": {"dropout": 0.2, "ff_chunks": 3},
    "lsh": {"attention": "lsh", "bucket_size": 4, "num_hashes": 2},
    "lsh-encoder-dropout": {"attention": "lsh", "bucket_size": 3, "is_causal": False, "dropout": 0.2},
    "hierarchical": {"attention": "hierarchical", "block_size": 4},
    "hierarchical-encoder": {"attention": "hierarchical", "block_size": 2, "is_causal": False},
}
all_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
COMPILED = ("lsh-encoder-dropout", "full-dropout-chunks")
compiled_options = pytest.mark.parametrize(
    "options",
    [
        # The others have all that these have, and more.
        pytest.param(options, id=name, marks=[] if name in COMPILED else [pytest.mark.slow])
        for name, options in OPTIONS.items()
    ],
)
causal_options = pytest.mark.parametrize(
    "options",
    [options for options in OPTIONS.values() if options.get("is_causal", True)],
    ids=[name for name, options in OPTIONS.items() if options.get("is_causal", True)],
)


@causal_options
def test_a_prefix_has_the_same_logits_in_a_longer_text(options):
    """Exact arithmetic would give equal logits; in float64, matrix products of other sizes round differently."""
    model = make(**options, coupling=Additive()).double().eval()
    for parameter in model.parameters():
        parameter.data *= 5  # so that attention is far from uniform
    tokens = random_tokens(2, 64)
    expected = model(tokens)
    for length in (1, 2, 7, 8, 9, 31, 40, 63):
        logits = model(tokens[:, :length])
        assert_close(logits, expected[:, :length], tolerance=1e-10)
        mask = (torch.arange(64) < length).expand(2, 64)
        assert_close(model(tokens, mask)[:, :length], logits, tolerance=1e-10)


def test_generation_with_hashing_equals_the_logits_of_the_whole_text():
    model = make(attention="lsh", bucket_size=4, num_hashes=2).double().eval()
    text = model.generate(random_tokens(1, 1), 40, temperature=0.0)
    assert torch.equal(model(text).argmax(-1)[0, :-1], text[0, 1:])


@all_options
@pytest.mark.parametrize("has_mask", [False, True])
def test_step_equals_the_twin(options, has_mask):
    model, twin = make(**options).double(), make(**options, policy=Store()).double()
    twin.load_state_dict(model.state_dict())
    tokens = random_tokens(2, 23)
    mask = torch.rand(2, 23) > 0.3 if has_mask else None
    output, expected = step(model, tokens, mask), step(twin, tokens, mask)
    assert torch.equal(output, expected)
    assert_close(gradients(model), gradients(twin))
    assert all(parameter.grad is not None for parameter in model.parameters())


@causal_options
@pytest.mark.parametrize("length", [1, 2, 15, 16, 33, 64])
def test_tokens_do_not_see_later_tokens(options, length):
    model = make(**options).double().eval()
    tokens = random_tokens(1, length)
    torch.manual_seed(1)
    before = model(tokens)
    for position in range(length):
        changed = tokens.clone()
        changed[0, position] = (changed[0, position] + 1) % 11
        torch.manual_seed(1)
        after = model(changed)
        assert torch.equal(after[:, :position], before[:, :position])
        assert not torch.equal(after[:, position], before[:, position])


@all_options
def test_masked_tokens_have_no_effect(options):
    """Sequences of different lengths share a batch with arbitrary padding."""
    model = make(**options).double().eval()
    tokens, length = random_tokens(2, 29), 17
    mask = torch.ones(2, 29, dtype=torch.bool)
    mask[1, length:] = False
    other = torch.where(mask, tokens, 3)
    torch.manual_seed(1)
    first = model(tokens, mask)
    torch.manual_seed(1)
    second = model(other, mask)
    assert_close(first[mask], second[mask], tolerance=1e-12)
    assert first.isfinite().all()


@all_options
def test_inverse_restores_the_embedding(options):
    """LSH attention uses the fixed-point grid, so its error is the rounding of the embedding to 2^-14."""
    tolerance = 2**-15 if options.get("attention") == "lsh" else 1e-6  # of values near 0.02
    model = make(**options, depth=12).eval()
    with torch.no_grad():
        x = model.embed(random_tokens(2, 50))
        rotary = model.rotary(x)
        y = model.blocks(x, rotary=rotary)
        error = (model.blocks.inverse(y, rotary=rotary) - x).abs().max().item()
        assert error <= tolerance
        if options.get("attention") == "lsh":
            assert torch.equal(model.blocks(model.blocks.inverse(y, rotary=rotary), rotary=rotary), y)


def activation_bytes(depth, policy=None, **options):
    return measure(make(**{**options, "depth": depth}, policy=policy), random_tokens(2, 48)).activation_bytes


@all_options
def test_memory_is_flat_in_depth(options):
    options = {**options, "dropout": 0.0}  # dropout stores a random state of 5 kB per function
    assert len({activation_bytes(depth, **options) for depth in (2, 3, 12)}) == 1
    shallow, middle, deep = (activation_bytes(depth, Store(), **options) for depth in (2, 3, 5))
    assert deep - middle == 2 * (middle - shallow) > 2 * 48 * 8 * 4  # more than one stream


def test_chunks_reduce_the_memory_of_the_perceptron():
    few, many = (activation_bytes(4, dim=16, ff_mult=64, ff_chunks=count) for count in (1, 8))
    hidden = 2 * 48 * 64 * 16 * 4
    assert few >= 3 * hidden  # before GELU, after GELU, and the gradient
    assert many < few / 2


@all_options
def test_memory_is_predicted(options):
    model, tokens = make(**options), random_tokens(2, 48)
    assert predict(model, tokens).peak_bytes == measure(model, tokens).peak_bytes


@pytest.mark.parametrize("is_causal", [False, True])
def test_backward_hashes_equal_the_forward_pass(is_causal):
    """In float32, rounding in the rebuilt streams would move some tokens to other buckets."""
    options = {"attention": "lsh", "bucket_size": 4, "num_hashes": 3, "depth": 8, "is_causal": is_causal}
    model, twin = make(**options), make(**options, policy=Store())
    twin.load_state_dict(model.state_dict())
    tokens = random_tokens(2, 64)
    for module in (model, twin):
        step(module, tokens)
    for (name, gradient), expected in zip(gradients(model).items(), gradients(twin).values(), strict=True):
        assert torch.equal(gradient, expected), name


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@compiled_options
def test_compiles_in_one_graph(options):
    """The backend uses PyTorch's kernels, so the output is equal bit for bit."""
    model, tokens = make(**options, depth=2), random_tokens(2, 20)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    outputs = [step(compiled, tokens)]
    first = gradients(model)
    model.zero_grad()
    outputs.append(step(model, tokens))
    assert torch.equal(*outputs)
    assert_close(first, gradients(model), tolerance=1e-5)  # in float32


def test_streams_are_float32_under_autocast():
    model, twin = make(depth=12, dim=32), make(depth=12, dim=32, policy=Store())
    twin.load_state_dict(model.state_dict())
    dtypes = []
    model.blocks.register_forward_hook(lambda module, inputs, y: dtypes.append(y.dtype))
    tokens = random_tokens(2, 40)
    for module in (model, twin):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            step(module, tokens)
    assert dtypes == [torch.float32]
    for (name, gradient), expected in zip(gradients(model).items(), gradients(twin).values(), strict=True):
        assert (gradient - expected).norm() <= 0.02 * expected.norm() + 1e-6, name


def test_learns_to_copy():
    """The target is the token four positions before, which attention has to find."""
    model = make(dim=32, depth=2, max_length=32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(200):
        tokens = torch.randint(11, (16, 4)).repeat(1, 5)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(tokens)[:, 4:-1].flatten(0, 1), tokens[:, 5:].flatten())
        loss.backward()
        optimizer.step()
    assert loss < 0.5  # without attention log(11), 2.4
    start = torch.tensor([[1, 2, 3, 4, 1, 2, 3, 4]])
    assert model.generate(start, 4, temperature=0)[0, 8:].tolist() == [1, 2, 3, 4]


def num_parameters_of(vocab_size, dim, depth, hidden_dim, num_attention_matrices):
    """Return the number of parameters, computed only from the architecture."""
    attention = num_attention_matrices * dim * dim
    perceptron = dim * hidden_dim + hidden_dim + hidden_dim * dim + dim
    block = 2 * dim + attention + 2 * dim + perceptron
    return vocab_size * dim + depth * block + 2 * 2 * dim + 2 * dim * vocab_size + vocab_size


@pytest.mark.parametrize(
    ("entry", "sizes", "exact"),
    [
        # Kitaev et al. (2020), section 5, and the published enwik8 model (google/reformer-enwik8): queries are keys
        (reformer_enwik8, (258, 1024, 12, 4096, 3), 139_319_554),
        # google/flaxformer, t5x/configs/h_transformer/models/h_transformer_1d_decoder_only_{small,base,large}.gin
        (h_transformer_small, (32_128, 256, 8, 1024, 4), 31_017_344),
        (h_transformer_base, (32_128, 768, 12, 2048, 4), 140_189_056),
        (h_transformer_large, (32_128, 1024, 24, 4096, 4), 400_944_512),
    ],
)
def test_published_sizes(entry, sizes, exact):
    with torch.device("meta"):
        model = entry()
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters_of(*sizes) == exact
    assert f"{exact:,}" in entry.__doc__


class Fixed(torch.nn.Module):
    """A model with fixed logits."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, features):
        return self.logits.expand(len(features), -1)


def drawn(**options):
    model = make(vocab_size=4)
    model.head = Fixed([0.0, 2.0, 1.0, -1.0])
    return set(model.generate(torch.zeros(200, 1, dtype=torch.long), 2, **options)[:, 1:].flatten().tolist())


def test_top_k_and_top_p():
    assert drawn() == {0, 1, 2, 3}
    assert drawn(temperature=0) == {1}
    assert drawn(temperature=0.01) == drawn(temperature=1e-300) == {1}
    assert drawn(top_k=2) == {1, 2}
    assert drawn(top_k=9) == {0, 1, 2, 3}
    # The probabilities are 0.61, 0.22, 0.08 and 0.03 by rank: the second is needed for 0.7, the third for 0.9.
    assert drawn(top_p=0.6) == {1}
    assert drawn(top_p=0.7) == {1, 2}
    assert drawn(top_p=0.9) == {0, 1, 2}
    assert drawn(top_p=1.0) == {0, 1, 2, 3}


def test_top_p_of_one_keeps_tokens_beyond_a_sum_that_rounds_to_one(monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "multinomial", lambda p, *_, **__: seen.append(p) or torch.zeros(1, 1, dtype=torch.long))
    draw_tokens(torch.tensor([[20.0, 0.0, -1.0]]), 1.0, None, 1.0, None)
    assert (seen[0] > 0).all()


def test_logits_that_are_not_finite_draw_nothing():
    model = make(vocab_size=4)
    model.head = Fixed([0.0, float("nan"), 1.0, -1.0])
    with pytest.raises(ValueError, match="logits that are NaN or infinite, so no token can be drawn; its weights have"):
        model.generate(torch.zeros(2, 1, dtype=torch.long), 1)


@causal_options
def test_generation_is_repeatable_and_reads_the_last_positions(options):
    model = make(**options, max_length=16)
    model.blocks[0].eval()  # as for a frozen block
    tokens = random_tokens(2, 40)
    first, second = (model.generate(tokens, 8, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(first[:, :40], tokens)
    short = model.generate(tokens[:, -16:], 8, generator=torch.Generator().manual_seed(5))
    assert torch.equal(short[:, 16:], first[:, 40:])
    assert model.training
    assert not model.blocks[0].training
    assert model.blocks[1].f.training
    assert torch.equal(model.generate(tokens, 0), tokens)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"dim": 9},
            r"`dim` \(=9\) must be a multiple of `num_heads` \(=2\), since the heads share the features; pass 10, or",
        ),
        ({"dim": 6}, r"`head_dim` \(=3\) must be even, since rotary positions rotate pairs"),
        ({"depth": 0}, r"`depth` \(=0\) must be a positive integer"),
        ({"vocab_size": 0}, r"`vocab_size` \(=0\) must be a positive integer"),
        ({"max_length": 2.5}, r"`max_length` \(=2.5\) must be a positive integer"),
        ({"ff_mult": 0}, r"`ff_mult` \(=0\) must be a positive number"),
        ({"ff_mult": 0.01}, r"`ff_mult` \(=0.01\) must give at least one feature, but 0.01 \* 8 is 0.08; 4 is usual"),
        ({"ff_chunks": 0}, r"`ff_chunks` \(=0\) must be a positive integer"),
        ({"attention": "lsh", "bucket_size": 0}, r"`bucket_size` \(=0\) must be a positive integer"),
        ({"attention": "lsh", "num_hashes": 1.5}, r"`num_hashes` \(=1.5\) must be a positive integer"),
        ({"attention": "hierarchical", "block_size": 0}, r"`block_size` \(=0\) must be a positive integer"),
        (
            {"attention": "hierarchical", "block_size": 5},
            r"`block_size` \(=5\) must be even, because the level below .*pass 6",
        ),
        ({"dropout": 1}, r"`dropout` \(=1\) must be a number from 0 to below 1"),
        ({"attention": "flash"}, r"`attention` \(='flash'\) must be 'full' or 'lsh' or 'hierarchical'"),
    ],
)
def test_rejects_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize("policy", [3, Store, [Reverse()]])
def test_rejects_wrong_policies(policy):
    with pytest.raises(
        TypeError, match=r"`policy` \(=.*\) must be a policy: `Reverse\(\)`, `Checkpoint\(\)`, .*`Store\(\)`"
    ):
        make(policy=policy)


@pytest.mark.parametrize(
    ("tokens", "mask", "error", "message"),
    [
        (torch.zeros(5, dtype=torch.long), None, ValueError, r"`tokens` has shape \(5,\), but must have \(B, T\)"),
        (torch.zeros(1, 0, dtype=torch.long), None, ValueError, r"`tokens` has shape \(1, 0\), but must have \(B, T\)"),
        (torch.zeros(1, 5), None, TypeError, r"`tokens` \(=torch.float32\) must be a tensor of integers"),
        ([[1, 2]], None, TypeError, r"`tokens` \(=\[\[1, 2\]\]\) must be a tensor of integers"),
        (torch.zeros(1, 65, dtype=torch.long), None, ValueError, r"`tokens` has 65 positions, more than `max_length`"),
        (torch.full((1, 5), 11), None, ValueError, r"`tokens` must be from 0 to 10, but range from 11 to 11; build"),
        (torch.full((1, 5), -1), None, ValueError, r"`tokens` must be from 0 to 10, but range from -1 to -1"),
        (
            torch.zeros(2, 5, dtype=torch.long),
            torch.ones(5, 2, dtype=torch.bool),
            ValueError,
            r"`mask` has shape \(5, 2\), but must have the shape of the tokens, \(2, 5\)",
        ),
        (
            torch.zeros(2, 5, dtype=torch.long),
            torch.ones(2, 5),
            TypeError,
            r"`mask` \(=torch.float32\) must be a bool tensor, true .*, or numbers of documents; pass `mask.bool\(\)`",
        ),
    ],
)
def test_rejects_wrong_inputs(tokens, mask, error, message):
    for policy in (Reverse(), Store()):
        with pytest.raises(error, match=message):
            make(policy=policy)(tokens, mask)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_new": -1}, r"`num_new` \(=-1\) must be a positive integer, or 0"),
        ({"temperature": -1.0}, r"`temperature` \(=-1.0\) must be positive and finite, or 0 for the most"),
        ({"temperature": float("inf")}, r"`temperature` \(=inf\) must be positive and finite"),
        ({"temperature": float("nan")}, r"`temperature` \(=nan\) must be positive"),
        ({"top_k": 0}, r"`top_k` \(=0\) must be a positive integer"),
        ({"top_p": 0.0}, r"`top_p` \(=0.0\) must be above 0 and at most 1"),
        ({"tokens": torch.zeros(2, 0, dtype=torch.long)}, r"`tokens` has shape \(2, 0\), but must have \(B, T\)"),
    ],
)
def test_rejects_wrong_arguments_of_generate(arguments, message):
    with pytest.raises(ValueError, match=message):
        make().generate(**{"tokens": random_tokens(1, 3), "num_new": 2, **arguments})
    with pytest.raises(ValueError, match="an encoder cannot generate"):
        make(is_causal=False).generate(random_tokens(1, 3), 1)


@pytest.mark.parametrize("is_causal", [False, True])
def test_full_and_hierarchical_attention_share_weights(is_causal):
    """Within two blocks the models compute the same."""
    full = make(is_causal=is_causal).double()
    hierarchical = make(is_causal=is_causal, attention="hierarchical", block_size=12).double()
    hierarchical.load_state_dict(full.state_dict())
    tokens = random_tokens(2, 24)
    assert_close(hierarchical(tokens), full(tokens), tolerance=1e-12)
