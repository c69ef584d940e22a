"""Choose the observers of a run, and call the ones that may correct it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from revnet._torch_internals import HAS_ACCELERATOR
from revnet.engine._agreement import AgreementWatch
from revnet.engine._capture import check_warmed_up, is_capturing
from revnet.engine._chain import BoundChain
from revnet.engine._communication import refuse_communication
from revnet.engine._device_digest import WAITING_INTERVAL, may_wait_for
from revnet.engine._digest import can_digest
from revnet.engine._drift import DriftWatch, active_meter, meter_is_quiet
from revnet.engine._drift_verdict import warn_of_low_precision
from revnet.engine._observer import Observer
from revnet.engine._range import RangeWatch
from revnet.engine._streams import StreamSnapshot
from revnet.engine._tensors import has_values, is_plain
from revnet.engine._tolerance import ToleranceWatch

if TYPE_CHECKING:
    from revnet.engine._rebuild import Rebuilder


def observers_of(chain: BoundChain, streams: Sequence[Tensor]) -> list[Observer]:
    """Return the observers of one run of the chain, which begins with these streams.

    Raises:
        NotImplementedError: A run with a `tolerance` is captured in a CUDA graph.
        ReconstructionError: A function is captured that has not run before.
    """
    half_blocks, is_exact = chain.half_blocks, chain.chain.is_exact
    observers: list[Observer] = []
    is_captured = HAS_ACCELERATOR and is_capturing()
    if len(half_blocks) > 1:  # With a single half-block, nothing is rebuilt.
        keeper = None if is_exact else chain.tolerance
        if keeper is None:
            is_low = streams[0].element_size() <= 2 and has_values(streams[0])
            if not is_exact and is_low and not meter_is_quiet():
                warn_of_low_precision(half_blocks[0], streams[0])
            # The first run has number 1. A function that depends on something outside of PyTorch is wrong in that run,
            # too.
            waits = may_wait_for(streams[0]) and chain.chain.num_runs % WAITING_INTERVAL == 1
            has_meter = active_meter() is not None  # It collects records of each function.
            if is_captured:
                # The eager steps before have compared values.
                check_warmed_up(half_blocks, chain.chain.plans)
            elif not has_meter and (waits or can_digest(streams[0])):
                observers.append(AgreementWatch())
            elif has_meter or not _is_on_host(streams[0]) or streams[0].dtype == torch.bfloat16:
                observers.append(DriftWatch())
        else:
            if is_captured:
                raise NotImplementedError(
                    "a ReversibleSequential with a `tolerance` cannot be captured in a CUDA graph, because its "
                    "computation depends on measured errors; reverse exactly with `set_coupling(model, FixedPoint())`."
                )
            refuse_communication(chain.chain, keeper.tolerance)
            drift = DriftWatch(keeps_all=True)
            tolerance = ToleranceWatch(keeper, half_blocks[0].name, drift, has_values=has_values(streams[0]))
            # In this order: drift must be measured after the tolerance has corrected the stream.
            observers += [tolerance, drift]
    if chain.chain.has_exact:
        observers.append(RangeWatch(is_captured=is_captured))
    return observers


def _is_on_host(stream: Tensor) -> bool:
    """Return whether a stream is an ordinary CPU tensor, or a fake tensor that represents one."""
    return is_plain(stream) and stream.device.type in ("cpu", "meta")


def correct(run: "Rebuilder", index: int, streams: StreamSnapshot) -> None:
    """Let the observers of a run check the stream that function `index` is about to read again."""
    # In a check, the input is changed on purpose.
    if (distance := streams.origin - 1 - index) > 0 and not run.is_checking:
        for observer in run.correctors:
            observer.before_replay(run, index, streams, distance)
