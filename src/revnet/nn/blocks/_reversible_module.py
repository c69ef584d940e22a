"""How reversible blocks and sequences of them run forward. A plain step enters no other file of this room."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import torch
from torch import Tensor, nn

from revnet._torch_internals import has_global_module_hook
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
    """How blocks and sequences run forward."""

    _chains: "Chains | None" = None
    _keeper: ToleranceKeeper | None = None

    @overload
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor: ...
    @overload
    def forward(self, x: TensorPair, *args: Any, **kwargs: Any) -> TensorPair: ...
    @overload
    def forward(self, x: Streams, *args: Any, **kwargs: Any) -> Streams: ...

    def forward(self, x: Tensor | Streams, *args: Any, **kwargs: Any) -> Tensor | Streams:
        """Compute the output of a block, or of a sequence's last block: a tensor for a tensor, a tuple for a tuple.

        Args:
            x: The activation, or the streams. Not modified, and free to be modified afterwards; streams under a
                `tolerance` only after the backward pass. The output is not: writing over it before the backward pass
                raises in that pass.
            args: Further positional arguments of every residual function, such as `f` and `g`.
            kwargs: Keyword arguments of every residual function. `f_kwargs` and `g_kwargs` are for one of them alone.
        """
        if not torch.compiler.is_dynamo_compiling() and block_calls.within and (run := call_within(self)):
            return run(x, args, kwargs)
        return run_forward(self._schedule(), x, args, kwargs, None, self._keeper)

    def _run(
        self, x: Tensor | Streams, args: tuple[Any, ...], kwargs: dict[str, Any], log_dets: list[Tensor] | None
    ) -> Any:
        return run_forward(self._schedule(), x, args, kwargs, log_dets, self._keeper)

    def _schedule(self) -> "Schedule":
        """Return what the module runs: what it ran last, if it is made of the same."""
        if self._chains is not None and not torch.compiler.is_dynamo_compiling():
            known = self._chains.known
            if known is not None and known.origin is not None and known.origin.is_same(self):
                return known.schedule
        return self._build_schedule()


Reads = tuple[Callable[[Any], Any], tuple[str, ...], str | None]
"""What a block's `half_blocks` reads: a getter of attributes, the names of children, and of a list of functions."""


class Origin(NamedTuple):
    """What the chains of a sequence were made of. It keeps nothing alive that they do not."""

    policies: tuple[AbstractPolicy, ...]
    reads: list[Reads]
    found: list[Any]
    """What was read from each block."""

    def is_same(self, sequence: Any) -> bool:
        """Return whether the chains would be the same if they were made now."""
        blocks = sequence._modules.get("blocks")
        if self.policies is not sequence._policies or type(blocks) is not nn.ModuleList:
            return False
        if len(self.reads) != len(blocks._modules) or has_global_module_hook():  # Such a hook must see each block.
            return False
        try:
            return self.found == look(blocks._modules.values(), self.reads)
        except (AttributeError, KeyError):  # Making the chains says what is missing.
            return False


def look(blocks: Iterable[Any], reads: Iterable[Reads]) -> list[Any]:
    """Return what each block's `half_blocks` reads, and what decides on whether the block itself must be called."""
    return [
        (
            type(block),
            type(block).forward,
            type(block).half_blocks,
            "forward" in block.__dict__ or "half_blocks" in block.__dict__,
            any((block._forward_hooks, block._forward_pre_hooks, block._backward_hooks, block._backward_pre_hooks)),
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
    """Run a schedule on `x`, and add up log-determinants in `log_dets`; the output has the form of `x`."""
    segments = schedule.segments
    if schedule.ambiguous is not None and isinstance(x, Tensor) and x.dim() == 3:
        raise unclear_split_dim(schedule.ambiguous, x)
    dim, num_streams = schedule.split_dim, schedule.num_streams
    coupling = segments[0][1].half_blocks[0].coupling if segments else None
    streams, input_dtype = begin(x, dim, num_streams, coupling)
    if log_dets is not None:
        check_samples(streams[0], dim)
    own_kwargs = take_own(kwargs, segments) if kwargs else {}
    is_plain = input_dtype is None and len(args) + len(kwargs) + len(own_kwargs) == 0
    # Where they are converted, what is held is the streams themselves, not their parts in another dtype.
    is_joined = isinstance(x, Tensor) and input_dtype is None
    call, last = None, len(segments) - 1
    for index, (policy, chain) in enumerate(segments):
        for_join = is_joined and index == last
        call = BoundChain(chain, args, kwargs, own_kwargs, input_dtype, log_dets, tolerance, is_plain, for_join)
        streams = policy.run(call, streams)
    if input_dtype is not None:
        streams = tuple([stream.to(input_dtype) for stream in streams])
    run = call.run if call is not None and is_joined else None
    return joined(streams, dim, None if run is None else run()) if isinstance(x, Tensor) else streams
