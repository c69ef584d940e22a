import csv
from importlib.resources import files

import pytest
import torch

from revnet import create_model, list_models
from revnet.memory import count_flops
from revnet.models import published_image_size
from revnet.models._registry import _ENTRIES, register_model

CIFAR = {
    *("highway20", "highway110", "irevnet_cifar", "plain20", "plain110", "resnet32", "resnet110", "resnet164"),
    *("revnet38", "revnet110", "revnet164", "revvit_cifar"),
}
SIDES = {"irevnet_cifar": 4, "revvit_cifar": 8, "revvit_small": 14, "revvit_base": 14}
"""Number of final features of the networks that are not in the paper."""
FIGURES = (files("revnet") / "models" / "published.csv").read_text().splitlines()
QUICK = {"plain20", "revvit_cifar"}
"""Models whose operations are counted quickly."""


def make_on_meta(name, **options):
    with torch.device("meta"):
        return create_model(name, **options)


def test_names_are_listed_in_numeric_order():
    assert list_models() == [
        "highway20",
        "highway110",
        "irevnet301",
        "irevnet_cifar",
        "plain20",
        "plain110",
        "resnet32",
        "resnet50",
        "resnet101",
        "resnet110",
        "resnet164",
        "revnet38",
        "revnet56",
        "revnet104",
        "revnet110",
        "revnet164",
        "revvit_base",
        "revvit_cifar",
        "revvit_small",
    ]


@pytest.mark.parametrize("name", ["highway20", "irevnet_cifar", "plain20", "resnet32", "revnet38", "revvit_cifar"])
def test_a_model_trains_one_step(name):
    model = create_model(name, num_classes=7, in_channels=1)
    logits = model(torch.randn(2, 1, 8, 8))
    assert logits.shape == (2, 7)
    logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", list_models())
def test_shapes_at_the_published_image_size(name):
    size, side, num_classes = (32, 8, 10) if name in CIFAR else (224, 7, 1000)
    side = SIDES.get(name, side)
    assert published_image_size(name) == size
    model = make_on_meta(name)
    features = model.forward_features(torch.empty(2, 3, size, size, device="meta"))
    assert features.shape == (2, model.num_features, side, side)
    assert model.forward_head(features).shape == (2, num_classes)


def test_figures_are_listed_for_each_model():
    figures = {row["name"]: int(row["image_size"]) for row in csv.DictReader(FIGURES)}
    assert figures == {name: published_image_size(name) for name in list_models()}
    assert list(figures) == list_models()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in list_models()]
)
def test_listed_figures_are_counted(name):
    """A model that has changed fails here, and the failure shows the line for `published.csv`."""
    size = published_image_size(name)
    model = make_on_meta(name)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    flops = count_flops(model, torch.empty(1, 3, size, size, device="meta"))
    is_reversible = "yes" if model.is_reversible else "no"
    assert f"{name},{num_parameters},{size},{model.num_classes},{flops},{is_reversible}" in FIGURES


def test_register_model(monkeypatch):
    monkeypatch.setattr("revnet.models._registry._ENTRIES", dict(_ENTRIES))

    @register_model(image_size=8)
    def revnet2(*, num_classes=3, in_channels=3):
        return f"{num_classes} {in_channels}"

    assert create_model("revnet2") == "3 3"
    assert create_model("revnet2", num_classes=0, in_channels=1) == "0 1"
    assert published_image_size("revnet2") == 8
    assert list_models().index("revnet2") == 11


@pytest.mark.parametrize("function", [create_model, published_image_size])
def test_unknown_name(function):
    with pytest.raises(ValueError, match=r"`name` \(='revnet83'\) is not a model of revnet; did you mean 'revnet38'\?"):
        function("revnet83")
    with pytest.raises(ValueError, match=r"`name` \(='gpt'\) is not a model of revnet; `revnet models` lists them"):
        function("gpt")


@pytest.mark.parametrize("name", list_models())
@pytest.mark.parametrize("count", [-1, 2.5, True, "10"])
def test_rejects_wrong_counts(name, count):
    with pytest.raises(ValueError, match=r"`num_classes` \(=.*\) must be a positive integer, or 0 for pooled"):
        make_on_meta(name, num_classes=count)
    with pytest.raises(ValueError, match=r"`in_channels` \(=.*\) must be a positive integer"):
        make_on_meta(name, in_channels=count)


@pytest.mark.parametrize("name", list_models())
def test_rejects_unknown_options(name):
    with pytest.raises(TypeError, match="drop_rate_of_heads"):
        make_on_meta(name, drop_rate_of_heads=0.5)
