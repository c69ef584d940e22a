"""A sequence of reversible blocks."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, overload

from torch import nn

from revnet._units import counted
from revnet.engine._tolerance import ToleranceKeeper
from revnet.engine._tracing import runs_plainly
from revnet.nn.blocks._abstract_block import AbstractReversibleBlock
from revnet.nn.blocks._blocks_in_runs import BlockInRun
from revnet.nn.blocks._chains import Chains, list_blocks
from revnet.nn.blocks._reversible_module import ReversibleModule
from revnet.nn.blocks._schedule import Schedule
from revnet.nn.blocks._tolerance import checked_tolerance, refuse_to_compile
from revnet.nn.policies._has_gradient_checkpointing import HasGradientCheckpointing
from revnet.nn.policies._has_policies import HasPolicies, PolicyUnit, broadcast_policy
from revnet.nn.policies._policy import AbstractPolicy, Reverse

_REVERSE = Reverse()


class ReversibleSequential(ReversibleModule, HasPolicies, HasGradientCheckpointing):
    """Run reversible blocks in order and keep only the final activation.

    The backward pass rebuilds the input of each block from its output, so four blocks and four hundred blocks need the
    same memory for activations. Otherwise the sequence behaves like plain autograd. Gradients, hooks,
    `torch.autograd.grad`, retained graphs, double backward, batch-norm statistics, dropout and autocast work as in the
    stored twin, which is the same sequence with `policy=Store()`.

    Use it if activations limit the size of your model or batch. For a few blocks on small inputs, plain autograd is
    faster.

    Args:
        blocks: The blocks, all with the same `split_dim`.
        policy: Policy for the activations, or its name: `Reverse()` rebuilds them, `Store()` keeps them, and
            `Checkpoint()` and `Offload()` are in between. Pass one policy for all blocks, or a sequence with one for
            each block, in any mix.
        tolerance: Bound on the relative error of every rebuilt stream, such as 1e-3. To keep it, the sequence also
            stores the streams at intermediate points (`keyframes`), as few as possible. None sets no bound.

    Shape:
        x: A tensor whose size along the blocks' `split_dim` is even, or a pair of tensors. Output: the same.

    Raises:
        TypeError: A block is not reversible, or an entry of `policy` is not a policy.
        ValueError: The blocks differ in `split_dim` or in their number of streams, the number of policies is not the
            number of blocks, or `tolerance` is not between 0 and 1. Blocks that were changed or replaced later raise
            in the next pass.
        NotImplementedError: A sequence with a `tolerance` is compiled as a whole.

    Numerics:
        The output is exact. The rebuilt activations carry the rounding of `(x + r) - r`, so the gradients differ from
        the twin's gradients by an error that grows with the depth and with the size of the residuals. Keep the streams
        in float32, as autocast does, and let `f` and `g` compute in low precision.

        With a `tolerance`, each rebuilt stream is compared with a sample of the true stream before a function reads it.
        If the error comes near the bound, the blocks before it are run forward again to recover the exact stream, and
        a keyframe is added, which the next forward pass stores. So even the first step keeps the bound. Every 100
        passes, all keyframes are chosen again. If undoing a single residual function breaks the bound, its input is
        stored, and a warning says so once. Exact couplings need no tolerance.

        A tolerance costs memory: a pair of streams at the start and at each keyframe (neighbors share a stream), and up
        to 2 KiB for each residual function. A backward pass that adds keyframes takes about one more forward pass, and
        memory for O(sqrt(depth)) pairs.

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
    _first_block = 0

    def __init__(
        self,
        *blocks: AbstractReversibleBlock,
        policy: AbstractPolicy | str | Sequence[AbstractPolicy | str] = _REVERSE,
        tolerance: float | None = None,
    ):
        super().__init__()
        checked_tolerance(tolerance)  # Before assigning, because assigning a module would register it.
        for index, block in enumerate(blocks):
            if not isinstance(block, AbstractReversibleBlock):
                raise TypeError(
                    f"`blocks[{index}]` (={type(block).__name__}) must be a reversible block, such as ReversibleBlock; "
                    "wrap two residual functions in one, or run other modules before or after the sequence."
                )
        _check_alike(blocks)
        self.blocks = nn.ModuleList(blocks)
        self._chains = Chains()
        self.set_policies(policy)
        self.tolerance = tolerance

    @property
    def first_block(self) -> int:
        """The number of the first block in errors and warnings, for a sequence that is a part of another one."""
        return self._first_block

    @first_block.setter
    def first_block(self, number: int) -> None:
        self._first_block = number
        self._chains = Chains()  # The names of half-blocks have the number.

    @property
    def tolerance(self) -> float | None:
        """The bound on the relative error of rebuilt streams, or None. Setting it discards the keyframes."""
        return None if self._keeper is None else self._keeper.tolerance

    @tolerance.setter
    def tolerance(self, tolerance: float | None) -> None:
        tolerance = checked_tolerance(tolerance)
        self._keeper = None if tolerance is None else ToleranceKeeper(tolerance)

    def tolerance_state(self) -> dict[str, Any] | None:
        """Return the keyframes and the other records of the tolerance as plain values; None without a `tolerance`.

        A training run that is resumed with this state has the same keyframes, and so the same gradients, as a run that
        was never stopped.
        """
        return None if self._keeper is None else self._keeper.state()

    def restore_tolerance(self, state: Mapping[str, Any] | None) -> None:
        """Restore the result of `tolerance_state`. It has no effect without a `tolerance`.

        Args:
            state: The state of a sequence with the same number of blocks, or None.
        """
        if self._keeper is not None and state is not None:
            self._keeper.restore(state)

    @property
    def keyframes(self) -> tuple[str, ...]:
        """The names of the residual functions whose input streams are stored, in order."""
        keyframes = frozenset() if self._keeper is None else self._keeper.keyframes
        names = [half_block.name for _, chain in self._schedule().segments for half_block in chain.half_blocks]
        return tuple(name for name in names if name in keyframes)

    @property
    def policy_units(self) -> list[PolicyUnit]:
        """The blocks, in order."""
        units = []
        for index, block in enumerate(self._reversible_blocks()):
            half_blocks = tuple(block.half_blocks())
            functions = tuple([half_block.function for half_block in half_blocks])
            units.append(PolicyUnit(f"blocks.{index}", functions, is_reversible=True, half_blocks=half_blocks))
        return units

    @property
    def policies(self) -> tuple[AbstractPolicy, ...]:
        """The policies, one for each block."""
        count = len(self.blocks)
        if len(self._policies) == count:
            return self._policies
        if len(set(self._policies)) > 1:
            raise ValueError(
                f"`blocks` has {count} entries, but `policies` has {len(self._policies)}, not all equal; after "
                "adding or deleting blocks, call `set_policies` with one policy, or one for each block."
            )
        return (self._policies or (_REVERSE,))[:1] * count

    def set_policies(self, policy: AbstractPolicy | str | Sequence[AbstractPolicy | str]) -> None:
        """Set one policy for all blocks, or one policy for each block. The next forward pass uses it."""
        self._policies = broadcast_policy(policy, self.policy_units)

    def blocks_in_run(self) -> list[BlockInRun]:
        """Return the blocks, in order."""
        return list_blocks(self, self._reversible_blocks())

    def __len__(self) -> int:
        return len(self.blocks)

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self.blocks)

    @overload
    def __getitem__(self, index: int) -> nn.Module: ...
    @overload
    def __getitem__(self, index: slice) -> "ReversibleSequential": ...

    def __getitem__(self, index: int | slice) -> "nn.Module | ReversibleSequential":
        """Return a block, or for a slice a sequence of the same blocks with their policies."""
        if isinstance(index, slice):
            blocks, policies = self._reversible_blocks()[index], self.policies[index]
            return ReversibleSequential(*blocks, policy=policies, tolerance=self.tolerance)
        return self.blocks[index]

    def extra_repr(self) -> str:
        """Return the policies, the tolerance and the number of keyframes, for `repr`."""
        runs = [(policy, len(list(group))) for policy, group in groupby(self.policies)]
        shown = [str(policy) if len(runs) == 1 else f"[{policy}] * {count}" for policy, count in runs]
        options = [f"policy={' + '.join(shown)}"] if runs else []
        if self.tolerance is not None:
            options.append(f"tolerance={self.tolerance:g}, {len(self.keyframes)} keyframes")
        return ", ".join(options)

    def _reversible_blocks(self) -> list[AbstractReversibleBlock]:
        return _checked(self.blocks)

    def _build_schedule(self) -> Schedule:
        """Build one chain for each run of blocks with the same policy, so that the run stores one pair of streams."""
        if self._keeper is not None and not runs_plainly():
            refuse_to_compile()
        return self._chains.of(self, self._reversible_blocks(), ReversibleSequential)


