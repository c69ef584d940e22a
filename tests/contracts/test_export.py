"""Exporting a reversible network: the file has the plain computation, with a dynamic batch."""

import subprocess
import sys

import pytest
import torch
from torch.export import Dim, export, save

from revnet import (
    Checkpoint,
    FixedPoint,
    Offload,
    Reverse,
    ReversibleSequential,
    Store,
    create_model,
    list_models,
    set_coupling,
)
from revnet.coupling import BDIA, ExactScaled, Scaled
from revnet.models import ReversibleEncoderDecoder, ReversibleTransformer, UNet3d
from tests.helpers import CASE, REVERSIBLE_MODELS, assert_close, model_input

POLICIES = {"reverse": Reverse(), "checkpoint": Checkpoint(), "offload": Offload(), "store": Store()}
all_policies = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
# `torch.jit.trace` is deprecated: a DeprecationWarning, and a FutureWarning in newer releases.
traces = pytest.mark.filterwarnings(
    "ignore:.torch.jit", "ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning"
)
DYNAMIC_BATCH = ({0: Dim("batch", min=2)},)

# This program cannot import revnet, like a server without it.
LOAD = """
import sys, torch
sys.modules["revnet"] = None
for name in sys.argv[1:]:
    x, y = torch.load(f"{name}.pt")
    assert torch.equal(torch.export.load(f"{name}.pt2").module()(x), y), name
"""


def sequence_of(policy):
    return CASE["conv"].sequence(2, policy).float()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_exported_program_runs_without_revnet(tmp_path, strict):
    names = []
    for name, policy in POLICIES.items():
        sequence = sequence_of(policy)
        program = export(sequence, (torch.randn(3, 6, 5, 5),), dynamic_shapes=DYNAMIC_BATCH, strict=strict)
        names.append(str(tmp_path / name))
        save(program, f"{names[-1]}.pt2")
        x = torch.randn(5, 6, 5, 5)
        torch.save((x, sequence(x).detach()), f"{names[-1]}.pt")
    subprocess.run([sys.executable, "-c", LOAD, *names], check=True, capture_output=True)


@pytest.mark.parametrize(
    "coupling", [FixedPoint(), ExactScaled(Scaled(-1.0)), ExactScaled(Scaled(0.5)), BDIA()], ids=str
)
def test_exported_exact_couplings_have_gradients(coupling):
    sequence = sequence_of(Reverse())
    set_coupling(sequence, coupling)
    sequence.eval()
    x = torch.randn(3, 6, 5, 5)
    program = export(sequence, (x,)).module()
    y, expected = program(x), sequence(x)
    assert torch.equal(y, expected)
    y.square().sum().backward()
    actual = [parameter.grad.clone() for parameter in program.parameters()]
    sequence.zero_grad()
    sequence(x).square().sum().backward()
    assert any(grad.abs().sum() > 0 for grad in actual)
    for grad, parameter in zip(actual, sequence.parameters(), strict=True):
        assert_close(grad, parameter.grad)


@pytest.mark.parametrize("strict", [False, True])
def test_tolerance_does_not_prevent_exports(strict):
    sequence = ReversibleSequential(*sequence_of(Reverse()), tolerance=1e-3).eval()
    x = torch.randn(3, 6, 5, 5)
    assert_close(export(sequence, (x,), strict=strict).module()(x), sequence(x), tolerance=1e-6)


@all_policies
@traces
def test_traced_by_torch_jit(policy):
    sequence = sequence_of(policy).eval()
    traced = torch.jit.trace(sequence, torch.randn(3, 6, 5, 5))
    x = torch.randn(5, 6, 5, 5)
    assert_close(traced(x), sequence(x), tolerance=1e-6)


@traces
@pytest.mark.parametrize("name", [name for name in REVERSIBLE_MODELS if "transformer" in name])
def test_transformers_are_traced_with_their_hashes(name):
    model = REVERSIBLE_MODELS[name]().double().eval()
    tokens = torch.randint(10, (2, 50))
    traced = torch.jit.trace(model, tokens)
    for batch in (2, 3):
        tokens = torch.randint(10, (batch, 50))
        assert_close(traced(tokens), model(tokens))


@traces
def test_a_trace_rounds_to_the_grid():
    sequence = CASE["conv"].sequence(2).float().eval()
    set_coupling(sequence, FixedPoint(fraction_bits=2))
    traced = torch.jit.trace(sequence, torch.randn(3, 6, 5, 5))
    x = torch.randn(5, 6, 5, 5)
    assert torch.equal(traced(x), sequence(x))
    assert torch.equal(traced(x), (4 * traced(x)).round() / 4)


@all_policies
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_written_as_onnx(policy, tmp_path):
    pytest.importorskip("onnxscript")
    x = torch.randn(3, 6, 5, 5)
    torch.onnx.export(
        sequence_of(policy).eval(), (x,), tmp_path / "model.onnx", dynamo=True, dynamic_shapes=DYNAMIC_BATCH
    )


