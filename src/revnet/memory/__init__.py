"""Where the bytes go: measured, not guessed."""

from revnet.memory._flops import FlopCounter as FlopCounter
from revnet.memory._flops import count_flops as count_flops
from revnet.memory._measure import LiveBytes as LiveBytes
from revnet.memory._measure import StepMemory as StepMemory
from revnet.memory._measure import format_bytes as format_bytes
from revnet.memory._measure import measure as measure