def _checked(blocks: nn.ModuleList) -> list[AbstractReversibleBlock]:
    """Return the blocks, or raise if they were changed so that they cannot run as one sequence."""
    checked = [block for block in blocks if isinstance(block, AbstractReversibleBlock)]
    if len(checked) != len(blocks):
        for index, block in enumerate(blocks):
            if not isinstance(block, AbstractReversibleBlock):
                raise TypeError(
                    f"`blocks[{index}]` is now a {type(block).__name__}, which is not a reversible block, so it "
                    "cannot run; wrap the block's functions `f` and `g` instead. `block.compile()` compiles "
                    "them, and `torch.distributed.fsdp.fully_shard(block)` shards a block in place."
                )
    _check_alike(checked)
    return checked


def _check_alike(blocks: Sequence[AbstractReversibleBlock]) -> None:
    """Raise if the blocks differ in the way in which they split their input."""
    for index, block in enumerate(blocks):
        if block.split_dim != blocks[0].split_dim:
            raise ValueError(
                f"`blocks[{index}]` has split_dim={block.split_dim}, but `blocks[0]` has split_dim="
                f"{blocks[0].split_dim}; give all blocks of a sequence the same `split_dim`."
            )
        if block.num_streams != blocks[0].num_streams:
            raise ValueError(
                f"`blocks[{index}]` has {counted(block.num_streams, 'stream')}, but `blocks[0]` has "
                f"{blocks[0].num_streams}; put blocks with different numbers of streams into separate sequences."
            )
