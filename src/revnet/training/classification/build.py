"""Build the classifier of a run, and the update that its memory is counted for."""

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from revnet.memory import Plan
from revnet.nn import set_tolerance
from revnet.training.classification.config import TrainConfig
from revnet.training.classification.model import Classifier, ClassifierHeader
from revnet.training.classification.own_model import check_policies, own_network
from revnet.training.classification.start import load_start
from revnet.training.optimizers import make_optimizer
from revnet.training.processes.prepare_model import check_devices
from revnet.training.processes.world import part_of_batch
from revnet.training.run.activation_memory import Update, apply_policies, make_plan
from revnet.training.run.network import prepare_network
from revnet.training.starting import StartWeights


@dataclass(frozen=True, eq=False)
class BuiltClassifier:
    """The classifier of a run before its first update."""

    classifier: Classifier
    """The classifier."""
    update: Update
    """What a plan and a count of the memory need to know of an update."""
    plan: Plan | None
    """Plan of policies for the memory budget, if there is one."""
    start: str | None
    """Trained weights that it starts from, as text."""


def build_classifier(
    config: TrainConfig, header: ClassifierHeader, preprocess: nn.Module, start: StartWeights | None
) -> BuiltClassifier:
    """Build the classifier of `header` with its policies, from random weights or from `start`.

    Raises:
        ValueError: A setting does not fit the model.
        CheckpointError: The weights are of another model.
        BudgetError: No plan fits the `memory_budget`.
        UserCodeError: The user's own model failed.
    """
    torch.manual_seed(config.seed)
    own = own_network(header)
    if own is not None:
        check_policies(config, own)
        check_devices(config, own, config.model)

    def make_model() -> nn.Module:
        model = Classifier.create(header, preprocess).model if own is None else copy.deepcopy(own).to("meta")
        return prepare_network(model, config)

    update = Update(
        make_model=make_model,
        make_batch=lambda: torch.empty(part_of_batch(config.batch_size, config.accumulate), *header.image_shape),
        loss=partial(_loss, label_smoothing=config.label_smoothing),
        optimizer=partial(make_optimizer, config),
    )
    plan = make_plan(config, update)
    if own is None:
        torch.manual_seed(config.seed)
    classifier = Classifier.create(header, preprocess, network=own)
    started = None if start is None else load_start(classifier, start)
    prepare_network(classifier.model, config)
    apply_policies(classifier.model, config, plan)
    if config.tolerance is not None:
        set_tolerance(classifier.model, config.tolerance)
    return BuiltClassifier(classifier, update, plan, started)


def _loss(logits: Tensor, **options: Any) -> Tensor:
    labels = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    return F.cross_entropy(logits, labels, **options)
