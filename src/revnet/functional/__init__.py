"""Functions on tensors, and the run that rebuilds activations."""

from revnet.functional._batch_norm import normalizes_as_batch_norm as normalizes_as_batch_norm
from revnet.functional._checkpoint import checkpointed as checkpointed
from revnet.functional._checkpoint import checkpointed_call as checkpointed_call
from revnet.functional._chunked import chunked as chunked
from revnet.functional._determinism import Repetition as Repetition
from revnet.functional._determinism import repeat_function as repeat_function
from revnet.functional._drift import DriftMeter as DriftMeter
from revnet.functional._drift import DriftRecord as DriftRecord
from revnet.functional._full_attention import full_attention as full_attention
from revnet.functional._guard import Guard as Guard
from revnet.functional._half_block import HalfBlock as HalfBlock
from revnet.functional._half_block import call_within as call_within
from revnet.functional._hierarchical_attention import hierarchical_attention as hierarchical_attention
from revnet.functional._lsh_attention import lsh_attention as lsh_attention
from revnet.functional._offload import offloaded as offloaded
from revnet.functional._reversible import ReversibleRun as ReversibleRun
from revnet.functional._reversible import inverse as inverse
from revnet.functional._reversible import reversible as reversible
from revnet.functional._reversible import run_reversible as run_reversible
from revnet.functional._reversible import stored as stored
from revnet.functional._rotary import rotary_table as rotary_table
from revnet.functional._rotary import rotate as rotate
from revnet.functional._split import split as split
