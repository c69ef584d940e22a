import pytest
import torch
from torch import nn

from revnet.distributed import synchronize_batch_norms
from revnet.distributed._sync_batch_norm import SyncBatchNorm2d
from revnet.models import create_model
from revnet.nn import BatchNorm2dBiased, BatchNorm2dUnbiased


def test_replaces_each_batch_norm_and_keeps_its_tensors():
    model = create_model("revnet38", num_classes=10, in_channels=3)
    model.stem.append(nn.BatchNorm2d(32))
    tensors = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    parameters = [id(parameter) for parameter in model.parameters()]
    count = synchronize_batch_norms(model)
    norms = [module for module in model.modules() if isinstance(module, nn.SyncBatchNorm)]
    assert count == len(norms) == sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    assert sum(type(norm) is nn.SyncBatchNorm for norm in norms) == 1
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == tensors
    assert [id(parameter) for parameter in model.parameters()] == parameters
    assert synchronize_batch_norms(model) == 0


@pytest.mark.parametrize("momentum", [0.1, 0.0, None])
@pytest.mark.parametrize("norm_type", [BatchNorm2dBiased, BatchNorm2dUnbiased])
def test_running_statistics_are_averaged_as_before(norm_type, momentum, monkeypatch):
    """PyTorch's class refuses to run on a CPU, so an ordinary batch norm takes its part."""
    norm = norm_type(3, momentum=momentum)
    model = nn.Sequential(norm_type(3, momentum=momentum))
    synchronize_batch_norms(model)
    assert isinstance(model[0], SyncBatchNorm2d)
    monkeypatch.setattr(nn.SyncBatchNorm, "forward", nn.modules.batchnorm._BatchNorm.forward)
    monkeypatch.setattr(nn.SyncBatchNorm, "_check_input_dim", lambda *_: None)
    for _ in range(3):
        x = torch.randn(2, 3, 2, 3)
        assert torch.equal(model(x), norm(x))
    assert model[0].momentum == momentum
    assert model[0].num_batches_tracked == 3
    assert torch.allclose(model[0].running_var, norm.running_var, rtol=1e-6)
    assert torch.equal(model[0].running_mean, norm.running_mean)
    model.eval(), norm.eval()
    assert torch.allclose(model(x), norm(x), rtol=1e-5)


def test_rejects_a_single_batch_norm():
    with pytest.raises(
        ValueError, match=r"`model` \(=BatchNorm2dBiased\) is a batch norm.*pass the model that contains"
    ):
        synchronize_batch_norms(BatchNorm2dBiased(2))


def test_the_converter_of_pytorch_names_the_way_out():
    with pytest.raises(
        NotImplementedError, match=r"call `revnet.distributed.synchronize_batch_norms\(model\)` instead"
    ):
        nn.SyncBatchNorm.convert_sync_batchnorm(create_model("resnet32"))
