"""Where the bytes go: measured, predicted, not guessed.

Names that `revnet` itself does not export are provisional: they may change in any release.
"""

from revnet.memory._bytes import format_bytes as format_bytes
from revnet.memory._bytes import parse_bytes as parse_bytes
from revnet.memory._flops import FlopCounter as FlopCounter
from revnet.memory._flops import count_flops as count_flops
from revnet.memory._live import LiveBytes as LiveBytes
from revnet.memory._measure import measure as measure
from revnet.memory._plan import Plan as Plan
from revnet.memory._plan import PlannedUnit as PlannedUnit
from revnet.memory._plan import PlanPoint as PlanPoint
from revnet.memory._plan import max_batch_size as max_batch_size
from revnet.memory._plan import plan as plan
from revnet.memory._plot import plot_timeline as plot_timeline
from revnet.memory._predict import predict as predict
from revnet.memory._step_memory import Breakdown as Breakdown
from revnet.memory._step_memory import CudaMemory as CudaMemory
from revnet.memory._step_memory import ModuleMemory as ModuleMemory
from revnet.memory._step_memory import StepMemory as StepMemory
from revnet.memory._step_memory import Timeline as Timeline
from revnet.memory._timing import CountedTiming as CountedTiming
from revnet.memory._timing import MeasuredTiming as MeasuredTiming
