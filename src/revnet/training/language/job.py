"""The job of `revnet train lm`: train a language model on a text."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from revnet._paths import absolute_path
from revnet._units import counted
from revnet.data import ConsecutiveWindows, RandomWindows, Vocabulary
from revnet.data.sources.text import TextDataset
from revnet.memory import Plan
from revnet.models import ReversibleTransformer
from revnet.training.device import find_device
from revnet.training.language.config import LanguageConfig
from revnet.training.language.model import SEPARATE, LanguageHeader, LanguageModel
from revnet.training.language.result import LanguageResult
from revnet.training.language.start import load_start
from revnet.training.language.task import LanguageTask
from revnet.training.language.text_data import average_bytes, count_bytes, load_data, make_header
from revnet.training.optimizers import make_optimizer
from revnet.training.processes.prepare_model import check_devices
from revnet.training.processes.world import check_division, part_of_batch
from revnet.training.run import run_dir
from revnet.training.run.activation_memory import Update, apply_policies, make_plan
from revnet.training.run.data_record import DataRecord, record_text
from revnet.training.run.job import AbstractJob, Outcome, RunNames
from revnet.training.run.network import prepare_network
from revnet.training.starting import absolute_weights, read_start_weights

_LONGEST_EPOCH = 500
"""Largest number of updates of an epoch, if the settings leave the number open."""


@dataclass(frozen=True, eq=False, kw_only=True)
class LanguageJob(AbstractJob[LanguageResult]):
    """Job of a run that trains a language model."""

    config: LanguageConfig
    names: RunNames
    task: LanguageTask
    plan: Plan | None
    dataset: TextDataset
    update: Update
    start: str | None
    drift_every: int | None

    def heading(self) -> list[tuple[str, str]]:
        """Return the lines printed before training: model, data, epochs."""
        config, dataset = self.config, self.dataset
        form = "" if config.form == "coupled" else f" of {config.form} form"
        num_parameters = sum(parameter.numel() for parameter in self.task.language_model.model.parameters())
        return [
            (
                "model",
                f"lm{form}, {counted(config.depth, 'block')}, {config.attention} attention, "
                f"{num_parameters:,} parameters",
            ),
            ("data", dataset.describe()),
            ("epochs", self.describe_updates(f"windows of {config.length} {dataset.vocabulary.noun}s")),
        ]

    def record_data(self) -> DataRecord:
        """Return what the run remembers of its data."""
        return record_text(self.dataset)

    @property
    def texts(self) -> Mapping[str, str]:
        """The tokenizer, unless the tokens are characters."""
        tokenizer = self.task.language_model.header.tokenizer
        return {} if tokenizer is None else {run_dir.TOKENIZER: tokenizer}

    def make_loaders(
        self, device: torch.device, *, rank: int = 0, num_processes: int = 1, num_parts: int = 1
    ) -> tuple[RandomWindows, ConsecutiveWindows]:
        """Return random windows for training and consecutive windows for validation."""
        assert self.config.updates_per_epoch is not None
        training = RandomWindows(
            self.dataset.train,
            length=self.config.length,
            batch_size=self.config.batch_size,
            num_batches=self.config.updates_per_epoch,
            num_parts=num_parts,
            seed=self.config.seed,
            rank=rank,
            num_processes=num_processes,
            pin_memory=device.type == "cuda",
        )
        validation = ConsecutiveWindows(
            self.dataset.validation,
            length=self.config.length,
            batch_size=self.config.batch_size,
            max_windows=self.config.val_windows,
            rank=rank,
            num_processes=num_processes,
        )
        return training, validation

    def finish(self, folder: Path, outcome: Outcome) -> LanguageResult:
        """Take the scores from the log: the validation text is the only text that is held out."""
        assert outcome.best_score is not None
        _, validation = self.make_loaders(outcome.device)
        return LanguageResult(
            data=self.dataset.name,
            attention=self.config.attention,
            val_loss=outcome.rows[-1]["val_loss"],
            best_val_loss=outcome.best_score,
            num_val_tokens=validation.num_windows * self.config.length,
            num_val_bytes=count_bytes(validation, self.dataset.vocabulary),
            token="character" if isinstance(self.dataset.vocabulary, Vocabulary) else "token",
            **outcome.figures.as_arguments(),
        )


def new_job(config: LanguageConfig) -> LanguageJob:
    """Check the settings of a new run and read its text."""
    if config.data is None:
        raise ValueError("`data` is required: a text file or a folder of them, such as --data book.txt.")
    return job_of_run(replace(config, data=absolute_path(config.data), weights=absolute_weights(config.weights)))


def job_of_run(config: LanguageConfig) -> LanguageJob:
    """Make the job of a run from the settings in its folder."""
    find_device(config.device)
    dataset, config = load_data(config)
    noun = dataset.vocabulary.noun
    shortest = min(len(dataset.train), len(dataset.validation))
    if shortest <= config.length:
        raise ValueError(
            f"`data` (='{config.data}') has {len(dataset.train):,} {noun}s for training and "
            f"{len(dataset.validation):,} for validation, too few for windows of `length` (={config.length}) plus one; "
            "pass a longer text, or a smaller length."
        )
    check_division(config.batch_size, num_parts=config.accumulate)
    usual = max(1, min(_LONGEST_EPOCH, len(dataset.train) // (config.batch_size * config.length)))
    updates_per_epoch = config.updates_per_epoch or usual
    config, num_updates = replace(config, updates_per_epoch=updates_per_epoch).limit_updates(updates_per_epoch)
    header = make_header(config, dataset)
    update = _make_update(config, header, len(dataset.vocabulary))
    plan = make_plan(config, update)
    torch.manual_seed(config.seed)
    language_model = LanguageModel.create(header)
    check_devices(config, language_model.model, "the language model")
    start = None
    if config.weights is not None:
        start = load_start(language_model, read_start_weights(config.weights, LanguageHeader))
    prepare_network(language_model.model, config)
    _set_loss(language_model.model, config)
    apply_policies(language_model.model, config, plan)
    bytes_per_token = average_bytes(config, dataset)
    task = LanguageTask(language_model, config, num_updates, val_bytes_per_token=bytes_per_token)
    return LanguageJob(
        config=config,
        names=RunNames(data=dataset.name, model="lm", loss=f"nats per {noun}"),
        task=task,
        plan=plan,
        dataset=dataset,
        update=update,
        start=start,
        drift_every=config.drift_every,
    )


def _make_update(config: LanguageConfig, header: LanguageHeader, num_tokens: int) -> Update:
    def make_model() -> nn.Module:
        model = LanguageModel.create(header).model
        _set_loss(model, config)
        return prepare_network(model, config)

    def make_tokens() -> Tensor:
        return torch.zeros(part_of_batch(config.batch_size, config.accumulate), config.length, dtype=torch.int64)

    is_chunked = config.chunked_loss
    if is_chunked is None:
        is_chunked = num_tokens > 2 * config.dim
    make_mask = make_tokens if header.documents == SEPARATE else None  # numbers of documents, in integers, too
    if not is_chunked:
        optimizer = partial(make_optimizer, config)
        return Update(make_model, make_tokens, loss=_loss, optimizer=optimizer, make_mask=make_mask)
    return Update(
        make_model,
        make_tokens,
        loss=None,
        optimizer=partial(make_optimizer, config),
        make_targets=make_tokens,
        make_mask=make_mask,
        chunked_loss="auto" if config.chunked_loss is None else None,
    )


def _set_loss(model: ReversibleTransformer, config: LanguageConfig) -> None:
    """Divide the logits of the loss into chunks as the settings ask; the head itself knows the default."""
    if config.chunked_loss is not None:
        model.head.is_chunked = config.chunked_loss


def _loss(logits: Tensor) -> Tensor:
    targets = torch.zeros(logits.shape[:2], dtype=torch.int64, device=logits.device)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
