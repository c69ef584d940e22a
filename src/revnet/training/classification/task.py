"""The task of training a classifier: loss, metrics and optimizer."""

from collections.abc import Mapping

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from revnet._units import format_rate
from revnet.training.classification.config import TrainConfig
from revnet.training.classification.model import Classifier
from revnet.training.optimizers import optimizer_factory, parameter_groups
from revnet.training.run.task import AbstractTask, BestEpoch
from revnet.training.schedules import cosine_decay, progressive_size, step_decay

Batch = tuple[Tensor, Tensor]


class ClassificationTask(AbstractTask):
    """Cross-entropy on augmented images.

    Args:
        classifier: Classifier to train.
        distort: Module applied to the pixels of training images, uint8, and their keys, on the device.
        augment: Module applied to preprocessed training images and their keys, on the device, outside autocast.
        config: Settings of the run.
        num_updates: Updates of the whole run, for the schedule. The caller counts them: Lightning's own estimate
            builds the loaders early, which stops stateful ones from resuming (lightning #20550).
    """

    config: TrainConfig
    best_epoch = BestEpoch("val_accuracy", is_highest=True)

    def __init__(
        self,
        classifier: Classifier,
        distort: nn.Module,
        augment: nn.Module,
        config: TrainConfig,
        num_updates: int,
    ) -> None:
        super().__init__()
        self.classifier = classifier
        self.distort = distort
        self.augment = augment
        self.config = config
        self.num_updates = num_updates
        self.train_accuracy = MulticlassAccuracy(classifier.header.num_classes, average="micro")
        self.val_accuracy = MulticlassAccuracy(classifier.header.num_classes, average="micro")

    def on_after_batch_transfer(self, batch: tuple[Tensor, ...], dataloader_idx: int) -> Batch:
        """Preprocess the batch on the device and, for training, augment it with the keys that it has then."""
        images, labels, *rest = batch
        keys = rest[0] if rest else None
        with torch.no_grad():
            images = self.classifier.preprocess(self.distort(images, keys))
            return self._shrink(self.augment(images, keys)), labels  # both are the identity in evaluation mode

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of one update."""
        images, labels = batch
        logits = self.classifier.model(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.config.label_smoothing)
        self.train_accuracy.update(logits.detach(), labels)
        self.log_mean("train_loss", loss, len(labels))
        self.log("train_accuracy", self.train_accuracy, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log loss and accuracy on held-out images."""
        images, labels = batch
        logits = self.classifier.model(images)
        self.val_accuracy.update(logits, labels)
        self.log_mean("val_loss", F.cross_entropy(logits, labels), len(labels))
        self.log("val_accuracy", self.val_accuracy)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Return the optimizer, and the schedule that steps after every update."""
        config = self.config
        groups = parameter_groups(self.classifier.model, config.weight_decay)
        optimizer = optimizer_factory(config)(groups)
        if config.schedule == "cosine":
            schedule = cosine_decay(optimizer, num_updates=self.num_updates, warmup=config.warmup)
        else:
            schedule = step_decay(
                optimizer,
                num_updates=self.num_updates,
                decay_at=config.decay_at,
                decay_factor=config.decay_factor,
                warmup=config.warmup,
            )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @property
    def saved_module(self) -> Classifier:
        """The classifier."""
        return self.classifier

    def report(self, metrics: Mapping[str, float]) -> str:
        """Return loss, accuracy and speed as text."""
        figures = f"loss {metrics['train_loss']:.4f}"
        if "val_accuracy" in metrics:
            figures += f"  validation accuracy {100 * metrics['val_accuracy']:.2f} %"
        return f"{figures}  {format_rate(self.config.batch_size / metrics['step_seconds'], 'images')}"

    def _shrink(self, images: Tensor) -> Tensor:
        full_size, start_size = min(images.shape[2:]), self.config.start_size
        if not self.training or start_size is None or start_size >= full_size:
            return images
        size = progressive_size(
            self.trainer.global_step / self.num_updates,
            start_size=start_size,
            full_size=full_size,
            full_size_at=self.config.full_size_at,
        )
        if size == full_size:
            return images
        sides = [round(size / full_size * side) for side in images.shape[2:]]
        return F.interpolate(images, sides, mode="bilinear", antialias=True)
