"""A converted network computes its equation, and its gradients equal the ones of its stored twin."""

import copy
import io
from dataclasses import replace

import pytest
import torch
from torch import nn

import revnet
from revnet.conversion import BDIA, Adapter, Consistent, Dr2Net, Rewire, set_method
from revnet.memory import measure, predict
from tests.conversion.hosts import Block, Host, all_equal, gradients, reference, twins

FLOAT = [Dr2Net(0.3, 0.7), Dr2Net(1, -0.7), Consistent(0.7, None), Consistent(-0.7, None), Rewire()]
EXACT = [Dr2Net(0.5, 0.5, 14), Consistent(), Consistent(-0.5), Rewire(14), Consistent(0.1, 30, is_wide=True)]
WITH_RANDOM = [*EXACT, BDIA(), BDIA(0.5)]
BRANCHES = [["norm1", "mixer", "dropout"], "norm2 mlp"]


@pytest.fixture
def x():
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(2))


def backward(**options):
    """Return a function that runs a model forward and backward."""
    return lambda model: model(options["x"], *options.get("args", ())).square().sum().backward()


@pytest.mark.parametrize("method", FLOAT, ids=str)
@pytest.mark.parametrize("stop", [None, 1, 4])
def test_computes_the_equation_in_float64(method, stop, x):
    torch.manual_seed(0)
    original = Host().double()
    converted = copy.deepcopy(original)
    revnet.convert(converted, method, blocks="blocks")
    scale, inputs = torch.tensor(0.5, dtype=torch.float64), x.double()
    torch.testing.assert_close(converted(inputs, scale, stop), reference(original, method, inputs, scale, stop))
    actual = gradients(converted, lambda model: model(inputs, scale, stop).square().sum().backward())
    twin = gradients(original, lambda model: reference(model, method, inputs, scale, stop).square().sum().backward())
    for a, b in zip(actual, twin, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("method", "rounded"),
    [
        (Consistent(0.0058), Consistent(1 / 256)),
        (Consistent(-0.01), Consistent(-3 / 256)),
        (Dr2Net(0.9, 0.1), Dr2Net(1 - 26 / 256, 26 / 256)),
        (Dr2Net(1, -0.1), Dr2Net(1 - 0.1 + 26 / 256, -26 / 256)),
        (Dr2Net(0.5, 0.001), Dr2Net(0.501, 0)),
    ],
    ids=str,
)
def test_all_factors_follow_from_the_rounded_one(method, rounded, x):
    """So that they have the sum that keeps streams from growing with depth."""
    host, _ = twins(replace(method, fraction_bits=30, is_wide=True), num_blocks=24)
    original = copy.deepcopy(host).double()
    revnet.convert(original, back=True)
    torch.testing.assert_close(host.double()(x.double()), reference(original, rounded, x.double()), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "method", [Dr2Net(), Consistent(0), Consistent(-1e-3), Dr2Net(1, 1e-3, 14), Dr2Net(0.999, 1e-3, 14)], ids=str
)
@pytest.mark.parametrize("branches", [None, BRANCHES])
@pytest.mark.parametrize("is_mixed", [False, True])
def test_starts_as_the_original_bit_for_bit(method, branches, is_mixed, x):
    torch.manual_seed(0)
    original = Host(dropout=0.3)
    converted = copy.deepcopy(original)
    revnet.convert(converted, method, blocks="blocks", branches=branches)

    def run(model):
        with torch.autocast("cpu", torch.bfloat16, enabled=is_mixed):
            y = model(x)
        outputs.append(y)
        y.float().square().sum().backward()

    outputs = []
    assert all_equal(gradients(converted, run), gradients(original, run))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("method", WITH_RANDOM, ids=str)
@pytest.mark.parametrize("branches", [None, BRANCHES])
def test_exact_gradients_equal_the_stored_twin(method, branches, x):
    host, stored = twins(method, dropout=0.3, branches=branches)
    for _ in range(2):
        assert all_equal(gradients(host, backward(x=x)), gradients(stored, backward(x=x)))
    host.eval(), stored.eval()
    assert all_equal(gradients(host, backward(x=x)), gradients(stored, backward(x=x)))


@pytest.mark.parametrize("method", [Consistent(0.5), BDIA(), Rewire(14)], ids=str)
def test_gradients_of_64_blocks_equal_the_stored_twin_under_autocast(method, x):
    host, stored = twins(method, num_blocks=64, dropout=0.1)

    def run(model):
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        y.float().square().mean().backward()

    assert all_equal(gradients(host, run), gradients(stored, run))


def test_bfloat16_model_runs_by_branches(x):
    host, stored = twins(Consistent(0.5), branches=BRANCHES)
    host.bfloat16(), stored.bfloat16()
    run = backward(x=x.bfloat16())
    assert host(x.bfloat16()).dtype == torch.bfloat16
    assert all_equal(gradients(host, run), gradients(stored, run))


def test_bdia_in_evaluation_mode_is_the_original_on_the_grid(x):
    host, _ = twins(BDIA())
    original = copy.deepcopy(host)
    revnet.convert(original, back=True)
    host.eval()
    distance = (host(x) - original(x)).abs().max()
    coarse, _ = twins(BDIA(fraction_bits=9))
    # A grid of 2^-9 instead of 2^-14 is 32 times as coarse.
    assert distance < (coarse.eval()(x) - original(x)).abs().max() / 8 < 1e-2


