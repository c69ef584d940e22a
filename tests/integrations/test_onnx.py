"""ONNX files in onnxruntime equal PyTorch, at a batch size of 1 too."""

import pytest
import torch
from torch.export import Dim

from revnet.training.export.inference import read_inference
from revnet.training.export.write import write_inference
from revnet.training.run.checkpoint import save_weights
from tests.helpers import CASE
from tests.training.samples import make_header, save_checkpoint
from tests.training.test_export import MODULES

onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # Warnings of the exporter.


@pytest.mark.parametrize("name", MODULES)
def test_every_family(name, tmp_path):
    torch.manual_seed(0)
    save_weights(MODULES[name](), tmp_path / "last.safetensors")
    report = write_inference(read_inference(tmp_path / "last.safetensors"), tmp_path / "last.onnx", "onnx")
    assert 0 < report.difference < 1e-5


def test_reversible_classifier_and_its_metadata(tmp_path):
    torch.manual_seed(0)
    file = save_checkpoint(tmp_path / "last.safetensors", make_header(model="revnet38"))
    report = write_inference(read_inference(file), tmp_path / "last.onnx", "onnx")
    assert 0 < report.difference < 1e-5
    model = onnx.load(tmp_path / "last.onnx")
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata["labels"] == '["cat", "dog", "frog"]'
    assert metadata["mean"] == "[128.0, 128.0, 128.0]"
    assert {node.domain for node in model.graph.node} == {""}, "only standard operators"
    assert b"site-packages" not in (tmp_path / "last.onnx").read_bytes()


@pytest.mark.parametrize("name", ["conv", "mlp", "affine-conv", "momentum", "three-streams"])
def test_plain_call_of_the_exporter(name, tmp_path):
    """Gradients are enabled, and the blocks reverse, as users leave them."""
    sequence = CASE[name].sequence(2).float().eval()
    x = CASE[name].input(requires_grad=False).float()
    torch.onnx.export(
        sequence, (x,), tmp_path / "model.onnx", dynamo=True, dynamic_shapes=({0: Dim("batch")},), verbose=False
    )
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for batch in (1, 7):
        x = torch.randn(batch, *x.shape[1:])
        (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), sequence(x).detach(), rtol=1e-5, atol=1e-5)
