"""Lightning callbacks: fit any LightningModule into a memory budget, and move the coefficients of converted blocks.

The names are provisional: they may change in any release.
"""

from revnet.errors import MissingDependencyError

__all__ = ["ConversionCallback", "MemoryBudget"]

try:
    from revnet.lightning._conversion_callback import ConversionCallback as ConversionCallback
    from revnet.lightning._memory_budget import MemoryBudget as MemoryBudget
except ModuleNotFoundError as error:
    if str(error.name).partition(".")[0] not in ("lightning", "torchmetrics"):
        raise
    raise MissingDependencyError.of("lightning", "`revnet.lightning`") from error
