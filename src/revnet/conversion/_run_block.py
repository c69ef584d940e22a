"""Run a converted block: continue the pass of the block before it, or begin one."""

import threading
from typing import Any

import torch
from torch import Tensor, nn

from revnet._checks import describe_kind
from revnet._torch_release import is_exporting
from revnet.conversion._branches import check_branches
from revnet.conversion._host_switches import checkpoints_itself
from revnet.conversion._row import Place
from revnet.conversion._scheme import Scheme
from revnet.conversion._stream_state import StreamState, attach, is_alias, state_of, take_other, was_overwritten
from revnet.engine import BoundChain
from revnet.engine._open_run import Given, OpenChain, OpenRun
from revnet.engine._split import dense, is_low_precision
from revnet.engine._tensors import version_of
from revnet.engine._tracing import refuse, runs_plainly
from revnet.nn import AbstractModulePolicy, Checkpoint, Reverse, Store
from revnet.nn._exchanged_class import find_cache

_STORE = Store()
_LOW_PRECISION = (torch.bfloat16, torch.float16)


class _Calls(threading.local):
    """The call of a converted block that is running in this thread, outside of its hooks."""

    given: Any = None
    """The stream that the host passed."""
    returned: Tensor | None = None
    """The tensor that the `forward` of the block returned."""


_calls = _Calls()


def call_block(block: nn.Module, kind: type[nn.Module], args: tuple[Any, ...], kwargs: Any) -> Any:
    """Call the block with its hooks, and carry the state across tensors that only alias others.

    Backward hooks of a module pass its inputs and outputs through nodes of their own, which return other tensors.
    """
    before, _calls.given, _calls.returned = _calls.given, args[0] if args else None, None
    try:
        output = kind.__call__(block, *args, **kwargs)
        returned = _calls.returned
    finally:
        _calls.given, _calls.returned = before, None
    y = output[0] if type(output) in (tuple, list) and output else output
    if returned is not None and y is not returned and isinstance(y, Tensor) and state_of(y) is None:
        state = state_of(returned)
        if state is not None and is_alias(y, returned):
            attach(y, state)
    return output


def run_block(place: Place, args: tuple[Any, ...], kwargs: dict[str, Any], stream_name: str) -> Any:
    """Compute what the block returns in its host.

    Args:
        place: The place of the block.
        args: The positional arguments of its `forward`.
        kwargs: The keyword arguments.
        stream_name: Name of the first parameter of `forward`, which is the stream.

    Raises:
        NotImplementedError: The call is exported.
        TypeError: The stream is not a floating-point tensor.
        RuntimeError: The stream is not what the block before returned.
    """
    if is_exporting():
        refuse_export(place)
    if args:
        x, args = args[0], args[1:]
    else:
        kwargs = dict(kwargs)
        x = kwargs.pop(stream_name, None)
    if not isinstance(x, Tensor) or not (x.is_floating_point() or x.is_complex()):
        raise TypeError(
            f"the stream of `{place.name}` (={describe_kind(x)}) must be a floating-point tensor, the first argument "
            f"of the block; convert the model back with `revnet.convert(model, back=True)`."
        )
    place.renew_branches()
    scheme = place.row.scheme
    state = _state_for(place, x, is_plain=scheme is None)
    if state is None and scheme is None:
        return _run_plain(place, x, args, kwargs)
    _check_arguments(place, args, kwargs)
    if place.branches is not None:
        check_branches(place, x, (args, kwargs))
    if checkpoints_itself(place.block) and place.block.training:
        raise ValueError(
            f"`{place.name}` has its own checkpointing on, which would run it a second time; turn it off, as "
            "`gradient_checkpointing_disable` or `activation_checkpointing_disable` does in transformers."
        )
    if state is None:
        assert scheme is not None
        state, streams = _begin(place, x, scheme)
    else:
        streams = _streams_of(place, x, state)
    return _advance(place, state, streams, (args, kwargs))


def refuse_export(place: Place) -> None:
    """Raise because a converted block is exported."""
    refuse(
        f"`{place.name}` is a converted block, which carries a second stream outside of the exported program; "
        "convert the model back with `revnet.convert(model, back=True)`, or keep it unconverted for the export."
    )


def _state_for(place: Place, x: Tensor, *, is_plain: bool) -> StreamState | None:
    """Return the state that the block continues, or None if it begins a pass."""
    state = state_of(x)
    if state is None and isinstance(_calls.given, Tensor) and (given := state_of(_calls.given)) is not None:
        # The input of a backward hook: the same memory, with a node of its own.
        state = given if is_alias(x, _calls.given) else None
    if state is not None and state.row is place.row and state.position == place.index:
        if state.version != version_of(x) or was_overwritten(x, state):
            raise RuntimeError(
                f"the output of `{_before(place)}` was modified in place before `{place.name}` read it, which cannot "
                "be undone; use the out-of-place form of the operation after the last converted block."
            )
        if state.other_version != version_of(state.other):
            raise RuntimeError(
                f"the output of a converted block was modified in place before `{place.name}` read it as its "
                "second stream; use the out-of-place form of the operation."
            )
        return state
    if place.index == 0 or is_plain:
        return None
    raise RuntimeError(
        f"`{place.name}` was given a tensor that `{_before(place)}` did not return, but the second stream comes with "
        "that tensor: the model changes the tensor between the two blocks, skips a block, or checkpoints its blocks; "
        "convert only blocks that feed each other directly, or convert the model back with "
        "`revnet.convert(model, back=True)`."
    )


