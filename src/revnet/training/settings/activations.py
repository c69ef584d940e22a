"""The settings of the memory for activations."""

from dataclasses import dataclass
from typing import ClassVar

from revnet.training.settings.checks import check_memory_budget, check_move, check_moves
from revnet.training.settings.choices import Policy
from revnet.training.settings.fields import SettingsGroup, checked


@dataclass(frozen=True, kw_only=True)
class ActivationSettings(SettingsGroup):
    """Settings of the memory for activations."""

    title: ClassVar[str] = "memory"

    policy: Policy = "reverse"
    """Policy for activations: `reverse` reconstructs the activations of reversible blocks in the backward pass,
    `checkpoint` stores the input of each block and computes the rest again, `store` keeps all activations, as the
    stored twin does."""

    hold: str | None = checked(None, check_move)
    """With the policy `reverse`: names of the residual functions, separated by commas, whose input streams are held
    instead of rebuilt, such as `f,g`; none by default. It saves time and costs memory."""

    keep: str | None = checked(None, check_move)
    """With the policy `reverse`: operators inside the residual functions, separated by commas, whose outputs are kept
    instead of computed again, such as `convolution`, `f.attention` or `g.linear.0`; or a number of bytes for each row
    of blocks, such as `64MiB`. By default, none are kept. It saves time and costs memory."""

    memory_budget: str | None = None
    """Largest amount of memory that an update may take, such as `16GiB` or `500MB`. A plan then chooses the policy of
    each block, instead of `policy`, so that an update takes the least time."""

    def _check_together(self) -> None:
        if self.memory_budget is not None:
            check_memory_budget(self.memory_budget, self.policy)
        check_moves({"hold": self.hold, "keep": self.keep}, self.policy, self.memory_budget)
