from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests.data.samples import CLASS_NAMES, encode, random_images


@pytest.fixture
def write_parquet() -> Callable[..., None]:
    """Return a function that writes one parquet file in the hub's layout."""
    import datasets  # slow to import, and most tests do not need it

    def write(
        file: Path,
        images: Tensor | Sequence[Any],
        labels: Sequence[Any],
        *,
        class_names: Sequence[str] | None = CLASS_NAMES,
        image_column: str = "img",
        label_column: str = "label",
        label_type: str = "int64",
    ) -> None:
        label_feature = datasets.ClassLabel(names=list(class_names)) if class_names else datasets.Value(label_type)
        encoded = [{"bytes": encode(image), "path": None} if isinstance(image, Tensor) else image for image in images]
        table = datasets.Dataset.from_dict(
            {image_column: encoded, label_column: list(labels)},
            features=datasets.Features({image_column: datasets.Image(), label_column: label_feature}),
        )
        file.parent.mkdir(parents=True, exist_ok=True)
        table.to_parquet(file)

    return write


@pytest.fixture
def folder(tmp_path: Path, write_parquet: Callable[..., None]) -> Path:
    """Return the path of a small color data set: three classes, 6 images for training, 3 for testing."""
    path = tmp_path / "pets"
    write_parquet(path / "train-00000-of-00001.parquet", random_images(6), [0, 1, 2, 0, 1, 2])
    write_parquet(path / "test-00000-of-00001.parquet", random_images(3, seed=1), [2, 1, 0])
    return path
