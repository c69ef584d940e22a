"""This library beside plain autograd, checkpointing and its peers: memory, time, gradients, and what goes wrong.

Names that `revnet` itself does not export are provisional: they may change in any release.
"""

from revnet._hardware import hardware_name as hardware_name
from revnet._provenance import describe_machine as describe_machine
from revnet.bench.benchmark import run_benchmark as run_benchmark
from revnet.bench.cases import CASES as CASES
from revnet.bench.cases import Case as Case
from revnet.bench.contenders import CONTENDERS as CONTENDERS
from revnet.bench.contenders import Contender as Contender
from revnet.bench.host_cases import HOST_CASES as HOST_CASES
from revnet.bench.host_cases import HOST_CONTENDERS as HOST_CONTENDERS
from revnet.bench.host_report import run_host_benchmark as run_host_benchmark
from revnet.bench.run import QUICK as QUICK
from revnet.bench.run import Results as Results
from revnet.bench.run import Settings as Settings
from revnet.bench.traps import TRAPS as TRAPS
from revnet.bench.traps import Trap as Trap
