"""Running a recorded function again, and filling its slots; see `RecordedCall`.

This is the second run of rules 4, 7 and 8 in the note of `revnet.engine`: it looks whether everything is as it was,
puts back what is not, catches what autograd saves, and compares it with the first run.
"""

from collections.abc import Callable, Mapping
from itertools import chain
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor

from revnet._torch_internals import (
    forward_mode_level,
    pop_saved_tensors_hooks,
    profiler_is_on,
    push_saved_tensors_hooks,
    set_grad_enabled,
)
from revnet.engine import _careful
from revnet.engine._batch_norm import WORTHWHILE
from revnet.engine._digest import digest_of, has_memory
from revnet.engine._record import RecordedCall, meta_of, metas_of
from revnet.engine._restore import restored

_version = attrgetter("_version")
_requires_grad = attrgetter("requires_grad")
_flatten = chain.from_iterable
_values = dict.values


def replay(
    call: RecordedCall,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    fill: bool,
    rounded: Tensor | None,
    needs_result: bool = True,
) -> Any:
    """Run the function again as the first time, and `fill` the slots that are still there.

    Args:
        call: The first run.
        function: What to call.
        args: Its positional arguments, with inputs of the same values as in the first run.
        kwargs: Its keyword arguments.
        fill: Whether the backward pass asks for what autograd saved.
        rounded: The input, if it carries the rounding of a reconstruction.
        needs_result: Whether to go on to the end; otherwise the run may stop once the slots are filled (rule 7).

    Returns:
        The result; None if the run stopped early.

    Raises:
        ReconstructionError: The function did something else than the first time (rule 8).
    """
    if (
        list(map(_version, call.parameters)) != call.versions
        or call.buffer_versions is not None
        or call.constants is not None
        or call.surroundings.arguments
    ):
        _careful.check_versions(call)
    if _is_as_it_was(call):
        return _run_again(call, function, args, kwargs, call.lasting, fill, rounded, needs_result)
    with restored(call) as lasting:
        return _run_again(call, function, args, kwargs, lasting, fill, rounded, needs_result)


def _run_again(
    call: RecordedCall,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    lasting: set[int],
    fill: bool,
    rounded: Tensor | None,
    needs_result: bool,
) -> Any:
    caught: list[Tensor] = []
    pack: Callable[[Tensor], Any] = caught.append
    stop_after = -1 if needs_result else call.stop_after
    versions: list[int] | None = None
    if not call.is_plain or stop_after > 0 or forward_mode_level() >= 0:
        versions = []
        pack = _careful.make_replay_pack(call, caught, versions, lasting, stop_after)
    try:
        result = _call_again(call, function, args, kwargs, pack, rounded)
    except _careful.StopReplay:
        result = None
    except BaseException:
        caught.clear()
        raise
    tensors = caught
    if versions is None:
        tensors = [
            each
            for each in caught
            if id(each) not in lasting and ((base := each._base) is None or id(base) not in lasting)
        ]
    metas = list(map(meta_of, tensors))
    if metas != (call.metas if result is not None or stop_after < 0 else call.metas[:stop_after]):
        _careful.fail_metas(call, metas)
    if result is not None:
        results = [meta_of(result)] if type(result) is Tensor else metas_of(result)
        if results != call.results:
            _careful.fail_results(call, results)
    if call.tail is not None and has_memory(tensors[-1]):
        call.tail_found = digest_of(tensors[-1])
        call.tail_error = 0.0
        if call.tail_found != call.tail:
            _careful.compare_tails(call, tensors[-1].dtype, is_rounded=rounded is not None)
    saved = call.saved() if fill and call.saved is not None else None
    if saved is not None:
        saved.tensors, saved.versions = list(tensors), versions
        if call.constants is not None:
            _careful.check_constants(call, saved.tensors)
    caught.clear()  # See `record`: the nodes of this second run hold the hook, too.
    return result


def _is_as_it_was(call: RecordedCall) -> bool:
    """Return whether everything that the function depends on is as it was in its first run (rule 4)."""
    if call.random or call.states or call.written or call.plan.statistics or call.is_mixed:
        return False
    plan = call.plan
    if (
        list(map(plan.get_flag, plan.flag_holders)) != plan.training
        or list(map(len, plan.dicts)) != plan.sizes
        or not all(map(is_, _flatten(map(_values, plan.filled_dicts)), call.held))
        or list(map(_requires_grad, call.parameters)) != call.requires_grad
    ):
        return False
    return not any(map(torch.is_autocast_enabled, call.surroundings.autocast_types))


def _call_again(
    call: RecordedCall,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    pack: Callable[[Tensor], Any],
    rounded: Tensor | None,
) -> Any:
    """Call the function with gradients and hooks, so that its batch norms do not count the batch twice."""
    norms = call.plan.norms
    is_faster = bool(norms) and rounded is not None and rounded.numel() >= WORTHWHILE and not call.is_mixed
    flags = [norm.attributes["track_running_stats"] for norm in norms]
    has_grad = torch.is_grad_enabled()
    push_saved_tensors_hooks(pack, _identity)
    try:
        set_grad_enabled(True)
        for norm in norms:
            norm.attributes["track_running_stats"] = False
            if (forward := norm.faster if is_faster else norm.forward) is not None:
                norm.attributes["forward"] = forward
        if profiler_is_on():
            with torch.profiler.record_function(f"revnet: replay {call.name}"):
                return function(*args, **kwargs)
        return function(*args, **kwargs)
    finally:
        for norm, flag in zip(norms, flags, strict=True):
            norm.attributes["track_running_stats"] = flag
            norm.attributes.pop("forward", None)
        set_grad_enabled(has_grad)
        pop_saved_tensors_hooks()


def _identity(tensor: Tensor) -> Tensor:
    return tensor
