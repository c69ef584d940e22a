"""The settings of a run that trains a classifier."""

import os
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from revnet.training.classification.mixing_settings import MixingSettings
from revnet.training.settings.checks import check_range
from revnet.training.settings.choices import OnCorrupt, Optimizer, Policy, Preprocessing, Schedule
from revnet.training.settings.fields import checked, integer, number
from revnet.training.settings.optimization import NORMALIZING
from revnet.training.settings.run_config import AbstractRunConfig

# Values for settings that are left open, by data set.
_USUAL: dict[str, dict[str, Any]] = {
    # A mirrored 2 is not a 2, and an 8x8 image has no 4 pixels to spare. With so little work per thread, threads mostly
    # wait for each other as soon as the cores are busy.
    "digits": {"preprocess": "standardize", "crop_padding": 1, "horizontal_flip": False, "num_threads": 1},
}
_USUAL_IN_MEMORY: dict[str, Any] = {"preprocess": "standardize", "crop_padding": 4, "horizontal_flip": True}
# Images in files are cropped while they are decoded, and their mean is unknown.
_USUAL_DECODED: dict[str, Any] = {"preprocess": "imagenet", "crop_padding": 0, "horizontal_flip": True}


@dataclass(frozen=True, kw_only=True)
class TrainConfig(MixingSettings, AbstractRunConfig):
    """Settings of a run that trains a classifier.

    The defaults train a small RevNet on the digits that come with revnet. `configs/` holds complete recipes, among them
    the recipes of the paper.

    Raises:
        TypeError: A setting has the wrong type.
        ValueError: A setting is out of range, or does not go with another.

    References:
        Gomez et al. (2017), The Reversible Residual Network, section 4 and appendix: the CIFAR recipe.
    """

    command: ClassVar[str] = "revnet train"
    title: ClassVar[str] = "settings"

    data: str = "digits"
    """Data set: a name (`digits`, `cifar10`, `cifar100`, `imagenet`), `hub:owner/name`, or a path: a folder of images
    (`<class>/...`, a fifth of which become the test set, or `train/<class>/...` next to `val`), of parquet files laid
    out as on the hub, or CIFAR's official archive."""

    model: str = "revnet38"
    """Model; `revnet models` lists them."""

    policy: Policy = "reverse"
    """Policy for activations: `reverse` reconstructs the activations of reversible blocks in the backward pass,
    `checkpoint` stores the input of each block and computes the rest again, also in models that are not reversible,
    `store` keeps all activations, as the stored twin does."""

    memory_budget: str | None = None
    """Largest amount of memory that an update may take, such as `16GiB` or `500MB`. A plan then chooses the policy of
    each block, instead of `policy`, so that an update takes the least time. The budget counts the tensors of the model,
    gradients, optimizer, activations and loss; leave room for data, augmentation, and what a GPU needs besides
    tensors."""

    exact: bool = False
    """Whether reversal is exact to the last bit: the streams of reversible blocks lie on a fixed-point grid, and each
    residual is rounded to it. The weights remember this setting."""

    tolerance: float | None = number(None, "above 0 and below 1", lambda x: 0 < x < 1, usual="1e-3")
    """Largest relative error of reconstructed activations: the run also stores the streams at some blocks, as few as
    needed. By default there is no bound, and a warning when gradients go wrong."""

    drift_every: int | None = integer(None, at_least=1)
    """Number of updates from one measurement of drift to the next, where drift is the distance of reconstructed
    activations from the true ones; by default, nothing is measured."""

    epochs: int = integer(60, at_least=1)
    """Number of passes over the training images."""

    max_updates: int | None = integer(None, at_least=1)
    """Number of updates after which to stop, mid-epoch if necessary; by default, all `epochs` are completed."""

    batch_size: int = integer(100, at_least=1)
    """Images per update. Images that an epoch leaves over may be seen in another epoch."""

    optimizer: Optimizer = "sgd"
    """Optimizer, a class of `torch.optim` in lower case. `sgd` is gradient descent with momentum, for convolutional
    networks; `adamw` is for transformers, with a learning rate near 1e-3 and a weight decay near 0.05; `muon` makes the
    updates of the weight matrices of hidden layers orthogonal, and leaves all other parameters to `adamw`, with the
    same learning rate."""

    lr: float | None = number(  # type: ignore[assignment] # None until `resolve`
        None, "above 0", lambda x: x > 0, usual="0.1"
    )
    """Highest learning rate. By default, it is 0.1 for images in memory, and for images in files
    0.02 times a 32nd of the batch size, at most 0.1. For `adamw` and its relatives it is 0.001."""

    schedule: Schedule = "step"

    label_smoothing: float = number(0.0, "from 0 to below 1", lambda x: 0 <= x < 1, usual="0.1")
    """Share of the target that is spread over all classes; in the training loss only."""

    weight_decay: float = number(2e-4, "0 or more", lambda x: x >= 0, usual="2e-4")

    val_fraction: float = number(0.1, "from 0 to below 1", lambda x: 0 <= x < 1, usual="0.1")
    """Share of the training images, taken evenly from all classes, that is held out for validation. With 0, the paper's
    protocol, the run trains on every image, and the best weights are the last."""

    preprocess: Preprocessing | None = None
    """Preprocessing: `standardize` scales each channel by the mean and deviation of the training pixels; `mean_image`
    subtracts the mean image of training and test set and stays on the 0-255 scale, as the paper does for CIFAR;
    `imagenet` uses the constants of that data set; `unit_range` scales to [-1, 1], as the paper does for ImageNet. By
    default, the preprocessing of the `weights`, or without them the one that suits the data: `imagenet` for images in
    files, `standardize` for images in memory."""

    image_size: int | None = integer(None, at_least=1)
    """Side to which images in files are cropped and resized; by default 224, and images that all have one size stay as
    they are."""

    crop_area: tuple[float, float] = checked((0.08, 1.0), check_range)
    """Smallest and largest share of an image in files that a random crop covers before it is resized; the paper uses
    0.05 to 1."""

    crop_padding: int | None = integer(None, at_least=0, at_most=100_000)
    """Pixels added on each side before a random crop; by default 1 for digits, 4 for other images in memory, 0 for
    images in files."""

    horizontal_flip: bool | None = None
    """Whether images are mirrored at random; by default not for digits, and otherwise yes."""

    color_distortion: bool = False
    """Whether brightness, saturation, hue and contrast change at random, as the paper does for ImageNet."""

    cutout: int = integer(0, at_least=0)
    """Side in pixels of a random square that is blanked out of each image; 0 for none."""

    start_size: int | None = integer(None, at_least=1)
    """Side to which training images are shrunk at first. It grows until the fraction `full_size_at` of all updates,
    when the images have their own size (progressive resizing). By default, they are not shrunk."""

    full_size_at: float = number(0.6, "above 0 and at most 1", lambda x: 0 < x <= 1, usual="0.6")
    """Point at which progressive resizing reaches the images' own size, as a fraction of all updates."""

    on_corrupt: OnCorrupt = "stop"
    """Response to an image that cannot be decoded: `stop` the run, or `skip` the image and print its name."""

    num_threads: int | None = integer(None, at_least=1, at_most=4096)
    """Threads on the CPU; by default, 1 for digits, PyTorch's choice elsewhere."""

    num_workers: int | None = integer(None, at_least=0)
    """Processes that decode images; by default, one less than the number of cores, at most 8, and none for images in
    memory."""

    seed: int = integer(0, at_least=0, at_most=2**32 - 1)
    """Seed of the initial weights, the held-out images, their order and the augmentation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "crop_area", tuple(self.crop_area))
        if isinstance(self.class_weights, list):
            object.__setattr__(self, "class_weights", tuple(self.class_weights))

    def resolve(self, data_name: str, *, is_decoded: bool = False) -> Self:
        """Return the settings with the defaults of the data set filled in.

        Args:
            data_name: Name of the data set.
            is_decoded: Whether its images are files, which are decoded and cropped in every epoch.
        """
        usual = _USUAL_DECODED if is_decoded else _USUAL.get(data_name, _USUAL_IN_MEMORY)
        if self.weights is not None:
            usual = {**usual, "preprocess": None}  # the preprocessing of the weights
        usual = {"num_workers": min(8, max(0, (os.cpu_count() or 1) - 1)) if is_decoded else 0, **usual}
        settings = self.resolve_rate(is_decoded=is_decoded)
        return replace(settings, **{name: value for name, value in usual.items() if getattr(self, name) is None})

    def resolve_rate(self, *, is_decoded: bool) -> Self:
        """Return the settings with the default of the learning rate filled in."""
        if self.lr is not None:
            return self
        if self.optimizer in NORMALIZING:
            return replace(self, lr=1e-3)
        # Networks for photographs are deeper, and their batches smaller.
        return replace(self, lr=min(0.1, 0.02 * self.batch_size / 32) if is_decoded else 0.1)

    def _check_together(self) -> None:
        if self.tolerance is not None and self.exact:
            raise ValueError(
                f"`tolerance` (={self.tolerance}) has no effect with `exact`, which leaves no error to bound; leave "
                "one of the two out."
            )
        if self.tolerance is not None and self.policy != "reverse":
            raise ValueError(
                f"`tolerance` (={self.tolerance}) bounds the error of reconstructed activations, and the `policy` "
                f"{self.policy} reconstructs nothing; leave one of the two out."
            )