def _before(place: Place) -> str:
    return place.row.names[place.index - 1]


def _check_arguments(place: Place, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not torch.is_grad_enabled() or place.policy == Store():
        return
    if (cache := find_cache(args, kwargs)) is not None:
        raise ValueError(
            f"`{place.name}` is given a {cache}, which a second run of the block would change again; call the model "
            "without it, as `use_cache=False` does in transformers."
        )


def _run_plain(place: Place, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run the block at `a = 0`, and keep only its input for the backward pass."""
    _check_arguments(place, args, kwargs)
    assert place.row.factors is not None
    _, b, c = place.row.factors
    is_original = b == c == 1
    if not is_original and place.branches is not None:
        check_branches(place, x, (args, kwargs))
    is_plain = not torch.is_grad_enabled() or runs_plainly()
    policy = place.policy if isinstance(place.policy, AbstractModulePolicy) else Checkpoint()
    y = x
    for function in (place.whole,) if is_original or place.branches is None else place.branches:
        residual = function(y, *args, **kwargs) if is_plain else policy.call(function, (y, *args), kwargs)
        y = residual if is_original else torch.add(y * (c - b if place.row.is_whole else c), residual, alpha=b)
    return place.whole.wrap(y)


def _begin(place: Place, x: Tensor, scheme: Scheme) -> tuple[StreamState, list[Tensor]]:
    """Return the state before the first block, and two streams that are equal."""
    dtype = x.dtype
    if is_low_precision(x):
        # Autocast casts what the functions compute with.
        x, dtype = x.float(), torch.float32
    elif dtype in _LOW_PRECISION:
        if place.row.is_whole:
            raise TypeError(
                f"the stream of `{place.name}` has dtype {dtype}, in which what a whole block adds to it is lost; "
                "train with float32 weights under `torch.autocast`, or pass `branches` to `revnet.convert`."
            )
        x = x.float()
    prepared = dense(scheme.couplings[0].prepare(x))
    input_dtype = dtype if prepared.dtype != dtype else None
    state = StreamState(place.row, place.index, scheme, prepared, None, input_dtype, None)
    return state, [prepared, prepared]


def _streams_of(place: Place, x: Tensor, state: StreamState) -> list[Tensor]:
    """Return the streams in their order.

    Raises:
        ValueError: The gradient of the tensor that the block before returned is asked for, but passes it by.
    """
    if state.primary is not None and (x._backward_hooks or x.retains_grad):
        what = "retains its gradient" if x.retains_grad else "has a backward hook"
        raise ValueError(
            f"the output of `{_before(place)}` {what}, but the gradient passes it by, because the stream that "
            f"`{place.name}` reads is not this tensor: {_why_apart(state)}; look at the input of the first converted "
            "block or at the output of the last one."
        )
    primary, other = x if state.primary is None else state.primary, take_other(state)
    is_first = state.scheme.target_of(place.index * state.scheme.num_functions - 1) == 0
    return [primary, other] if is_first else [other, primary]


def _why_apart(state: StreamState) -> str:
    """Return why the tensor that a block returns is not its stream."""
    if state.scheme.adapter is not None:
        return "`Adapter` shows the host the mean of two streams"
    return f"streams are wider than {state.input_dtype}"


def _advance(place: Place, state: StreamState, streams: list[Tensor], arguments: Given) -> Any:
    """Run the functions of the block on the streams, and return what the host gets."""
    row, run, scheme = place.row, state.run, state.scheme
    count, role = scheme.num_functions, str(place.index)
    is_plain = not torch.is_grad_enabled() or runs_plainly()
    if not is_plain and place.policy == Reverse():
        if run is None or not run.can_advance or run.position != place.index * count:
            # There is none, or its pass went on from the same tensor, or its backward pass has begun.
            chain = row.chain_of(place.index, len(row.names), scheme)
            run = OpenRun(OpenChain(chain, (), {}, {}, state.input_dtype), streams)
            run.offset = place.index * count
        assert isinstance(run.chain, OpenChain)
        row.fill(run.chain.chain, run.offset // count, place, scheme)
        run.advance(run.chain, count, role, arguments, streams)
    else:
        run = None
        chain = row.chain_of(place.index, place.index + 1, scheme)
        row.fill(chain, place.index, place, scheme)
        call = BoundChain(chain, *arguments, {}, state.input_dtype)
        streams = list((_STORE if is_plain else place.policy).run(call, streams))
    last = scheme.target_of((place.index + 1) * count - 1)
    primary, other = streams[last], streams[1 - last]
    y = primary if scheme.adapter is None else (primary + other) / 2
    if state.input_dtype is not None:
        y = y.to(state.input_dtype)
    if place.index + 1 < len(row.names):
        held = None if y is primary else primary
        if held is not None and not is_plain and (place.block._backward_hooks or place.block._backward_pre_hooks):
            raise ValueError(
                f"`{place.name}` has a backward hook, which would not run, because the stream that the next block "
                f"reads is not the tensor that this one returns: {_why_apart(state)}; put the hook on a module inside "
                "the block."
            )
        attach(y, StreamState(row, place.index + 1, scheme, other, held, state.input_dtype, run))
        _calls.returned = y
    return place.whole.wrap(y)
