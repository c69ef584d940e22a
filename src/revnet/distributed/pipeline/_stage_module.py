"""The part of a model that one process of a pipeline runs."""

import re
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import nn

from revnet.nn import ReversibleSequential
from revnet.nn.blocks._chains import has_own_call


class StageModule(nn.Module):
    """Consecutive blocks of a pipeline, with the stem in the first stage and the head in the last.

    `cut_into_stages` makes stages. The state dict of a stage names blocks by their places in the whole sequence, so the
    state dicts of all stages together are the state dict of a stage with all blocks. It is also the state dict of a
    module whose attributes are named `stem`, `blocks` and `head`. A stage loads its own part of such a state dict.

    Args:
        blocks: The blocks of this stage.
        stem: The module before the blocks, in the first stage.
        head: The module after the blocks, in the last stage.
        index: The place of the stage, from 0.
        num_stages: The number of stages.
        first_block: The place of the first block in the whole sequence.
        num_above: The number of half-blocks in later stages that are undone before the output of this stage comes back.

    Example:
        >>> from torch import nn
        >>> from revnet import ReversibleBlock, ReversibleSequential
        >>> from revnet.distributed import StageModule
        >>> blocks = ReversibleSequential(ReversibleBlock(nn.Linear(2, 2), nn.Linear(2, 2)))
        >>> stage = StageModule(blocks, index=1, num_stages=2, first_block=7)
        >>> list(stage.state_dict())[0]
        'blocks.blocks.7.f.weight'
    """

    def __init__(
        self,
        blocks: ReversibleSequential,
        *,
        stem: nn.Module | None = None,
        head: nn.Module | None = None,
        index: int = 0,
        num_stages: int = 1,
        first_block: int = 0,
        num_above: int = 0,
    ):
        super().__init__()
        check_only_blocks(blocks)
        self.stem = stem
        self.blocks = blocks
        # Errors and warnings name blocks by their places in the whole sequence.
        self.blocks.first_block = first_block
        self.head = head
        self.index = index
        self.num_stages = num_stages
        self.num_above = num_above
        self.register_state_dict_post_hook(_to_whole)
        self.register_load_state_dict_pre_hook(_from_whole)

    @property
    def first_block(self) -> int:
        """The place of the first block in the whole sequence."""
        return self.blocks.first_block

    @property
    def is_first(self) -> bool:
        """Whether the stage receives the batch."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """Whether the stage computes the loss."""
        return self.index == self.num_stages - 1

    @property
    def split_dim(self) -> int:
        """The dimension along which the blocks split a tensor into streams."""
        return int(self.blocks.blocks[0].split_dim)  # type: ignore[arg-type]

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        tensors: Iterator[torch.Tensor] = chain(self.parameters(), self.buffers())
        return next((tensor.device for tensor in tensors), torch.device("cpu"))

    def extra_repr(self) -> str:
        """Return the place of the stage, for `repr`."""
        last = self.first_block + len(self.blocks) - 1
        return f"stage {self.index} of {self.num_stages}, blocks {self.first_block} to {last}"


def check_only_blocks(blocks: ReversibleSequential) -> None:
    """Raise if a sequence does more than run its blocks, which is all that a stage does.

    Raises:
        ValueError: It has hooks, or a `forward`, parameters or buffers of its own.
    """
    own = "hooks or a `forward` of its own" if has_own_call(blocks, ReversibleSequential) else _own_tensor(blocks)
    if own:
        raise ValueError(
            f"`blocks` (={type(blocks).__name__}) has {own}, which a stage would leave out, since it runs only the "
            "blocks; move it into `stem`, `head` or a block, and pass a plain `ReversibleSequential`."
        )


def _own_tensor(blocks: ReversibleSequential) -> str | None:
    """Return a description of a tensor that belongs to the sequence and not to a block, or None."""
    others = {name: child for name, child in blocks.named_children() if name != "blocks"}
    named = [*blocks.named_parameters(recurse=False), *blocks.named_buffers(recurse=False)]
    for name, child in others.items():
        named += [*child.named_parameters(name), *child.named_buffers(name)]
    # An attribute may also be another name of a block.
    inside = {id(tensor) for tensor in chain(blocks.blocks.parameters(), blocks.blocks.buffers())} if named else ()
    return next((f"a parameter or buffer of its own (`{name}`)" for name, x in named if id(x) not in inside), None)


_BLOCK = re.compile(r"blocks\.blocks\.(\d+)\.")


def _renumbered(key: str, prefix: str, shift: int) -> str:
    """Return a key with the number of its block shifted, if it belongs to a block."""
    match = _BLOCK.match(key, len(prefix)) if key.startswith(prefix) else None
    if match is None:
        return key
    return f"{key[: match.start(1)]}{int(match[1]) + shift}{key[match.end(1) :]}"


def _to_whole(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Rename the entries of blocks to their places in the whole sequence."""
    assert isinstance(module, StageModule)
    # All at once: the old and the new names overlap.
    entries = [(key, state.pop(key)) for key in list(state) if key.startswith(prefix)]
    state.update({_renumbered(key, prefix, module.first_block): value for key, value in entries})


def _from_whole(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Rename the entries of this stage's blocks to their places in the stage, and remove those of other stages."""
    assert isinstance(module, StageModule)
    first, count = module.first_block, len(module.blocks)
    for key, value in [(key, state.pop(key)) for key in list(state) if key.startswith(prefix)]:
        match = _BLOCK.match(key, len(prefix))
        if match is not None:
            is_own = first <= int(match[1]) < first + count
        elif key.startswith(f"{prefix}stem."):
            is_own = module.is_first
        else:
            is_own = module.is_last or not key.startswith(f"{prefix}head.")
        if is_own:
            state[_renumbered(key, prefix, -first)] = value
