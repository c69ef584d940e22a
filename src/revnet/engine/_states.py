"""Buffers and parameters that a function writes to: keep their values from before the first run for the replay."""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from revnet._torch_internals import in_functorch_transform
from revnet.engine._arrays import array_of, is_on_host, same_bits
from revnet.engine._device_digest import is_on_accelerator
from revnet.engine._digest import checksum
from revnet.engine._saved_samples import CHECKSUM_INTERVAL
from revnet.engine._tensors import version_of, versions_of

if TYPE_CHECKING:
    from revnet.engine._record import RecordedCall


_COUNT = "num_batches_tracked"
"""Name of the buffer whose version is raised by each call of a batch norm in training."""


class Checksums(NamedTuple):
    """Checksums of tensors that a function is not expected to write to."""

    parameters: list[int | None]
    statistics: dict[int, tuple[int | None, int]]
    """For each place of a statistic that a norm alone should write to, the number of calls of the norm as well."""


def before(call: "RecordedCall") -> Checksums | None:
    """Copy, before a call, the tensors that the function may write to.

    Returns:
        Checksums, in one call of `CHECKSUM_INTERVAL`; otherwise None.
    """
    plan = call.plan
    if plan.states:
        call.states = {place: call.buffers[place].detach().clone() for place in plan.states}
    if plan.data_writes:
        call.written = {place: call.parameters[place].detach().clone() for place in plan.data_writes}
    if plan.fixed or plan.states:
        call.buffer_versions = {place: version_of(call.buffers[place]) for place in (*plan.fixed, *plan.states)}
    can_read = not call.surroundings.is_captured
    return _checksums(call) if can_read and plan.num_calls % CHECKSUM_INTERVAL == 1 else None


def after(call: "RecordedCall", checksums: Checksums | None) -> None:
    """Keep, after a call, the copies of the tensors that it changed, and record the versions that it left."""
    if call.states:
        _settle_states(call)
    versions = versions_of(call.parameters)
    written = dict(call.written or {})
    for place, (old, new) in enumerate(zip(call.versions, versions, strict=True)):
        if old != new and place not in written:
            # Written before use, as with `nn.Embedding(max_norm=)`: a replay works on a copy of the value that this
            # left.
            written[place] = call.parameters[place]
    call.versions = versions
    if checksums is not None:
        _compare(call, checksums, written)
    call.written = written or None


def _compare(call: "RecordedCall", old: Checksums, written: dict[int, Tensor]) -> None:
    """Find the tensors that the function was not expected to write to."""
    plan, new = call.plan, _checksums(call)
    for place, (old_sum, new_sum) in enumerate(zip(old.parameters, new.parameters, strict=True)):
        # FSDP frees or allocates the memory of a parameter when a module inside the function ends or begins.
        can_compare = old_sum is not None and new_sum is not None
        if can_compare and old_sum != new_sum and place not in written:
            # Observed for the first time, so the value from before the call is lost. This replay begins with the value
            # that the function left, and the check of its result shows whether that was right. From the next call on, a
            # copy is taken first.
            written[place] = call.parameters[place]
            plan.data_writes.append(place)
    for place, (old_sum, old_calls) in old.statistics.items():
        new_sum, new_calls = new.statistics[place]
        if old_sum is not None and new_sum is not None and old_sum != new_sum and old_calls == new_calls:
            # Written without a call of the norm, as by `F.batch_norm`, so a replay would write it, too.
            plan.statistics.append(place)


def _settle_states(call: "RecordedCall") -> None:
    assert call.states is not None
    assert call.buffer_versions is not None
    for place, copy in list(call.states.items()):
        buffer = call.buffers[place]
        holder, name = call.plan.buffer_places[place]
        # Kernels that update running statistics do not raise the version, so no vector is trusted to be constant. Large
        # buffers (masks, position tables) are compared.
        is_constant = (
            holder.get(name) is buffer
            and buffer.dim() > 1
            and version_of(buffer) == call.buffer_versions[place]
            and _has_same_bits(call, place, buffer, copy)
        )
        del (call.states if is_constant else call.buffer_versions)[place]
    call.buffer_versions = call.buffer_versions or None
    call.states = call.states or None


def _has_same_bits(call: "RecordedCall", place: int, buffer: Tensor, copy: Tensor) -> bool:
    """Return whether a buffer has the values of its copy, or whether that cannot be known."""
    plan, is_captured = call.plan, call.surroundings.is_captured
    if is_on_host(buffer) and is_on_host(copy) and not is_captured:
        return same_bits(array_of(buffer), array_of(copy))
    if not is_on_accelerator(buffer) or in_functorch_transform():
        return True  # A fake tensor, for instance, has no bits.
    # Comparing waits for the device, so it happens once in a while, and the answer holds until the next time.
    if plan.num_calls % CHECKSUM_INTERVAL == 1 and not is_captured:
        plan.constants.discard(place)
        if torch.equal(buffer, copy):
            plan.constants.add(place)
    return place in plan.constants


def _checksums(call: "RecordedCall") -> Checksums:
    plan = call.plan
    expected = {*plan.states, *plan.statistics}
    statistics = {}
    for place, (holder, name) in enumerate(plan.buffer_places):
        if place not in expected and name != _COUNT:
            num_calls = -1 if (count := holder.get(_COUNT)) is None else version_of(count)
            statistics[place] = checksum(call.buffers[place]), num_calls
    return Checksums(list(map(checksum, call.parameters)), statistics)
