"""Training on Lightning: settings, a run from start to end, and the files that it leaves.

The names below load PyTorch and Lightning when they are first used, so that the command line can check its flags, or
print its help, without them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from revnet.errors import MissingDependencyError
from revnet.training.config import TrainConfig as TrainConfig
from revnet.training.language_config import LanguageConfig as LanguageConfig
from revnet.training.nice_config import NiceConfig as NiceConfig

if TYPE_CHECKING:
    from revnet.training._checkpoint import load_classifier as load_classifier
    from revnet.training.classifier import Classifier as Classifier
    from revnet.training.confusion import Confusion as Confusion
    from revnet.training.density import ImageDensity as ImageDensity
    from revnet.training.density import load_density as load_density
    from revnet.training.density_result import DensityResult as DensityResult
    from revnet.training.drift_monitor import DriftMonitor as DriftMonitor
    from revnet.training.evaluate_result import EvaluateResult as EvaluateResult
    from revnet.training.evaluation import evaluate as evaluate
    from revnet.training.language_model import LanguageModel as LanguageModel
    from revnet.training.language_model import load_language_model as load_language_model
    from revnet.training.language_result import LanguageResult as LanguageResult
    from revnet.training.prediction import Prediction as Prediction
    from revnet.training.prediction import predict as predict
    from revnet.training.results import TrainResult as TrainResult
    from revnet.training.run import TrainingInterrupted as TrainingInterrupted
    from revnet.training.run import resume as resume
    from revnet.training.run import train as train
    from revnet.training.run_result import RunResult as RunResult
    from revnet.training.sampling import Samples as Samples
    from revnet.training.sampling import sample as sample

_HOME = {
    "Classifier": "classifier",
    "Confusion": "confusion",
    "DensityResult": "density_result",
    "DriftMonitor": "drift_monitor",
    "EvaluateResult": "evaluate_result",
    "ImageDensity": "density",
    "LanguageModel": "language_model",
    "LanguageResult": "language_result",
    "Prediction": "prediction",
    "RunResult": "run_result",
    "Samples": "sampling",
    "TrainResult": "results",
    "TrainingInterrupted": "run",
    "evaluate": "evaluation",
    "load_classifier": "_checkpoint",
    "load_density": "density",
    "load_language_model": "language_model",
    "predict": "prediction",
    "resume": "run",
    "sample": "sampling",
    "train": "run",
}

__all__ = [  # noqa: RUF022 - sorted as a reader would, case-insensitively
    "Classifier",
    "Confusion",
    "DensityResult",
    "DriftMonitor",
    "evaluate",
    "EvaluateResult",
    "ImageDensity",
    "LanguageConfig",
    "LanguageModel",
    "LanguageResult",
    "load_classifier",
    "load_density",
    "load_language_model",
    "NiceConfig",
    "predict",
    "Prediction",
    "resume",
    "RunResult",
    "sample",
    "Samples",
    "train",
    "TrainConfig",
    "TrainingInterrupted",
    "TrainResult",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'revnet.training' has no attribute {name!r}")
    try:
        return getattr(import_module(f"revnet.training.{_HOME[name]}"), name)
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if package in ("None", "revnet"):
            raise
        raise MissingDependencyError.of(package, "training") from error


def __dir__() -> list[str]:
    return sorted(__all__)
