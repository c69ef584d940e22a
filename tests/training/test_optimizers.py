import copy
from typing import get_args

import pytest
import torch
from torch import nn

from revnet.models import create_model, list_models
from revnet.models.reversible_vit import PositionEmbedding
from revnet.training import LanguageConfig, NiceConfig, TrainConfig
from revnet.training.muon import MuonWithAdamW
from revnet.training.optimizers import make_optimizer, parameter_groups
from revnet.training.settings.choices import Optimizer


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


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.hidden = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 4))
        self.head = nn.Linear(4, 3)

    def forward(self, tokens):
        return self.head(self.hidden(self.embedding(tokens)))


def step(model, optimizer, seed=0):
    generator = torch.Generator().manual_seed(seed)
    model(torch.randint(5, (8,), generator=generator)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("name", get_args(Optimizer))
def test_every_optimizer_updates_all_parameters(name):
    model = Network()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = make_optimizer(LanguageConfig(optimizer=name, lr=1e-2, weight_decay=0.0), model)
    for seed in range(3):
        step(model, optimizer, seed)
    assert all(not torch.equal(*pair) for pair in zip(model.parameters(), before, strict=True))


def test_frozen_parameters_are_left_out():
    model = Network()
    model.hidden.requires_grad_(False)
    optimizer = make_optimizer(LanguageConfig(), model)
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert trained == {id(p) for part in (model.embedding, model.head) for p in part.parameters()}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LanguageConfig(), {"betas": (0.9, 0.99), "eps": 1e-8, "lr": 2e-3}),
        (NiceConfig(), {"betas": (0.9, 0.999), "lr": 1e-3}),
        (LanguageConfig(beta2=0.95, momentum=0.8, eps=1e-6), {"betas": (0.8, 0.95), "eps": 1e-6}),
        (LanguageConfig(optimizer="nadam"), {"betas": (0.9, 0.99), "decoupled_weight_decay": True}),
        (LanguageConfig(optimizer="rmsprop"), {"alpha": 0.99, "momentum": 0.9}),
        (LanguageConfig(optimizer="rmsprop", beta2=0.9), {"alpha": 0.9}),
        (LanguageConfig(optimizer="adadelta", beta2=0.8), {"rho": 0.8}),
        (LanguageConfig(optimizer="muon"), {"betas": (0.9, 0.99), "momentum": 0.95, "nesterov": True}),
        (LanguageConfig(optimizer="muon", momentum=0.0), {"momentum": 0.0, "nesterov": False}),
        (TrainConfig(lr=0.1), {"momentum": 0.9, "nesterov": False, "lr": 0.1}),
    ],
)
def test_settings_reach_the_optimizer(config, expected):
    (group, *_) = make_optimizer(config, Network()).param_groups
    assert {name: group[name] for name in expected} == expected


def test_muon_takes_the_matrices_of_hidden_layers():
    model = Network()
    optimizer = make_optimizer(LanguageConfig(optimizer="muon", weight_decay=0.1), model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    of_muon = [group for group in optimizer.param_groups if group["use_muon"]]
    assert [names[id(p)] for group in of_muon for p in group["params"]] == ["hidden.0.weight", "hidden.2.weight"]
    assert all(group["weight_decay"] == 0.1 for group in of_muon)


def test_the_last_linear_layer_is_the_head_of_other_models():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3)))
    optimizer = make_optimizer(LanguageConfig(optimizer="muon"), model)
    (group,) = [group for group in optimizer.param_groups if group["use_muon"]]
    assert [id(parameter) for parameter in group["params"]] == [id(model[0].weight), id(model[2][0].weight)]


def test_transposed_convolutions_decay():
    model = nn.Sequential(*[make(2, 2, 3) for make in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)])
    decayed, others = parameter_groups(model, 0.1)
    assert [parameter.dim() for parameter in decayed["params"]] == [3, 4, 5]
    assert [parameter.dim() for parameter in others["params"]] == [1, 1, 1]


def test_muon_and_adamw_are_pytorchs_own():
    model, twin = Network(), Network()
    twin.load_state_dict(model.state_dict())
    together = make_optimizer(LanguageConfig(optimizer="muon", weight_decay=0.1, lr=1e-2), model)
    matrices = [twin.hidden[0].weight, twin.hidden[2].weight]
    others = [p for p in twin.parameters() if not any(p is matrix for matrix in matrices)]
    head = [twin.head.weight]
    muon = torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    groups = [
        {"params": head, "weight_decay": 0.1},
        {"params": [p for p in others if p is not head[0]], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.99))
    for seed in range(3):
        step(model, together, seed)
        twin(torch.randint(5, (8,), generator=torch.Generator().manual_seed(seed))).square().sum().backward()
        muon.step()
        adamw.step()
        twin.zero_grad()
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), twin.parameters(), strict=True))


def test_state_of_muon_is_restored():
    model = Network()
    optimizer = make_optimizer(LanguageConfig(optimizer="muon"), model)
    step(model, optimizer)
    other = copy.deepcopy(model)
    restored = make_optimizer(LanguageConfig(optimizer="muon"), other)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(model, optimizer, 1)
    step(other, restored, 1)
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), other.parameters(), strict=True))


def test_schedule_moves_both_parts_of_muon():
    model = Network()
    optimizer = make_optimizer(LanguageConfig(optimizer="muon", lr=1e-2, weight_decay=0.0), model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: 0.0)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    step(model, optimizer)
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), before, strict=True))
    assert schedule.get_last_lr() == [0.0] * len(optimizer.param_groups)


def test_muon_needs_a_matrix():
    model = nn.Sequential(nn.Conv2d(1, 2, 3))
    with pytest.raises(ValueError, match=r"`optimizer` \(='muon'\) is for the weight matrices of hidden linear layers"):
        make_optimizer(TrainConfig(optimizer="muon", lr=1e-3), model)
    with pytest.raises(ValueError, match=r"`params` \(with a tensor of shape \(2, 1, 3, 3\)\) must hold matrices"):
        MuonWithAdamW([{"params": list(model.parameters()), "use_muon": True}])
