"""Functions that communicate with other processes, which no process may run again by itself."""

import torch.distributed as dist
from torch import nn

from revnet._torch_release import fsdp_modules_in
from revnet.engine._chain import Chain
from revnet.engine._tensors import is_sharded


def refuse_communication(chain: Chain, tolerance: float) -> None:
    """Raise if a function whose streams are rebuilt within a tolerance communicates with other processes.

    Each process runs other functions again, so the others would not answer.

    Raises:
        NotImplementedError: The function or its block has sharded parameters, or a synchronized batch norm.
    """
    blocks = chain.blocks or [None] * len(chain.half_blocks)
    for half_block, block in zip(chain.half_blocks, blocks, strict=True):
        for module in [*([] if block is None else [block]), *half_block.function.modules()]:
            if (what := _communicating(module)) is not None:
                raise NotImplementedError(
                    f"a `tolerance` (={tolerance:g}) does not go with {what} in `{half_block.name}`: each process "
                    "runs other functions again, and this one communicates with all processes; reverse exactly "
                    "with `set_coupling(model, FixedPoint())`, or call `set_tolerance(model, None)`."
                )


def _communicating(module: nn.Module) -> str | None:
    """Return a description of what makes the module communicate with other processes, or None."""
    if fsdp_modules_in([module]) or any(map(is_sharded, module._parameters.values())):
        return "sharded parameters"
    if not isinstance(module, nn.SyncBatchNorm) or not module.training:
        return None
    is_alone = not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(module.process_group) == 1
    return None if is_alone else "a synchronized batch norm"
