"""One coupling for a whole model."""

from torch import nn

from revnet._checks import check_module
from revnet.coupling import AbstractCoupling
from revnet.nn._abstract_block import check_coupling
from revnet.nn._block import ReversibleBlock
from revnet.nn._coupling_layer import CouplingLayer
from revnet.nn._multi_stream_block import MultiStreamBlock

_TAKES_ONE = (ReversibleBlock, CouplingLayer, MultiStreamBlock)


def set_coupling(model: nn.Module, coupling: AbstractCoupling) -> None:
    """Give all reversible blocks of `model` one coupling. The next forward pass follows it.

    This changes every `ReversibleBlock`, `CouplingLayer` and `MultiStreamBlock`. A `MomentumBlock` keeps its coupling.
    Parts of a model that are kept instead of reversed, such as the first block of a RevNet stage, are always exact.

    Args:
        model: A model that contains reversible blocks.
        coupling: The coupling. `FixedPoint()` makes reversal exact.

    Raises:
        TypeError: `model` is not a module, or `coupling` is not a coupling.
        ValueError: `model` has no reversible block.
    """
    check_module("model", model)
    check_coupling(coupling)
    blocks = [module for module in model.modules() if isinstance(module, _TAKES_ONE)]
    if not blocks:
        raise ValueError(
            f"`model` (={type(model).__name__}) has no reversible block that could take the coupling {coupling}; build "
            "it of `ReversibleSequential`."
        )
    for block in blocks:
        block.coupling = coupling
