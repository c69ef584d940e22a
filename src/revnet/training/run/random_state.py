"""The random numbers of a batch, as a function of the seed of the run and the position of the batch alone."""

import random
from hashlib import blake2b

import numpy as np
import torch
from lightning.pytorch import Trainer


def seed_batch(trainer: Trainer, seed: int) -> None:
    """Seed PyTorch, NumPy and Python for the next batch, in training or validation.

    The seed is a function of the seed of the run, the epoch, the number of the batch and the rank of the process. So a
    checkpoint needs no random state, and processes draw different numbers, for dropout say. What validation, a logger
    or a callback draws changes nothing. Validation repeats its numbers in each epoch, so that epochs can be compared.
    """
    if trainer.training:
        position = f"train {trainer.current_epoch} {trainer.fit_loop.epoch_loop.batch_progress.current.ready}"
    else:
        position = f"validate {trainer.fit_loop.epoch_loop.val_loop.batch_progress.current.ready}"
    key = f"{seed} {position} {trainer.global_rank}"
    value = int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "big")
    device = trainer.strategy.root_device
    torch.default_generator.manual_seed(value)
    if device.type != "cpu":
        # The current device only; `torch.manual_seed` also seeds the devices of others.
        torch.get_device_module(device).manual_seed(value)
    np.random.seed(value % 2**32)
    random.seed(value)
