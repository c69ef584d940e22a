"""Buffers and parameters that a function writes to: what was there before its first run, for the second one."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from revnet.engine._arrays import same_bits
from revnet.engine._digest import array_of, can_digest, checksum
from revnet.engine._tensors import version_of, versions_of

if TYPE_CHECKING:
    from revnet.engine._record import RecordedCall

CHECKSUM_INTERVAL = 64
"""Calls of a plan between two checksums of the parameters, which show writes that leave no version."""


def before(call: "RecordedCall") -> list[int | None] | None:
    """Copy, before a call, what the function may write to; return checksums of its parameters now and then."""
    plan = call.plan
    if plan.states:
        call.states = {place: call.buffers[place].detach().clone() for place in plan.states}
    if plan.data_writes:
        call.written = {place: call.parameters[place].detach().clone() for place in plan.data_writes}
    if plan.fixed or plan.states:
        call.buffer_versions = {place: version_of(call.buffers[place]) for place in (*plan.fixed, *plan.states)}
    return _checksums(call.parameters) if plan.num_calls % CHECKSUM_INTERVAL == 1 else None


def after(call: "RecordedCall", checksums: list[int | None] | None) -> None:
    """Keep, after a call, the copies of what it changed, and note the versions that it left."""
    if call.states:
        _settle_states(call)
    versions = versions_of(call.parameters)
    written = dict(call.written or {})
    for place, (old, new) in enumerate(zip(call.versions, versions, strict=True)):
        if old != new and place not in written:
            # Written before use, as `nn.Embedding(max_norm=)` does: a replay works on a copy of what that left.
            written[place] = call.parameters[place]
    call.versions = versions
    # The parameters are only read again where a sum from before the call is there to compare with.
    new_sums = () if checksums is None else _checksums(call.parameters)
    for place, (old_sum, new_sum) in enumerate(zip(checksums or (), new_sums, strict=False)):
        if old_sum != new_sum and place not in written:
            # Seen for the first time, so what was there before is lost: this replay begins with what the function left,
            # and the check of its result says whether that was right. Next time a copy is taken before the call.
            written[place] = call.parameters[place]
            call.plan.data_writes.append(place)
    call.written = written or None


def _settle_states(call: "RecordedCall") -> None:
    assert call.states is not None
    assert call.buffer_versions is not None
    for place, copy in list(call.states.items()):
        buffer = call.buffers[place]
        holder, name = call.plan.buffer_places[place]
        # Kernels that keep running statistics write without raising the version, so that no vector is trusted to be
        # constant. Large buffers (masks, position tables) are compared; on the CPU, since devices would be waited for.
        can_compare = can_digest(buffer) and can_digest(copy)
        is_constant = (
            holder[name] is buffer
            and buffer.dim() > 1
            and version_of(buffer) == call.buffer_versions[place]
            and not (can_compare and not same_bits(array_of(buffer), array_of(copy)))
        )
        del (call.states if is_constant else call.buffer_versions)[place]
    call.buffer_versions = call.buffer_versions or None
    call.states = call.states or None


def _checksums(tensors: Sequence[Tensor]) -> list[int | None]:
    """Return a number for the bits of each tensor; None where they cannot be read."""
    return list(map(checksum, tensors))
