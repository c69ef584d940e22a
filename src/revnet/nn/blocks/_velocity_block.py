"""The base of blocks whose second stream is a velocity."""

from torch import nn

from revnet.coupling import AbstractCoupling
from revnet.engine import HalfBlock
from revnet.nn.blocks._abstract_block import AbstractReversibleBlock, check_functions, reads
from revnet.nn.blocks._split_dim import choose_split_dim


class AbstractVelocityBlock(AbstractReversibleBlock):
    """Update a velocity with a residual of the activation, and the activation with the velocity.

    Args:
        f: The residual function.
        coupling: How the residual is combined with the velocity.
        split_dim: The dimension along which a tensor input is split into the activation and the velocity.
    """

    def __init__(self, f: nn.Module, coupling: AbstractCoupling, split_dim: int | None):
        super().__init__()
        check_functions(f=f)
        self.f = f
        self.step = nn.Identity()
        self.coupling = coupling
        self.split_dim, self.has_default_split_dim = choose_split_dim(split_dim)

    @reads("coupling", children=("f", "step"))
    def half_blocks(self, prefix: str = "") -> list[HalfBlock]:
        """Return the updates of the velocity and of the activation. `prefix`, such as "blocks.3.", names the block."""
        return [
            HalfBlock(self.f, 1, 0, prefix + "f", self.coupling),
            HalfBlock(self.step, 0, 1, prefix + "step", role="step", takes_arguments=False),
        ]
