"""The forms of the transformer: equations, gradients, exact reversal, memory and files."""

import copy

import pytest
import torch

from revnet import Additive, Checkpoint, FixedPoint, Offload, Reverse, Store, set_policy, set_tolerance
from revnet.coupling import ExactScaled, Scaled
from revnet.memory import measure, plan, predict
from revnet.models import ReversibleTransformer
from revnet.models.pretrained.mixin import from_pretrained
from revnet.numerics import measure_drift
from tests.helpers import assert_close, gradients

TINY = {"vocab_size": 11, "dim": 8, "depth": 3, "num_heads": 2, "max_length": 64}
REVERSED = {
    "coupled": {},
    "midpoint": {"form": "midpoint"},
    "midpoint-step": {"form": "midpoint", "step_size": 0.3},
    "midpoint-even-depth": {"form": "midpoint", "depth": 4},
    "leapfrog": {"form": "leapfrog"},
    "leapfrog-step": {"form": "leapfrog", "step_size": 0.5},
    "midpoint-rms-swiglu": {"form": "midpoint", "norm": "rms", "mlp": "swiglu", "bias": False, "num_kv_heads": 1},
    "leapfrog-lsh": {"form": "leapfrog", "attention": "lsh", "bucket_size": 4},
    "midpoint-hierarchical": {"form": "midpoint", "attention": "hierarchical", "block_size": 4, "num_kv_heads": 1},
    "midpoint-momentum": {"form": "midpoint", "coupling": Scaled.momentum(0.9)},
}
all_reversed = pytest.mark.parametrize("options", REVERSED.values(), ids=REVERSED.keys())
FORMS = ("coupled", "midpoint", "leapfrog", "stored")
slow = pytest.mark.slow


def make(**options):
    torch.manual_seed(0)
    return ReversibleTransformer(**{**TINY, **options})


def random_tokens(B=2, T=23):
    return torch.randint(11, (B, T), generator=torch.Generator().manual_seed(1))


def step(model, tokens):
    model.zero_grad()
    torch.manual_seed(1)
    loss = model(tokens[:, :-1], targets=tokens[:, 1:])
    loss.backward()
    return loss.detach()


def residual(layer, x, rotary):
    """Return the residual of a whole layer, f(x) + g(x + f(x))."""
    a = layer.f(x, rotary=rotary)
    return a + layer.g(x + a)


@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize("form", ["midpoint", "leapfrog", "stored"])
def test_features_follow_the_equation(form, depth):
    h = 0.3
    options = {} if form == "stored" else {"step_size": h}
    model, tokens = make(form=form, depth=depth, **options).double(), random_tokens()
    layers = [block if form == "stored" else block.f for block in model.blocks]
    before = x = model.embedding(tokens)
    rotary = model.rotary(x)
    for index, layer in enumerate(layers):
        f = residual(layer, x, rotary)
        if form == "stored":
            before, x = x, x + f
        elif form == "midpoint":
            before, x = x, before + 2 * h * f
        else:  # It starts with a velocity of zero.
            before, x = x, (x if index == 0 else 2 * x - before) + h**2 * f
    assert_close(model(tokens), model.head(model.norm(x)), tolerance=1e-13)
    assert model.num_features == 8


