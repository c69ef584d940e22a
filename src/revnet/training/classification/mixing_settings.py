"""The settings of what a classifier sees of its training images, beyond crops and flips."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from revnet.training.settings.checks import check_class_weights
from revnet.training.settings.fields import SettingsGroup, checked, integer, number


@dataclass(frozen=True, kw_only=True)
class MixingSettings(SettingsGroup):
    """Settings of strong augmentation and of rare classes."""

    title: ClassVar[str] = "strong augmentation and rare classes"

    randaugment: int = integer(0, at_least=0, at_most=30)
    """Magnitude of RandAugment, which applies two random operations to each training image, such as rotation, contrast
    or shear; 9 is usual, and 0 leaves it out. It needs kornia (`pip install 'revnet[augment]'`)."""

    mixup: float = number(0.0, "0 or more", lambda x: x >= 0, usual="0.2 or 0.8")
    """Parameter of the Beta distribution that decides how images of a batch are blended with others; 0 does not."""

    cutmix: float = number(0.0, "0 or more", lambda x: x >= 0, usual="1")
    """Parameter of the Beta distribution that decides how large a rectangle of another image is pasted into the images
    of a batch; 0 pastes none. With `mixup` too, half of the batches are blended."""

    class_weights: Literal["balanced"] | tuple[float, ...] | None = checked(None, check_class_weights)
    """Weight of each class in the training loss, as a list in the order of the classes, or `balanced` for weights that
    are inverse to the number of training images. By default, all images weigh alike."""

    balanced_sampling: bool = False
    """Whether every training image is drawn at random, each class equally often, instead of each image once in an
    epoch."""

    def _check_together(self) -> None:
        if self.class_weights is not None and self.balanced_sampling:
            raise ValueError(
                "`class_weights` and `balanced_sampling` both make up for rare classes; leave one of the two out."
            )
