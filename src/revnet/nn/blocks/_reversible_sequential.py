"""Reversible blocks in a row."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, overload

from torch import nn

from revnet.engine._tolerance import ToleranceKeeper
from revnet.engine._tracing import runs_plainly
from revnet.nn.blocks._abstract_block import AbstractReversibleBlock
from revnet.nn.blocks._chains import Chains
from revnet.nn.blocks._reversible_module import ReversibleModule
from revnet.nn.blocks._schedule import Schedule
from revnet.nn.blocks._tolerance import checked_tolerance, refuse_to_compile
from revnet.nn.policies._has_policies import HasPolicies, PolicyUnit, broadcast_policy
from revnet.nn.policies._policy import AbstractPolicy, Reverse

_REVERSE = Reverse()


class ReversibleSequential(ReversibleModule, HasPolicies):
    """Run reversible blocks in order and keep only the final activation.

    The backward pass rebuilds each block's input from its output, so that the memory for activations is the same for
    four blocks and for four hundred. It behaves as plain autograd does: gradients, hooks, `torch.autograd.grad`,
    retained graphs, double backward, batch-norm statistics, dropout and autocast equal the stored twin's, which is
    the same sequence with `policy=Store()`.

    Use it where activations decide what fits. For a few blocks on small inputs, plain autograd is faster.

    Args:
        blocks: The blocks, all with the same `split_dim`.
        policy: What to do with activations: `Reverse()` rebuilds them, `Store()` keeps them, `Checkpoint()` and
            `Offload()` lie between. One policy for all blocks, or a sequence with one for each, mixed freely.
        tolerance: Bounds the relative error of every rebuilt stream, 1e-3 for instance: the sequence holds pairs of
            streams also within, at as few `keyframes` as that takes. None bounds nothing.

    Shape:
        x: a tensor, even along the blocks' `split_dim`, or a pair of tensors. Output: the same.

    Raises:
        TypeError: A block is not reversible, or an entry of `policy` is not a policy.
        ValueError: The blocks' `split_dim` differ, there are not as many policies as blocks, or `tolerance` is no
            relative error.
        NotImplementedError: A sequence with a `tolerance` is compiled as a whole.

    Numerics:
        The output is exact. The rebuilt activations carry the rounding of `(x + r) - r`, so that gradients differ from
        the twin's by an error that grows with depth and with the size of the residuals. Keep the streams in float32, as
        autocast does, and let `f` and `g` compute in low precision.

        With a `tolerance`, each rebuilt stream is compared with a sample of the true one before a function reads it.
        Where the error comes near the bound, the blocks below run forward once more to find the truth, and a keyframe
        is placed, which the next forward pass holds; so the first step is protected, too. Every 100 passes the
        keyframes are placed again. Where undoing one residual function breaks the bound, its stream is stored, and a
        warning says so once. Exact couplings need none of it.

        That costs, besides the pair at each keyframe (neighbours share a stream), the pair at the start and up to 2 KiB
        for each residual function; in a pass that places keyframes, about one forward pass, and pairs whose number is
        as the root of the depth.

    References:
        Gomez et al. (2017), The Reversible Residual Network, Algorithm 1.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from revnet import ReversibleBlock, ReversibleSequential
        >>> blocks = [ReversibleBlock(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(8)]
        >>> model = ReversibleSequential(*blocks)
        >>> model(torch.rand(3, 4)).sum().backward()
        >>> model[0].f.weight.grad.shape
        torch.Size([2, 2])
    """

    _chains: Chains

    def __init__(
        self,
        *blocks: AbstractReversibleBlock,
        policy: AbstractPolicy | str | Sequence[AbstractPolicy | str] = _REVERSE,
        tolerance: float | None = None,
    ):
        super().__init__()
        checked_tolerance(tolerance)  # Before the setter: a module would become a child instead.
        for index, block in enumerate(blocks):
            if not isinstance(block, AbstractReversibleBlock):
                raise TypeError(
                    f"`blocks[{index}]` (={type(block).__name__}) must be a reversible block, such as ReversibleBlock; "
                    "wrap two residual functions in one, or run what is not reversible before or after the sequence."
                )
            if block.split_dim != blocks[0].split_dim:
                raise ValueError(
                    f"`blocks[{index}]` has split_dim={block.split_dim}, but must split as `blocks[0]` does, along "
                    f"{blocks[0].split_dim}; give all blocks of a sequence the same `split_dim`."
                )
            if block.num_streams != blocks[0].num_streams:
                raise ValueError(
                    f"`blocks[{index}]` has {block.num_streams} streams, but must have as many as `blocks[0]`, "
                    f"{blocks[0].num_streams}; put blocks of other numbers of streams into sequences of their own."
                )
        self.blocks = nn.ModuleList(blocks)
        self._chains = Chains()
        self.set_policies(policy)
        self.tolerance = tolerance

    @property
    def tolerance(self) -> float | None:
        """The bound on the relative error of rebuilt streams; None for none. Setting it forgets the keyframes."""
        return None if self._keeper is None else self._keeper.tolerance

    @tolerance.setter
    def tolerance(self, tolerance: float | None) -> None:
        tolerance = checked_tolerance(tolerance)
        self._keeper = None if tolerance is None else ToleranceKeeper(tolerance)

    def tolerance_state(self) -> dict[str, Any] | None:
        """What the bound has learnt so far, of plain values; None without a `tolerance`.

        A run that is resumed with it has the keyframes of one that was not stopped, and so the same gradients.
        """
        return None if self._keeper is None else self._keeper.state()

    def restore_tolerance(self, state: Mapping[str, Any] | None) -> None:
        """Take over what `tolerance_state` gave, of a sequence with as many blocks; nothing without a `tolerance`."""
        if self._keeper is not None and state is not None:
            self._keeper.restore(state)

    @property
    def keyframes(self) -> tuple[str, ...]:
        """The residual functions before which the pair of streams is held, by their names, in order."""
        placed = frozenset() if self._keeper is None else self._keeper.keyframes
        names = [half_block.name for _, chain in self._schedule().segments for half_block in chain.half_blocks]
        return tuple(name for name in names if name in placed)

    @property
    def policy_units(self) -> list[PolicyUnit]:
        """The blocks, in order."""
        return [
            PolicyUnit(f"blocks.{index}", tuple(each.function for each in block.half_blocks()), is_reversible=True)
            for index, block in enumerate(self._reversible_blocks())
        ]

    @property
    def policies(self) -> tuple[AbstractPolicy, ...]:
        """The policies, one for each block."""
        count = len(self.blocks)
        if len(self._policies) == count:
            return self._policies
        if len(set(self._policies)) > 1:
            raise ValueError(
                f"`blocks` has {count} entries, but `policies` has {len(self._policies)}, and they differ, so that it "
                "is not known which belongs to which; after adding or deleting blocks, call "
                "`set_policies` with one policy, or one for each block."
            )
        return (self._policies or (_REVERSE,))[:1] * count

    def set_policies(self, policy: AbstractPolicy | str | Sequence[AbstractPolicy | str]) -> None:
        """Give all blocks one policy, or each its own; the next forward pass follows it."""
        self._policies = broadcast_policy(policy, self.policy_units)

    def __len__(self) -> int:
        return len(self.blocks)

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self.blocks)

    @overload
    def __getitem__(self, index: int) -> nn.Module: ...
    @overload
    def __getitem__(self, index: slice) -> "ReversibleSequential": ...

    def __getitem__(self, index: int | slice) -> "nn.Module | ReversibleSequential":
        """A block; or for a slice a sequence of these same blocks, with their policies."""
        if isinstance(index, slice):
            blocks, policies = self._reversible_blocks()[index], self.policies[index]
            return ReversibleSequential(*blocks, policy=policies, tolerance=self.tolerance)
        return self.blocks[index]

    def extra_repr(self) -> str:
        """The policy, or the policies in runs, and the bound with what it takes, for `repr`."""
        runs = [(policy, len(list(group))) for policy, group in groupby(self.policies)]
        if len(runs) <= 1:
            options = [f"policy={policy}" for policy, _ in runs]
        else:
            options = ["policy=" + " + ".join(f"[{policy}] * {count}" for policy, count in runs)]
        if self.tolerance is not None:
            options.append(f"tolerance={self.tolerance:g}, {len(self.keyframes)} keyframes")
        return ", ".join(options)

    def _reversible_blocks(self) -> list[AbstractReversibleBlock]:
        blocks = [block for block in self.blocks if isinstance(block, AbstractReversibleBlock)]
        if len(blocks) != len(self.blocks):
            for index, block in enumerate(self.blocks):
                if not isinstance(block, AbstractReversibleBlock):
                    raise TypeError(
                        f"`blocks[{index}]` is now a {type(block).__name__}, which is not a reversible block, and "
                        "would be left out; wrap the block's functions `f` and `g` instead. `block.compile()` compiles "
                        "them, and `torch.distributed.fsdp.fully_shard(block)` shards a block in place."
                    )
        return blocks

    def _build_schedule(self) -> Schedule:
        """Return the blocks in runs of one policy: rebuilt together, they keep one pair of streams, not one each."""
        if self._keeper is not None and not runs_plainly():
            refuse_to_compile()
        return self._chains.of(self, self._reversible_blocks(), ReversibleSequential)