@pytest.mark.parametrize("method", [Adapter(), Adapter(a=0.5, b=0.9, fraction_bits=None)], ids=str)
def test_adapter_computes_meft(method, x):
    torch.manual_seed(0)
    original = Host().double()
    for block in original.blocks:
        block.adapter = nn.Sequential(nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 16)).double()
    converted = copy.deepcopy(original)
    revnet.convert(converted, method, blocks="blocks")

    def meft(model):
        x1 = x2 = model.stem(x.double())
        for block in model.blocks:
            y1 = method.a * x1 + Block.forward(block, x2)
            x1, x2 = method.b * x2 + block.adapter(y1), y1
        return model.head((x1 + x2) / 2)

    # The grid rounds each of 10 sums, and `a` to a multiple of 1/256.
    bound = 1e-12 if method.fraction_bits is None else 1e-2
    assert (converted(x.double()) - meft(original)).abs().max() < bound
    actual = gradients(converted, backward(x=x.double()))
    expected = gradients(original, lambda model: meft(model).square().sum().backward())
    stored = copy.deepcopy(converted)
    revnet.set_policy(stored, "store")
    if method.fraction_bits is None:
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    else:
        assert all_equal(actual, gradients(stored, backward(x=x.double())))


@pytest.mark.parametrize(
    ("method", "bytes_per_block"),
    [
        (Rewire(), 0),
        (Consistent(), 1024),
        (BDIA(0.5), 512 + 64),
        (Dr2Net(), 4 * 4096),
    ],
    ids=str,
)
def test_bytes_grow_by_the_formula(method, bytes_per_block):
    inputs = torch.randn(64, 4)

    def activation_bytes(num_blocks):
        host = Host(num_blocks, width=64)
        revnet.convert(host, method, blocks="blocks")
        measured = measure(host, inputs)
        if num_blocks == 5 and isinstance(method, BDIA):
            assert predict(host, inputs) == measured
        return measured.activation_bytes

    # Per block: the kept bits of 64 x 64 elements, and a byte for each of 64 samples; at `a = 0`, its input.
    assert activation_bytes(10) - activation_bytes(5) == 5 * bytes_per_block


def test_checkpointed_blocks_mix_with_reversed_ones(x):
    host, stored = twins(Consistent(), dropout=0.2)
    for index, policy in {1: "checkpoint", 3: "store"}.items():
        revnet.set_policy(host.blocks[index], policy)
    assert all_equal(gradients(host, backward(x=x)), gradients(stored, backward(x=x)))


def test_pass_in_flight_keeps_its_method(x):
    host, stored = twins(Consistent(0.5), dropout=0.2)

    def run(model):
        features = model.stem(x)
        for index, block in enumerate(model.blocks):
            if index == 2:
                set_method(model, Consistent(0.25))
            features = block(features)
        set_method(model, Consistent(0))
        features.square().sum().backward()
        set_method(model, Consistent(0.5))

    assert all_equal(gradients(host, run), gradients(stored, run))


def test_converts_back_and_again(x):
    torch.manual_seed(0)
    host = Host()
    names, y = list(host.state_dict()), host(x)
    report = revnet.convert(host.blocks, Rewire())
    assert report.converted == ("0", "1", "2", "3", "4")
    assert not torch.equal(host(x), y)
    assert list(host.state_dict()) == names
    report = revnet.convert(host, back=True)
    assert str(report) == "converted back: 0, 1, 2, 3, 4"
    assert all(type(block) is Block for block in host.blocks)
    assert torch.equal(host(x), y)
    assert not any("_conversion_place" in vars(block) for block in host.blocks)
    revnet.convert(host, Dr2Net(), blocks=["blocks"])
    assert torch.equal(host(x), y)


def test_refuses_to_restore_a_class_that_was_replaced_again():
    host, _ = twins(Rewire())
    kind = type(host.blocks[1])
    host.blocks[1].__class__ = type("Replaced", (kind,), {})
    with pytest.raises(ValueError, match=r"`blocks\.1` of `model` had its class replaced again after it was converted"):
        revnet.convert(host, back=True)
    assert all(isinstance(block, kind) for block in host.blocks)


def test_copies_and_pickles(x):
    host, _ = twins(Consistent())
    file = io.BytesIO()
    torch.save(host, file)
    file.seek(0)
    for other in (copy.deepcopy(host), torch.load(file, weights_only=False)):
        assert all_equal(gradients(other, backward(x=x)), gradients(host, backward(x=x)))
        assert all(isinstance(block, Block) for block in other.blocks)
        set_method(other, Rewire())
        assert not torch.equal(other(x), host(x))
        revnet.convert(other, back=True)
    assert torch.equal(host(x), host(x))


def test_features_are_saved_without_the_state(x):
    host, _ = twins(Consistent())
    features = host.blocks[0](host.stem(x))
    file = io.BytesIO()
    torch.save(features, file)
    file.seek(0)
    assert torch.equal(torch.load(file), features)
    file.seek(0)
    loaded = torch.load(file)
    with pytest.raises(RuntimeError, match=r"`blocks\.1` was given a tensor that `blocks\.0` did not return"):
        host.blocks[1](loaded)
