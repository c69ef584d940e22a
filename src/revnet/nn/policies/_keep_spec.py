"""What users write for `Reverse(keep=...)`, as rules of the engine."""

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch._ops import OpOverload, OpOverloadPacket

from revnet._bytes import parse_bytes
from revnet._checks import describe
from revnet._torch_internals import is_composite
from revnet.engine._keep import AbstractKeepRule, KeepOperators, KeepSelected, KeepWithin

Keep = str | int | Callable[..., Any] | OpOverloadPacket | OpOverload | Sequence[Any]

_aten = torch.ops.aten
_BY_NAME: dict[str, tuple[str, ...]] = {
    "convolution": ("convolution",),
    "linear": ("mm", "addmm", "bmm", "baddbmm"),
    "attention": (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_fused_attention_overrideable",
    ),
}
"""Operators that a name means, most of them expensive to run again."""
_COMPOSITE: dict[str, str] = {
    "aten::linear": "linear",
    "aten::matmul": "linear",
    "aten::scaled_dot_product_attention": "attention",
    **{f"aten::conv{dims}d": "convolution" for dims in (1, 2, 3)},
    **{f"aten::conv_transpose{dims}d": "convolution" for dims in (1, 2, 3)},
}
"""Operators that PyTorch replaces by the ones of a name before they run."""
KEEP_NAMES = tuple(_BY_NAME)
"""Names of the kinds of operators."""
_ENTRY = re.compile(r"(?:(?P<role>[^\W\d]\w*)\.)?(?P<name>[a-z_]+)(?:\.(?P<number>\d+))?")
_WAY_OUT = "such as 'convolution', 'f.attention', 'g.linear.0', `torch.ops.aten.mm`, '64MiB' or a function"


def is_budget(keep: Keep) -> bool:
    """Return whether `keep` is a number of bytes."""
    return (isinstance(keep, int) and not isinstance(keep, bool)) or (
        isinstance(keep, str) and keep.strip()[:1] in [*"0123456789."]
    )


def rule_of(keep: Keep, role: str) -> AbstractKeepRule | None:
    """Return the rule for the residual functions of one role; None to keep nothing.

    Args:
        keep: What the user wrote, checked by `check_keep`.
        role: Role of the functions, such as "f".
    """
    if is_budget(keep):
        operators = frozenset().union(*map(_operators_named, _BY_NAME))
        return KeepWithin(operators, parse_bytes(keep, "keep"))  # type: ignore[arg-type]
    if callable(keep) and not isinstance(keep, OpOverload | OpOverloadPacket):
        return KeepSelected(keep)
    entries = [_parse(entry) for entry in as_entries(keep)]
    of_role = tuple([(operators, number) for wanted, operators, number in entries if wanted in (None, role)])
    return KeepOperators(of_role) if of_role else None


def as_entries(keep: Keep) -> tuple[Any, ...]:
    """Return the entries of a sequence, or the only entry."""
    if isinstance(keep, str):
        return tuple([entry.strip() for entry in keep.split(",")])
    return tuple(keep) if isinstance(keep, Sequence | set | frozenset) else (keep,)


def check_keep(keep: Keep) -> Keep:
    """Return `keep` in a form that can be hashed.

    Raises:
        TypeError: `keep` or one of its entries has the wrong type.
        ValueError: An entry has an unknown name, or PyTorch replaces an operator before it runs.
    """
    if is_budget(keep):
        parse_bytes(keep, "keep")  # type: ignore[arg-type]
        return keep
    if callable(keep) and not isinstance(keep, OpOverload | OpOverloadPacket):
        return keep
    if not isinstance(keep, str | Sequence | set | frozenset | OpOverload | OpOverloadPacket):
        raise TypeError(f"`keep` (={describe(keep)}) must hold operators, names of operators or a number, {_WAY_OUT}.")
    entries = as_entries(keep)
    for entry in entries:
        _parse(entry)
    return entries


def roles_in(keep: Keep) -> set[str]:
    """Return the roles that entries of `keep` name."""
    if is_budget(keep) or not isinstance(keep, tuple):
        return set()
    return {role for role, _, _ in map(_parse, keep) if role is not None}


@lru_cache(maxsize=4096)
def kind_of(operator: OpOverload) -> int | None:
    """Return the index in `KEEP_NAMES` of the name that means this operator; None if no name does."""
    return next((index for index, name in enumerate(KEEP_NAMES) if operator in _operators_named(name)), None)


def _parse(entry: Any) -> tuple[str | None, frozenset[OpOverload], int | None]:
    """Return the role, the operators and the number of the call that an entry names; None for all."""
    if isinstance(entry, OpOverload):
        return None, _expanded(entry), None
    if isinstance(entry, OpOverloadPacket):
        overloads = [getattr(entry, name) for name in entry.overloads()]
        return None, frozenset().union(*map(_expanded, overloads)), None
    if not isinstance(entry, str):
        raise TypeError(f"`keep` holds {describe(entry)}, which must be an operator or the name of one, {_WAY_OUT}.")
    match = _ENTRY.fullmatch(entry)
    if match is None or match["name"] not in _BY_NAME:
        names = ", ".join(map(repr, _BY_NAME))
        raise ValueError(
            f"`keep` holds {describe(entry)}, but the names of operators are {names}, with a residual function before "
            "and the number of a call after them if wanted: 'g.linear.0' is the first linear layer in g."
        )
    return match["role"], _operators_named(match["name"]), None if match["number"] is None else int(match["number"])


@lru_cache
def _operators_named(name: str) -> frozenset[OpOverload]:
    packets = [getattr(_aten, packet) for packet in _BY_NAME[name] if hasattr(_aten, packet)]
    return frozenset([getattr(packet, overload) for packet in packets for overload in packet.overloads()])


def _expanded(operator: OpOverload) -> frozenset[OpOverload]:
    """Return the operators that run if this one is called.

    Raises:
        ValueError: PyTorch replaces it by operators that are not known here.
    """
    name = operator._schema.name
    if name in _COMPOSITE:
        return _operators_named(_COMPOSITE[name])
    if is_composite(operator):
        raise ValueError(
            f"`keep` holds `{operator}`, which PyTorch replaces by other operators before it runs; name those, for "
            "example `torch.ops.aten.mm`. `torch.utils._python_dispatch.TorchDispatchMode` shows them."
        )
    return frozenset([operator])
