"""Parquet files of encoded images: labels and class names are read at once, images row by row."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from revnet._input_files import name_in_utf8
from revnet.data._require import require
from revnet.data.splits.rows import BUFFER_SIZE, AbstractRows, Order, Row, shuffled
from revnet.errors import DataError

_IMAGE_COLUMNS = ("img", "image")
_LABEL_COLUMNS = ("label", "fine_label")

_FREE_BYTES = 2**26
_MOST_EXPANSION = 100
"""How far a part of a file may expand when it is unpacked, if it has more than 64 MiB then."""

_CHUNK = 32
"""Rows read from a file at a time; few, since an image may have megabytes."""


@dataclass(frozen=True, eq=False)
class ParquetFile:
    """One file, with everything read except the images."""

    path: Path
    """Path of the file."""
    labels: list[int | None]
    """Labels as stored in the file; None for a missing label."""
    class_names: tuple[str, ...] | None
    """Names of the classes in the metadata of the schema, or None."""
    image_column: str
    """Name of the column of encoded images."""
    label_column: str
    """Name of the column of labels."""
    group_sizes: tuple[int, ...]
    """Numbers of rows in the row groups, which can be read independently of one another."""


def read_parquet_file(path: Path) -> ParquetFile:
    """Read the labels and the metadata of a file.

    Raises:
        DataError: The file is not a parquet file, lacks a column of images or labels, or has no rows.
        MissingDependencyError: Hugging Face `datasets` is not installed.
    """
    datasets = require("datasets", package="Hugging Face `datasets`", purpose="reading parquet files")
    parquet = _arrow()
    try:
        with name_in_utf8(path) as name, parquet.ParquetFile(name) as table:
            _check_size(table.metadata, path)
            schema = table.schema_arrow
            image_column, label_column = _find_columns(schema.names, path)
            label_feature = datasets.Features.from_arrow_schema(schema)[label_column]
            _check_types(schema.field(image_column).type, label_feature, path)
            labels = table.read([label_column]).column(0).to_pylist()
            sizes = tuple(table.metadata.row_group(group).num_rows for group in range(table.num_row_groups))
    except DataError:
        raise
    except Exception as error:  # Arrow's errors derive from OSError, ValueError, TypeError, KeyError and others
        raise _unreadable(path, error) from error
    if not labels:
        raise DataError(f"'{path}' holds no images; download it again, or remove it.")
    names = getattr(label_feature, "names", None)
    return ParquetFile(path, labels, tuple(names) if names else None, image_column, label_column, sizes)


class ParquetRows(AbstractRows):
    """Rows of several files; a shard is one row group of one file.

    Args:
        files: The files, in order.
    """

    def __init__(self, files: Sequence[ParquetFile]) -> None:
        self._shards = [(file, group) for file in files for group in range(len(file.group_sizes))]

    @property
    def num_shards(self) -> int:
        """Number of row groups in all files."""
        return len(self._shards)

    def read(self, order: Order | None, worker: int, num_workers: int) -> Iterator[Row]:
        """Yield the rows of one worker's share of the row groups.

        Raises:
            DataError: A file is corrupt, or has changed.
        """
        if order is None:
            return self._read(range(worker, len(self._shards), num_workers))
        shards = order.shard_generator().permutation(len(self._shards))
        rows = self._read(shards[worker::num_workers].tolist())
        return shuffled(rows, BUFFER_SIZE, order.row_generator(worker))

    def _read(self, shards: Iterable[int]) -> Iterator[Row]:
        for shard in shards:
            yield from _read_group(*self._shards[shard])


def _check_size(metadata: Any, path: Path) -> None:
    """Raise if a file has far more content than bytes, before the content is read.

    Raises:
        DataError: It has more rows than bytes, or a part unpacks to far more bytes than it has.
    """
    num_bytes = path.stat().st_size
    if metadata.num_rows > num_bytes:
        raise DataError(f"'{path}' has {metadata.num_rows:,} rows in {num_bytes:,} bytes, so they hold no images.")
    for group in range(metadata.num_row_groups):
        for column in range(metadata.num_columns):
            part = metadata.row_group(group).column(column)
            unpacked = part.total_uncompressed_size
            if unpacked > max(_FREE_BYTES, _MOST_EXPANSION * min(part.total_compressed_size, num_bytes)):
                raise DataError(
                    f"'{path}' unpacks `{part.path_in_schema}` to {unpacked / 2**20:,.0f} MiB, more than "
                    f"{_MOST_EXPANSION} times its size; write it again without compression, which images have already."
                )


def _find_columns(columns: Iterable[str], path: Path) -> tuple[str, str]:
    image = next((name for name in _IMAGE_COLUMNS if name in columns), None)
    label = next((name for name in _LABEL_COLUMNS if name in columns), None)
    if image is None or label is None:
        raise DataError(
            f"'{path}' has the columns {', '.join(columns)}; it must have one of {', '.join(_IMAGE_COLUMNS)} "
            f"and one of {', '.join(_LABEL_COLUMNS)}; rename them."
        )
    return image, label


def _check_types(image_type: Any, label_feature: Any, path: Path) -> None:
    stored = str(image_type).removeprefix("struct<")
    if not ("bytes: binary" in stored or "bytes: large_binary" in stored or stored in ("binary", "large_binary")):
        raise DataError(f"the images of '{path}' must be stored as encoded bytes, not as {image_type}; encode them.")
    if not str(getattr(label_feature, "dtype", "")).startswith(("int", "uint")):
        raise DataError(f"the labels of '{path}' must be integers, not {label_feature}; store class numbers.")


def _read_group(file: ParquetFile, group: int) -> Iterator[Row]:
    parquet = _arrow()
    number = sum(file.group_sizes[:group])
    try:
        # With a buffer, a row group is not read at once: it may be the whole file.
        with name_in_utf8(file.path) as name, parquet.ParquetFile(name, buffer_size=2**20) as table:
            columns = [file.image_column, file.label_column]
            for chunk in table.iter_batches(_CHUNK, row_groups=[group], columns=columns, use_threads=False):
                # One image at a time, since the others of the chunk are in Arrow's memory already.
                for image, label in zip(chunk.column(file.image_column), chunk.column(file.label_column), strict=True):
                    encoded, note = _encoded(image.as_py())
                    yield Row(encoded, label.as_py(), f"row {number} of '{file.path}'{note}")
                    number += 1
    except Exception as error:
        raise _unreadable(file.path, error) from error


def _arrow() -> ModuleType:
    return require("pyarrow.parquet", package="Hugging Face `datasets`", purpose="reading parquet files")


def _encoded(image: Any) -> tuple[bytes, str]:
    """Return the bytes of an image, and a remark for messages."""
    if not isinstance(image, dict):
        return image or b"", ""
    # A path is not followed, since it could point to any file on this machine.
    note = "" if image["bytes"] or not image.get("path") else ", which has a path instead of an image,"
    return image["bytes"] or b"", note


def _unreadable(path: Path, error: Exception) -> DataError:
    reason = getattr(error, "strerror", None) or str(error).strip().partition("\n")[0].rstrip(".")
    return DataError(f"'{path}' cannot be read as parquet: {reason}; download it again.")
