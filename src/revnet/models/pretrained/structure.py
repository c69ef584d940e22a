"""The choices that a model makes after construction, as JSON: policies, couplings, tolerances and batch norms.

Most models have one policy and one coupling throughout. So each choice is a mapping in which `*` stands for most
modules, and the name of a module for an exception.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from revnet._checks import describe
from revnet.coupling import BDIA, AbstractCoupling, Additive, Affine, ExactScaled, FixedPoint, Momentum, Scaled
from revnet.nn import BatchNorm2dBiased, BatchNorm2dUnbiased, ReversibleBlock, ReversibleSequential
from revnet.nn._exchanged_class import is_converted
from revnet.nn._whole_model import HAS_COUPLING, policy_holders
from revnet.nn.policies._plain_policy import describe_policy, read_policy

_COUPLINGS: dict[str, type[AbstractCoupling]] = {
    "additive": Additive,
    "affine": Affine,
    "fixed_point": FixedPoint,
    "momentum": Momentum,
    "scaled": Scaled,
    "exact_scaled": ExactScaled,
    "bdia": BDIA,
}
_NORMS: dict[str, type[_BatchNorm]] = {
    "BatchNorm1d": nn.BatchNorm1d,
    "BatchNorm2d": nn.BatchNorm2d,
    "BatchNorm2dBiased": BatchNorm2dBiased,
    "BatchNorm2dUnbiased": BatchNorm2dUnbiased,
    "BatchNorm3d": nn.BatchNorm3d,
}
_REST = "*"
_WRAPPER = "_orig_mod."
"""Part of the name of a module that `torch.compile` has wrapped."""


def unwrapped(name: str) -> str:
    """Return the name that a module or tensor has without the wrappers of `torch.compile`."""
    return name.replace(_WRAPPER, "")


def describe_structure(model: nn.Module) -> dict[str, Any]:
    """Return the choices of `model` as plain values for JSON.

    A policy that only Python can express, such as a class of your own, is left out: it changes memory, not outputs.

    Raises:
        ValueError: A block has a coupling of your own, or is converted, which changes the outputs.
    """
    converted = next((name for name, module in model.named_modules() if is_converted(module)), None)
    if converted is not None:
        raise ValueError(
            f"`{converted}` is a converted block, which a file cannot describe; save the state dict and convert the "
            "model that loads it, or convert this one back with `revnet.convert(model, back=True)`."
        )
    policies = {
        unwrapped(name): [describe_policy(policy) for policy in holder.policies]
        for name, holder in policy_holders(model).items()
    }
    modules = {unwrapped(name): module for name, module in model.named_modules()}
    tolerances = {name: each.tolerance for name, each in modules.items() if isinstance(each, ReversibleSequential)}
    choices = {
        "policies": {
            name: each[0] if each and each.count(each[0]) == len(each) else each for name, each in policies.items()
        },
        "couplings": {
            name: _describe_coupling(name, each.coupling)
            for name, each in modules.items()
            if isinstance(each, HAS_COUPLING)
        },
        "tolerances": tolerances if any(tolerances.values()) else {},
        "batch_norms": {name: _describe_norm(each) for name, each in modules.items() if isinstance(each, _BatchNorm)},
    }
    structure: dict[str, Any] = {kind: _compressed(values) for kind, values in choices.items() if values}
    if _is_channels_last(model):
        structure["memory_format"] = "channels_last"
    return structure


def apply_structure(model: nn.Module, structure: Mapping[str, Any]) -> None:
    """Make the choices of a model that `describe_structure` has described.

    Args:
        model: A new model.
        structure: The description, which may come from a stranger.

    Raises:
        TypeError, ValueError: The description does not fit the model.
    """
    holders = policy_holders(model)
    for name, value in _expanded(structure, "policies", holders).items():
        holder = holders[name]
        entries = value if isinstance(value, list) else [value] * len(holder.policy_units)
        policies = [None if entry is None else read_policy(entry) for entry in entries]
        if len(policies) != len(holder.policies):
            raise ValueError(f"`policies` has {len(policies)} entries for `{name}`, not {len(holder.policies)}.")
        holder.set_policies([new or old for new, old in zip(policies, holder.policies, strict=True)])
    blocks = {name: each for name, each in model.named_modules() if isinstance(each, HAS_COUPLING)}
    for name, value in _expanded(structure, "couplings", blocks).items():
        blocks[name].coupling = _read_couplings(blocks[name], value)
    rows = {name: each for name, each in model.named_modules() if isinstance(each, ReversibleSequential)}
    for name, value in _expanded(structure, "tolerances", rows).items():
        if isinstance(value, int | float | None):  # a module or a tensor would be registered
            rows[name].tolerance = value
    norms = {name: each for name, each in model.named_modules() if isinstance(each, _BatchNorm)}
    for name, value in _expanded(structure, "batch_norms", norms).items():
        _apply_norm(model, name, norms[name], value)
    if structure.get("memory_format") == "channels_last":
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # PyTorch's stubs lack it


def _compressed(values: Mapping[str, Any]) -> dict[str, Any]:
    (usual, _), *_ = Counter(map(repr, values.values())).most_common(1)
    rest = next(value for value in values.values() if repr(value) == usual)
    return {_REST: rest} | {name: value for name, value in values.items() if repr(value) != usual}


def _expanded(structure: Mapping[str, Any], kind: str, modules: Mapping[str, Any]) -> dict[str, Any]:
    """Return the value of each module in `modules` that has one."""
    values = structure.get(kind, {})
    if not isinstance(values, Mapping):
        raise ValueError(f"`{kind}` (={describe(values)}) must be an object.")
    unknown = [name for name in values if name != _REST and name not in modules]
    if unknown:
        raise ValueError(f"`{kind}` has an entry for `{unknown[0]}`, which the model does not have.")
    return {name: values.get(name, values.get(_REST)) for name in modules if name in values or _REST in values}


def _describe_coupling(block: str, coupling: AbstractCoupling | tuple[AbstractCoupling, ...]) -> Any:
    if isinstance(coupling, tuple):
        return [_describe_coupling(block, each) for each in coupling]
    name = next((name for name, kind in _COUPLINGS.items() if type(coupling) is kind), None)
    if name is None:
        raise ValueError(
            f"`{block}` has the coupling {describe(coupling)}, which a file cannot describe; save the state dict, or "
            "choose a coupling of revnet with `set_coupling`."
        )
    arguments: dict[str, Any] = {}
    for field in fields(coupling):  # type: ignore[arg-type] # they are dataclasses
        if field.init:
            value = getattr(coupling, field.name)
            arguments[field.name] = _describe_coupling(block, value) if isinstance(value, AbstractCoupling) else value
    return {"name": name, **arguments} if arguments else name


def _read_couplings(block: nn.Module, value: Any) -> Any:
    if not isinstance(value, list):
        return _read_coupling(value)
    if len(value) != 2 or not isinstance(block, ReversibleBlock):
        raise ValueError(f"`couplings` (={describe(value)}) must be a coupling, or the two of a ReversibleBlock.")
    return tuple(map(_read_coupling, value))


def _describe_norm(norm: _BatchNorm) -> dict[str, Any]:
    name = next((name for name, kind in _NORMS.items() if type(norm) is kind), None)
    # A synchronized norm of revnet has the rule of the norm that it replaced.
    biased = getattr(norm, "_is_biased", None)
    if biased is not None:
        name = "BatchNorm2dBiased" if biased else "BatchNorm2dUnbiased"
    numbers = {"eps": norm.eps, "momentum": norm.momentum}
    return numbers if name is None else {"name": name, **numbers}  # The constructor restores other classes.


def _apply_norm(model: nn.Module, name: str, norm: _BatchNorm, value: Any) -> None:
    if not isinstance(value, Mapping) or value.get("name", next(iter(_NORMS))) not in _NORMS:
        raise ValueError(f"`batch_norms` (={describe(value)}) must name one of {', '.join(_NORMS)}.")
    make: Callable[..., _BatchNorm] = _NORMS[value["name"]] if "name" in value else type(norm)
    arguments = {argument: value.get(argument, getattr(norm, argument)) for argument in ("eps", "momentum")}
    checked = BatchNorm2dBiased(1, **arguments)  # checks the numbers
    if type(norm) is make:
        norm.eps, norm.momentum = checked.eps, checked.momentum
        return
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, make(norm.num_features, **arguments).train(norm.training))


def _read_coupling(value: Any) -> AbstractCoupling:
    arguments = dict(value) if isinstance(value, Mapping) else {"name": value}
    name = arguments.pop("name", None)
    # A coupling may have another coupling as an argument.
    inner = {key: _read_coupling(own) for key, own in arguments.items() if isinstance(own, Mapping)}
    arguments = {key: own for key, own in arguments.items() if key not in inner}
    are_numbers = all(isinstance(own, bool | int | float | str) for own in arguments.values())
    if not isinstance(name, str) or name not in _COUPLINGS or not are_numbers:
        raise ValueError(f"`couplings` (={describe(value)}) must name one of {', '.join(_COUPLINGS)}.")
    return _COUPLINGS[name](**arguments, **inner)


def _is_channels_last(model: nn.Module) -> bool:
    def has_layout(weight: torch.Tensor) -> bool:
        return weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()

    return any(weight.dim() == 4 and has_layout(weight) for weight in model.parameters())
