"""The optimizers of a run, and the parameters that decay."""

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from revnet.training.muon import MuonWithAdamW
from revnet.training.settings.optimization import ADAM_FAMILY
from revnet.training.settings.run_config import AbstractRunConfig

_CLASSES: dict[str, type[Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adamw": torch.optim.AdamW,
    "muon": MuonWithAdamW,
    "adam": torch.optim.Adam,
    "adamax": torch.optim.Adamax,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
    "adadelta": torch.optim.Adadelta,
    "adafactor": torch.optim.Adafactor,
    "asgd": torch.optim.ASGD,
    "rprop": torch.optim.Rprop,
}
_DECAYED = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)


def make_optimizer(config: AbstractRunConfig, model: nn.Module) -> Optimizer:
    """Return the optimizer of `config` for the parameters of `model` that are trained.

    Raises:
        ValueError: The optimizer is Muon, and the model has no weight matrix for it.

    References:
        Loshchilov and Hutter (2019), Decoupled Weight Decay Regularization: AdamW.
    """
    groups = parameter_groups(model, config.weight_decay)
    if config.optimizer == "rprop":
        groups = [{"params": group["params"]} for group in groups]
    if config.optimizer == "muon":
        matrices = _hidden_matrices(model)
        if not matrices:
            raise ValueError(
                "`optimizer` (='muon') is for the weight matrices of hidden linear layers, and the model has none to "
                "train; pass sgd or adamw."
            )
        groups = [part for group in groups for part in _split_for_muon(group, matrices)]
    return _CLASSES[config.optimizer](groups, lr=config.lr, **_options(config))  # type: ignore[call-arg]


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the parameters that are trained: weights of convolutions and linear layers decay, the others do not.

    References:
        Gomez et al. (2017), the official code: the same weights decay, and neither batch norms nor biases do.
    """
    decayed = {id(m.weight) for m in model.modules() if isinstance(m, _DECAYED)}
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if id(p) in decayed], "weight_decay": weight_decay},
        {"params": [p for p in parameters if id(p) not in decayed], "weight_decay": 0.0},
    ]


def _options(config: AbstractRunConfig) -> dict[str, Any]:
    """Return the options of the optimizer's class, apart from the learning rate; PyTorch's defaults for the others."""
    name = config.optimizer
    beta1 = 0.9 if config.momentum is None else config.momentum
    beta2 = config.usual_beta2 if config.beta2 is None else config.beta2
    options: dict[str, Any] = {"eps": config.eps} if config.eps is not None else {}
    if name in ADAM_FAMILY:
        options["betas"] = (beta1, beta2)
    if name in ("nadam", "radam"):
        options["decoupled_weight_decay"] = True
    if name == "sgd":
        options |= {"momentum": beta1, "nesterov": bool(config.nesterov)}
    if name == "muon":
        momentum = 0.95 if config.momentum is None else config.momentum
        nesterov = momentum > 0 if config.nesterov is None else config.nesterov
        options |= {"momentum": momentum, "nesterov": nesterov, "betas": (0.9, beta2)}
    if name == "rmsprop":
        options["momentum"] = beta1
    if name in ("rmsprop", "adadelta") and config.beta2 is not None:
        options["alpha" if name == "rmsprop" else "rho"] = config.beta2
    return options


def _hidden_matrices(model: nn.Module) -> set[int]:
    """Return the ids of the trained weights of all linear layers but the head, or the last one without a `head`."""
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    head = getattr(model, "head", None)
    if not isinstance(head, nn.Module):
        head = nn.ModuleList(linear[-1:])
    excluded = {id(parameter) for parameter in head.parameters()}
    # An embedding that shares its weight with a linear layer stays with AdamW.
    excluded |= {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return {id(module.weight) for module in linear if module.weight.requires_grad} - excluded


def _split_for_muon(group: dict[str, Any], matrices: set[int]) -> list[dict[str, Any]]:
    parts = {
        use_muon: [parameter for parameter in group["params"] if (id(parameter) in matrices) == use_muon]
        for use_muon in (True, False)
    }
    return [{**group, "params": params, "use_muon": use_muon} for use_muon, params in parts.items() if params]
