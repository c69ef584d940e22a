import pytest
from torch import nn

from revnet.training.freezing import freeze_parameters, frozen_norms


def make_model():
    return nn.Sequential(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)), nn.BatchNorm2d(2), nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("patterns", "frozen"),
    [
        ("0", {"0.0.weight", "0.0.bias", "0.1.weight", "0.1.bias"}),
        ("0.1, 2.bias", {"0.1.weight", "0.1.bias", "2.bias"}),
        ("*.bias", {"0.0.bias", "0.1.bias", "1.bias", "2.bias"}),
        ("[01].weight", {"1.weight"}),
    ],
)
def test_freezes_what_matches(patterns, frozen):
    model = make_model()
    freeze_parameters(model, patterns)
    assert {name for name, parameter in model.named_parameters() if not parameter.requires_grad} == frozen


def test_norms_without_trained_parameters_are_frozen():
    model = make_model()
    freeze_parameters(model, "0,1.bias")
    assert frozen_norms(model) == [model[0][1]]


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ("0,3", r"`freeze` \(='0,3'\): '3' matches no parameter; the parts of the network are 0, 1, 2"),
        ("2.wieght", r"did you mean '2.weight'\?"),
        ("0,", r"'' matches no parameter"),
        ("*", r"`freeze` \(='\*'\) leaves no parameter to train"),
    ],
)
def test_rejects_patterns(patterns, message):
    with pytest.raises(ValueError, match=message):
        freeze_parameters(make_model(), patterns)
