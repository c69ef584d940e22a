"""The drift check of every run: it warns once about errors, and never without one."""

import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from revnet import (
    Additive,
    FixedPoint,
    ReconstructionError,
    ReconstructionWarning,
    Reverse,
    ReversibleBlock,
    ReversibleSequential,
    Store,
    create_model,
    set_coupling,
)
from revnet.conversion import Dr2Net
from revnet.engine import DriftMeter
from revnet.engine._arrays import LEAST
from revnet.engine._drift import MOST_SAMPLED, relative_error, sample
from revnet.engine._parts import parts_of
from tests.conversion.hosts import twins
from tests.helpers import ConvResidual, mlp, squares, stored_twin


class Steep(nn.Module):
    """Amplifies small differences; its values stay below 1."""

    def __init__(self, slope):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        nn.init.orthogonal_(self.linear.weight)
        self.slope = slope

    def forward(self, x):
        return torch.sin(self.slope * self.linear(x))


def steep(depth=16, slope=3.0):
    return ReversibleSequential(*[ReversibleBlock(Steep(slope), Steep(slope)) for _ in range(depth)])


def step(module, x=None):
    squares(module(torch.randn(4, 16) if x is None else x)).backward()


def test_warns_once_of_wrong_gradients():
    sequence = steep()
    with pytest.warns(
        ReconstructionWarning,
        match=r"that `blocks.0.f` reads was rebuilt with a relative error of .*, so gradients are off by at "
        r"least as much. Bound the error with `tolerance=1e-3`.*`FixedPoint\(\)`.*`revnet doctor`",
    ):
        step(sequence)
    step(sequence)  # Warnings are errors here.
    with pytest.warns(ReconstructionWarning):
        step(steep())  # Another model.


def test_warning_about_converted_blocks_names_what_helps_them():
    host, _ = twins(Dr2Net(0.9, 0.1), num_blocks=16)
    message = (
        r"that `blocks.0` reads was rebuilt with .*`fraction_bits` in the method, .*`revnet.conversion.set_method`"
    )
    with pytest.warns(ReconstructionWarning, match=message) as caught:
        squares(host(torch.randn(6, 4))).backward()
    assert len(caught) == 1
    assert "tolerance" not in str(caught[0].message)
    host, _ = twins(Dr2Net(0.95, 0.05), num_blocks=60)
    with pytest.raises(ReconstructionError, match=r"`blocks.0` reads contains NaN or inf .*`fraction_bits`"):
        squares(host(torch.randn(6, 4))).backward()


