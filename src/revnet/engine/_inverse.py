"""Invert a chain without a run: compute the streams before it from the streams after it."""

from collections.abc import Sequence

from torch import Tensor

from revnet._types import Streams
from revnet.engine._chain import BoundChain
from revnet.engine._range import check_magnitude
from revnet.engine._record import RecordedCall
from revnet.engine._restore import set_aside
from revnet.engine._sums import read_source
from revnet.engine._surroundings import Surroundings


def inverse(chain: BoundChain, streams: Sequence[Tensor]) -> Streams:
    """Compute the streams before the half-blocks from the streams after them.

    The computation uses ordinary autograd and is differentiable. Buffers such as batch-norm statistics are not changed.
    In training mode, batch norm uses the statistics of this batch, as in the forward pass. Random functions such as
    dropout do not draw the same numbers as in the forward pass, so invert them in evaluation mode.
    """
    running = list(streams)
    surroundings = Surroundings.of(None, [*chain.tensors(), *streams])
    for half_block in reversed(chain.half_blocks):
        # Never recorded: it lists the buffers and devices that `set_aside` protects.
        call = RecordedCall(half_block.name, None, half_block.function, surroundings)
        with set_aside(call):
            residual = chain.call(half_block, read_source(running, half_block.source))
        y = running[half_block.target]
        check_magnitude(half_block, y)
        running[half_block.target] = half_block.coupling.inverse(y, residual, half_block.name)
    return tuple(running)
