"""Help texts from docstrings, for the arguments of a function and the fields of a dataclass."""

import ast
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Callable
from typing import Any

from revnet.cli._errors import one_line


def describe_function(function: Callable[..., Any]) -> str:
    """Return the docstring of `function` up to its section `Args`."""
    return inspect.cleandoc(function.__doc__ or "").partition("\nArgs:")[0].strip()


def describe_arguments(function: Callable[..., Any]) -> dict[str, str]:
    """Return the sentences of the section `Args` of a docstring, by argument."""
    section = inspect.cleandoc(function.__doc__ or "").partition("\nArgs:\n")[2]
    section = re.split(r"\n(?=\S)", section, maxsplit=1)[0]  # the next section is not indented
    entries = re.split(r"^(\w+): ", textwrap.dedent(section), flags=re.MULTILINE)[1:]
    return {name: one_line(text) for name, text in zip(entries[::2], entries[1::2], strict=True)}


def describe_fields(settings: type) -> dict[str, str]:
    """Return the string beneath each field of a dataclass, by field."""
    descriptions: dict[str, str] = {}
    for base in reversed(settings.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(node, ast.ClassDef)
        for field, text in zip(node.body, node.body[1:], strict=False):
            match field, text:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(sentence))):
                    descriptions[name] = one_line(sentence)
    return descriptions
