"""Run a recorded function again, and fill its slots: the second run of rules 4, 7 and 8 of the note."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from revnet._torch_internals import (
    any_autocast_is_on,
    forward_mode_level,
    never_compile,
    pop_saved_tensors_hooks,
    profiler_is_on,
    push_saved_tensors_hooks,
    set_grad_enabled,
)
from revnet.engine import _careful
from revnet.engine._careful import meta_of
from revnet.engine._plan import ITEMS
from revnet.engine._record import RecordedCall
from revnet.engine._restore import run_restored
from revnet.engine._tensors import flatten, get_requires_grad, get_version

Function = Callable[..., Any]
Args = tuple[Any, ...]


def replay(
    call: RecordedCall, function: Function, args: Args, *, fill: bool, is_rounded: bool, needs_result: bool = True
) -> Any:
    """Run a function again under the conditions of its first run. Return the result, or None if the run stopped early.

    Args:
        call: The first run.
        function: The callable.
        args: Its arguments; the inputs have the same values as in the first run.
        fill: Whether to fill the slots that still exist.
        is_rounded: Whether the input carries the rounding of a reconstruction.
        needs_result: Whether to run to the end; otherwise the run may stop once the slots are filled (rule 7).

    Raises:
        ReconstructionError: The function did not repeat its first run (rule 8).
    """
    plan = call.plan
    has_more = call.buffer_versions is not None or call.constants is not None or call.surroundings.arguments
    if has_more or [*map(get_version, call.parameters)] != call.versions:
        _careful.check_versions(call)
    # Is everything that the function depends on as it was in its first run (rule 4)?
    if (
        (call.is_mixed or call.random or call.states or call.written or plan.statistics or plan.sharded)
        or call.surroundings.has_moved
        or [*map(plan.get_flag, plan.flag_holders)] != plan.training
        or any(plan.empty)
        or len(held := tuple(flatten(plan.values))) != len(plan.types)
        or plan.memory_of(id(held) + ITEMS).raw != call.ids
        or [*map(get_requires_grad, call.parameters)] != call.requires_grad
        or any_autocast_is_on()  # It was off: `is_mixed` is checked above.
    ):
        return run_restored(call, _run_again, function, args, fill, is_rounded, needs_result)
    return _run_again(call, function, args, call.lasting, fill, is_rounded, needs_result)


def _run_again(
    call: RecordedCall, function: Function, args: Args, lasting: set[int], fill: bool, is_rounded: bool, is_whole: bool
) -> Any:
    caught: list[Tensor] = []
    pack: Callable[[Tensor], Any] = caught.append  # In C; lasting tensors are removed afterwards.
    stop_after = -1 if is_whole else call.stop_after
    versions: list[int] | None = None
    if not call.is_plain or forward_mode_level() >= 0:
        versions = []
        pack = _careful.make_replay_pack(call, caught, versions, lasting, stop_after, StopReplay)
    elif stop_after > 0:
        pack = _make_stopping_pack(caught, lasting, stop_after)
    for keeper in call.keepers:
        function = keeper.replaying(function, call.name, caught, lasting)
    norms = call.plan.norms
    flags: list[tuple[bool, Function | None]] = []
    has_grad = torch.is_grad_enabled()
    push_saved_tensors_hooks(pack, _careful.identity)  # Only a function that differentiates inside itself unpacks here.
    try:
        set_grad_enabled(True)  # A backward pass disables gradients, and nothing would be saved.
        for norm in norms:
            attributes = norm.attributes
            forward = None if "forward" in attributes else norm.forward
            flags.append((attributes["track_running_stats"], forward))
            attributes["track_running_stats"] = False
            if forward is not None:
                attributes["forward"] = forward
        if profiler_is_on():
            function = torch.profiler.record_function(f"revnet: replay {call.name}")(function)
        result = function(*args)
    except StopReplay:
        result = None
    except BaseException:
        caught.clear()  # The traceback refers to the hook, which would keep every activation alive.
        raise
    finally:
        for norm, (flag, forward) in zip(norms, flags):  # noqa: B905 - fewer flags after an exception
            norm.attributes["track_running_stats"] = flag
            if forward is not None:
                norm.attributes.pop("forward", None)
        set_grad_enabled(has_grad)
        pop_saved_tensors_hooks()
    tensors = caught
    if versions is None:
        tensors = [t for t in caught if id(t) not in lasting and ((base := t._base) is None or id(base) not in lasting)]
    is_same = call.is_self_contained and len(tensors) == len(call.metas)
    metas = call.metas if is_same else [*map(meta_of, tensors)]
    if metas != (call.metas if result is not None or stop_after < 0 else call.metas[:stop_after]):
        _careful.fail_metas(call, metas)
    if result is not None:
        results = [meta_of(result)] if type(result) is Tensor else _careful.metas_of(result)
        if results != call.results:
            _careful.fail_results(call, results)
    if call.tail is not None:
        call.tail.compare(call.name, tensors, is_rounded=is_rounded)
    if fill and (saved := call.saved()) is not None:
        saved.tensors, saved.versions = tensors[:], versions  # A copy, since `caught` is cleared.
        if call.constants is not None:
            _careful.check_constants(call, saved.tensors)
    caught.clear()  # The nodes hold the hook, and the hook this list, as in `record` (rule 1).
    return result


class StopReplay(BaseException):
    """Raised to stop a replay once every slot is filled. User code does not catch a BaseException."""


def _make_stopping_pack(caught: list[Tensor], lasting: set[int], stop_after: int) -> Callable[[Tensor], None]:
    """Return a hook that collects tensors that do not last, and stops the run after `stop_after` of them."""

    def pack(tensor: Tensor) -> None:  # Returns None: a node that holds its own output stays alive.
        if id(tensor) not in lasting and ((base := tensor._base) is None or id(base) not in lasting):
            caught.append(tensor)
            if len(caught) == stop_after:
                raise StopReplay

    return pack


never_compile(_make_stopping_pack)
