"""Lightning's strategy for a model that several processes divide, which also reads the checkpoint of a whole one."""

from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict
from torch.optim import Optimizer

from revnet.training.run.checkpoint import read_checkpoint
from revnet.training.run.divided_state import load_whole_state
from revnet.training.run.plain_state import without_foreign_states
from revnet.training.run.run_dir import is_sharded


class ShardedStrategy(ModelParallelStrategy):
    """`ModelParallelStrategy`, except for checkpoints that are one file.

    Lightning numbers the states of an optimizer in the order of the parameters in the model. PyTorch numbers them in
    the order of the parameters in the groups of the optimizer, and so does a file.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._warned: set[str] = set()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write the shards of this process, and what has no shards."""
        super().save_checkpoint(without_foreign_states(checkpoint, self._warned), filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Load weights and optimizer states, and return the rest of the checkpoint."""
        path = Path(self.broadcast(checkpoint_path))
        if is_sharded(path):
            return super().load_checkpoint(path, weights_only=weights_only)
        checkpoint = read_checkpoint(path)
        assert self.model is not None
        load_whole_state(self.model, checkpoint.pop("state_dict"))
        for optimizer, state in zip(self.optimizers, checkpoint.pop("optimizer_states"), strict=True):
            set_optimizer_state_dict(
                self.model,
                optimizer,
                optim_state_dict=self._by_name(optimizer, state),
                options=StateDictOptions(full_state_dict=True),
            )
        return checkpoint

    def _by_name(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        assert self.model is not None
        name_of = {parameter: name for name, parameter in self.model.named_parameters()}
        names = [name_of[parameter] for group in optimizer.param_groups for parameter in group["params"]]
        return {
            "state": {names[number]: values for number, values in state["state"].items()},
            "param_groups": [
                group | {"params": [names[number] for number in group["params"]]} for group in state["param_groups"]
            ],
        }
