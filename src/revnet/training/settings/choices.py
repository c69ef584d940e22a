"""Settings that are a choice among names."""

from typing import Literal

Preprocessing = Literal["standardize", "mean_image", "imagenet", "unit_range"]
Precision = Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true"]
Device = Literal["auto", "cpu", "cuda", "mps"]
Strategy = Literal["auto", "ddp", "fsdp2"]
Compile = Literal["off", "functions", "model"]
Schedule = Literal["step", "cosine", "constant", "plateau", "restarts"]
Optimizer = Literal[
    "sgd",
    "adamw",
    "muon",
    "adam",
    "adamax",
    "nadam",
    "radam",
    "rmsprop",
    "adagrad",
    "adadelta",
    "adafactor",
    "asgd",
    "rprop",
]
Policy = Literal["reverse", "checkpoint", "store"]
OnCorrupt = Literal["stop", "skip"]

LOGGERS = ("csv", "tensorboard", "wandb", "mlflow")
"""Destinations of the figures of a run."""
