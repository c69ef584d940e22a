"""The image classifiers of this library as models of timm: `timm.create_model("revnet56")`.

Importing this module registers the classifiers with timm, and needs timm. A classifier has its own name, except for the
ResNets, whose names timm has given to other networks: `resnet50` of this library is timm's `revnet_resnet50`. Weights
have the same names as in models that `revnet.create_model` builds.

Names that `revnet` itself does not export are provisional: they may change in any release.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from revnet._checks import check_share, describe, is_integer
from revnet.errors import MissingDependencyError
from revnet.models import AbstractImageClassifier
from revnet.models import list_models as list_own_models
from revnet.models._image_classifier import check_global_pool
from revnet.models._registry import _entry, published_image_size

try:
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    from timm.models import build_model_with_cfg, is_model, register_model, resolve_pretrained_cfg
    from timm.models._features import FeatureGetterNet, FeatureHookNet
except ModuleNotFoundError as _error:
    if _error.name != "timm":
        raise
    raise MissingDependencyError.of("timm", "`revnet.timm`") from _error

__all__ = ["register_models", "timm_name"]

default_cfgs: dict[str, dict[str, Any]] = {}
"""Configurations by name in timm, where timm looks for them."""

_CIFAR_MEAN, _CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
_PREFIX = "revnet_"
_NUM_VIT_MAPS = 3
"""Number of maps that `features_only=True` returns by default if all maps have one size, as in timm."""
_FEATURE_CLASSES = {"getter": FeatureGetterNet, "hook": FeatureHookNet}


def timm_name(name: str) -> str:
    """Return the name that a classifier has in timm.

    Args:
        name: One of `revnet.list_models()`.

    Raises:
        ValueError: No model has this name.
    """
    _entry(name)
    return _PREFIX + name if name.startswith("resnet") else name


def register_models() -> list[str]:
    """Register the classifiers that timm does not know yet, and return their names in timm.

    Importing `revnet.timm` calls it. Call it again after you have registered models of your own with
    `revnet.models.register_model`.

    Raises:
        ValueError: timm has another model with this name.
    """
    names = []
    for own_name in list_own_models():
        name = timm_name(own_name)
        if name in default_cfgs:
            continue
        if is_model(name):
            raise ValueError(
                f"`{own_name}` cannot be registered, since timm has another model named '{name}'; give your function "
                "another name."
            )
        default_cfgs[name] = _make_cfg(own_name)
        globals()[name] = register_model(_make_entry(name, own_name))
        names.append(name)
    return names


def _make_cfg(own_name: str) -> dict[str, Any]:
    """Return the configuration of a model without weights."""
    function = _entry(own_name).function
    size = published_image_size(own_name)
    is_small = size < 64
    return {
        "url": "",
        "num_classes": inspect.signature(function).parameters["num_classes"].default,
        "input_size": (3, size, size),
        "crop_pct": 1.0 if is_small else 0.875,
        "interpolation": "bicubic",
        "mean": _CIFAR_MEAN if is_small else IMAGENET_DEFAULT_MEAN,
        "std": _CIFAR_STD if is_small else IMAGENET_DEFAULT_STD,
        # The first convolution of an i-RevNet reads pixels that the stem has turned into channels.
        "first_conv": None if own_name.startswith("irevnet") else "stem.0",
        "classifier": "head",
    }


def _make_entry(name: str, own_name: str) -> Callable[..., torch.nn.Module]:
    """Return the function that timm calls to build a model."""

    def entry(pretrained: bool = False, **kwargs: Any) -> torch.nn.Module:
        return _create(name, own_name, pretrained, kwargs)

    entry.__name__ = entry.__qualname__ = name
    entry.__doc__ = _entry(own_name).function.__doc__
    return entry


def _create(name: str, own_name: str, pretrained: bool, kwargs: dict[str, Any]) -> torch.nn.Module:
    cfg = resolve_pretrained_cfg(name, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
    if pretrained and not (cfg.has_weights or cfg.state_dict):
        raise ValueError(
            f"`pretrained` (=True) must be False, since no weights of {name} are published; pass `checkpoint_path`, or "
            "`pretrained_cfg_overlay={'file': ...}`, to load your own."
        )
    feature_cfg = _feature_cfg(own_name, kwargs) if kwargs.get("features_only") else None
    return build_model_with_cfg(partial(_build, own_name), name, pretrained, feature_cfg=feature_cfg, **kwargs)


def _feature_cfg(own_name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return how `features_only=True` reads maps, and remove its arguments from `kwargs`."""
    feature_cls = kwargs.pop("feature_cls", "getter")
    chosen = _FEATURE_CLASSES.get(feature_cls, feature_cls) if isinstance(feature_cls, str) else feature_cls
    if not (isinstance(chosen, type) and issubclass(chosen, tuple(_FEATURE_CLASSES.values()))):
        raise ValueError(
            f"`feature_cls` (={describe(feature_cls)}) must be 'getter' or 'hook', since a reversible stage returns "
            "two streams, which other wrappers cannot join."
        )
    out_indices = kwargs.pop("out_indices", None)
    if out_indices is None:
        with torch.device("meta"):
            info = _entry(own_name).function().feature_info
        is_pyramid = len({entry["reduction"] for entry in info}) > 1
        out_indices = tuple(range(len(info))) if is_pyramid else _NUM_VIT_MAPS
    return {"feature_cls": chosen, "out_indices": out_indices}


def _build(
    own_name: str,
    *,
    num_classes: int,
    in_chans: int,
    global_pool: str = "avg",
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    img_size: Any = None,
    device: Any = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> AbstractImageClassifier:
    """Build a model from timm's arguments."""
    function = _entry(own_name).function
    known = inspect.signature(function).parameters.keys() - {"num_classes", "in_channels"}
    check_share(drop_rate=drop_rate, drop_path_rate=drop_path_rate)
    check_global_pool(global_pool, num_classes)
    if drop_path_rate:
        _check_option("drop_path_rate", drop_path_rate, "drop_path" in known, own_name, "0")
        options["drop_path"] = drop_path_rate
    if img_size is not None:
        _check_option("img_size", img_size, "img_size" in known, own_name, "no size, as it takes images of any size")
        options["img_size"] = _side(img_size)
    for key, value in options.items():
        takes = ", ".join(f"`{option}`" for option in sorted(known)) or "no options of its own"
        _check_option(key, value, key in known, own_name, f"only what it takes: {takes}")
    with torch.device(device) if device is not None else torch.device(torch.get_default_device()):
        model = function(num_classes=num_classes, in_channels=in_chans, **options)
    model.global_pool = global_pool
    model.drop_rate = drop_rate
    return model if dtype is None else model.to(dtype)


def _check_option(name: str, value: Any, is_known: bool, model_name: str, way_out: str) -> None:
    if not is_known:
        raise TypeError(f"`{name}` (={describe(value)}) is not an option of {timm_name(model_name)}; pass {way_out}.")


def _side(img_size: Any) -> int:
    """Return the side of square images, given as a number or as a pair."""
    sides = tuple(img_size) if isinstance(img_size, (tuple, list)) else (img_size,)
    if not sides or len(set(sides)) != 1 or not is_integer(sides[0]):
        raise ValueError(
            f"`img_size` (={describe(img_size)}) must be the side of square images, for which the position embedding "
            "is learned; pass one number. Images of other sides are accepted later."
        )
    return sides[0]


register_models()
