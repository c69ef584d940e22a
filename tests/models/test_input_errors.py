"""Inputs of a wrong dtype or shape raise one line that names them, and right ones are never refused."""

import pytest
import torch
from torch import nn

from revnet import Checkpoint, set_policy
from revnet.models import NICE, Highway, IRevNet, ResNet, ReversibleViT, RevNet, UNet3d

RESNET = {"num_blocks": (1, 1), "widths": (4, 4, 8), "num_classes": 2}
# Streams of 16 bits warn.
pytestmark = pytest.mark.filterwarnings("ignore::revnet.ReconstructionWarning")
MODELS = {
    "ResNet": lambda: ResNet(**RESNET),
    "RevNet": lambda: RevNet(**RESNET),
    "Highway": lambda: Highway(num_layers=(1, 1), width=4, num_classes=2),
    "IRevNet": lambda: IRevNet(num_blocks=(1, 1), strides=(1, 2), num_classes=2),
    "ReversibleViT": lambda: ReversibleViT(img_size=8, patch_size=4, dim=8, depth=1, num_heads=2, num_classes=2),
    "NICE": lambda: NICE(image_shape=(3, 8, 8), num_couplings=2, hidden_dim=4, num_hidden=1),
    "UNet3d": lambda: UNet3d(in_channels=3, widths=(4, 8)),
}
CLASSIFIERS = ("ResNet", "RevNet", "Highway", "IRevNet", "ReversibleViT")


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]().eval()


def make_input(model, dtype=torch.float32):
    shape = (2, 3, 8, 8, 8) if isinstance(model, UNet3d) else (2, 3, 8, 8)
    return torch.rand(shape).mul(100).to(dtype)


def catch(model, x):
    """Return the error of the model on `x`, in one line."""
    with pytest.raises((TypeError, ValueError)) as caught:
        model(x)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("`x`")
    return caught.type, message


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool])
def test_integers_are_refused(model, dtype):
    kind, message = catch(model, make_input(model, dtype))
    assert kind is TypeError
    assert message.startswith(f"`x` has dtype {dtype}, but must be floating-point")
    assert "`x.float()`" in message or isinstance(model, NICE)


@pytest.mark.parametrize(
    ("weights", "dtype", "way_out"),
    [
        (torch.float32, torch.float64, "`x.float()`, or convert the model with `model.to(torch.float64)`"),
        (torch.float32, torch.float16, "`x.float()`"),
        (torch.float32, torch.bfloat16, "`x.float()`"),
        (torch.float64, torch.float32, "`x.double()`, or convert the model with `model.to(torch.float32)`"),
        (torch.bfloat16, torch.float32, "`x.bfloat16()`"),
    ],
)
def test_another_dtype_than_the_weights_is_refused(model, weights, dtype, way_out):
    kind, message = catch(model.to(weights), make_input(model, dtype))
    assert kind is TypeError
    assert message.startswith(f"`x` has dtype {dtype}, but the weights of the model have {weights}; pass {way_out}")


def test_dtype_of_the_weights_works(model):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert model.to(dtype)(make_input(model, dtype)) is not None


def test_autocast_converts_all_but_float64(model):
    with torch.autocast("cpu", torch.bfloat16):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            assert model(make_input(model, dtype)) is not None
        assert catch(model, make_input(model, torch.float64))[0] is TypeError
        if isinstance(model, UNet3d):
            assert model.double()(make_input(model, torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize("method", ["forward", "forward_features", "forward_intermediates"])
def test_wrong_channels_are_refused(name, method):
    function = getattr(MODELS[name]().eval(), method)
    message = r"`x` \(of shape \(2, 4, 8, 8\)\) has 4 channels, but must have 3, as the model was built"
    with pytest.raises(ValueError, match=message):
        function(torch.rand(2, 4, 8, 8))
    with pytest.raises(ValueError, match=r"for channels in the last dimension pass `x.movedim\(-1, 1\)`"):
        function(torch.rand(2, 16, 16, 3))
    with pytest.raises(ValueError, match=r"`x` \(of shape \(2, 3, 8, 0\)\) must not be empty"):
        function(torch.rand(2, 3, 8, 0))
    with pytest.raises(TypeError, match=r"`x` has dtype torch.float64"):
        function(torch.rand(2, 3, 8, 8, dtype=torch.float64))


def test_inverse_path_of_irevnet_explains_its_input():
    with pytest.raises(TypeError, match=r"`x` has dtype torch.float64"):
        MODELS["IRevNet"]().eval().forward_invertible(torch.rand(2, 3, 8, 8, dtype=torch.float64))
    with pytest.raises(
        TypeError, match=r"`y` has dtype torch.float64, but the weights of the model have torch.float32"
    ):
        MODELS["IRevNet"]().eval().inverse(torch.rand(2, 48, 2, 2, dtype=torch.float64))


def test_empty_volume_is_refused():
    with pytest.raises(ValueError, match=r"`x` \(of shape \(1, 3, 8, 8, 0\)\) must not be empty"):
        MODELS["UNet3d"]()(torch.rand(1, 3, 8, 8, 0))
    assert MODELS["UNet3d"]()(torch.rand(0, 3, 8, 8, 8)).shape == (0, 3, 8, 8, 8)


def test_complex_input_is_refused(model):
    kind, message = catch(model, make_input(model, torch.complex64))
    assert kind is TypeError
    assert "pass `x.real`." in message or isinstance(model, NICE)


def test_explains_under_a_policy_for_the_stem():
    model = MODELS["RevNet"]()
    set_policy(model, Checkpoint())
    assert catch(model, torch.rand(2, 3, 8, 8, dtype=torch.float64))[0] is TypeError


def test_hook_may_convert_the_input(model):
    """Layers that convert their input, as sharding in mixed precision does, are not second-guessed."""
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Conv3d | nn.Linear))
    first.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
    if isinstance(model, UNet3d | ReversibleViT):
        assert model(make_input(model, torch.float64)) is not None


def test_other_errors_stay_as_they_are(model):
    def fail(*_):
        raise RuntimeError("a bug of a hook")

    def exhaust(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Conv3d | nn.Linear))
    handle = first.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="a bug of a hook"):
        model(make_input(model))
    handle.remove()
    first.register_forward_pre_hook(exhaust)
    with pytest.raises(torch.OutOfMemoryError):
        model(make_input(model, torch.float64))


@pytest.mark.parametrize(("name", "multiple"), [("ResNet", 1), ("RevNet", 1), ("IRevNet", 4), ("ReversibleViT", 4)])
def test_size_multiple_of_classifiers(name, multiple):
    model = MODELS[name]().eval()
    assert model.size_multiple == multiple
    assert model.in_channels == 3
    assert model(torch.rand(1, 3, 3 * multiple, 2 * multiple)).shape == (1, 2)


def test_size_multiple_of_volumes():
    assert UNet3d(widths=(4, 8, 8)).size_multiple == 4
