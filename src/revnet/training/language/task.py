"""The task of training a language model: loss and optimizer."""

from collections.abc import Mapping

from torch import Tensor

from revnet._units import format_loss, format_perplexity, format_rate
from revnet.data.sources.text import bits_per_byte
from revnet.training.language.config import LanguageConfig
from revnet.training.language.model import LanguageModel
from revnet.training.run.task import AbstractTask, BestEpoch


class LanguageTask(AbstractTask):
    """Cross-entropy of the next token, in nats.

    A batch is (B, T + 1): windows, in which the model reads all but the last token and predicts all but the first.

    Args:
        language_model: Model to train.
        config: Settings of the run.
        num_updates: Updates of the whole run, for the schedule.
        val_bytes_per_token: Average number of bytes of the tokens that a validation predicts.
    """

    config: LanguageConfig
    best_epoch = BestEpoch("val_loss", is_highest=False)

    def __init__(
        self, language_model: LanguageModel, config: LanguageConfig, num_updates: int, *, val_bytes_per_token: float
    ) -> None:
        super().__init__()
        self.language_model = language_model
        self.config = config
        self.num_updates = num_updates
        self.val_bytes_per_token = val_bytes_per_token

    @property
    def saved_module(self) -> LanguageModel:
        """The language model."""
        return self.language_model

    def compute(self, batch: Tensor) -> tuple[Tensor, ...]:
        """Return the loss of a training batch."""
        return (self._loss(batch),)

    def log_update(self, batch: Tensor, loss: Tensor, *outputs: Tensor) -> None:
        """Log the loss of a training batch."""
        self.log_mean("train_loss", loss, len(batch))

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Log the loss on windows of the validation text."""
        self.log_mean("val_loss", self._loss(batch), len(batch))

    def report(self, metrics: Mapping[str, float]) -> str:
        """Return loss and speed as text."""
        noun = self.language_model.vocabulary.noun
        tokens = self.config.batch_size * self.config.length / metrics["step_seconds"]
        losses = f"loss {format_loss(metrics['train_loss'])} nats/{noun}"
        if "val_loss" in metrics:
            loss = metrics["val_loss"]
            losses += f"  validation {format_loss(loss)}, perplexity {format_perplexity(loss)}"
            if self.language_model.header.tokenizer is not None:
                losses += f", {format_loss(bits_per_byte(loss, self.val_bytes_per_token))} bits/byte"
        return f"{losses}  {format_rate(tokens, f'{noun}s')}"

    def _loss(self, windows: Tensor) -> Tensor:
        return self.language_model(windows[:, :-1], targets=windows[:, 1:])
