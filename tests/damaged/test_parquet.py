"""Damaged parquet files, and parquet files that expand to gigabytes."""

import io
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from revnet.data.sources.parquet_folder import load_parquet_folder
from revnet.errors import DataError
from tests.damaged.damage import assert_ends_well, damage_bytes, other_file, seeded
from tests.data.samples import encode, random_images

CASES = [pytest.param(range(12), id="few"), pytest.param(range(400), marks=pytest.mark.slow, id="many")]
TEST = "test-00000-of-00001.parquet"
TRAIN = "train-00000-of-00001.parquet"


def write(path: Path, num_images: int = 6, **options) -> None:
    images = [{"bytes": encode(image), "path": None} for image in random_images(num_images)]
    table = pa.table({"image": images, "label": [number % 3 for number in range(num_images)]})
    pq.write_table(table, path, **options)


@pytest.fixture
def folder(tmp_path) -> Path:
    for name in (TRAIN, TEST):
        write(tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("numbers", CASES)
def test_damaged_parquet(folder, numbers):
    originals = []
    for options in ({}, {"compression": "gzip"}, {"compression": "none", "use_dictionary": False}, {"version": "1.0"}):
        stream = io.BytesIO()
        write(stream, **options)
        originals.append(stream.getvalue())
    # The threads of PyArrow start here. They would end the process if there were no memory to start them, below.
    load_parquet_folder(folder)
    load_parquet_folder(folder, image_size=4)
    path = folder / TRAIN
    for number in numbers:
        draw = seeded("parquet", number)
        path.write_bytes(damage_bytes(draw.choice(originals), draw) if number % 20 else other_file(draw))
        assert_ends_well(lambda: load_parquet_folder(folder), f"parquet {number}")
        assert_ends_well(lambda: load_parquet_folder(folder, image_size=4), f"parquet {number}, stream")


def test_images_that_expand_to_gigabytes_are_refused(folder):
    table = pa.table({"image": [{"bytes": bytes(2**30), "path": None}], "label": [0]})
    pq.write_table(table, folder / TRAIN, compression="zstd", use_dictionary=False, write_statistics=False)
    assert (folder / TRAIN).stat().st_size < 2**21
    del table
    error = assert_ends_well(lambda: load_parquet_folder(folder), "bomb")
    assert isinstance(error, DataError)
    assert "unpacks `image.bytes` to 1,024 MiB" in str(error)


def test_labels_that_expand_to_gigabytes_are_refused(folder):
    num_rows = 3 * 10**6
    image = pa.StructArray.from_arrays([pa.nulls(num_rows, pa.binary())], names=["bytes"])
    pq.write_table(pa.table({"image": image, "label": pa.array([0] * num_rows)}), folder / TRAIN)
    error = assert_ends_well(lambda: load_parquet_folder(folder), "labels")
    assert isinstance(error, DataError)
    assert "3,000,000 rows" in str(error)


def test_compressible_images_load(folder):
    num_images = 20
    flat = [{"bytes": encode(image * 0), "path": None} for image in random_images(num_images, 3, 400, 400)]
    pq.write_table(pa.table({"image": flat, "label": [n % 3 for n in range(num_images)]}), folder / TRAIN)
    shutil.copy(folder / TRAIN, folder / TEST)
    assert len(load_parquet_folder(folder).train) == num_images
