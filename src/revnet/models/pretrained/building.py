"""From a network to its description for `config.json`, and back."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

import revnet
from revnet._checks import describe, is_integer, is_number
from revnet._outside_text import shorten
from revnet.errors import CheckpointError
from revnet.models.pretrained.outline import build_outline
from revnet.models.pretrained.reading import FORMAT, Pretrained
from revnet.models.pretrained.structure import apply_structure, describe_structure
from revnet.models.pretrained.tensor_file import first_difference

_Network = TypeVar("_Network", bound=nn.Module)

_CLASS_KEY = "architectures"
"""Key of a list with the name of the class, as in transformers."""
_KINDS_OF = {"policy": "policies", "coupling": "couplings"}
"""Arguments of constructors that the modules know, and may have changed since, with their keys in the description."""
_MOST = 2**31


def describe_network(network: nn.Module, name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return everything that it takes to build `network` again, except its tensors, as values for JSON.

    Args:
        network: The network.
        name: Name of its class.
        arguments: Arguments of its constructor.

    Raises:
        ValueError: An argument or a coupling cannot be written as JSON.
    """
    described = {key: _plain(name, key, value) for key, value in arguments.items() if key not in _KINDS_OF}
    if "num_classes" in described and is_integer(getattr(network, "num_classes", None)):
        described["num_classes"] = network.num_classes  # `reset_classifier` may have changed it
    return {
        _CLASS_KEY: [name],
        **described,
        **describe_structure(network),
        "revnet_format": FORMAT,
        "revnet_version": revnet.__version__,
    }


def class_of(pretrained: Pretrained, classes: Mapping[str, type[_Network]], wanted: type[nn.Module]) -> type[_Network]:
    """Return the class of a network that was read.

    Args:
        pretrained: The network.
        classes: The classes that can be built, by name.
        wanted: Class of which it must be a subclass.

    Raises:
        CheckpointError: The class is unknown, or another one.
    """
    names = pretrained.config.get(_CLASS_KEY)
    where = f"`{pretrained.path}`"
    if names is None and classes.get(wanted.__name__) is wanted and not inspect.isabstract(wanted):
        return classes[wanted.__name__]  # `huggingface_hub` alone writes the arguments only
    name = names[0] if isinstance(names, list) and len(names) == 1 else None
    if not isinstance(name, str) or "revnet_version" not in pretrained.config:
        shown = shorten(f" (it says {name})" if isinstance(name, str) else "", 80)
        raise CheckpointError(
            f"{where} is not a model of revnet{shown}: its config.json was written by another library; pass a model "
            "that `save_pretrained` or `revnet push` has written."
        )
    if wanted.__name__ == name and not inspect.isabstract(wanted):
        return cast("type[_Network]", wanted)  # Another class of this name may be registered.
    if name not in classes:
        raise CheckpointError(
            f"{where} holds a {shorten(name)}, which this revnet does not know (it was written by revnet "
            f"{shorten(str(pretrained.config['revnet_version']), 20)}, this is {revnet.__version__}); update revnet, "
            "or import the module that defines the class."
        )
    if not issubclass(classes[name], wanted):
        raise CheckpointError(
            f"{where} holds a {name}, not a {wanted.__name__}; use `{name}.from_pretrained`, or "
            "`revnet.models.from_pretrained`, which takes any."
        )
    return classes[name]


def build_network(
    network_type: type[_Network], pretrained: Pretrained, arguments: Mapping[str, Any], *, strict: bool
) -> _Network:
    """Build a network, and load its tensors.

    Args:
        network_type: Its class.
        pretrained: What was read.
        arguments: Arguments of the constructor that replace the ones in `config.json`.
        strict: Whether every tensor must be there, and no others.

    Raises:
        CheckpointError: The network cannot be built, or the tensors do not fit it.
    """
    path, tensors = pretrained.path, pretrained.tensors
    make = _constructor(network_type, pretrained.config, arguments)
    outline = _explained(lambda: build_outline(make, tensors), pretrained)
    # Before memory is allocated: a file from a stranger may describe a model of any size.
    expected = outline.state_dict()
    if not strict:
        expected = {name: tensor for name, tensor in expected.items() if name in tensors}
        tensors = {name: tensor for name, tensor in tensors.items() if name in expected}
    difference = first_difference(_in_types_of(tensors, expected), tensors, lacks="it lacks")
    if difference is not None:
        raise CheckpointError(
            f"`{path}` does not fit its {network_type.__name__}: {difference}; pass the weights of that model, or "
            "arguments that fit the weights."
        )
    network = _explained(make, pretrained)
    _take_dtypes(network, tensors)  # First, so that no value is rounded on its way.
    network.load_state_dict(tensors, strict=strict)
    return network.eval()


