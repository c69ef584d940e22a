import pytest
import torch

from revnet import create_model, list_models


def test_names_are_listed_in_numeric_order():
    assert list_models() == ["resnet32", "revnet38"]


@pytest.mark.parametrize("name", list_models())
def test_every_model_trains_one_step(name):
    model = create_model(name, num_classes=7, in_channels=1)
    logits = model(torch.randn(2, 1, 8, 8))
    assert logits.shape == (2, 7)
    logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_unknown_name():
    with pytest.raises(ValueError, match=r"`name` \(='revnet83'\) is no model of revnet; did you mean 'revnet38'\?"):
        create_model("revnet83")
    with pytest.raises(ValueError, match=r"`name` \(='gpt'\) is no model of revnet; the models are: resnet32,"):
        create_model("gpt")


@pytest.mark.parametrize("name", list_models())
@pytest.mark.parametrize("count", [0, -1, 2.5, True])
def test_counts_must_be_positive(name, count):
    with pytest.raises(ValueError, match=r"`num_classes` \(=.*\) must be a positive integer"):
        create_model(name, num_classes=count)
    with pytest.raises(ValueError, match=r"`in_channels` \(=.*\) must be a positive integer"):
        create_model(name, in_channels=count)
