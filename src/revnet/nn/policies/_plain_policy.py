"""Policies as plain values, for configurations in JSON and for checkpoints."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from revnet._checks import describe
from revnet.nn.policies._has_policies import POLICY_OF
from revnet.nn.policies._policy import AbstractPolicy


def describe_policy(policy: AbstractPolicy) -> Any:
    """Return a policy as its name, or as a mapping with its name and the arguments that differ from the default.

    Returns:
        Plain values, or None if only Python can express the policy, such as a class of your own.

    Example:
        >>> from revnet import Reverse
        >>> from revnet.nn.policies._plain_policy import describe_policy
        >>> describe_policy(Reverse()), describe_policy(Reverse(hold="f"))
        ('reverse', {'name': 'reverse', 'hold': ['f']})
    """
    for name, default in POLICY_OF.items():
        if type(policy) is type(default):
            arguments = {field.name: getattr(policy, field.name) for field in fields(policy)}  # type: ignore[arg-type]
            changed = {key: value for key, value in arguments.items() if value != getattr(default, key)}
            if not all(map(_is_plain, changed.values())):
                return None
            lists = {key: list(value) if isinstance(value, tuple) else value for key, value in changed.items()}
            return {"name": name, **lists} if lists else name
    return None


def read_policy(value: Any, argument: str = "policies") -> AbstractPolicy:
    """Return the policy that `describe_policy` has described.

    Args:
        value: The description, which may come from a stranger.
        argument: Name for error messages.

    Raises:
        TypeError, ValueError: The value does not describe a policy.

    Example:
        >>> from revnet.nn.policies._plain_policy import read_policy
        >>> read_policy({"name": "reverse", "hold": ["f"]})
        Reverse(hold=('f',))
    """
    arguments = dict(value) if isinstance(value, Mapping) else {"name": value}
    name = arguments.pop("name", None)
    if not isinstance(name, str) or name not in POLICY_OF or not all(map(_is_plain, arguments.values())):
        raise ValueError(f"`{argument}` (={describe(value)}) must name one of {', '.join(POLICY_OF)}.")
    return replace(POLICY_OF[name], **arguments)  # type: ignore[type-var]


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(isinstance(item, str) for item in value)
    return isinstance(value, bool | int | str)
