"""The settings of a run that fits a density to images."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

from revnet.training.settings.choices import OnCorrupt, Precision
from revnet.training.settings.fields import integer, number
from revnet.training.settings.run_config import AbstractRunConfig

Prior = Literal["logistic", "gaussian"]
DensityModel = Literal["nice", "realnvp", "glow"]


@dataclass(frozen=True, kw_only=True)
class NiceConfig(AbstractRunConfig):
    """Settings of a run that fits NICE, RealNVP or Glow, densities with exact likelihood, to images.

    The defaults fit NICE to the digits that come with revnet. `configs/` holds complete recipes for all three models.

    Raises:
        TypeError: A setting has the wrong type.
        ValueError: A setting is out of range, or does not go with another.

    References:
        Dinh, Krueger and Bengio (2015), NICE: Non-linear Independent Components Estimation.
        Dinh, Sohl-Dickstein and Bengio (2017), Density Estimation Using Real NVP.
        Kingma and Dhariwal (2018), Glow: Generative Flow with Invertible 1x1 Convolutions.
    """

    command: ClassVar[str] = "revnet train nice"
    title: ClassVar[str] = "settings"

    task: Literal["nice"] = "nice"
    """Task of the run, which distinguishes a file of these settings from others."""

    data: str = "digits"
    """Data set of images that fits into memory: a name (`digits`, `cifar10`, `cifar100`) or a path, of a folder of
    photographs, of parquet files laid out as on the hub or of CIFAR's official archive. Labels are not used."""

    image_size: int | None = integer(None, at_least=1)
    """Height and width of photographs in files, which are resized and cropped. By default, all images must have the
    same size."""

    model: DensityModel = "nice"
    """Model: `nice` has perceptrons and suits small images; `realnvp` and `glow` have convolutions at several
    scales."""

    num_scales: int = integer(2, at_least=1)
    """Scales of `realnvp` and `glow`, each of which halves the sides of the image. `nice` has none."""

    num_couplings: int = integer(8, at_least=1)
    """Number of coupling layers: for `nice` in all, even; for `glow` at each scale; for `realnvp` of each kind at each
    scale. The papers' networks have 4, 32 and 3."""

    hidden_dim: int = integer(256, at_least=1)
    """Units of each hidden layer of a coupling layer; the papers' networks have 1000 to 5000 (`nice`), 512 channels
    (`glow`) and 64 channels (`realnvp`)."""

    num_hidden: int = integer(2, at_least=1)
    """Hidden layers of each coupling layer of `nice`; residual blocks of each coupling layer of `realnvp`. `glow`
    always has 2 hidden layers."""

    prior: Prior = "logistic"
    """Distribution of each component of a code."""

    epochs: int = integer(120, at_least=1)
    """Number of passes over the training images, each with different noise."""

    max_updates: int | None = integer(None, at_least=1)
    """Number of updates after which to stop, mid-epoch if necessary; by default, all `epochs` are completed."""

    batch_size: int = integer(100, at_least=1)
    """Images per update. Images that an epoch leaves over may be seen in another epoch."""

    lr: float = number(1e-3, "above 0", lambda x: x > 0, usual="0.001")

    warmup: float = number(0.02, "from 0 to below 1", lambda x: 0 <= x < 1, usual="0.05")

    weight_decay: float = number(2.0, "0 or more", lambda x: x >= 0, usual="0.1")
    """Decay of the weights of the linear layers, times the learning rate. The digits are few, and overfit with less."""

    max_grad_norm: float | None = number(10.0, "above 0", lambda x: x > 0, usual="1")

    horizontal_flip: bool = False
    """Whether training images are mirrored at random."""

    val_fraction: float = number(0.1, "from 0 to below 1", lambda x: 0 <= x < 1, usual="0.1")
    """Share of the training images, taken evenly from all classes, that is held out for validation. With 0, the run
    trains on every image, and the best weights are the last."""

    on_corrupt: OnCorrupt = "stop"
    """Response to an image that cannot be decoded: `stop` the run, or `skip` the image and print its name."""

    precision: Precision = "32-true"
    """Arithmetic: `32-true`, or `bf16-mixed` for autocast to bfloat16, which makes likelihoods less accurate."""

    num_threads: int | None = integer(None, at_least=1, at_most=4096)
    """Threads on the CPU; by default, 1 for digits, and PyTorch's choice elsewhere."""

    seed: int = integer(0, at_least=0, at_most=2**32 - 1)
    """Seed of the initial weights, the held-out images, their order and the noise."""

    def model_options(self) -> dict[str, Any]:
        """Return the arguments of the model, except the shape of the images."""
        options: dict[str, Any] = {"hidden_dim": self.hidden_dim, "prior": self.prior}
        match self.model:
            case "nice":
                return {"num_couplings": self.num_couplings, "num_hidden": self.num_hidden, **options}
            case "realnvp":
                own = {"num_couplings": self.num_couplings, "num_blocks": self.num_hidden}
            case "glow":
                own = {"num_steps": self.num_couplings}
        return {"num_scales": self.num_scales, **own, **options}

    def resolve(self, data_name: str) -> Self:
        """Return the settings with the defaults of the data set filled in."""
        # With so little work per thread, threads mostly wait for each other as soon as the cores are busy.
        return replace(self, num_threads=1) if self.num_threads is None and data_name == "digits" else self

    def _check_together(self) -> None:
        if self.model == "glow" and self.num_hidden != 2:
            raise ValueError(
                f"`num_hidden` (={self.num_hidden}) is for nice and realnvp, since the couplings of glow always have 2 "
                "hidden layers; leave it out."
            )
        if self.model == "nice" and self.num_scales != NiceConfig.num_scales:
            raise ValueError(
                f"`num_scales` (={self.num_scales}) is for realnvp and glow, since nice has no scales; leave it out, "
                "or pass `model` glow or realnvp."
            )
        if self.model == "nice" and self.num_couplings % 2:
            raise ValueError(
                f"`num_couplings` (={self.num_couplings}) must be even, since a reversible block consists of two; pass "
                f"{self.num_couplings + 1}."
            )
