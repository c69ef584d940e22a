"""Train reversible models on several processes, on the engines of `torch.distributed`.

`shard_blocks` shards a model by block (FSDP2). `synchronize_batch_norms` lets batch norms normalize the whole batch.
`Pipeline` divides a reversible sequence into stages, one for each
process.

Names that `revnet` itself does not export are provisional: they may change in any release.
"""

import typing

from revnet.distributed._shard import shard_blocks as shard_blocks
from revnet.distributed._sync_batch_norm import synchronize_batch_norms as synchronize_batch_norms
from revnet.distributed.pipeline._cut import cut_into_stages as cut_into_stages
from revnet.distributed.pipeline._link import Traffic as Traffic
from revnet.distributed.pipeline._pipeline import Pipeline as Pipeline
from revnet.distributed.pipeline._stage_module import StageModule as StageModule

if typing.TYPE_CHECKING:
    from revnet.distributed.pipeline._reversible_stage import ReversibleStage as ReversibleStage


def __getattr__(name: str) -> typing.Any:
    # PyTorch's pipelining loads the whole compiler.
    if name == "ReversibleStage":
        from revnet.distributed.pipeline._reversible_stage import ReversibleStage

        return ReversibleStage
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
