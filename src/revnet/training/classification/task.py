"""The task of training a classifier: loss, metrics and optimizer."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from revnet._units import format_loss, format_rate
from revnet.training.classification.config import TrainConfig
from revnet.training.classification.mixing import make_mix
from revnet.training.classification.model import Classifier
from revnet.training.run.task import AbstractTask, BestEpoch
from revnet.training.schedules import progressive_size

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
        class_weights: Weight of each class in the training loss, (K,); None weighs all classes alike.
    """

    config: TrainConfig
    best_epoch = BestEpoch("val_accuracy", is_highest=True)
    class_weights: Tensor | None

    def __init__(
        self,
        classifier: Classifier,
        distort: nn.Module,
        augment: nn.Module,
        config: TrainConfig,
        num_updates: int,
        class_weights: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.classifier = classifier
        self.distort = distort
        self.augment = augment
        self.config = config.resolve_rate(is_decoded=False)  # a job has filled in the rate
        self.num_updates = num_updates
        self.mix = make_mix(config, classifier.header.num_classes)
        # Computed from the data: a checkpoint need not have it.
        self.register_buffer("class_weights", class_weights, persistent=False)
        self.train_accuracy = MulticlassAccuracy(classifier.header.num_classes, average="micro")
        self.val_accuracy = MulticlassAccuracy(classifier.header.num_classes, average="micro")

    def on_after_batch_transfer(self, batch: tuple[Tensor, ...], dataloader_idx: int) -> Batch:
        """Preprocess the batch on the device and, for training, augment it with the keys that it has then."""
        images, labels, *rest = batch
        keys = rest[0] if rest else None
        with torch.no_grad():
            images = self.classifier.preprocess(self.distort(images, keys))
            images = self._shrink(self.augment(images, keys))  # both are the identity in evaluation mode
            return self.mix(images, labels) if self.mix is not None and self.training else (images, labels)

    def compute(self, batch: Batch) -> tuple[Tensor, ...]:
        """Return the loss and the logits of a training batch."""
        images, targets = batch
        logits = self.classifier.model(images)
        return self._loss(logits, targets), logits

    def log_update(self, batch: Batch, loss: Tensor, *outputs: Tensor) -> None:
        """Log loss and accuracy of a training batch."""
        (logits,), targets = outputs, batch[1]
        # Of two images that were mixed, the one with the larger share counts as the truth.
        labels = targets if targets.ndim == 1 else targets.argmax(1)
        self.train_accuracy.update(logits.detach(), labels)
        self.log_mean("train_loss", loss, len(labels))
        self.log("train_accuracy", self.train_accuracy, on_step=False, on_epoch=True)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log loss and accuracy on held-out images."""
        images, labels = batch
        logits = self.classifier.model(images)
        self.val_accuracy.update(logits, labels)
        self.log_mean("val_loss", F.cross_entropy(logits, labels), len(labels))
        self.log("val_accuracy", self.val_accuracy)

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        smoothing = self.config.label_smoothing
        if self.class_weights is None:
            return F.cross_entropy(logits, targets, label_smoothing=smoothing)
        # Divided by the number of images, not by the sum of their weights, which differs between the parts of a batch.
        losses = F.cross_entropy(
            logits, targets, weight=self.class_weights, label_smoothing=smoothing, reduction="none"
        )
        return losses.mean()

    @property
    def saved_module(self) -> Classifier:
        """The classifier."""
        return self.classifier

    def report(self, metrics: Mapping[str, float]) -> str:
        """Return loss, accuracy and speed as text."""
        figures = f"loss {format_loss(metrics['train_loss'])} nats/image"
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
