"""The network of `benchmarks/wide.py`."""

from revnet import AbstractPolicy
from revnet.models import RevNet


def wide_revnet(num_classes: int, in_channels: int, policy: AbstractPolicy | None = None) -> RevNet:
    """Return a reversible network of the class of ResNet-18, for images of CIFAR's size: 9,032,266 parameters."""
    return RevNet(
        num_blocks=(3, 3, 3, 3),
        widths=(64, 64, 128, 256, 512),
        num_classes=num_classes,
        in_channels=in_channels,
        policy=policy,
    )
