"""The result tables: networks, recipes and published errors.

References:
    Gomez et al. (2017), The Reversible Residual Network, tables 3 and 4.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Row:
    """One network of a table."""

    model: str
    """Name of the model."""

    pair: str
    """Model of the same size that it is compared with: a ResNet for a RevNet, and vice versa."""

    paper_error: float | None = None
    """Test error of the paper in percent, quoted from memory, or None if the paper has none."""

    rerun_error: float | None = None
    """Test error of the official code in percent, or None if unknown.

    For CIFAR a rerun from the README of silvandeleemput/memcnn, for ImageNet top-1 on the validation set from its own
    README.
    """


@dataclass(frozen=True, kw_only=True)
class Table:
    """Networks that are trained with one recipe on one data set."""

    name: str
    """Name of the table in `revnet reproduce`."""

    recipe: str
    """Folder of the settings, `<dataset>/<recipe>`, with one file per model."""

    num_classes: int
    """Number of classes of the data set."""

    rows: tuple[Row, ...]
    """Networks, each ResNet before its RevNet."""

    @property
    def models(self) -> list[str]:
        """Names of the models."""
        return [row.model for row in self.rows]


def _pair(resnet: str, revnet: str, *figures: tuple[float | None, float | None]) -> list[Row]:
    (resnet_paper, resnet_rerun), (revnet_paper, revnet_rerun) = figures or ((None, None), (None, None))
    return [
        Row(model=resnet, pair=revnet, paper_error=resnet_paper, rerun_error=resnet_rerun),
        Row(model=revnet, pair=resnet, paper_error=revnet_paper, rerun_error=revnet_rerun),
    ]


_CIFAR10 = (
    *_pair("resnet32", "revnet38", (7.14, 7.26), (7.24, 6.86)),
    *_pair("resnet110", "revnet110", (5.74, 6.01), (5.76, 5.98)),
    *_pair("resnet164", "revnet164", (5.24, 5.43), (5.17, 5.44)),
)
_CIFAR100 = (
    *_pair("resnet32", "revnet38", (29.95, 30.90), (28.96, 28.83)),
    *_pair("resnet110", "revnet110", (26.44, 26.70), (25.40, 26.00)),
    *_pair("resnet164", "revnet164", (23.37, 23.21), (23.69, 23.61)),
)
_IMAGENET = (
    *_pair("resnet50", "revnet56"),
    *_pair("resnet101", "revnet104", (None, 23.01), (None, 23.10)),
)

_DATA = (("cifar10", 10, _CIFAR10), ("cifar100", 100, _CIFAR100), ("imagenet", 1000, _IMAGENET))

TABLES = {
    table.name: table
    for data, num_classes, rows in _DATA
    for table in (
        Table(name=data, recipe=f"{data}/paper", num_classes=num_classes, rows=rows),
        Table(name=f"{data}-modern", recipe=f"{data}/modern", num_classes=num_classes, rows=rows),
        Table(name=f"{data}-quick", recipe=f"{data}/quick", num_classes=num_classes, rows=rows[:2]),
    )
} | {"cifar10-cpu": Table(name="cifar10-cpu", recipe="cifar10/cpu", num_classes=10, rows=_CIFAR10[:2])}
"""All tables by name: the paper's recipe, a modern recipe of at most the same length, a short one for a CPU, and one
for a few hours of a CPU."""
