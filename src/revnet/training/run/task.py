"""The part of a LightningModule that all tasks share: what to save, which epoch is best, what to print."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Self

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from revnet.training.freezing import frozen_norms
from revnet.training.run.captured_update import CapturedUpdate
from revnet.training.run.checkpoint import HEADER_KEY
from revnet.training.run.mean_over_samples import MeanOverSamples
from revnet.training.run.optimization import configure_optimization
from revnet.training.run.random_state import seed_batch
from revnet.training.saved_module import SavedModule
from revnet.training.settings.run_config import AbstractRunConfig


class BestEpoch(NamedTuple):
    """Rule for which epoch is the best."""

    metric: str
    """Name of a metric that validation logs."""
    is_highest: bool
    """Whether the highest value is the best; otherwise the lowest is."""

    def is_best(self, score: float, loss: float, *, earlier_score: float, earlier_loss: float) -> bool:
        """Return whether a validation is better than the best of the earlier ones, or equally good.

        Accuracies on few images are often equal. Then the lower loss is better, and of equal losses, the later one.

        Args:
            score: Value of the metric.
            loss: Validation loss.
            earlier_score: Value of the metric in the best earlier validation.
            earlier_loss: Validation loss in the best earlier validation.
        """
        if score == earlier_score:
            return loss <= earlier_loss
        return score > earlier_score if self.is_highest else score < earlier_score


class AbstractTask(LightningModule, ABC):
    """Loss, metrics and optimizer of one task.

    It logs `train_loss` and, with validation, `val_loss`. Its module is the attribute `classifier`, `density` or
    `language_model`, by which a checkpoint finds its tensors.
    """

    config: AbstractRunConfig
    """Settings of the run."""
    num_updates: int
    """Updates of the whole run."""
    best_epoch: BestEpoch
    """Rule for which epoch is the best."""
    with_final_weights: Callable[[], AbstractContextManager[None]] = staticmethod(nullcontext)
    """Context in which the module has the weights to save: their average, if the run keeps one."""
    prepare_model: Callable[[nn.Module], object] | None = None
    """Function that changes the network in place for several devices, once the processes are connected."""
    captured_update: CapturedUpdate | None = None
    """Runs the passes of an update as a CUDA graph, if the settings ask for it."""

    def __init__(self) -> None:
        super().__init__()
        self.means = nn.ModuleDict({name: MeanOverSamples() for name in ("train_loss", "val_loss")})

    @property
    @abstractmethod
    def saved_module(self) -> SavedModule:
        """Module that is trained, and saved."""

    @abstractmethod
    def report(self, metrics: Mapping[str, float]) -> str:
        """Return the figures of an epoch as one line of text."""

    @abstractmethod
    def compute(self, batch: Any) -> tuple[Tensor, ...]:
        """Return the loss of a training batch, and what else `log_update` needs."""

    @abstractmethod
    def log_update(self, batch: Any, loss: Tensor, *outputs: Tensor) -> None:
        """Log the figures of a training batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of one update."""
        update = self.captured_update
        loss, *outputs = self.compute(batch) if update is None else update.run(batch)
        self.log_update(batch, loss, *outputs)
        return loss

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Run the backward pass, unless it was part of a CUDA graph."""
        if self.captured_update is None or not self.captured_update.put_gradients():
            super().backward(loss, *args, **kwargs)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimizer, and the schedule that steps after every update.

        Raises:
            ValueError: A setting does not fit the model.
        """
        metric, is_highest = self.best_epoch
        return configure_optimization(
            self.config, self.saved_module.model, self.num_updates, metric=metric, is_highest=is_highest
        )

    def train(self, mode: bool = True) -> Self:
        """Set the mode of all modules; frozen batch norms always use their averages."""
        super().train(mode)
        for norm in frozen_norms(self.saved_module.model):
            norm.train(False)
        return self

    def on_fit_start(self) -> None:
        """Set the modes: Lightning leaves them as they are."""
        self.train()

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Step a schedule, except the one that follows validations."""
        if not isinstance(scheduler, ReduceLROnPlateau):
            super().lr_scheduler_step(scheduler, metric)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Seed the random numbers of the batch, so that they do not depend on what was drawn before."""
        seed_batch(self.trainer, self.config.seed)
        return batch

    def configure_model(self) -> None:
        """Prepare the network for several devices."""
        if self.prepare_model is not None:
            self.prepare_model(self.saved_module.model)
            self.prepare_model = None

    def log_mean(self, name: str, mean: Tensor, num_samples: int) -> None:
        """Log the mean of `train_loss` or `val_loss` over all samples of an epoch, in all processes."""
        metric = self.means[name]
        assert isinstance(metric, MeanOverSamples)
        metric.update(mean.detach(), num_samples)
        self.log(name, metric, on_step=False, on_epoch=True)

    @property
    def total_train_loss(self) -> float:
        """Sum of the training loss over the samples of this process in the epoch so far."""
        metric = self.means["train_loss"]
        assert isinstance(metric, MeanOverSamples)
        return float(metric.total)

    @property
    def mean_train_loss(self) -> float:
        """Mean of the training loss over the samples of this process in the epoch so far."""
        metric = self.means["train_loss"]
        assert isinstance(metric, MeanOverSamples)
        return float(metric.total / metric.num_samples)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the header to the checkpoint, so that the file says what it holds."""
        checkpoint[HEADER_KEY] = self.saved_module.header.to_metadata()
