"""The forward pass of reversible blocks and sequences. A plain step runs no other file of `revnet.nn`."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn

from revnet._torch_internals import has_global_module_hook, hooks_of
from revnet._types import Streams, TensorPair
from revnet.engine import BoundChain
from revnet.engine._block_hooks import block_calls, call_within
from revnet.engine._streams import begin, joined
from revnet.engine._tolerance import ToleranceKeeper
from revnet.nn.blocks._abstract_reversible import AbstractReversible
from revnet.nn.blocks._run import check_samples, take_own
from revnet.nn.blocks._schedule import Schedule
from revnet.nn.blocks._split_dim import unclear_split_dim
from revnet.nn.policies._policy import AbstractPolicy

if TYPE_CHECKING:
    from revnet.nn.blocks._chains import Chains


class ReversibleModule(AbstractReversible):
    """The forward pass that blocks and sequences share."""

    _chains: "Chains | None" = None
    _keeper: ToleranceKeeper | None = None

    @overload
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor: ...
    @overload
    def forward(self, x: TensorPair, *args: Any, **kwargs: Any) -> TensorPair: ...
    @overload
    def forward(self, x: Streams, *args: Any, **kwargs: Any) -> Streams: ...

    def forward(self, x: Tensor | Streams, *args: Any, **kwargs: Any) -> Tensor | Streams:
        """Compute the output: a tensor if `x` is a tensor, and a tuple if `x` is a tuple.

        Args:
            x: The activation, or the streams. Before `backward`, do not modify the output, or `x` under a `tolerance`.
            args: Additional positional arguments of every residual function, such as `f` and `g`.
            kwargs: Additional keyword arguments. `f_kwargs` and `g_kwargs` are dicts for only one of the functions.
        """
        if not torch.compiler.is_dynamo_compiling() and block_calls.within and (run := call_within(self)):
            return run(x, args, kwargs)
        return run_forward(self._schedule(), x, args, kwargs, None, self._keeper)

    def _run(self, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any], log_dets: list[Tensor] | None) -> Any:
        return run_forward(self._schedule(), x, args, kwargs, log_dets, self._keeper)

    def _schedule(self) -> Schedule:
        """Return the schedule of the last call, or a new one if the module has changed since."""
        if self._chains is not None and not torch.compiler.is_dynamo_compiling():
            known = self._chains.known
            if known is not None and known.origin is not None and known.origin.is_same(self):
                return known.schedule
        return self._build_schedule()


Reads = tuple[Callable[[Any], Any], tuple[str, ...], str | None]
"""The data that `half_blocks` reads from its block: a getter of attributes, names of children, and name of a list."""


@dataclass(frozen=True)
class Origin:
    """The parts from which the chains of a sequence were built. It keeps nothing alive that the chains do not keep."""

    policies: tuple[AbstractPolicy, ...]
    reads: list[Reads]
    values: list[Any]

    def is_same(self, sequence: Any) -> bool:
        """Return whether the chains would be the same if they were built now."""
        blocks = sequence._modules.get("blocks")
        if self.policies is not sequence._policies or type(blocks) is not nn.ModuleList:
            return False
        if len(self.reads) != len(blocks._modules) or has_global_module_hook():  # Such a hook must see each block.
            return False
        try:
            return self.values == read_blocks(blocks._modules.values(), self.reads)
        except (AttributeError, KeyError):  # Building the chains raises the right error.
            return False


def read_blocks(blocks: Iterable[Any], reads: Iterable[Reads]) -> list[Any]:
    """Return the values that `half_blocks` reads from each block, and those that say whether it must be called."""
    return [
        (
            type(block),
            type(block).forward,
            type(block).half_blocks,
            "forward" in block.__dict__ or "half_blocks" in block.__dict__,
            any(hooks_of(block)),
            attributes(block),
            list(map(block._modules.get, children)),
            list_name and (type(block._modules[list_name]), *block._modules[list_name]._modules.values()),
        )
        for block, (attributes, children, list_name) in zip(blocks, reads, strict=True)
    ]


def run_forward(
    schedule: Schedule,
    x: Tensor | Streams,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    log_dets: list[Tensor] | None = None,
    tolerance: ToleranceKeeper | None = None,
) -> Any:
    """Run a schedule on `x`, and append log-determinants to `log_dets`. The output is a tensor if `x` is one."""
    segments, dim = schedule.segments, schedule.split_dim
    if schedule.ambiguous is not None and isinstance(x, Tensor) and x.dim() == 3:
        raise unclear_split_dim(schedule.ambiguous, x)
    coupling = segments[0][1].half_blocks[0].coupling if segments else None
    streams, input_dtype = begin(x, dim, schedule.num_streams, coupling)
    if log_dets is not None:
        check_samples(streams[0], dim)
    own_kwargs = take_own(kwargs, segments) if kwargs else {}
    is_plain = input_dtype is None and len(args) + len(kwargs) + len(own_kwargs) == 0
    is_joined = isinstance(x, Tensor) and input_dtype is None  # Else the run holds the streams, not the output.
    call, last = None, len(segments) - 1
    for index, (policy, chain) in enumerate(segments):
        for_join = is_joined and index == last
        is_direct = is_plain and not chain.mixes
        call = BoundChain(chain, args, kwargs, own_kwargs, input_dtype, log_dets, tolerance, is_direct, for_join)
        streams = policy.run(call, streams)
    if input_dtype is not None:
        streams = tuple([stream.to(input_dtype) for stream in streams])
    run = call.run if call is not None and is_joined else None
    return joined(streams, dim, None if run is None else run()) if isinstance(x, Tensor) else streams
