"""Exchange the class of a block for one whose instances run reversibly within their host."""

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from revnet._torch_internals import must_be_one_graph, run_as_it_is, run_between_graphs
from revnet._torch_release import constant_of_object, is_exporting
from revnet.conversion._remedies import remedies_for
from revnet.conversion._row import Place
from revnet.conversion._run_block import call_block, refuse_export, run_block
from revnet.engine._tracing import CannotCompileError
from revnet.nn import AbstractPolicy, HasPolicies, PolicyUnit, Reverse
from revnet.nn._exchanged_class import ORIGINAL_CLASS, derived_class, exchange_class, reduce_parts
from revnet.nn.blocks._blocks_in_runs import BlockInRun, RunsBlocks
from revnet.nn.policies._has_policies import broadcast_policy

PLACE = "_conversion_place"
_WAYS_OUT = (
    "compile without `fullgraph=True`, compile the modules inside the blocks, or convert the model back with "
    "`revnet.convert(model, back=True)`"
)
_REASON = f"a converted block cannot be part of a graph; {_WAYS_OUT}"


class Converted(HasPolicies, RunsBlocks):
    """Base of the classes of converted blocks; it is mixed with the block's own class."""

    _original_class: type[nn.Module]
    _conversion_place: Place

    @property
    def policy_units(self) -> list[PolicyUnit]:
        """The block, as one unit."""
        return [PolicyUnit("", (self,), is_reversible=True)]  # type: ignore[arg-type]

    @property
    def policies(self) -> tuple[AbstractPolicy, ...]:
        """The policy, in a tuple of one."""
        return (self._conversion_place.policy,)

    def set_policies(self, policy: AbstractPolicy | str | Sequence[AbstractPolicy | str]) -> None:
        """Set the policy. The next forward pass uses it."""
        (chosen,) = broadcast_policy(policy, self.policy_units)
        if isinstance(chosen, Reverse) and chosen != Reverse():
            raise ValueError(
                f"`policy` (={chosen}) must hold and keep nothing in a converted block; pass `Reverse()`, or "
                "`Checkpoint()` for some of the blocks."
            )
        self._conversion_place.policy = chosen

    def blocks_in_run(self) -> list[BlockInRun]:
        """Return the block itself, whose row is the list that it was converted with."""
        place = self._conversion_place
        row = place.row
        return [
            BlockInRun(
                name="",
                module=place.block,
                policy=place.policy,
                half_blocks=row.half_blocks_of(place),
                row=row,
                index=place.index,
                original=place.whole,
                remedies=remedies_for(row.method, row.num_branches),
            )
        ]


def place_of(block: nn.Module) -> Place:
    """Return the place of a converted block.

    Raises:
        RuntimeError: The block is a shallow copy of a converted one.
    """
    place: Place = vars(block)[PLACE]
    if place.block is not block:
        raise RuntimeError(
            f"`{place.name}` is a shallow copy of a converted block, as `nn.DataParallel` makes them, which would run "
            "the original; use `DistributedDataParallel`, or `copy.deepcopy`."
        )
    return place


def make_converted(block: nn.Module, place: Place) -> None:
    """Make `block` a converted block.

    Raises:
        TypeError: The class of the block cannot be combined with another one.
    """
    exchange_class(block, converted_class, place.name, action="converted", way_out="convert other blocks")
    vars(block)[PLACE] = place


def restore_class(block: nn.Module) -> None:
    """Make a converted block an instance of its original class again."""
    block.__class__ = type(block)._original_class  # type: ignore[attr-defined]
    vars(block).pop(PLACE, None)


def new_converted(kind: type[nn.Module]) -> nn.Module:
    """Return a converted block whose original class is `kind`, without calling its constructor."""
    converted = converted_class(kind)
    return converted.__new__(converted)


def converted_class(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the subclass of `kind` whose instances are converted; the same one in each call."""
    return derived_class(kind, Converted, ORIGINAL_CLASS, _body_of)


def _body_of(kind: type[nn.Module]) -> dict[str, Any]:
    stream_name = next(iter([*inspect.signature(kind.forward).parameters][1:]), "x")

    @functools.wraps(kind.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return run_block(place_of(self), args, kwargs, stream_name)

    def call_eagerly(self: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return call_block(self, kind, args, kwargs)

    @functools.wraps(kind.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            _refuse_one_graph(self)
        return call_eagerly(self, args, kwargs)

    # The compiler fails on tensors that carry attributes.
    run_between_graphs(forward, _REASON)
    run_between_graphs(call_eagerly, _REASON)
    run_as_it_is(call)
    return {"forward": forward, "__call__": call, "extra_repr": _extra_repr, "__reduce_ex__": _reduce}


@constant_of_object
def _refuse_one_graph(block: nn.Module) -> None:
    """End the trace with an error if it cannot leave out the block."""
    place = place_of(block)
    if is_exporting():
        refuse_export(place)
    if must_be_one_graph():
        raise CannotCompileError(
            f"`{place.name}` is a converted block, which cannot be part of a graph of `torch.compile`; {_WAYS_OUT}."
        )


def _extra_repr(self: Any) -> str:
    """Return what the block itself shows, and the method."""
    own: str = self._original_class.extra_repr(self)
    return ", ".join(filter(None, [own, f"converted by {vars(self)[PLACE].row.method}"]))


def _reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
    """Return how to copy or pickle the block, whose class cannot be found by its name."""
    kind = self._original_class
    _, rest = reduce_parts(self, kind, protocol)
    if rest is None:
        raise TypeError(
            f"a converted {kind.__name__} cannot be copied or pickled, because its class has its own way to do so; "
            "convert the model back with `revnet.convert(model, back=True)` before."
        )
    return (new_converted, (kind,), *rest)
