"""Memory of a training step: measure it, predict it, and plan policies that fit a budget.

Names that `revnet` itself does not export are provisional: they may change in any release.
"""

from revnet._bytes import format_bytes as format_bytes
from revnet._bytes import parse_bytes as parse_bytes
from revnet.memory.distributed._distributed_memory import DistributedMemory as DistributedMemory
from revnet.memory.distributed._predict_distributed import predict_distributed as predict_distributed
from revnet.memory.planning._apply_budget import apply_budget as apply_budget
from revnet.memory.planning._max_batch_size import max_batch_size as max_batch_size
from revnet.memory.planning._max_patch_size import max_patch_size as max_patch_size
from revnet.memory.planning._plan import Plan as Plan
from revnet.memory.planning._planner import plan as plan
from revnet.memory.planning._timing import MeasuredTiming as MeasuredTiming
from revnet.memory.planning._timing import RooflineTiming as RooflineTiming
from revnet.memory.step._flops import count_flops as count_flops
from revnet.memory.step._measure import measure as measure
from revnet.memory.step._predict import predict as predict
from revnet.memory.step._step_memory import StepMemory as StepMemory
