"""The settings of an update."""

from dataclasses import dataclass
from typing import ClassVar

from revnet.training.settings.fields import SettingsGroup, integer, number


@dataclass(frozen=True, kw_only=True)
class UpdateSettings(SettingsGroup):
    """Settings of an update."""

    title: ClassVar[str] = "updates"

    accumulate: int = integer(1, at_least=1)
    """Number of equal parts in which each batch is processed, one after another. Their gradients add up to one update
    of `batch_size`, with the activation memory of one part. Batch norm normalizes each part by itself."""

    max_grad_norm: float | None = number(None, "above 0", lambda x: x > 0, usual="1")
    """Norm to which the gradient of an update is clipped; not clipped by default."""

    max_grad_value: float | None = number(None, "above 0", lambda x: x > 0, usual="0.5")
    """Largest absolute value of an element of the gradient; larger ones are clipped. Not clipped by default."""

    ema_decay: float | None = number(None, "above 0 and below 1", lambda x: 0 < x < 1, usual="0.999")
    """Decay of an exponential moving average of the weights, which is validated and saved instead of the weights
    themselves. The decay of early updates is lower, so that the first weights are soon forgotten. By default, the run
    saves the weights themselves."""

    step_in_backward: bool = False
    """Whether each parameter is updated in the backward pass, as soon as its gradient is known. One gradient at a time
    then takes memory, and the weights are the same to the last bit."""

    def _check_together(self) -> None:
        if self.max_grad_norm is not None and self.max_grad_value is not None:
            raise ValueError(
                f"`max_grad_value` (={self.max_grad_value}) and `max_grad_norm` (={self.max_grad_norm}) both clip the "
                "gradient; pass null for one of the two."
            )
