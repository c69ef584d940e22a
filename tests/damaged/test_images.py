"""Damaged images, images that are something else, and images of enormous size."""

import io
import os
import struct
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from revnet.data import load_image
from revnet.data.decoding.decode import UndecodableError, decode_whole
from revnet.errors import DataError
from tests.damaged.damage import assert_ends_well, damage_bytes, other_file, seeded

FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM")
CASES = [pytest.param(range(70), id="few"), pytest.param(range(1400), marks=pytest.mark.slow, id="many")]


def encode(image_format: str, mode: str = "RGB", size: tuple[int, int] = (20, 12), **options) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(stream, format=image_format, **options)
    return stream.getvalue()


@pytest.mark.parametrize("numbers", CASES)
def test_damaged_images(tmp_path, numbers):
    images = [encode(image_format) for image_format in FORMATS]
    images += [encode("PNG", "P"), encode("JPEG", "CMYK"), encode("TIFF", "RGB", compression="tiff_lzw")]
    path = tmp_path / "image.jpg"
    num_loaded = 0
    for number in numbers:
        draw = seeded("images", number)
        content = damage_bytes(draw.choice(images), draw) if number % 50 else other_file(draw)
        path.write_bytes(content)
        loaded = assert_ends_well(lambda: load_image(path, image_size=(8, 8), in_channels=3), f"images {number}")
        num_loaded += not isinstance(loaded, Exception)
        with suppress(UndecodableError):
            decode_whole(content)
    assert 0 < num_loaded < len(numbers)  # a changed pixel is no reason to refuse an image


def test_all_formats_open(tmp_path):
    for image_format in FORMATS:
        path = tmp_path / f"{image_format}.jpg"
        path.write_bytes(encode(image_format))
        assert load_image(path, image_size=(8, 8), in_channels=3).shape == (3, 8, 8)


def test_postscript_starts_no_program(tmp_path, monkeypatch):
    marker, programs = tmp_path / "marker", tmp_path / "programs"
    programs.mkdir()
    for name in ("gs", "gswin64c", "gswin32c", "ghostscript"):
        (programs / name).write_text(f"#!/bin/sh\ntouch {marker}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    path = tmp_path / "photo.jpg"
    path.write_text(
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n0 0 moveto showpage\n%%Trailer\n%%EOF\n"
    )
    with pytest.raises(DataError, match=r"its format is not one of JPEG, PNG, .*; convert it\.$"):
        load_image(path, image_size=(8, 8), in_channels=3)
    assert not marker.exists()


@pytest.mark.parametrize(
    "content", [b"\0\0\0\x18ftypheic" + bytes(100), b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"8BPS" + bytes(100)]
)
def test_a_known_format_that_is_not_read_says_so(tmp_path, content):
    path = tmp_path / "photo.jpg"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"its format is not one of JPEG, PNG, .*; convert it\.$"):
        load_image(path, image_size=(8, 8), in_channels=3)


def large_png(width: int, height: int) -> bytes:
    """Return a PNG of one gray level."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(width + 1)) for _ in range(height)) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_enormous_images_are_refused_with_the_limit(tmp_path, monkeypatch):
    path = tmp_path / "large.png"
    path.write_bytes(large_png(13_000, 13_000))  # 169 million pixels, which Pillow would read
    with pytest.raises(
        DataError,
        match=r"more than 100,000,000 pixels: 13,000 x 13,000; shrink it, or set REVNET_MAX_PIXELS to a larger",
    ) as caught:
        load_image(path, image_size=(8, 8), in_channels=3)
    assert "13,000 x 13,000" in str(caught.value)
    monkeypatch.setenv("REVNET_MAX_PIXELS", "200000000")
    assert load_image(path, image_size=(8, 8), in_channels=1).shape == (1, 8, 8)


def test_a_large_photograph_is_decoded_at_a_smaller_size(tmp_path):
    path = tmp_path / "photo.jpg"
    Image.new("L", (13_000, 13_000)).save(path, format="JPEG")
    assert load_image(path, image_size=(224, 224), in_channels=1).shape == (1, 224, 224)


@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "sparse"])
def test_names_of_images_that_are_something_else(tmp_path, kind):
    path = tmp_path / "x.jpg"
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "folder":
            path.mkdir()
        case "sparse":
            with path.open("wb") as file:
                file.truncate(2**40)
    error = assert_ends_well(lambda: load_image(path, image_size=(8, 8), in_channels=3), kind)
    assert isinstance(error, DataError)
    assert Path(path).name in str(error)
