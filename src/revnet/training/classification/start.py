"""Start a classifier from trained weights, whose classes may be others."""

from torch import Tensor, nn

from revnet._outside_text import shorten
from revnet.data import Preprocess
from revnet.errors import CheckpointError
from revnet.training.classification.model import Classifier, ClassifierHeader
from revnet.training.starting import StartWeights, describe_start, load_start_weights


def preprocess_of(start: StartWeights, image_shape: tuple[int, int, int]) -> Preprocess:
    """Return the preprocessing that the weights were trained with.

    Raises:
        CheckpointError: They have none, or it does not fit images of `image_shape`.
    """
    if "preprocess.mean" not in start.others:
        raise CheckpointError(
            f"`weights` (='{start.path}') have no preprocessing, since they were trained on floating-point images; "
            "pass a `preprocess`."
        )
    mean = start.others["preprocess.mean"]
    if mean.shape[0] != image_shape[0]:
        raise CheckpointError(
            f"`weights` (='{start.path}') are for images with {_channels(mean)}, and the data have "
            f"{image_shape[0]}; pass weights that were trained on such images."
        )
    if mean.shape[1:] not in ((1, 1), image_shape[1:]):
        raise CheckpointError(
            f"`weights` (='{start.path}') subtract a mean image of {tuple(mean.shape[1:])} pixels, and the data have "
            f"images of {image_shape[1:]}; pass a `preprocess`, such as standardize."
        )
    return Preprocess(mean, start.others["preprocess.scale"])


def load_start(classifier: Classifier, start: StartWeights) -> str:
    """Load the weights into a classifier; its head stays new if its classes are others.

    Returns:
        What was loaded, in one line.

    Raises:
        CheckpointError: The weights are of another model.
    """
    old: ClassifierHeader = start.header
    header = classifier.header
    if old.model != header.model:
        raise CheckpointError(
            f"`weights` (='{start.path}') are of the model {shorten(old.model)}, not of `model` (='{header.model}'); "
            f"pass `model` {shorten(old.model)}, or other weights."
        )
    new, reason = [], ""
    if old.class_names != header.class_names:
        new = _head_names(classifier.model)
        reason = f" ({header.num_classes} classes, not the {old.num_classes} of {old.data})"
    load_start_weights(classifier.model, start.network, start.path, new=new)
    return describe_start(start.path, new, reason)


def _head_names(model: nn.Module) -> list[str]:
    head = getattr(model, "head", None)
    tensors = {id(tensor) for tensor in head.parameters()} if isinstance(head, nn.Module) else set()
    names = [name for name, tensor in model.named_parameters() if id(tensor) in tensors]
    if not names:
        raise CheckpointError(
            f"`weights` are for other classes, and {type(model).__name__} has no `head` to replace; name its last "
            "layer `head`."
        )
    return names


def _channels(mean: Tensor) -> str:
    return f"{mean.shape[0]} channel{'s' * (mean.shape[0] != 1)}"
