"""Models by name: one of `revnet models`, or the user's own by its import path."""

import difflib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from revnet.cli._errors import UsageError
from revnet.models import create_model, list_models
from revnet.training.import_path import FORM, UserCodeError, import_object


def build_model(name: str, *, is_real: bool) -> nn.Module:
    """Build a model in training mode.

    Args:
        name: A name from `revnet models`, or `package.module:attribute`: a module, or a callable without arguments that
            returns one. Modules in the current directory can be imported.
        is_real: Whether to allocate its tensors; otherwise it is built on the meta device, if possible.

    Raises:
        ValueError: The model does not exist, or cannot be built.
    """
    if ":" in name:
        model = _load(name, is_real)
    elif name in list_models():
        with torch.device("cpu" if is_real else "meta"):
            model = create_model(name)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # as in `revnet train`
    else:
        close = difflib.get_close_matches(name, list_models(), n=1)
        hint = f"did you mean `{close[0]}`?" if close else "`revnet models` lists them."
        raise UsageError(f"unknown model `{name}`; {hint} A model of your own is written {FORM}.")
    return model.train()


def _load(name: str, is_real: bool) -> nn.Module:
    try:
        model = import_object(name, f"`{name}`", example="networks.unet:UNet")
    except UserCodeError as error:
        raise UsageError(f"{str(error).removesuffix('.')}: {_describe(error.__cause__ or error)}") from error
    if not isinstance(model, nn.Module) and callable(model):
        model = _call(model, name, is_real)
    if not isinstance(model, nn.Module):
        raise UsageError(f"`{name}` must be an nn.Module, or a callable that returns one; got {type(model).__name__}.")
    return model


def _call(make: Callable[[], Any], name: str, is_real: bool) -> Any:
    if not is_real:
        try:
            with torch.device("meta"):
                return make()
        except (Exception, SystemExit):
            pass  # It may need data, to load weights for instance. The second call reports an error that persists.
    try:
        return make()
    except (Exception, SystemExit) as error:
        raise UsageError(f"`{name}` failed when called without arguments: {_describe(error)}") from error


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
