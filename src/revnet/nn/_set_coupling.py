"""One coupling for a whole model."""

from torch import nn

from revnet.coupling import AbstractCoupling
from revnet.nn._abstract_block import check_coupling
from revnet.nn._block import ReversibleBlock
from revnet.nn._coupling_layer import CouplingLayer
from revnet.nn._multi_stream_block import MultiStreamBlock

_TAKES_ONE = (ReversibleBlock, CouplingLayer, MultiStreamBlock)


def set_coupling(model: nn.Module, coupling: AbstractCoupling) -> None:
    """Give all reversible blocks of `model` one coupling; the next forward pass follows it.

    Reached are `ReversibleBlock`, `CouplingLayer` and `MultiStreamBlock`; a `MomentumBlock` keeps its own. What a model
    keeps instead of reversing, such as the first block of a RevNet's stage, is exact with any.

    Args:
        model: A model with reversible blocks.
        coupling: `FixedPoint()`, for instance, makes reversal exact.

    Raises:
        TypeError: `coupling` is none.
        ValueError: `model` has no reversible block.
    """
    check_coupling(coupling)
    blocks = [module for module in model.modules() if isinstance(module, _TAKES_ONE)]
    if not blocks:
        raise ValueError(
            f"`model` (={type(model).__name__}) has no reversible block that could take the coupling {coupling}; build "
            "it of `ReversibleSequential`."
        )
    for block in blocks:
        block.coupling = coupling