def check_rebuildable(network_type: type[nn.Module], config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Raise unless the network that `config` describes has these tensors, so that it can be loaded again.

    Args:
        network_type: Class of the network.
        config: Its description, as `describe_network` returns it.
        tensors: Its tensors.

    Raises:
        ValueError: The network was changed in a way that the description does not have.
    """
    expected = build_outline(_constructor(network_type, config, {}), tensors).state_dict()
    difference = first_difference(tensors, _in_types_of(tensors, expected), lacks="a new one lacks")
    if difference is not None:
        raise ValueError(
            f"this {network_type.__name__} was changed in a way that a file cannot describe: {difference}; undo the "
            "change, for instance with `torch.nn.utils.parametrize.remove_parametrizations`, or save the state dict."
        )


def _constructor(
    network_type: type[_Network], config: Mapping[str, Any], arguments: Mapping[str, Any]
) -> Callable[[], _Network]:
    """Return a function that builds the network which `config` describes, with `arguments` instead of saved ones."""
    signature = inspect.signature(network_type.__init__).parameters
    unknown = [name for name in arguments if name not in signature]
    if unknown:
        raise TypeError(f"{network_type.__name__} has no argument `{unknown[0]}`; leave it out.")
    saved = {key: value for key, value in config.items() if key in signature and key not in _KINDS_OF}

    def make() -> _Network:
        checked = {key: _checked(key, value) for key, value in saved.items()}
        network = network_type(**{**checked, **arguments})
        given = {_KINDS_OF[name] for name in _KINDS_OF if arguments.get(name) is not None}
        apply_structure(network, {key: value for key, value in config.items() if key not in given})
        cast("Any", network)._apply_changes(config)
        return network

    return make


def _in_types_of(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors in `expected`, in the floating-point types of `tensors`."""

    def converted(name: str, tensor: Tensor) -> Tensor:
        other = tensors.get(name)
        both = other is not None and other.is_floating_point() and tensor.is_floating_point()
        return tensor.to(other.dtype) if both and other is not None else tensor

    return {name: converted(name, tensor) for name, tensor in expected.items()}


def _explained(make: Callable[[], _Network], pretrained: Pretrained) -> _Network:
    try:
        return make()
    except (TypeError, ValueError) as error:
        version = pretrained.config.get("revnet_version")
        hint = ""
        if version is not None and version != revnet.__version__:
            hint = f" (it was written by revnet {shorten(str(version), 20)}, this is revnet {revnet.__version__})"
        raise CheckpointError(f"`{pretrained.path}` cannot be rebuilt{hint}: {error}") from error


def _take_dtypes(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give parameters and buffers the types that they had when they were written."""
    state = network.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        if state[name].dtype != tensor.dtype:
            state[name].data = state[name].data.to(tensor.dtype)


def _plain(owner: str, name: str, value: Any) -> Any:
    """Return an argument of a constructor as a value for JSON.

    Raises:
        ValueError: It is not a number, a text or a list of them.
    """
    if isinstance(value, tuple | list | torch.Size):
        return [_plain(owner, name, item) for item in value]
    if value is None or isinstance(value, bool | str) or is_integer(value) or is_number(value):
        return value
    raise ValueError(
        f"`{name}` (={describe(value)}) of {owner} cannot be written to config.json, which holds numbers, texts and "
        "lists of them; save the state dict."
    )


def _checked(name: str, value: Any) -> Any:
    """Return an argument from `config.json`, with tuples for lists."""
    if isinstance(value, list):
        if any(isinstance(item, list) for item in value):
            raise ValueError(f"`{name}` must not hold lists in lists.")
        return tuple([_checked(name, item) for item in value])
    if isinstance(value, dict) or (isinstance(value, int) and abs(value) >= _MOST):
        raise ValueError(f"`{name}` (={describe(value)}) must be a text, a list or a number that is not enormous.")
    return value
