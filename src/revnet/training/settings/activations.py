"""The settings of the memory for activations."""

from dataclasses import dataclass
from typing import ClassVar

from revnet.training.settings.checks import check_memory_budget
from revnet.training.settings.choices import Policy
from revnet.training.settings.fields import SettingsGroup


@dataclass(frozen=True, kw_only=True)
class ActivationSettings(SettingsGroup):
    """Settings of the memory for activations."""

    title: ClassVar[str] = "memory"

    policy: Policy = "reverse"
    """Policy for activations: `reverse` reconstructs the activations of reversible blocks in the backward pass,
    `checkpoint` stores the input of each block and computes the rest again, `store` keeps all activations, as the
    stored twin does."""

    memory_budget: str | None = None
    """Largest amount of memory that an update may take, such as `16GiB` or `500MB`. A plan then chooses the policy of
    each block, instead of `policy`, so that an update takes the least time."""

    def _check_together(self) -> None:
        if self.memory_budget is not None:
            check_memory_budget(self.memory_budget, self.policy)