@all_reversed
def test_gradients_equal_the_stored_twin(options):
    model = make(**options).double()
    twin = make(**options, policy=Store()).double()
    twin.load_state_dict(model.state_dict())
    tokens = random_tokens()
    assert torch.equal(step(model, tokens), step(twin, tokens))
    assert_close(gradients(model), gradients(twin), tolerance=1e-9 if "momentum" in str(options) else 1e-11)
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("form", FORMS)
def test_all_policies_have_the_same_gradients(form):
    model, tokens = make(form=form, depth=4).double(), random_tokens()
    set_policy(model, Store())
    step(model, tokens)
    expected = gradients(model)
    for policy in (Checkpoint(), Offload(), Store()):
        set_policy(model, policy)
        assert model.blocks.policies == (policy,) * 4
        step(model, tokens)
        assert_close(gradients(model), expected, tolerance=1e-13)
    model.blocks.set_policies([Store(), Checkpoint(), Offload(), Store() if form == "stored" else Reverse()])
    step(model, tokens)
    assert_close(gradients(model), expected, tolerance=1e-13)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"form": "coupled"},
        {"form": "midpoint"},
        {"form": "midpoint", "step_size": 0.2},
        {"form": "leapfrog"},
        {"form": "leapfrog", "step_size": 0.5},
        {"form": "midpoint", "coupling": ExactScaled(Scaled.consistent(0.5))},
    ],
    ids=str,
)
def test_exact_forms_equal_the_stored_twin_bit_for_bit(options, autocast):
    options = {"coupling": FixedPoint(), "dropout": 0.1, "depth": 12, **options}
    model, tokens = make(**options), random_tokens()
    twin = make(**options, policy=Store())
    twin.load_state_dict(model.state_dict())
    for each in (model, twin):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            step(each, tokens)
    for (name, gradient), expected in zip(gradients(model).items(), gradients(twin).values(), strict=True):
        assert torch.equal(gradient, expected), name


def test_couplings_of_the_forms():
    assert make(form="midpoint").blocks[0].coupling == Additive()
    assert make(form="midpoint", step_size=0.25).blocks[0].coupling == Scaled.midpoint(0.25)
    assert make(form="midpoint", step_size=0.25, coupling=FixedPoint(12)).blocks[0].coupling == ExactScaled(
        Scaled.midpoint(0.25), 12
    )
    assert make(form="leapfrog", coupling=FixedPoint()).blocks[0].coupling == FixedPoint()
    assert make(form="leapfrog", step_size=0.5).blocks[0].coupling == Scaled.euler(0.5)
    assert make(form="leapfrog", attention="lsh").blocks[0].coupling == FixedPoint()


def activation_bytes(depth, **options):
    return measure(make(depth=depth, **options), random_tokens(2, 48)).activation_bytes


@pytest.mark.parametrize("form", ["midpoint", "leapfrog"])
def test_memory_is_flat_in_depth(form):
    assert len({activation_bytes(depth, form=form) for depth in (2, 3, 12)}) == 1
    small, large = (activation_bytes(depth, form="stored") for depth in (2, 3))
    assert large - small > 2 * 48 * 8 * 4  # more than one stream


@pytest.mark.parametrize("form", FORMS)
def test_memory_is_predicted(form):
    tokens = random_tokens(2, 48)
    for options in (
        {"policy": "checkpoint"},
        {"mlp": "swiglu", "norm": "rms", "num_kv_heads": 1, "tie_embeddings": True},
    ):
        model = make(form=form, **options)
        assert predict(model, tokens).peak_bytes == measure(model, tokens).peak_bytes


@slow
@pytest.mark.parametrize("form", ["midpoint", "stored"])
def test_a_plan_fits_the_model(form):
    model, tokens = make(form=form, depth=6), random_tokens(2, 48)
    set_policy(model, Store())
    most = predict(model, tokens).peak_bytes
    chosen = plan(model, tokens, budget=most - 1)
    chosen.apply(model)
    assert measure(model, tokens).peak_bytes == chosen.peak_bytes < most


@pytest.mark.parametrize("form", ["coupled", "midpoint", "leapfrog"])
def test_drift_is_measured(form):
    drift = measure_drift(make(form=form, depth=12), random_tokens(), loss=lambda logits: logits.sum())
    assert len(drift.blocks) == 12
    assert 0 < drift.error < 1e-4
    exact = measure_drift(
        make(form=form, depth=12, coupling=FixedPoint()), random_tokens(), loss=lambda logits: logits.sum()
    )
    assert exact.error == 0


