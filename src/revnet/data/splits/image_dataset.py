"""A data set: a training split and a test split of labeled images, and the names of the classes."""

from dataclasses import dataclass

from revnet.data.splits._holdout import explain_holdout
from revnet.data.splits.abstract_split import AbstractSplit
from revnet.data.splits.stream_split import StreamSplit


@dataclass(frozen=True)
class Division:
    """Division of a plain folder of classes into training and test images."""

    seed: int
    """Seed that the division follows from."""
    files: str
    """Fingerprint of the names of all files, which the division follows from, too."""


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """A data set for classification, split into training and test images.

    Raises:
        ValueError: The splits hold images of different shapes, or a label has no class name.
    """

    name: str
    """Name of the data set in logs and file names, such as `digits` or `cifar10`."""
    train: AbstractSplit
    """Training images."""
    test: AbstractSplit
    """Test images, to be used once, at the end."""
    class_names: tuple[str, ...]
    """Names of the classes; a label is an index into them."""
    division: Division | None = None
    """Division into `train` and `test`, if the data come in one part."""

    def __post_init__(self) -> None:
        if self.train.image_shape != self.test.image_shape:
            raise ValueError(
                f"`test` (with images of {self.test.image_shape}) must hold images of the same shape as `train` "
                f"(with images of {self.train.image_shape}); resize one of them."
            )
        for part, split in (("train", self.train), ("test", self.test)):
            if split.labels is None:
                continue
            low, high = int(split.labels.min()), int(split.labels.max())
            if low < 0 or high >= self.num_classes:
                raise ValueError(
                    f"`{part}` (with labels {low}..{high}) must have labels in 0..{self.num_classes - 1}, one for "
                    f"each of the {self.num_classes} `class_names`; name every class."
                )

    @property
    def num_classes(self) -> int:
        """Number of classes, including classes without images."""
        return len(self.class_names)

    @property
    def in_channels(self) -> int:
        """Channels of an image: 1 for gray, 3 for color."""
        return self.train.image_shape[0]

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of an image."""
        return self.train.image_shape[1:]

    def holdout(self, fraction: float, seed: int) -> tuple[AbstractSplit, AbstractSplit]:
        """Hold out a part of the training images for validation; the test split is not touched.

        The split is stratified: every class contributes the same share, to the nearest image. The split depends on
        `fraction`, `seed` and the labels alone, and both parts keep the order of the images. Where training images
        are cropped at random, validation images are cropped like test images.

        Args:
            fraction: Share of the training images that goes to validation, rounded up to whole images.
            seed: Seed of the choice.

        Returns:
            The training part and the validation part, of the same type as `train`.

        Raises:
            ValueError: `fraction` is not between 0 and 1, one of the parts would have fewer images than there are
                classes, a class has a single image, `seed` is not in 0..2^32 - 1, or the training images come as a
                stream.
        """
        self.check_holdout("fraction", fraction, none="leave out the holdout")
        return self.train.holdout(fraction, seed)

    def check_holdout(self, name: str, fraction: float, *, none: str = "pass 0 to train on all images") -> None:
        """Raise unless a share of the training images of every class can be held out.

        Args:
            name: Name of the share, for the message.
            fraction: The share, between 0 and 1.
            none: Way out without a holdout, for the message.

        Raises:
            ValueError: One of the parts would have fewer images than there are classes, or a class has a single image.
        """
        if self.train.labels is None or isinstance(self.train, StreamSplit) or not 0 < fraction < 1:
            return  # `holdout` raises
        reason = explain_holdout(self.train.labels, self.class_names, fraction)
        if reason is not None:
            raise ValueError(f"`{name}` (={fraction}) {reason}, or {none}.")