@pytest.mark.parametrize("name", ["flow-step", "affine-conv", "momentum"])
def test_densities_have_a_dynamic_batch(name):
    """The log-determinants have the shape of the batch."""

    class LogDet(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.sequence = CASE[name].sequence(2)

        def forward(self, x):
            return self.sequence.forward_with_log_det(x)

    module, x = LogDet().eval(), CASE[name].input(requires_grad=False)
    program = export(module, (x,), dynamic_shapes=DYNAMIC_BATCH)
    for batch in (1, 7):
        x = torch.randn(batch, *x.shape[1:], dtype=x.dtype)
        assert_close(program.module()(x), module(x))


@traces
@pytest.mark.parametrize(
    "strict",
    [
        pytest.param(False, id="export"),
        pytest.param(True, id="strict", marks=pytest.mark.slow),
        pytest.param(None, id="trace"),
    ],
)
def test_language_model_that_computes_in_chunks_has_a_dynamic_length(strict):
    model = ReversibleTransformer(vocab_size=9, dim=8, depth=2, num_heads=2, max_length=32, ff_chunks=3).eval()
    tokens = torch.randint(9, (2, 10))
    shapes = ({0: Dim("batch", min=2), 1: Dim("length", min=2, max=32)},)
    if strict is None:
        program = torch.jit.trace(model, tokens)
    else:
        program = export(model, (tokens,), dynamic_shapes=shapes, strict=strict).module()
    for shape in ((2, 10), (3, 17), (5, 4)):
        tokens = torch.randint(9, shape)
        assert_close(program(tokens), model(tokens), tolerance=1e-5)  # in float32


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_encoder_and_decoder_have_a_dynamic_batch(strict):
    model = ReversibleEncoderDecoder(
        vocab_size=9, dim=8, encoder_depth=1, decoder_depth=1, num_heads=2, max_length=16
    ).eval()
    tokens = torch.randint(9, (2, 5)), torch.randint(9, (2, 4))
    batch = Dim("batch", min=2)
    program = export(model, tokens, dynamic_shapes=({0: batch}, {0: batch}), strict=strict).module()
    tokens = torch.randint(9, (7, 5)), torch.randint(9, (7, 4))
    assert_close(program(*tokens), model(*tokens), tolerance=1e-5)


@pytest.mark.slow  # `tests/models/test_unet3d.py` compiles a U-Net for several sizes.
def test_volumes_have_dynamic_sides():
    model = UNet3d(in_channels=1, num_classes=2, widths=(4, 8)).eval()
    sides = {axis: 2 * Dim(f"half{axis}", min=2) for axis in (2, 3, 4)}
    program = export(model, (torch.randn(1, 1, 8, 12, 16),), dynamic_shapes=(sides,), strict=True).module()
    x = torch.randn(1, 1, 16, 8, 12)
    assert_close(program(x), model(x), tolerance=1e-4)


def own_inputs(name):
    """Return small models of all kinds with an input, and the registered ones with images of the smallest size."""
    if name in REVERSIBLE_MODELS:
        model = REVERSIBLE_MODELS[name]()
        return model, model_input(model)
    if name == "unet3d":
        return UNet3d(in_channels=1, num_classes=2, widths=(4, 8)), torch.randn(2, 1, 8, 8, 8, dtype=torch.float64)
    size = 224 if name in ("revvit_base", "revvit_small") else 32
    return create_model(name), torch.randn(2, 3, size, size, dtype=torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*REVERSIBLE_MODELS, "unet3d", *sorted(set(list_models()) - set(REVERSIBLE_MODELS))])
def test_every_model(name):
    model, x = own_inputs(name)
    # In float64, in which an attention that hashes, or a grid, is unlikely to round to another side.
    program = export(model.double().eval(), (x,), dynamic_shapes=DYNAMIC_BATCH)
    assert not [node for node in program.graph.nodes if "revnet" in str(node.target)]
    for batch in (1, 3):
        x = x[:1].repeat(batch, *[1] * (x.dim() - 1))
        assert_close(program.module()(x), model(x), tolerance=1e-7)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Warnings of Inductor.
def test_compiled_ahead_of_time(tmp_path):
    model = create_model("revnet38").eval()
    program = export(model, (torch.randn(3, 3, 32, 32),), dynamic_shapes=DYNAMIC_BATCH)
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    x = torch.randn(7, 3, 32, 32)
    assert_close(torch._inductor.aoti_load_package(package)(x), model(x), tolerance=1e-5)


@traces
def test_graph_of_tensorboard(tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard", reason="tensorboard is not installed")
    with tensorboard.SummaryWriter(tmp_path) as writer:
        writer.add_graph(sequence_of(Reverse()).eval(), torch.randn(3, 6, 5, 5))
    assert next(tmp_path.iterdir()).stat().st_size > 1000