@pytest.mark.parametrize(
    "make",
    [
        lambda: steep(depth=2, slope=0.5),
        lambda: ReversibleSequential(*[ReversibleBlock(ConvResidual(2), ConvResidual(2)) for _ in range(8)]),
        lambda: create_model("revnet38"),
    ],
    ids=["mlp", "conv", "revnet38"],
)
@pytest.mark.parametrize("how", ["training", "evaluation", "frozen below", "frozen above", "retained", "double"])
def test_does_not_warn_about_accurate_models(make, how):
    model = make()
    shape = (
        (2, 3, 8, 8)
        if not isinstance(model, ReversibleSequential)
        else (2, 16)
        if "Steep" in repr(model)
        else (2, 4, 4, 4)
    )
    x = torch.randn(shape, requires_grad=how == "double")
    parameters = list(model.parameters())
    if how == "evaluation":
        model.eval()
    for parameter in parameters[: len(parameters) // 2] if how == "frozen below" else ():
        parameter.requires_grad_(False)
    for parameter in parameters[len(parameters) // 2 :] if how == "frozen above" else ():
        parameter.requires_grad_(False)
    loss = squares(model(x))
    if how == "double":
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        loss = squares(grad)
    loss.backward(retain_graph=how == "retained")
    if how == "retained":
        loss.backward()
    assert any(parameter.grad is not None for parameter in parameters)


@pytest.mark.parametrize("zero_streams", ["both", "first", "second"])
def test_does_not_warn_about_zero_streams(zero_streams):
    """Their rounding errors are negligible compared with the other stream, and do no harm."""
    sequence = ReversibleSequential(*[ReversibleBlock(mlp(8), mlp(8)) for _ in range(6)])
    x1, x2 = torch.randn(4, 8), torch.randn(4, 8)
    zero = torch.zeros(4, 8)
    streams = {"both": (zero, zero), "first": (zero, x2), "second": (x1, zero)}[zero_streams]
    y1, y2 = sequence(streams)
    (squares(y1) + squares(y2)).backward()
    assert sequence[0].f[0].bias.grad.isfinite().all()


class Large(nn.Linear):
    """Adds large numbers to a stream, which depend on the other stream alone."""

    def forward(self, x):
        return 1e6 * torch.tanh(super().forward(x))


@pytest.mark.parametrize("tolerance", [None, 1e-3])
def test_a_small_stream_that_is_lost_next_to_a_large_one(tolerance):
    first, second = ReversibleBlock(mlp(8), mlp(8)), ReversibleBlock(Large(8, 8), nn.Sequential(nn.Tanh(), mlp(8)))
    sequence = ReversibleSequential(first, second, tolerance=tolerance)
    x = torch.randn(4, 16)
    meter = DriftMeter(is_quiet=True)
    with meter.on():
        step(sequence, x)
    errors = {record.name: float(record.error) for record in meter.records}
    if tolerance is not None:
        assert max(errors.values()) <= tolerance
        return
    # Rounding to float32 at 1e6 is off by 0.03, and this stream has a size of 1.
    assert errors["blocks.0.g"] > 1e-3
    with pytest.warns(ReconstructionWarning, match="`blocks.0.f` reads was rebuilt with a relative error of"):
        step(sequence, x)


@pytest.mark.parametrize("coupling", [Additive(), FixedPoint()])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_ignores_nonfinite_values_of_the_forward_pass(value, coupling):
    sequence = steep(4, 0.5)
    set_coupling(sequence, coupling)
    x = torch.randn(4, 16)
    x[0, 0] = value
    step(sequence, x)
    assert sequence[0].g.linear.weight.grad.isnan().any()


@pytest.mark.parametrize("coupling", [Additive(), FixedPoint()])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_warns_of_nonfinite_values_of_a_function(value, coupling):
    """The streams before it cannot be rebuilt, and gradients are NaN, even where the loss leaves these values out."""
    sequence = steep(4, 0.5)
    set_coupling(sequence, coupling)
    with torch.no_grad():
        sequence[2].f.linear.bias[0] = value
    with pytest.warns(
        ReconstructionWarning,
        match=r"^the final streams contain NaN or inf, which spread to the stream that `blocks.0.f` reads when it was "
        r"rebuilt, so gradients are NaN even if the loss leaves these elements out.*`Store\(\)`",
    ):
        step(sequence)
    assert sequence[0].g.linear.weight.grad.isnan().any()
    step(sequence)  # Warnings are errors here.


class Exploding(nn.Module):
    """Finite on the first call; if its input differs on the next call, the result is infinite."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.seen = None

    def forward(self, x):
        seen, self.seen = self.seen, x.detach().clone()
        y = self.linear(x)
        return y if seen is None else y + (x.detach() - seen) * torch.inf


def test_nan_caused_by_reversal_raises():
    sequence = ReversibleSequential(*[ReversibleBlock(mlp(8), mlp(8)) for _ in range(3)])
    sequence[1].f = Exploding()
    with pytest.raises(
        ReconstructionError, match=r"that `blocks.0.f` reads contains NaN or inf when it is rebuilt, but did not in"
    ):
        step(sequence)


class Counting(nn.Linear):
    """Returns different numbers on each call."""

    num_calls = 0

    def forward(self, x):
        self.num_calls += 1
        return super().forward(x) * (1 + 1e-3 * self.num_calls)


def test_function_that_does_not_repeat_itself_raises_in_exact_mode():
    sequence = ReversibleSequential(*[ReversibleBlock(mlp(8), mlp(8)) for _ in range(3)])
    sequence[1].f = Counting(8, 8)
    set_coupling(sequence, FixedPoint())
    with pytest.raises(ReconstructionError, match=r"`blocks\.1\.f` returned different numbers when it ran again"):
        step(sequence)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_warns_once_of_low_precision_and_names_remedies(dtype):
    sequence = ReversibleSequential(*[ReversibleBlock(mlp(8), mlp(8)) for _ in range(2)]).to(dtype)
    x = torch.randn(4, 16, dtype=dtype)
    with pytest.warns(
        ReconstructionWarning, match=rf"`blocks.0.f` are {dtype}, so undoing each block .*let autocast comp"
    ):
        sequence(x)
    sequence(x)


@pytest.mark.parametrize("remedy", ["stored", "exact", "bounded"])
def test_does_not_warn_of_harmless_low_precision(remedy):
    options = {"policy": Store()} if remedy == "stored" else {"tolerance": 0.1} if remedy == "bounded" else {}
    sequence = ReversibleSequential(*[ReversibleBlock(mlp(8), mlp(8)) for _ in range(2)], **options).bfloat16()
    if remedy == "exact":
        set_coupling(sequence, FixedPoint())
    sequence(torch.randn(4, 16).bfloat16()).float().sum().backward()
    assert sequence[0].f[0].weight.grad.isfinite().all()


def test_autocast_keeps_streams_in_float32():
    sequence = ReversibleSequential(*[ReversibleBlock(mlp(8), mlp(8)) for _ in range(2)])
    meter = DriftMeter()
    with torch.autocast("cpu", torch.bfloat16), meter.on():
        y = sequence(torch.randn(4, 16).bfloat16())
        assert y.dtype == torch.float32
        y.sum().backward()
    assert {record.dtype for record in meter.records} == {torch.float32}
    assert len(meter.records) == 3
    assert max(float(record.error) for record in meter.records) < 1e-5


def test_meter_records_each_rebuilt_input_once_by_name():
    sequence = steep(4, 0.5)
    sequence.set_policies([Reverse(), Reverse(), Store(), Reverse()])
    meter = DriftMeter()
    with meter.on():
        loss = squares(sequence(torch.randn(4, 16)))
    loss.backward(retain_graph=True)
    loss.backward()
    assert [(record.name, record.distance) for record in meter.records] == [
        ("blocks.3.f", 1),
        ("blocks.1.f", 1),
        ("blocks.0.g", 2),
        ("blocks.0.f", 3),
    ]
    assert meter.records[0].function is sequence[3].f
    assert all(0 <= float(record.error) < 1e-5 for record in meter.records)


def test_meter_records_only_its_own_thread():
    sequence, meter = steep(2, 0.5), DriftMeter()
    with meter.on():
        thread = threading.Thread(target=step, args=(sequence,))
        thread.start()
        thread.join()
    assert meter.records == []


def test_quiet_meter_does_not_warn():
    meter = DriftMeter(is_quiet=True)
    with meter.on():
        step(steep())
        step(steep(2).bfloat16(), torch.randn(4, 16).bfloat16())
    assert len(meter.records) > 0


@pytest.mark.parametrize("where", ["fake", "meta"])
def test_does_not_judge_tensors_without_values(where):
    with FakeTensorMode() if where == "fake" else torch.device("meta"):
        sequence = steep(8)
        step(sequence, torch.randn(4, 16))
        assert sequence[0].f.linear.weight.grad.shape == (8, 8)


@pytest.mark.parametrize("shape", [(), (3,), (10**7,), (7, 10**5), (8, 32, 32, 32), (2, 1, 1, 4096), (1000, 2)])
def test_samples_are_small_and_spread(shape):
    x = torch.empty(()).expand(shape)
    taken = sample(x)
    assert min(x.numel(), MOST_SAMPLED // 2) <= taken.numel() <= MOST_SAMPLED
    if len(shape) > 1:
        assert all(size > 1 or full_size == 1 for size, full_size in zip(taken.shape, shape, strict=True))


@pytest.mark.parametrize(
    "shape",
    [(64, 64), (32, 32), (65, 65), (30, 30), (210, 21), (128, 256), (8, 64, 64), (128, 64, 8, 8), (9, 33, 7, 7)],
)
@pytest.mark.parametrize("transposed", [False, True])
def test_every_part_of_a_stream_is_judged(shape, transposed):
    x = torch.randn(shape)
    parts = parts_of(x.mT.contiguous().mT if transposed else x)
    assert [count for _, count in parts.groups] == list(shape[: 2 if len(shape) == 4 else 3])
    for part, count in parts.groups:
        assert len(part) == len(parts.values)
        assert np.bincount(part, minlength=count).min() >= LEAST


@pytest.mark.parametrize("scale", [1e-30, 1e-20])
def test_tolerance_bounds_the_error_of_tiny_streams(scale):
    """The squares of their elements are zero in float32; after the first block, the streams have a size of 1."""
    blocks = [ReversibleBlock(*[nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2)]) for _ in range(3)]
    sequence = ReversibleSequential(*blocks, tolerance=1e-3)
    twin, x = stored_twin(sequence), scale * torch.randn(4, 16)
    for _ in range(3):  # The first run learns where to hold streams.
        for module in (sequence, twin):
            module.zero_grad()
            squares(module(x)).backward()
    for actual, expected in zip(sequence.parameters(), twin.parameters(), strict=True):
        size = expected.grad.double().norm()
        assert (actual.grad.double() - expected.grad.double()).norm() <= 1e-2 * size


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_relative_error_of_samples_whose_squares_leave_float32(scale):
    x = scale * torch.randn(64, 8)
    assert relative_error(1.1 * x, x) == pytest.approx(0.1, rel=1e-4)
    assert relative_error(x, x) == 0


@pytest.mark.parametrize("value", [torch.inf, 1e200])
def test_ignores_the_settings_of_numpy_for_warnings(value):
    """Parts of a stream are compared in the first run."""
    sequence = ReversibleSequential(*[ReversibleBlock(mlp(8), mlp(8)) for _ in range(2)]).double()
    x = torch.randn(64, 16, dtype=torch.float64)
    x[0, 0] = value
    with np.errstate(all="raise"):
        sequence(x)[1:].square().sum().backward()


def test_relative_error_of_samples():
    x = torch.tensor([3.0, 4.0])
    assert relative_error(x, x) == 0
    assert relative_error(x * 1.1, x) == pytest.approx(0.1, rel=1e-4)
    zero = torch.zeros(2)
    assert relative_error(zero, zero) == 0
    assert relative_error(zero + 1e-7, zero) > 1
    assert relative_error(zero + 1e-7, zero, torch.tensor(1e-3)) == pytest.approx(1e-4, rel=1e-4)
    assert relative_error(torch.tensor([torch.nan, 1.0]), x).isnan()
    assert relative_error(x.to(torch.complex64) * 1.1j, x * 1j) == pytest.approx(0.1, rel=1e-4)
