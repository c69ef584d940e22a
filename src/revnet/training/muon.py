"""Muon for the weight matrices of hidden layers, together with AdamW for all other parameters."""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import AdamW, Muon, Optimizer
from torch.optim.optimizer import ParamsT

_SHARED = ("lr", "weight_decay")
_OF_MUON = ("momentum", "nesterov")
_OF_ADAMW = ("betas", "eps")


class MuonWithAdamW(Optimizer):
    """PyTorch's `Muon` for some parameter groups and its `AdamW` for the others, as one optimizer with one state.

    The update of a matrix is scaled so that its size matches AdamW's, and both kinds of groups therefore share a
    learning rate, a weight decay and a schedule.

    Args:
        params: Parameter groups; `use_muon` of a group is true if its parameters, all of them matrices, take Muon.
        lr: Learning rate.
        momentum: Momentum of Muon.
        nesterov: Whether Muon uses Nesterov's momentum.
        betas: Betas of AdamW.
        eps: Constant of AdamW.
        weight_decay: Weight decay, times the learning rate.
        use_muon: Value for groups that do not say it.

    Raises:
        ValueError: A parameter of a group with `use_muon` is not a matrix.

    References:
        Jordan et al. (2024), Muon: An optimizer for hidden layers in neural networks.
        Liu et al. (2025), Muon is Scalable for LLM Training, section 2.2: the scale of the update.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        momentum: float = 0.95,
        nesterov: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        use_muon: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "use_muon": use_muon,
        }
        super().__init__(params, defaults)
        self._muon = Muon([{"params": []}], adjust_lr_fn="match_rms_adamw")
        self._adamw = AdamW([{"params": []}])
        for group in self.param_groups:
            for parameter in group["params"] if group["use_muon"] else ():
                if parameter.ndim != 2:
                    raise ValueError(
                        f"`params` (with a tensor of shape {tuple(parameter.shape)}) must hold matrices where "
                        "`use_muon` is true; put it into another group."
                    )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Update all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part, names, is_muon in ((self._muon, _OF_MUON, True), (self._adamw, _OF_ADAMW, False)):
            # The parts read this state and these groups, which a schedule changes and a checkpoint replaces.
            part.state = self.state
            part.param_groups = [
                {**part.defaults, "params": group["params"], **{name: group[name] for name in (*_SHARED, *names)}}
                for group in self.param_groups
                if group["use_muon"] == is_muon
            ]
            part.step()
        return loss
