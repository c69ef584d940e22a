"""Cut a model into the stages of a pipeline."""

from collections.abc import Sequence

from torch import nn

from revnet._checks import describe, is_integer
from revnet.distributed.pipeline._stage_module import StageModule, check_only_blocks
from revnet.nn import AbstractModulePolicy, ReversibleSequential


def cut_into_stages(
    blocks: ReversibleSequential,
    num_stages: int,
    *,
    num_blocks: Sequence[int] | None = None,
    stem: nn.Module | None = None,
    head: nn.Module | None = None,
) -> list[StageModule]:
    """Cut a sequence of reversible blocks, with an optional stem and head, into stages.

    The stages share the modules of the sequence. Set policies, couplings and the tolerance before: a stage has the
    policies of its blocks, and a tolerance of its own.

    Args:
        blocks: The blocks.
        num_stages: The number of stages, one for each process.
        num_blocks: The number of blocks in each stage. The default divides them evenly; the first stages get one more
            if that is not possible. Give the first stage fewer blocks if the stem is expensive, and the last one if the
            head is.
        stem: The module before the blocks, which returns a tensor or a pair of streams.
        head: The module after the blocks.

    Returns:
        The stages, in order.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: There are fewer blocks than stages, `num_blocks` does not fit, two stages share a parameter, or the
            sequence does more than run its blocks.

    Example:
        >>> from torch import nn
        >>> from revnet import ReversibleBlock, ReversibleSequential
        >>> from revnet.distributed import cut_into_stages
        >>> blocks = [ReversibleBlock(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(5)]
        >>> stages = cut_into_stages(ReversibleSequential(*blocks), 2)
        >>> [len(stage.blocks) for stage in stages]
        [3, 2]
    """
    _check_modules(blocks, stem, head)
    counts = _counts(blocks, num_stages, num_blocks)
    stages, first, num_above = [], 0, _half_blocks_above(blocks, counts)
    for index, count in enumerate(counts):
        stages.append(
            StageModule(
                blocks[first : first + count],
                stem=stem if index == 0 else None,
                head=head if index == num_stages - 1 else None,
                index=index,
                num_stages=num_stages,
                first_block=first,
                num_above=num_above[index],
            )
        )
        first += count
    _check_not_tied(stages)
    return stages


def _check_modules(blocks: object, stem: object, head: object) -> None:
    if not isinstance(blocks, ReversibleSequential):
        raise TypeError(
            f"`blocks` (={describe(blocks)}) must be a ReversibleSequential; pass the modules before and after it as "
            "`stem` and `head`."
        )
    check_only_blocks(blocks)
    for name, module in (("stem", stem), ("head", head)):
        if module is not None and not isinstance(module, nn.Module):
            raise TypeError(f"`{name}` (={describe(module)}) must be an nn.Module, or None.")


def _counts(blocks: ReversibleSequential, num_stages: int, num_blocks: Sequence[int] | None) -> list[int]:
    """Return the number of blocks in each stage."""
    if not is_integer(num_stages) or num_stages < 1:
        raise ValueError(f"`num_stages` (={describe(num_stages)}) must be a positive integer, the number of processes.")
    if len(blocks) < num_stages:
        raise ValueError(
            f"`num_stages` (={describe(num_stages)}) must be at most the number of blocks ({len(blocks)}), since each "
            "stage runs at least one; use fewer processes, or divide the batch with DistributedDataParallel."
        )
    if num_blocks is None:
        return even_counts(len(blocks), num_stages)
    is_sequence = isinstance(num_blocks, Sequence) and not isinstance(num_blocks, str)
    if not is_sequence or not all(is_integer(count) and count > 0 for count in num_blocks):
        raise ValueError(f"`num_blocks` (={describe(num_blocks)}) must be a list of positive integers, one per stage.")
    if len(num_blocks) != num_stages or sum(num_blocks) != len(blocks):
        raise ValueError(
            f"`num_blocks` (={describe(list(num_blocks))}) must have one entry for each of {num_stages} stages, and "
            f"the sum {len(blocks)}, the number of blocks."
        )
    return list(num_blocks)


def even_counts(num_blocks: int, num_stages: int) -> list[int]:
    """Return the number of blocks in each stage if they are divided evenly; the first stages may get one more."""
    quotient, remainder = divmod(num_blocks, num_stages)
    return [quotient + (index < remainder) for index in range(num_stages)]


def _half_blocks_above(blocks: ReversibleSequential, counts: Sequence[int]) -> list[int]:
    """Return, for each stage, the number of half-blocks that are undone before its output comes back."""
    above, num_above, stop = [], 0, len(blocks)
    for count in reversed(counts):
        above.append(num_above)
        # A stage that begins with another policy keeps its input, which is exact.
        keeps_input = isinstance(blocks.policies[stop - count], AbstractModulePolicy)
        num_half_blocks = sum(len(unit.functions) for unit in blocks.policy_units[stop - count : stop])
        num_above = 0 if keeps_input else num_above + num_half_blocks
        stop -= count
    return above[::-1]


def _check_not_tied(stages: Sequence[StageModule]) -> None:
    """Raise if two stages share a parameter or buffer, since each process would train a copy of its own."""
    owner: dict[int, tuple[int, str]] = {}
    for stage in stages:
        named = [*stage.named_parameters(remove_duplicate=False), *stage.named_buffers(remove_duplicate=False)]
        for name, tensor in named:
            index, first_name = owner.setdefault(id(tensor), (stage.index, name))
            if index != stage.index:
                raise ValueError(
                    f"stages {index} and {stage.index} share a tensor (`{first_name}` and `{name}`), but each process "
                    "would train its own copy; untie them, or cut the blocks elsewhere with `num_blocks`."
                )
