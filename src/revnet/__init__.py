"""Reversible residual networks for PyTorch: activation memory that does not grow with depth.

The names below load PyTorch when they are first used, not when `revnet` is imported: the command line must answer
`revnet --help` at once, and every module of a package pays for what its `__init__` imports.

`from revnet import *` imports classes and functions only. The rooms, such as `revnet.nn`, are attributes of the package
that a star import leaves out, because `nn` would replace the `nn` of `from torch import nn`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from revnet import bench as bench
    from revnet import coupling as coupling
    from revnet import data as data
    from revnet import functional as functional
    from revnet import memory as memory
    from revnet import models as models
    from revnet import nn as nn
    from revnet import numerics as numerics
    from revnet import paper as paper
    from revnet import training as training
    from revnet.coupling import Additive as Additive
    from revnet.coupling import FixedPoint as FixedPoint
    from revnet.errors import BudgetError as BudgetError
    from revnet.errors import CheckpointError as CheckpointError
    from revnet.errors import DataError as DataError
    from revnet.errors import MissingDependencyError as MissingDependencyError
    from revnet.errors import PredictionError as PredictionError
    from revnet.errors import ReconstructionError as ReconstructionError
    from revnet.errors import ReconstructionWarning as ReconstructionWarning
    from revnet.errors import RevnetError as RevnetError
    from revnet.models import create_model as create_model
    from revnet.models import list_models as list_models
    from revnet.nn import AbstractPolicy as AbstractPolicy
    from revnet.nn import Checkpoint as Checkpoint
    from revnet.nn import Offload as Offload
    from revnet.nn import PolicySequential as PolicySequential
    from revnet.nn import Reverse as Reverse
    from revnet.nn import ReversibleBlock as ReversibleBlock
    from revnet.nn import ReversibleSequential as ReversibleSequential
    from revnet.nn import Store as Store
    from revnet.nn import set_coupling as set_coupling
    from revnet.nn import set_policy as set_policy
    from revnet.nn import set_tolerance as set_tolerance

__version__ = "0.1.0"

_ROOMS = ("bench", "coupling", "data", "functional", "memory", "models", "nn", "numerics", "paper", "training")
_HOME = {
    "Additive": "revnet.coupling",
    "AbstractPolicy": "revnet.nn",
    "BudgetError": "revnet.errors",
    "Checkpoint": "revnet.nn",
    "CheckpointError": "revnet.errors",
    "DataError": "revnet.errors",
    "FixedPoint": "revnet.coupling",
    "MissingDependencyError": "revnet.errors",
    "Offload": "revnet.nn",
    "PolicySequential": "revnet.nn",
    "PredictionError": "revnet.errors",
    "ReconstructionError": "revnet.errors",
    "ReconstructionWarning": "revnet.errors",
    "Reverse": "revnet.nn",
    "ReversibleBlock": "revnet.nn",
    "ReversibleSequential": "revnet.nn",
    "RevnetError": "revnet.errors",
    "Store": "revnet.nn",
    "create_model": "revnet.models",
    "list_models": "revnet.models",
    "set_coupling": "revnet.nn",
    "set_policy": "revnet.nn",
    "set_tolerance": "revnet.nn",
}

__all__ = [  # noqa: RUF022 - sorted as a reader would, case-insensitively
    "AbstractPolicy",
    "Additive",
    "BudgetError",
    "Checkpoint",
    "CheckpointError",
    "create_model",
    "DataError",
    "FixedPoint",
    "list_models",
    "MissingDependencyError",
    "Offload",
    "PolicySequential",
    "PredictionError",
    "ReconstructionError",
    "ReconstructionWarning",
    "Reverse",
    "ReversibleBlock",
    "ReversibleSequential",
    "RevnetError",
    "set_coupling",
    "set_policy",
    "set_tolerance",
    "Store",
]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"revnet.{name}")
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'revnet' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_ROOMS, "__version__"])
