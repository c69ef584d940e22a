"""The settings of a run that fits NICE to images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Self, get_args

from revnet.training._adamw_settings import check_run_settings
from revnet.training._checks import check_choice, check_integer, check_name, check_number
from revnet.training._settings import load_settings, save_settings
from revnet.training.choices import Device, OnCorrupt, Policy, Precision

Prior = Literal["logistic", "gaussian"]


@dataclass(frozen=True, kw_only=True)
class NiceConfig:
    """Settings of one run that fits NICE, a density with exact likelihood, to images.

    The defaults fit the embedded digits. `configs/` holds complete recipes.

    Raises:
        TypeError: A setting has the wrong type.
        ValueError: A setting lies outside its range.

    References:
        Dinh, Krueger and Bengio (2015), NICE: Non-linear Independent Components Estimation.
    """

    task: Literal["nice"] = "nice"
    """What is trained: tells a file of these settings from others."""

    data: str = "digits"
    """Data set of images that fits into memory, by name (`digits`, `cifar10`, `cifar100`) or by path, of a folder of
    parquet files laid out as on the hub or of CIFAR's official archive. Their classes are not looked at."""

    num_couplings: int = 8
    """Coupling layers; even. The paper's networks have 4."""

    hidden_dim: int = 256
    """Units of each hidden layer of a coupling layer; the paper's networks have 1000 to 5000."""

    num_hidden: int = 2
    """Hidden layers of each coupling layer; the paper's networks have 4 or 5."""

    prior: Prior = "logistic"
    """Law of a code's components."""

    policy: Policy = "reverse"
    """What is done with activations: `reverse` computes those of reversible blocks again in the backward pass,
    `checkpoint` keeps what each block reads and computes the rest again, `store` keeps all, as the stored twin."""

    memory_budget: str | None = None
    """Most memory that an update may take, such as `16GiB` or `500MB`; what each block does with its activations is
    planned for it, in place of `policy`, to take the least time."""

    epochs: int = 120
    """How often the training images are seen, each time with other noise."""

    max_updates: int | None = None
    """Updates after which to stop, in the midst of an epoch if need be; null makes all of `epochs`."""

    batch_size: int = 100
    """Images per update. What an epoch leaves over is seen in another epoch."""

    lr: float = 1e-3
    """Highest learning rate, of AdamW; it falls to zero along half a cosine."""

    warmup: float = 0.02
    """Share of all updates in which the learning rate first rises from zero in a line."""

    beta2: float = 0.999
    """How long AdamW remembers squared gradients."""

    weight_decay: float = 2.0
    """Decay of the weights of the linear layers, times the learning rate; digits are few, and overfitted with less."""

    max_grad_norm: float | None = 10.0
    """Norm to which the gradient of an update is cut; null leaves it alone."""

    horizontal_flip: bool = False
    """Whether training images are mirrored at random."""

    val_fraction: float = 0.1
    """Share of the training images, taken evenly from all classes, that validates instead of training. With 0 every
    image trains and the best weights are the last."""

    on_corrupt: OnCorrupt = "stop"
    """What an image that cannot be decoded does: `stop` the run, or `skip` the image, naming it."""

    precision: Precision = "32-true"
    """Arithmetic: `32-true`, or `bf16-mixed` for autocast to bfloat16, which blurs likelihoods."""

    device: Device = "auto"
    """Where to train; `auto` takes the GPU if there is one."""

    num_threads: int | None = None
    """Threads on the CPU; null is PyTorch's choice, but 1 for digits."""

    seed: int = 0
    """Seed of the initial weights, the held-out images, their order and the noise."""

    out_dir: str | None = None
    """Folder of the run, which must not hold one yet; null takes the next free `runs/<data>_nice_<number>`."""

    def __post_init__(self) -> None:
        check_choice("task", self.task, ("nice",))
        check_name("data", self.data)
        check_run_settings(self)
        for name in ("num_couplings", "hidden_dim", "num_hidden"):
            check_integer(name, getattr(self, name), at_least=1)
        if self.num_couplings % 2:
            raise ValueError(
                f"`num_couplings` (={self.num_couplings}) must be even, since a reversible block consists of two; pass "
                f"{self.num_couplings + 1}."
            )
        check_choice("prior", self.prior, get_args(Prior))
        check_choice("on_corrupt", self.on_corrupt, get_args(OnCorrupt))
        check_number("val_fraction", self.val_fraction, "from 0 to below 1", lambda x: 0 <= x < 1, "0.1 is usual")
        if self.horizontal_flip not in (True, False):
            raise TypeError(f"`horizontal_flip` (={self.horizontal_flip!r}) must be true or false.")

    def resolve(self, data_name: str) -> Self:
        """Fill what was left to the data set."""
        # Threads that share so little work mostly wait for each other as soon as the cores are busy.
        return replace(self, num_threads=1) if self.num_threads is None and data_name == "digits" else self

    def save(self, path: Path) -> None:
        """Write the settings as YAML that `revnet train nice --config` takes."""
        save_settings(self, path)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read settings that `save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is no YAML mapping, or names a setting that does not exist.
        """
        return load_settings(cls, path, "revnet train nice")
