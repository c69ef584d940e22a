"""The settings of a training run: one dataclass, checked when it is made, saved beside what it made."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from revnet.training._checks import check_fractions, check_name, check_range
from revnet.training._settings import load_settings, save_settings
from revnet.training._train_checks import check_train_config
from revnet.training.choices import Device, OnCorrupt, Optimizer, Policy, Precision, Preprocessing, Schedule

# What a data set is given where the settings leave it open.
_USUAL: dict[str, dict[str, Any]] = {
    # A mirrored 2 is not a 2, an 8x8 image has no 4 pixels to spare, and threads that share so little work mostly wait
    # for each other as soon as the cores are busy.
    "digits": {"preprocess": "standardize", "crop_padding": 1, "horizontal_flip": False, "num_threads": 1},
}
_USUAL_IN_MEMORY: dict[str, Any] = {"preprocess": "standardize", "crop_padding": 4, "horizontal_flip": True}
# Their crops are cut while they are decoded, and nobody knows their mean.
_USUAL_DECODED: dict[str, Any] = {"preprocess": "imagenet", "crop_padding": 0, "horizontal_flip": True}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of one training run.

    The defaults train a small RevNet on the embedded digits. `configs/` holds complete recipes, the paper's among them.

    Raises:
        TypeError: A setting has the wrong type.
        ValueError: A setting lies outside its range.

    References:
        Gomez et al. (2017), The Reversible Residual Network, section 4 and appendix: the CIFAR recipe.
    """

    data: str = "digits"
    """Data set: a name (`digits`, `cifar10`, `cifar100`, `imagenet`), `hub:owner/name`, or a path: a folder of images
    (`train/<class>/...` beside `val`), of parquet files laid out as on the hub, or CIFAR's official archive."""

    model: str = "revnet38"
    """Model; `revnet models` lists them."""

    policy: Policy = "reverse"
    """What is done with activations: `reverse` computes those of reversible blocks again in the backward pass,
    `checkpoint` keeps what each block reads and computes the rest again, in models that are not reversible too, `store`
    keeps all, as the stored twin."""

    memory_budget: str | None = None
    """Most memory that an update may take, such as `16GiB` or `500MB`; what each block does with its activations is
    planned for it, in place of `policy`, to take the least time. Counted are the tensors of model, gradients,
    optimizer, activations and loss, not the data, their augmentation or what a GPU needs beside tensors: leave room for
    these."""

    exact: bool = False
    """Whether reversal is exact to the last bit: the streams of reversible blocks lie on a fixed-point grid, to which
    each residual is rounded. The weights remember it."""

    tolerance: float | None = None
    """Largest relative error of activations that are rebuilt: streams are kept at as many blocks as that takes. Null
    bounds nothing, and warns where gradients go wrong."""

    drift_every: int | None = None
    """Updates from one measurement of how far rebuilt activations are from the true ones to the next; null measures
    nothing."""

    epochs: int = 60
    """How often the training images are seen."""

    max_updates: int | None = None
    """Updates after which to stop, in the midst of an epoch if need be; null makes all of `epochs`."""

    batch_size: int = 100
    """Images per update. What an epoch leaves over is seen in another epoch."""

    optimizer: Optimizer = "sgd"
    """How weights follow their gradients: `sgd` is gradient descent with momentum, for convolutional networks; `adamw`
    is for transformers, with a learning rate near 1e-3 and a weight decay near 0.05."""

    lr: float = 0.1
    """Highest learning rate."""

    schedule: Schedule = "step"
    """Course of the learning rate after the warm-up: `step` multiplies it by `decay_factor` at `decay_at`, `cosine`
    takes it down to zero along half a cosine."""

    warmup: float = 0.0
    """Share of all updates in which the learning rate first rises from zero in a line."""

    decay_at: tuple[float, ...] = (0.5, 0.75)
    """When the learning rate is multiplied by `decay_factor`, as fractions of all updates."""

    decay_factor: float = 0.1
    """What the learning rate is multiplied by."""

    momentum: float = 0.9
    """Momentum of the gradient descent; of `adamw` its first beta, the other being 0.999."""

    nesterov: bool = False
    """Whether the momentum looks ahead, as Nesterov's does; with `sgd` only."""

    label_smoothing: float = 0.0
    """Share of the target that is spread over all classes; of the training loss only."""

    weight_decay: float = 2e-4
    """Decay of the convolution and linear weights; norms, biases and position embeddings are left alone. `sgd` adds it
    to the gradient, `adamw` takes it off the weights, times the learning rate."""

    val_fraction: float = 0.1
    """Share of the training images, taken evenly from all classes, that validates instead of training. With 0, the
    paper's protocol, every image trains and the best weights are the last."""

    preprocess: Preprocessing | None = None
    """`standardize` each channel by the training pixels; subtract the `mean_image` of training and test set and stay on
    the 0-255 scale, as the paper does for CIFAR; `imagenet` standardizes by the constants of that data set;
    `unit_range` scales to [-1, 1], as the paper does for ImageNet. Null is the data set's usual: `imagenet` for images
    in files, `standardize` for those held in memory."""

    image_size: int | None = None
    """Side to which images in files are cropped and resized; null is 224, or leaves images that all have one size as
    they are."""

    crop_area: tuple[float, float] = (0.08, 1.0)
    """Least and greatest share of an image in files that a random crop takes, before it is resized; the paper's is
    0.05 to 1."""

    crop_padding: int | None = None
    """Pixels added on each side before a random crop; null is the data set's usual: 1 for digits, 4 elsewhere."""

    horizontal_flip: bool | None = None
    """Whether images are mirrored at random; null is the data set's usual: no for digits, yes elsewhere."""

    color_distortion: bool = False
    """Whether brightness, saturation, hue and contrast change at random, as the paper does for ImageNet."""

    cutout: int = 0
    """Side in pixels of a random square that is blanked out of each image; 0 for none."""

    start_size: int | None = None
    """Side that training images are shrunk to at first; it grows to their own until the fraction `full_size_at` of all
    updates (progressive resizing). Null keeps their size."""

    full_size_at: float = 0.6
    """When progressive resizing has reached the images' own size, as a fraction of all updates."""

    on_corrupt: OnCorrupt = "stop"
    """What an image that cannot be decoded does: `stop` the run, or `skip` the image, naming it."""

    precision: Precision = "32-true"
    """Arithmetic: `32-true`, or `bf16-mixed` for autocast to bfloat16."""

    device: Device = "auto"
    """Where to train; `auto` takes the GPU if there is one."""

    num_threads: int | None = None
    """Threads on the CPU; null is the data set's usual: 1 for digits, PyTorch's choice elsewhere."""

    num_workers: int | None = None
    """Processes that decode images; null is one less than the cores, at most 8, and none for images in memory."""

    seed: int = 0
    """Seed of the initial weights, the held-out images, their order and the augmentation."""

    out_dir: str | None = None
    """Folder of the run, which must not hold one yet; null takes the next free `runs/<data>_<model>_<number>`."""

    def __post_init__(self) -> None:
        check_train_config(self)
        # YAML has lists only; the frozen dataclass wants a tuple, which compares and hashes.
        object.__setattr__(self, "decay_at", check_fractions("decay_at", self.decay_at))
        object.__setattr__(self, "crop_area", check_range("crop_area", self.crop_area))
        if self.out_dir is not None:
            check_name("out_dir", self.out_dir)

    def resolve(self, data_name: str, *, is_decoded: bool = False) -> Self:
        """Fill what was left to the data set.

        Args:
            data_name: How the data set is called.
            is_decoded: Whether its images lie in files, to be decoded and cropped in every epoch.
        """
        usual = _USUAL.get(data_name, _USUAL_DECODED if is_decoded else _USUAL_IN_MEMORY)
        usual = {"num_workers": min(8, max(0, (os.cpu_count() or 1) - 1)) if is_decoded else 0, **usual}
        return replace(self, **{name: value for name, value in usual.items() if getattr(self, name) is None})

    def save(self, path: Path) -> None:
        """Write the settings as YAML that `revnet train --config` takes."""
        save_settings(self, path)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read settings that `save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is no YAML mapping, or names a setting that does not exist.
        """
        return load_settings(cls, path, "revnet train")
