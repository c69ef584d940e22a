"""The settings of the optimizer and of its learning rate."""

from dataclasses import dataclass
from typing import ClassVar

from revnet.training.settings.checks import check_fractions
from revnet.training.settings.choices import Optimizer, Schedule
from revnet.training.settings.fields import SettingsGroup, checked, integer, number

ADAM_FAMILY = ("adam", "adamw", "adamax", "nadam", "radam")
"""Optimizers with two betas."""

_TAKERS: dict[str, tuple[str, ...]] = {
    "momentum": ("sgd", "muon", "rmsprop", *ADAM_FAMILY),
    "nesterov": ("sgd", "muon"),
    "beta2": (*ADAM_FAMILY, "muon", "rmsprop", "adadelta"),
    "eps": (*ADAM_FAMILY, "muon", "rmsprop", "adagrad", "adadelta"),
}
"""Optimizers that take a setting."""

# With a rate that suits SGD, nothing is learned.
NORMALIZING = (*ADAM_FAMILY, "muon", "rmsprop", "adafactor")
"""Optimizers each update of which moves every weight by about the learning rate."""

_HIGHEST_LR = 0.05


@dataclass(frozen=True, kw_only=True)
class OptimizationSettings(SettingsGroup):
    """Settings of the optimizer and of its learning rate."""

    title: ClassVar[str] = "optimizer"

    optimizer: Optimizer = "adamw"
    """Optimizer, a class of `torch.optim` in lower case. `sgd` is gradient descent with momentum, for convolutional
    networks; `adamw` is for transformers, with a learning rate near 1e-3; `muon` makes the updates of the weight
    matrices of hidden layers orthogonal, and leaves all other parameters to `adamw`, with the same learning rate."""

    lr: float = number(1e-3, "above 0", lambda x: x > 0, usual="0.001")
    """Highest learning rate."""

    weight_decay: float = number(0.0, "0 or more", lambda x: x >= 0, usual="0.1")
    """Decay of the convolution and linear weights; norms, biases, embeddings and position embeddings do not decay.
    `adamw`, `nadam`, `radam`, `muon` and `adafactor` subtract it from the weights, times the learning rate; the others
    add it to the gradient."""

    momentum: float | None = number(None, "from 0 to below 1", lambda x: 0 <= x < 1, usual="0.9")
    """Momentum of `sgd`, `muon` and `rmsprop`, or the first beta of `adamw` and its relatives. By default 0.9, or 0.95
    for `muon`, whose `adamw` part always has 0.9."""

    nesterov: bool | None = None
    """Whether to use Nesterov's momentum, for `sgd` and `muon`; by default only for `muon`."""

    beta2: float | None = number(None, "from 0 to below 1", lambda x: 0 <= x < 1, usual="0.999")
    """Decay rate of the average of squared gradients: the second beta of `adamw` and its relatives, alpha of `rmsprop`,
    rho of `adadelta`. By default, the usual value of the optimizer, 0.999 for `adamw`."""

    eps: float | None = number(None, "above 0 and at most 1", lambda x: 0 < x <= 1, usual="1e-8")
    """Constant that keeps the optimizer from dividing by zero; by default, the usual value of the optimizer."""

    schedule: Schedule = "cosine"
    """Schedule of the learning rate after the warm-up: `step` multiplies it by `decay_factor` at `decay_at`; `cosine`
    lowers it to zero along half a cosine; `constant` keeps it; `plateau` multiplies it by `decay_factor` when more than
    `plateau_patience` validations in a row have not improved; `restarts` runs `num_cycles` cosines, one after
    another."""

    warmup: float = number(0.0, "from 0 to below 1", lambda x: 0 <= x < 1, usual="0.05")
    """Share of all updates in which the learning rate first rises linearly from zero."""

    decay_at: tuple[float, ...] = checked((0.5, 0.75), check_fractions)
    """Points at which the learning rate is multiplied by `decay_factor`, as fractions of all updates; for the schedule
    `step`."""

    decay_factor: float = number(0.1, "above 0 and at most 1", lambda x: 0 < x <= 1, usual="0.1")
    """Factor that the learning rate is multiplied by; for the schedules `step` and `plateau`."""

    plateau_patience: int = integer(5, at_least=0)
    """Number of validations in a row without a better result after which one more lowers the learning rate; for the
    schedule `plateau`."""

    num_cycles: int = integer(3, at_least=1, at_most=1000)
    """Number of cycles of the schedule `restarts`."""

    cycle_growth: float = number(1.0, "from 1 to 10", lambda x: 1 <= x <= 10, usual="1 or 2")
    """Length of a cycle of the schedule `restarts`, as a multiple of the cycle before."""

    def __post_init__(self) -> None:
        # YAML has lists only; a frozen dataclass needs tuples, which can be hashed.
        object.__setattr__(self, "decay_at", tuple(self.decay_at))

    def _check_together(self) -> None:
        for name, takers in _TAKERS.items():
            value = getattr(self, name)
            if value not in (None, False) and self.optimizer not in takers:
                raise ValueError(
                    f"`{name}` (={value}) is for the `optimizer` {_join(takers)}, not for {self.optimizer}; leave it "
                    "out, or pass null."
                )
        if self.optimizer in NORMALIZING and self.lr is not None and self.lr > _HIGHEST_LR:
            raise ValueError(
                f"`lr` (={self.lr}) must be {_HIGHEST_LR} or less with the `optimizer` {self.optimizer}; 0.001 is "
                "usual."
            )
        if self.optimizer == "rprop" and self.weight_decay:
            raise ValueError(
                f"`weight_decay` (={self.weight_decay}) is not for the `optimizer` rprop, which reads only the sign of "
                "a gradient; pass 0."
            )
        if self.nesterov and self.momentum == 0:
            raise ValueError("`nesterov` (=True) needs a `momentum` above 0; 0.9 is usual.")


def _join(names: tuple[str, ...]) -> str:
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
