# The names of the package, each of them once: type checkers and `revnet._lazy` read this file.
from revnet import bench as bench
from revnet import coupling as coupling
from revnet import data as data
from revnet import distributed as distributed
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
from revnet.errors import ProcessError as ProcessError
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

__version__: str
