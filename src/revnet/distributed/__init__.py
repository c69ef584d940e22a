"""Train reversible models on several processes, on the engines of `torch.distributed`.

Names that `revnet` itself does not export are provisional: they may change in any release.
"""

from revnet.distributed._shard import shard_blocks as shard_blocks
