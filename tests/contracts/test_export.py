"""Exporting a reversible network: the file has the plain computation, with a dynamic batch."""

import subprocess
import sys

import pytest
import torch
from torch.export import Dim, export, save

from revnet import Checkpoint, Offload, Reverse, ReversibleSequential, Store
from tests.helpers import CASE, assert_close

POLICIES = {"reverse": Reverse(), "checkpoint": Checkpoint(), "offload": Offload(), "store": Store()}
all_policies = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
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
def test_exported_program_runs_without_revnet(tmp_path):
    names = []
    for name, policy in POLICIES.items():
        for strict in (False, True):
            sequence = sequence_of(policy)
            program = export(sequence, (torch.randn(3, 6, 5, 5),), dynamic_shapes=DYNAMIC_BATCH, strict=strict)
            names.append(str(tmp_path / f"{name}-{strict}"))
            save(program, f"{names[-1]}.pt2")
            x = torch.randn(5, 6, 5, 5)
            torch.save((x, sequence(x).detach()), f"{names[-1]}.pt")
    subprocess.run([sys.executable, "-c", LOAD, *names], check=True, capture_output=True)


@pytest.mark.parametrize("strict", [False, True])
def test_tolerance_does_not_prevent_exports(strict):
    sequence = ReversibleSequential(*sequence_of(Reverse()), tolerance=1e-3).eval()
    x = torch.randn(3, 6, 5, 5)
    assert_close(export(sequence, (x,), strict=strict).module()(x), sequence(x), tolerance=1e-6)


@all_policies
@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_traced_by_torch_jit(policy):
    sequence = sequence_of(policy).eval()
    traced = torch.jit.trace(sequence, torch.randn(3, 6, 5, 5))
    x = torch.randn(5, 6, 5, 5)
    assert_close(traced(x), sequence(x), tolerance=1e-6)


@all_policies
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_written_as_onnx(policy, tmp_path):
    pytest.importorskip("onnxscript")
    x = torch.randn(3, 6, 5, 5)
    torch.onnx.export(
        sequence_of(policy).eval(), (x,), tmp_path / "model.onnx", dynamo=True, dynamic_shapes=DYNAMIC_BATCH
    )
