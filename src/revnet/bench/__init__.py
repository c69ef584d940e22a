"""Comparison with plain autograd, checkpointing and other reversible libraries: memory, time, gradients, pitfalls.

Names that `revnet` itself does not export are provisional: they may change in any release.
"""

from revnet._hardware import hardware_name as hardware_name
from revnet._provenance import describe_machine as describe_machine
from revnet.bench.benchmark import run_benchmark as run_benchmark
from revnet.bench.cases import CASES as CASES
from revnet.bench.cases import Case as Case
from revnet.bench.host_report import run_host_benchmark as run_host_benchmark
from revnet.bench.methods import METHODS as METHODS
from revnet.bench.methods import Method as Method
from revnet.bench.pitfalls import PITFALLS as PITFALLS
from revnet.bench.pitfalls import Pitfall as Pitfall
from revnet.bench.run import QUICK as QUICK
from revnet.bench.run import Settings as Settings
