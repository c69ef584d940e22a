import pytest
import torch
from torch import nn

from revnet.models import create_model, list_models
from revnet.models.reversible_vit import PositionEmbedding
from revnet.training.optimizers import parameter_groups


@pytest.mark.parametrize("name", list_models())
def test_only_convolution_and_linear_weights_decay(name):
    with torch.device("meta"):
        model = create_model(name)
    decayed, others = parameter_groups(model, 2e-4)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert decayed["weight_decay"] == 2e-4
    assert others["weight_decay"] == 0
    assert all(parameter.ndim in (2, 4) for parameter in decayed["params"])
    positions = {name for name, module in model.named_modules() if isinstance(module, PositionEmbedding)}
    for parameter in others["params"]:
        assert parameter.ndim == 1 or names[id(parameter)].removesuffix(".weight") in positions
    parameter_names = [names[id(parameter)] for group in (decayed, others) for parameter in group["params"]]
    assert sorted(parameter_names) == sorted(names.values())


def test_shared_weight_is_in_one_group_once():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    decayed, others = parameter_groups(model, 0.1)
    assert [len(decayed["params"]), len(others["params"])] == [1, 2]
