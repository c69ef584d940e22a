"""What cannot be converted, and why."""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn

from revnet._checks import describe
from revnet.conversion._host_switches import checkpoints_itself
from revnet.nn._exchanged_class import is_converted
from revnet.nn.blocks._abstract_reversible import AbstractReversible
from revnet.nn.policies._added_policy import AddedPolicy
from revnet.nn.policies._has_policies import HasPolicies

_STRIDES = ("stride", "dilation")


def check_host(model: nn.Module) -> None:
    """Raise if a model checkpoints its blocks itself.

    Raises:
        ValueError: It does.
    """
    for name, module in model.named_modules():
        if (switch := checkpoints_itself(module)) is not None:
            owner = f"`{name}`" if name else "`model`"
            raise ValueError(
                f"{owner} (={type(module).__name__}) has `{switch}` on, so it would run converted blocks a second "
                "time; turn it off, as `gradient_checkpointing_disable` does in transformers and "
                "`set_grad_checkpointing(False)` in timm."
            )


def check_row(blocks: Mapping[str, Any]) -> None:
    """Raise if blocks cannot form a row.

    Raises:
        TypeError: One of them is not a module.
        ValueError: There are none, or two share a module.
    """
    if not blocks:
        raise ValueError("the list of blocks is empty; name one with at least one residual block.")
    owners: dict[int, str] = {}
    for name, block in blocks.items():
        if not isinstance(block, nn.Module):
            raise TypeError(f"block `{name}` (={describe(block)}) must be a module.")
        for inner in block.modules():
            has_state = inner is block or any(True for _ in inner.buffers(recurse=False))
            if has_state and owners.setdefault(id(inner), name) != name:
                what = "are one module" if inner is block else f"share the state of a {type(inner).__name__}"
                raise ValueError(
                    f"blocks `{owners[id(inner)]}` and `{name}` {what}, which each run changes; convert a list whose "
                    "blocks have state of their own."
                )


def check_block(name: str, block: nn.Module) -> None:
    """Raise if a block cannot be converted.

    Raises:
        TypeError: Its class cannot be replaced.
        ValueError: It is converted or reversible already, or it has a policy or a `forward` of its own.
    """
    kind = type(block).__name__
    if is_converted(block):
        raise ValueError(
            f"`{name}` (={kind}) is converted already; change its method with `revnet.conversion.set_method`, or "
            "convert it back with `back=True`."
        )
    if isinstance(block, AbstractReversible):
        raise ValueError(f"`{name}` (={kind}) is reversible already; convert ordinary residual blocks.")
    if isinstance(block, HasPolicies):
        way_out = "take it away with `revnet.nn.remove_policies` before"
        if not isinstance(block, AddedPolicy):
            way_out = "set its policy with `revnet.set_policy` instead of converting it, or convert other blocks"
        raise ValueError(f"`{name}` (={kind}) has a policy, which would run it a second time; {way_out}.")
    if isinstance(block, torch.jit.ScriptModule):
        raise TypeError(f"`{name}` (={kind}) is scripted, so its class is fixed; convert the model before scripting.")
    if kind == "OptimizedModule":
        raise ValueError(
            f"`{name}` (={kind}) is the result of `torch.compile`; convert the model first, and then compile the "
            "modules inside its blocks."
        )
    if "forward" in vars(block):
        raise ValueError(
            f"`{name}` (={kind}) has a `forward` that was set on the block itself, as accelerate's hooks do, and that "
            "hides the one of its class; remove it, or convert the model before it is dispatched."
        )
    if type(block).forward is nn.Module.forward:
        raise TypeError(f"`{name}` (={kind}) has no `forward`; name the list of blocks inside it.")


def check_once(rows: Sequence[Mapping[str, nn.Module]]) -> None:
    """Raise if two lists have a block in common.

    Raises:
        ValueError: They have.
    """
    owners: dict[int, str] = {}
    for name, block in chain.from_iterable(row.items() for row in rows):
        if id(block) in owners:
            other = owners[id(block)]
            places = f"`{name}` twice" if other == name else f"one block twice, as `{other}` and as `{name}`"
            raise ValueError(f"`blocks` names {places}; leave one of the lists out.")
        owners[id(block)] = name


def check_adapter(name: str, block: nn.Module, adapter: str) -> None:
    """Raise if a block has no adapter.

    Raises:
        ValueError: It has no child of this name.
    """
    if adapter not in dict(block.named_modules()):
        raise ValueError(
            f"`{name}` (={type(block).__name__}) has no child `{adapter}`; add one to each block that is converted, as "
            f"in `block.{adapter} = nn.Linear(d, d)`, before `Adapter`."
        )


def why_first_differs(blocks: Sequence[nn.Module]) -> str | None:
    """Return why the first block stays as it is, or None if it is like the second one."""
    if len(blocks) < 2:
        return None
    first, second = map(_structure, blocks[:2])
    if first == second:
        return None
    return "its parameters or strides differ from the next block's, so it may change the shape"


def _structure(block: nn.Module) -> Any:
    parameters = [(name, tuple(parameter.shape)) for name, parameter in block.named_parameters()]
    strides = [
        (name, attribute, str(value))
        for name, module in block.named_modules()
        for attribute in _STRIDES
        if (value := getattr(module, attribute, None)) is not None
    ]
    return type(block), parameters, strides
