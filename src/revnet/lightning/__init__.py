"""A Lightning callback that fits any LightningModule into a memory budget.

The names are provisional: they may change in any release.
"""

from revnet.errors import MissingDependencyError

__all__ = ["MemoryBudget"]

try:
    from revnet.lightning._memory_budget import MemoryBudget as MemoryBudget
except ModuleNotFoundError as error:
    if str(error.name).partition(".")[0] not in ("lightning", "torchmetrics"):
        raise
    raise MissingDependencyError.of("lightning", "`revnet.lightning`") from error
