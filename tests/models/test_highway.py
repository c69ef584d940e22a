import pytest
import torch
import torch.nn.functional as F
from torch import nn

from revnet import Checkpoint, Offload, Store, create_model, set_policy
from revnet.memory import measure, predict
from revnet.models import Highway
from revnet.models.highway import HighwayLayer, PlainLayer, ResidualLayer
from tests.helpers import squares

LAYERS = ("highway", "plain", "residual")


def make_layer(kind, *, norm):
    options = {"gate_bias": -1.0} if kind is HighwayLayer else {}
    layer = kind(4, norm=norm, **options).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


@pytest.mark.parametrize("norm", [False, True])
def test_highway_layer_follows_the_equation(norm):
    layer = make_layer(HighwayLayer, norm=norm)
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    h = F.conv2d(x, layer.transform[0].weight, layer.transform[0].bias, padding=1)
    if norm:
        mean, variance = h.mean((0, 2, 3), keepdim=True), h.var((0, 2, 3), correction=0, keepdim=True)
        h = (h - mean) / (variance + 1e-3).sqrt()
        h = h * layer.transform[1].weight[:, None, None] + layer.transform[1].bias[:, None, None]
    h = h.clamp(min=0)
    t = 1 / (1 + (-F.conv2d(x, layer.gate.weight, layer.gate.bias, padding=1)).exp())
    torch.testing.assert_close(layer(x), t * h + (1 - t) * x)


def test_other_layers_have_the_same_transform():
    highway = make_layer(HighwayLayer, norm=False)
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    for kind, shortcut in ((PlainLayer, 0), (ResidualLayer, 1)):
        layer = make_layer(kind, norm=False)
        layer.transform.load_state_dict(highway.transform.state_dict())
        assert torch.equal(layer(x), shortcut * x + highway.transform(x))


def test_highway_layer_passes_gradcheck():
    layer = make_layer(HighwayLayer, norm=False)
    x = torch.randn(1, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))


def test_a_closed_gate_passes_the_input_on():
    model = Highway(num_layers=(20,), width=8, gate_bias=-200)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(model.forward_features(x), model.stem(x))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("norm", [False, True])
def test_depth_and_shapes(layer, norm):
    model = Highway(num_layers=(2, 1, 3), width=6, layer=layer, norm=norm, stem_stride=2, in_channels=1)
    y, maps = model.forward_intermediates(torch.randn(2, 1, 17, 16))
    sides = [(9, 8), (9, 8), (5, 4), (3, 2)]
    assert [map_.shape for map_ in maps] == [(2, 6, *side) for side in sides]
    assert y.shape == (2, 6, 3, 2)
    assert len(model.stages) == 3
    assert sum(isinstance(module, HighwayLayer | PlainLayer | ResidualLayer) for module in model.modules()) == 6


def test_initial_gate_biases():
    for options, bias in (({}, -2.0), ({"gate_bias": -1}, -1.0)):
        model = Highway(num_layers=(2, 2), width=4, **options)
        gates = [module.gate for module in model.modules() if isinstance(module, HighwayLayer)]
        assert len(gates) == 4
        assert all(torch.equal(gate.bias, torch.full((4,), bias)) for gate in gates)


@pytest.mark.parametrize(
    ("name", "num_parameters", "num_weights"),
    [("highway20", 84_138, 20), ("highway110", 501_738, 110), ("plain20", 42_378, 20), ("plain110", 251_178, 110)],
)
def test_published_names_count_layers_with_weights(name, num_parameters, num_weights):
    with torch.device("meta"):
        model = create_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters
    is_weight = [name.endswith(("0.weight", "head.weight")) for name, _ in model.named_parameters()]
    assert sum(is_weight) == num_weights


@pytest.mark.parametrize("policy", [Checkpoint(), Offload()])
@pytest.mark.parametrize("layer", LAYERS)
def test_policies_give_the_gradients_of_the_stored_layers_bit_for_bit(layer, policy):
    model = Highway(num_layers=(2, 2), width=4, layer=layer, norm=True)
    x = torch.randn(3, 3, 8, 8)
    results, statistics = [], []
    start = {name: value.clone() for name, value in model.state_dict().items()}
    for current in (Store(), policy):
        model.load_state_dict(start)
        set_policy(model, current)
        y = model(x)
        results.append([y, *torch.autograd.grad(squares(y), list(model.parameters()))])
        statistics.append([buffer.clone() for buffer in model.buffers()])
    for stored, other in (*zip(*results, strict=True), *zip(*statistics, strict=True)):
        assert torch.equal(stored, other)


def test_bytes_are_predicted():
    model = Highway(num_layers=(4,), width=4)
    x = torch.randn(2, 3, 8, 8)
    stored = predict(model, x)
    assert stored.held_bytes == measure(model, x).held_bytes
    set_policy(model, Checkpoint())
    checkpointed = predict(model, x)
    assert checkpointed.held_bytes == measure(model, x).held_bytes
    # Each layer stores H and T, next to its input. `lerp` stores nothing else.
    one_map = 4 * x[:, :1].numel() * x.element_size()
    assert stored.held_bytes - checkpointed.held_bytes == 4 * 2 * one_map


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_layers": ()}, ValueError, r"`num_layers` \(=\(\)\) must have at least one stage, such as \(6, 6, 6\)"),
        ({"num_layers": 6}, TypeError, r"`num_layers` \(=6\) must be a sequence of integers"),
        ({"num_layers": (2, 0)}, ValueError, r"`num_layers\[1\]` \(=0\) must be a positive integer"),
        ({"width": 0}, ValueError, r"`width` \(=0\) must be a positive integer"),
        ({"layer": "dense"}, ValueError, r"`layer` \(='dense'\) must be 'highway' or 'plain' or 'residual'"),
        ({"gate_bias": "-2"}, ValueError, r"`gate_bias` \(='-2'\) must be a number; -2 is usual"),
        ({"gate_bias": float("nan")}, ValueError, r"`gate_bias` \(=nan\) must be a number; -2 is usual"),
        (
            {"gate_bias": -2, "layer": "plain"},
            ValueError,
            r"`gate_bias` \(=-2\) is for highway layers, and plain layers have no gates; leave it out, or pass",
        ),
        ({"norm": 1}, TypeError, r"`norm` \(=1\) must be True or False"),
        ({"stem_stride": -1}, ValueError, r"`stem_stride` \(=-1\) must be a positive integer"),
    ],
)
def test_rejects_wrong_options(options, error, message):
    with pytest.raises(error, match=message):
        Highway(**{"num_layers": (1,), "width": 4} | options)
