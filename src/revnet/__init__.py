"""Reversible residual networks for PyTorch: activation memory that does not grow with depth.

The names in `revnet.__all__` are the stable API. They keep their meaning and signature between minor releases. The
modules, such as `revnet.nn` and `revnet.memory`, export more names. These are provisional: they may change in any
release, and the changelog says so.

Names load PyTorch when they are first used, not when `revnet` is imported, so that `revnet --help` answers quickly.

`from revnet import *` imports only the stable API. It does not import the modules, since `revnet.nn` would replace the
`nn` of `from torch import nn`.
"""

from typing import TYPE_CHECKING

from revnet._lazy import attach

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

_ROOMS = ("bench", "coupling", "data", "functional", "memory", "models", "nn", "numerics", "paper", "training")
_HOMES = ("errors", "coupling", "nn", "models")

__getattr__, __dir__ = attach(__name__, dict.fromkeys(__all__, _HOMES), submodules=_ROOMS)
