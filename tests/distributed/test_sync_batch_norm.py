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


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.BatchNorm2d, BatchNorm2dBiased, BatchNorm2dUnbiased])
def test_shared_norms_stay_shared(norm):
    model = nn.Module()
    model.a = model.b = norm(4)
    shared = norm(4)
    model.p, model.q = nn.Sequential(shared), nn.ModuleDict({"other": shared})
    model.again = model.p
    assert synchronize_batch_norms(model) == 2
    assert isinstance(model.a, nn.SyncBatchNorm)
    assert model.a is model.b
    assert isinstance(model.p[0], nn.SyncBatchNorm)
    assert model.p[0] is model.q["other"]
    assert model.a is not model.p[0]
    assert synchronize_batch_norms(model) == 0


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, BatchNorm2dUnbiased])
def test_hooks_and_attributes_are_kept(norm, monkeypatch):
    monkeypatch.setattr(nn.SyncBatchNorm, "forward", nn.modules.batchnorm._BatchNorm.forward)
    monkeypatch.setattr(nn.SyncBatchNorm, "_check_input_dim", lambda *_: None)
    model, calls = nn.Sequential(norm(2, eps=0.5, momentum=0.3)), []

    def note(name):
        return lambda module, *_: calls.append((name, module))

    old = model[0]
    handles = [
        old.register_forward_pre_hook(note("pre")),
        old.register_forward_hook(note("forward")),
        old.register_full_backward_hook(note("backward")),
        old.register_full_backward_pre_hook(note("backward pre")),
        old.register_state_dict_pre_hook(note("state")),
        old.register_load_state_dict_pre_hook(note("load")),
        old.register_load_state_dict_post_hook(note("loaded")),
    ]
    old.register_forward_hook(lambda module, args, y: 2 * y)
    old.custom = 3
    old.weight.requires_grad_(False)
    old.eval()
    assert synchronize_batch_norms(model) == 1
    new = model[0]
    del old
    assert (new.custom, new.eps, new.momentum, new.training) == (3, 0.5, 0.3, False)
    assert (new.weight.requires_grad, new.bias.requires_grad) == (False, True)
    new.train()
    x = torch.randn(2, 2, 3, 3, requires_grad=True)
    assert_close = torch.testing.assert_close
    assert_close(new(x).mean(), torch.zeros(()), atol=1e-6, rtol=0)
    assert_close(new(x).std(), 2 * norm(2, eps=0.5)(x).std())
    calls.clear()
    model(x).square().sum().backward()
    model.load_state_dict(model.state_dict())
    names = ["pre", "forward", "backward pre", "backward", "state", "load", "loaded"]
    assert calls == [(name, new) for name in names]
    for handle in handles:
        handle.remove()
    calls.clear()
    model(x)
    assert calls == []


class Doubled(nn.BatchNorm1d):
    def forward(self, x):
        return 2 * super().forward(x)


def norm_with(kind):
    norm = nn.BatchNorm1d(3)
    if kind == "subclass":
        return Doubled(3)
    if kind == "instance":
        norm.forward = lambda x: x
    elif kind == "parametrization":
        nn.utils.parametrize.register_parametrization(norm, "weight", nn.Softplus())
    else:
        return nn.LazyBatchNorm1d()
    return norm


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("subclass", r"`1` \(=Doubled\) has a `forward` of its own, which a synchronized batch norm would leave out"),
        ("instance", "has a `forward` of its own"),
        ("parametrization", "has a parametrization of its own"),
        ("lazy", r"`1` \(=LazyBatchNorm1d\) does not know its number of features yet; call the model once"),
    ],
)
def test_rejects_norms_that_it_cannot_repeat(kind, message):
    model = nn.Sequential(nn.BatchNorm1d(3), norm_with(kind))
    with pytest.raises(ValueError, match=message):
        synchronize_batch_norms(model)
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in model)
