"""The running statistics of batch norms, which each process keeps for its own batches."""

from torch import distributed, nn
from torch.nn.modules.batchnorm import _NormBase

from revnet.training.processes.world import current_world


def share_statistics(model: nn.Module) -> None:
    """Copy the running statistics of the main process, which are saved, to all processes.

    Training does not read them, so this does not change it.
    """
    if current_world().num_processes == 1:
        return
    norms = [module for module in model.modules() if isinstance(module, _NormBase)]
    for buffer in [buffer for norm in norms for buffer in norm.buffers()]:
        distributed.broadcast(buffer, 0)
