"""The engine: reversible execution as a real autograd graph."""

from revnet.engine._batch_norm import normalizes_as_batch_norm as normalizes_as_batch_norm
from revnet.engine._block_hooks import call_within as call_within
from revnet.engine._chain import BoundChain as BoundChain
from revnet.engine._chain import Chain as Chain
from revnet.engine._chain import HalfBlock as HalfBlock
from revnet.engine._chain import stored as stored
from revnet.engine._checkpoint import checkpointed as checkpointed
from revnet.engine._checkpoint import checkpointed_call as checkpointed_call
from revnet.engine._determinism import Repetition as Repetition
from revnet.engine._determinism import repeat_function as repeat_function
from revnet.engine._drift import DriftMeter as DriftMeter
from revnet.engine._drift import DriftRecord as DriftRecord
from revnet.engine._offload import offloaded as offloaded
from revnet.engine._offload import offloaded_call as offloaded_call
from revnet.engine._reversible import inverse as inverse
from revnet.engine._reversible import reversible as reversible
from revnet.engine._streams import prepare as prepare
from revnet.engine._streams import split as split
from revnet.engine._tolerance import ToleranceKeeper as ToleranceKeeper