@pytest.mark.parametrize(
    "options",
    [
        *[{"form": form} for form in FORMS],
        {"form": "midpoint", "step_size": 0.2, "coupling": FixedPoint()},
        {"form": "leapfrog", "step_size": 0.5, "coupling": FixedPoint()},
        {"norm": "rms", "mlp": "swiglu", "bias": False, "num_kv_heads": 1, "tie_embeddings": True, "rope_theta": 5e5},
    ],
    ids=str,
)
def test_files_keep_the_form(tmp_path, options):
    model, tokens = make(**options).eval(), random_tokens()
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path)
    assert torch.equal(loaded(tokens), model(tokens))
    assert loaded.form == model.form
    couplings = [[getattr(block, "coupling", None) for block in each.blocks] for each in (loaded, model)]
    assert couplings[0] == couplings[1]
    assert (loaded.head.weight is loaded.embedding.weight) == options.get("tie_embeddings", False)


@pytest.mark.parametrize("form", FORMS)
def test_copies_and_switches(form):
    model, tokens = make(form=form), random_tokens()
    copied = copy.deepcopy(model)
    assert torch.equal(copied(tokens), model(tokens))
    model.gradient_checkpointing_enable()
    assert model.blocks.policies == ((Checkpoint() if form == "stored" else Reverse()),) * 3
    model.gradient_checkpointing_disable()
    assert model.blocks.policies == (Store(),) * 3
    assert len(model.blocks) == 3
    assert model.is_reversible == (form != "stored")


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("form", [pytest.param(form, marks=() if form == "leapfrog" else slow) for form in FORMS])
def test_compiles_in_one_graph(form):
    model, tokens = make(form=form, depth=2, norm="rms", num_kv_heads=1), random_tokens()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    losses = [step(compiled, tokens)]
    first = gradients(model)
    losses.append(step(model, tokens))
    torch.testing.assert_close(*losses)
    assert_close(first, gradients(model), tolerance=1e-5)


@pytest.mark.parametrize("form", ["midpoint", "leapfrog"])
def test_tolerance_bounds_the_drift(form):
    model, tokens = make(form=form, depth=12), random_tokens()
    set_tolerance(model, 1e-6)
    step(model, tokens)
    assert model.blocks.keyframes is not None
    set_policy(twin := copy.deepcopy(model), Store())
    step(twin, tokens)
    assert_close(gradients(model), gradients(twin), tolerance=1e-4)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"form": "reversed"}, ValueError, r"`form` \(='reversed'\) must be 'coupled' or 'midpoint' or 'leapfrog' or"),
        ({"step_size": 0.5}, ValueError, r"`step_size` \(=0.5\) must be None for the coupled form"),
        ({"form": "stored", "step_size": 1}, ValueError, r"`step_size` \(=1\) must be None for the stored form"),
        ({"form": "midpoint", "step_size": 0}, ValueError, r"`step_size` \(=0\) must be a positive number"),
        (
            {"form": "stored", "coupling": FixedPoint()},
            ValueError,
            r"`coupling` \(=FixedPoint.*\) must be None for the",
        ),
        (
            {"form": "stored", "policy": "reverse"},
            TypeError,
            "is for reversible blocks, and blocks.0 is not reversible",
        ),
        (
            {"form": "leapfrog", "coupling": Scaled.momentum(0.9)},
            ValueError,
            r"`coupling` \(=Scaled.*\) must be `Additive\(\)`, `FixedPoint\(\)` or None for the leapfrog form",
        ),
        ({"form": "midpoint", "coupling": "fixed"}, TypeError, r"`coupling` \(='fixed'\) must be a coupling"),
        ({"form": "coupled", "coupling": []}, TypeError, r"`coupling` \(=\[\]\) must be a coupling"),
        (
            {"form": "leapfrog", "coupling": torch.zeros(2)},
            TypeError,
            r"`coupling` \(=a tensor .*\) must be a coupling",
        ),
    ],
)
def test_rejects_wrong_options(options, error, message):
    with pytest.raises(error, match=message) as caught:
        make(**options)
    assert "\n" not in str(caught.value)
