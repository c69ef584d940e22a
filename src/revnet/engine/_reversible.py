"""The entry points that keep only the final streams, and the one that goes backward without a run."""

from collections.abc import Sequence

import torch
from torch import Tensor

from revnet._types import Streams
from revnet.engine._agreement import AgreementWatch
from revnet.engine._chain import BoundChain, stored
from revnet.engine._digest import can_digest
from revnet.engine._drift import DriftWatch, active_meter, warn_of_low_precision
from revnet.engine._observer import Observer
from revnet.engine._range import RangeWatch, check_magnitude
from revnet.engine._rebuild import Rebuilder
from revnet.engine._record import RecordedCall, Surroundings
from revnet.engine._restore import set_aside
from revnet.engine._tensors import has_values, is_plain
from revnet.engine._tolerance import ToleranceWatch
from revnet.engine._tracing import runs_plainly
from revnet.engine.compile import compiled


def reversible(chain: BoundChain, streams: Sequence[Tensor]) -> Streams:
    """Run half-blocks and keep only the final streams; the backward pass rebuilds the rest.

    Args:
        chain: The half-blocks in order, with the arguments of their functions.
        streams: The streams, two or more. Not modified.

    Returns:
        The streams after the last half-block. Modifying one in place before the backward pass makes that pass raise.

    Raises:
        TypeError: A residual function returned no tensor, or one of a dtype that the stream cannot hold.
        ValueError: A residual function returned another shape than that of the stream it updates.
        RuntimeError: A residual function modified its input in place.
        ReconstructionError: In the backward pass, the activations cannot be rebuilt. Never a wrong gradient instead.

    Numerics:
        The output is the one of `stored`, bit for bit. Gradients differ by the rounding of `(x + r) - r`, which grows
        with depth.

    References:
        Gomez et al. (2017), The Reversible Residual Network, equations 6 and 7 and Algorithm 1.
    """
    if not torch.is_grad_enabled() or runs_plainly():
        return stored(chain, streams)
    if torch.compiler.is_dynamo_compiling():
        return compiled(chain, streams) or stored(chain, streams)
    return Rebuilder(chain, streams, _observers_of(chain, streams)).run(chain, streams)


def _observers_of(chain: BoundChain, streams: Sequence[Tensor]) -> list[Observer]:
    half_blocks, is_exact = chain.half_blocks, chain.chain.is_exact
    observers: list[Observer] = []
    if len(half_blocks) > 1:  # Of a single one, nothing is rebuilt.
        keeper = None if is_exact else chain.tolerance
        if keeper is None:
            if not is_exact and streams[0].element_size() <= 2:
                warn_of_low_precision(half_blocks[0], streams[0])
            if active_meter() is not None or not is_on_host(streams[0]) or streams[0].dtype == torch.bfloat16:
                observers.append(DriftWatch())
            elif can_digest(streams[0]):
                observers.append(AgreementWatch())
        else:
            if streams[0].is_cuda and torch.cuda.is_current_stream_capturing():
                raise NotImplementedError(
                    "a ReversibleSequential with a `tolerance` cannot be captured in a CUDA graph: what it computes "
                    "depends on what it measures; reverse exactly with `set_coupling(model, FixedPoint())`."
                )
            drift = DriftWatch(keeps_all=True)
            tolerance = ToleranceWatch(keeper, half_blocks[0].name, drift, has_values=has_values(streams[0]))
            observers += [tolerance, drift]
    if chain.chain.has_exact:
        observers.append(RangeWatch())
    return observers


def inverse(chain: BoundChain, streams: Sequence[Tensor]) -> Streams:
    """Compute the streams before the half-blocks from the ones after them.

    Runs by ordinary autograd and is differentiable. Buffers (batch-norm statistics) are left as they are. In training
    mode batch norm uses the statistics of this batch, as the forward pass did; random functions such as dropout do
    not repeat the forward pass's draw, so invert those in evaluation mode.
    """
    running = list(streams)
    surroundings = Surroundings(chain.tensors(), streams)
    for half_block in reversed(chain.half_blocks):
        call = RecordedCall(half_block.name, None, half_block.function, surroundings)
        with set_aside(call):
            residual = chain.call(half_block, running[half_block.source])
        y = running[half_block.target]
        check_magnitude(half_block, y)
        running[half_block.target] = half_block.coupling.inverse(y, residual, half_block.name)
    return tuple(running)


def is_on_host(stream: Tensor) -> bool:
    """Return whether a stream is an ordinary tensor of the CPU, or a fake one that stands for such."""
    return is_plain(stream) and stream.device.type in ("cpu", "meta")
