"""Make the residual blocks of any model reversible, in place, and take it back."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

from torch import nn

from revnet._checks import check_bool, check_module, describe, describe_kind
from revnet.conversion._bodies import WholeBlock
from revnet.conversion._branches import Branches, check_kind_of_branches, make_branches
from revnet.conversion._converted import make_converted, place_of, restore_class
from revnet.conversion._methods import AbstractMethod, Adapter, Consistent
from revnet.conversion._refusals import check_adapter, check_block, check_host, check_once, check_row, why_first_differs
from revnet.conversion._report import ConversionReport
from revnet.conversion._row import Place, Row
from revnet.nn import Reverse
from revnet.nn._exchanged_class import ORIGINAL_CLASS, is_converted


def convert(
    model: nn.Module | Sequence[nn.Module],
    method: AbstractMethod | None = None,
    *,
    blocks: str | Sequence[str] | None = None,
    branches: Branches | None = None,
    back: bool = False,
) -> ConversionReport:
    """Make residual blocks reversible, in place, so that their activations are rebuilt in the backward pass.

    Each block must be called as `block(x, ...)`, and must return a tensor of the shape of `x`, which the next block
    reads. The class of each block is replaced by a subclass, and nothing else of the model changes: names, parameters,
    hooks, `isinstance` and the code that calls the blocks stay as they are. The second stream rides on the tensor that
    a block returns. The first block of a list stays as it is if its parameters have other shapes than the second one's.

    `revnet.set_policy(model, "store")` gives the stored twin: the same converted network, whose activations are
    stored. The streams are float32 under autocast. The functions of a block must compute the same when they run again.

    Args:
        model: A list of blocks, such as `model.blocks`; or a whole model, if `blocks` is given.
        method: The method; None means `Consistent()`.
        blocks: Dotted names of the lists within `model`, such as "layer1" or ["layer1", "layer2"].
        branches: Names of the modules of each residual branch of a block, such as
            `[["norm1", "attn"], ["norm2", "mlp"]]`, which the block must apply one after the other. Each branch is
            then a residual function with float32 streams, which models in bfloat16 need, and gets the arguments of the
            block that its modules take by name. None makes each block one function.
        back: Whether to restore the original classes instead, of all blocks in `model`.

    Returns:
        A report of the blocks that were converted, and of the others.

    Raises:
        TypeError: An argument has the wrong type, or a block cannot be converted.
        ValueError: `blocks` names something else than a list of blocks, or a block cannot be converted.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import revnet
        >>> from revnet.conversion import Dr2Net
        >>> class Block(nn.Linear):
        ...     def forward(self, x):
        ...         return x + torch.tanh(super().forward(x))
        >>> blocks = nn.Sequential(*[Block(8, 8) for _ in range(4)])
        >>> model = nn.Sequential(nn.Linear(3, 8), blocks)
        >>> x = torch.rand(2, 3)
        >>> y = model(x)
        >>> report = revnet.convert(model, Dr2Net(alpha=1, beta=0), blocks="1")
        >>> torch.equal(model(x), y)
        True
    """
    check_bool(back=back)
    if back:
        return _convert_back(model, method, blocks)
    method = Consistent() if method is None else method
    if not isinstance(method, AbstractMethod):
        raise TypeError(f"`method` (={describe(method)}) must be a method of conversion, such as `Consistent(0.25)`.")
    if branches is not None:
        check_kind_of_branches(branches)
    rows = _rows_of(model, blocks)
    if isinstance(model, nn.Module):
        check_host(model)
    left: dict[str, str] = {}
    planned: list[tuple[Row, list[nn.Module]]] = []
    for row_blocks in rows:
        check_row(row_blocks)
        names = list(row_blocks)
        if reason := why_first_differs(list(row_blocks.values())):
            left[names.pop(0)] = reason
        for name in names:
            check_block(name, row_blocks[name])
        num_branches = None if branches is None else len(branches)
        planned.append((Row(tuple(names), method, num_branches), [row_blocks[name] for name in names]))
    check_once(rows)
    # Only now, so that an error leaves the model as it was.
    made = [_places(row, members, branches) for row, members in planned]
    done: list[nn.Module] = []
    try:
        for place in chain.from_iterable(made):
            make_converted(place.block, place)
            done.append(place.block)
    except TypeError:
        for block in done:
            restore_class(block)
        raise
    return ConversionReport(method, tuple(name for row, _ in planned for name in row.names), left)


def set_method(model: nn.Module | Sequence[nn.Module], method: AbstractMethod) -> None:
    """Change the method of all converted blocks in a model. Passes that have begun keep the one before.

    Args:
        model: The model, or a list of its blocks.
        method: The new method.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: The model has no converted blocks, or they do not fit the method.
    """
    if not isinstance(method, AbstractMethod):
        raise TypeError(f"`method` (={describe(method)}) must be a method of conversion, such as `Consistent(0.25)`.")
    blocks = _converted_in(model)
    if not blocks:
        raise ValueError(f"`model` (={describe_kind(model)}) has no converted blocks; call `revnet.convert` first.")
    rows = list({id(row): row for row in [place_of(block).row for block in blocks]}.values())
    if isinstance(method, Adapter):
        for block in blocks:
            check_adapter(place_of(block).name, block, method.name)
    for row in rows:
        method.scheme(row.num_branches)  # All of them first, so that an error changes none.
    for row in rows:
        if row.method != method:
            row.method = method


def _converted_in(model: Any) -> list[nn.Module]:
    """Return the converted blocks in a model or in a list of modules."""
    parts = model if isinstance(model, list | tuple) else [model]
    for part in parts:
        check_module("model", part)
    return [block for part in parts for block in part.modules() if is_converted(block)]


def _places(row: Row, blocks: Sequence[nn.Module], branches: Branches | None) -> list[Place]:
    places = []
    for index, block in enumerate(blocks):
        whole = WholeBlock(block, type(block), row.names[index])
        parts = None if branches is None else make_branches(block, row.names[index], branches)
        if isinstance(row.method, Adapter):
            check_adapter(row.names[index], block, row.method.name)
        places.append(Place(row, index, block, whole, parts, Reverse()))
    return places


def _rows_of(model: Any, blocks: Any) -> list[dict[str, nn.Module]]:
    """Return the lists of blocks, each with the names of its blocks."""
    if blocks is None:
        if not isinstance(model, nn.Sequential | nn.ModuleList | list | tuple):
            raise TypeError(
                f"`model` (={describe(model)}) must be a list of blocks, such as `model.blocks`; or name its lists, as "
                "in `blocks='blocks'`."
            )
        members = list(model._modules.items()) if isinstance(model, nn.Module) else list(enumerate(model))
        return [{str(name): block for name, block in members}]
    check_module("model", model)
    names = [blocks] if isinstance(blocks, str) else blocks
    if not isinstance(names, Sequence) or not names or not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"`blocks` (={describe(blocks)}) must be the name of a list of blocks, such as 'layer1', or a list of them."
        )
    return [_row_named(model, name) for name in names]


def block_lists(model: nn.Module) -> dict[str, nn.Sequential | nn.ModuleList]:
    """Return the lists in a model whose blocks `convert` could be given, by name."""
    lists = (nn.Sequential, nn.ModuleList)
    return {name: module for name, module in model.named_modules() if name and isinstance(module, lists)}


def _row_named(model: nn.Module, name: str) -> dict[str, nn.Module]:
    modules = dict(model.named_modules())
    found = modules.get(name)
    if not isinstance(found, nn.Sequential | nn.ModuleList):
        lists = list(block_lists(model))
        what = "does not exist" if found is None else f"is a {type(found).__name__}"
        hint = f"this model has {', '.join(lists[:4])}" if lists else "this model has none"
        raise ValueError(f"`blocks` names {name!r}, which {what} in `model`, and not a list of blocks; {hint}.")
    return {f"{name}.{child}": block for child, block in found._modules.items()}


def _convert_back(model: Any, method: Any, blocks: Any) -> ConversionReport:
    if method is not None or blocks is not None:
        raise ValueError("`back` (=True) restores all blocks of `model`, so `method` and `blocks` must be left out.")
    converted = _converted_in(model)
    if not converted:
        raise ValueError(f"`model` (={describe_kind(model)}) has no converted blocks, so `back` must be False.")
    names = tuple(place_of(block).name for block in converted)
    for name, block in zip(names, converted, strict=True):
        if ORIGINAL_CLASS not in vars(type(block)):
            raise ValueError(
                f"`{name}` of `model` had its class replaced again after it was converted, as `fully_shard` and "
                "parametrizations do, so it cannot be converted back; undo that first, or set `Store()` with "
                "`set_policy`."
            )
    for block in converted:
        restore_class(block)
    return ConversionReport(None, names)
