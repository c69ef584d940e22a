"""A model as the command line names it: one of `revnet models`, or the user's own by its import path."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable
from functools import reduce
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from revnet.models import create_model, list_models

_FORM = "package.module:attribute"


def build_model(name: str, *, is_real: bool) -> nn.Module:
    """Build a model in training mode.

    Args:
        name: One of `revnet models`, or `package.module:attribute`: a module, or what makes one when it is called
            without arguments. The current directory can be imported from.
        is_real: With data; else on the meta device, if it can be built there.

    Raises:
        ValueError: There is no such model, or it cannot be built.
    """
    if ":" in name:
        model = _load(name, is_real)
    elif name in list_models():
        with torch.device("cpu" if is_real else "meta"):
            model = create_model(name)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # as `revnet train` has them
    else:
        close = difflib.get_close_matches(name, list_models(), n=1)
        hint = f"did you mean `{close[0]}`?" if close else "`revnet models` lists them."
        raise ValueError(f"`{name}` is no model; {hint} One of your own is written {_FORM}.")
    return model.train()


def _load(name: str, is_real: bool) -> nn.Module:
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute or module_name.endswith(".py") or "/" in module_name:
        raise ValueError(f"`{name}` must be written {_FORM}, such as networks.unet:UNet, without `/` or `.py`.")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = import_module(module_name)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
            raise ValueError(f"`{name}`: there is no module `{error.name}`, neither here nor installed.") from error
        raise ValueError(f"`{name}`: importing `{module_name}` failed: {_tell(error)}") from error
    try:
        found = reduce(getattr, attribute.split("."), module)
    except AttributeError as error:
        close = difflib.get_close_matches(attribute, vars(module), n=1)
        hint = f"; did you mean `{close[0]}`?" if close else "."
        raise ValueError(f"`{name}`: `{module_name}` has no `{attribute}`{hint}") from error
    if not isinstance(found, nn.Module) and callable(found):
        found = _call(found, name, is_real)
    if not isinstance(found, nn.Module):
        raise ValueError(
            f"`{name}` must be an nn.Module, or make one when it is called; it gave {type(found).__name__}."
        )
    return found


def _call(make: Callable[[], Any], name: str, is_real: bool) -> Any:
    if not is_real:
        try:
            with torch.device("meta"):
                return make()
        except (Exception, SystemExit):
            pass  # It may need data, to load weights for instance; what fails anyway is told below.
    try:
        return make()
    except (Exception, SystemExit) as error:
        raise ValueError(f"`{name}` failed when it was called, without arguments: {_tell(error)}") from error


def _tell(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
