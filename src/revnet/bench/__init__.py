"""Compare memory, time, gradients and pitfalls with plain autograd, checkpointing and other reversible libraries.

Names that `revnet` itself does not export are provisional: they may change in any release.
"""

from revnet.bench.benchmark import run_benchmark as run_benchmark
from revnet.bench.cases import CASES as CASES
from revnet.bench.host_report import run_host_benchmark as run_host_benchmark
from revnet.bench.methods import METHODS as METHODS
from revnet.bench.pitfalls import PITFALLS as PITFALLS
from revnet.bench.run import Settings as Settings
