"""Training with Lightning: settings, runs, and the files that a run writes.

PyTorch and Lightning load when a name that needs them is first used. The command line can check its flags and print its
help without them.

Names that `revnet` itself does not export are provisional: they may change in any release.
"""

from typing import TYPE_CHECKING

from revnet._lazy import attach

if TYPE_CHECKING:  # The names of `_HOME`, for type checkers; a test compares the two.
    from revnet.training.classification.config import TrainConfig as TrainConfig
    from revnet.training.classification.model import Classifier as Classifier
    from revnet.training.classification.model import load_classifier as load_classifier
    from revnet.training.classification.result import TrainResult as TrainResult
    from revnet.training.density.config import NiceConfig as NiceConfig
    from revnet.training.density.model import ImageDensity as ImageDensity
    from revnet.training.density.model import load_density as load_density
    from revnet.training.density.result import DensityResult as DensityResult
    from revnet.training.density.sample import sample as sample
    from revnet.training.drift_monitor import DriftMonitor as DriftMonitor
    from revnet.training.entry import resume as resume
    from revnet.training.entry import train as train
    from revnet.training.evaluation.evaluate import evaluate as evaluate
    from revnet.training.evaluation.evaluate_result import EvaluateResult as EvaluateResult
    from revnet.training.evaluation.predict_images import predict_images as predict_images
    from revnet.training.language.config import LanguageConfig as LanguageConfig
    from revnet.training.language.model import LanguageModel as LanguageModel
    from revnet.training.language.model import load_language_model as load_language_model
    from revnet.training.language.result import LanguageResult as LanguageResult
    from revnet.training.run.execute import TrainingInterrupted as TrainingInterrupted

_HOME = {
    "Classifier": "classification.model",
    "DensityResult": "density.result",
    "DriftMonitor": "drift_monitor",
    "evaluate": "evaluation.evaluate",
    "EvaluateResult": "evaluation.evaluate_result",
    "ImageDensity": "density.model",
    "LanguageConfig": "language.config",
    "LanguageModel": "language.model",
    "LanguageResult": "language.result",
    "load_classifier": "classification.model",
    "load_density": "density.model",
    "load_language_model": "language.model",
    "NiceConfig": "density.config",
    "predict_images": "evaluation.predict_images",
    "resume": "entry",
    "sample": "density.sample",
    "train": "entry",
    "TrainConfig": "classification.config",
    "TrainingInterrupted": "run.execute",
    "TrainResult": "classification.result",
}
__all__ = list(_HOME)

__getattr__, __dir__ = attach(__name__, _HOME, purpose="training")
