import struct
import sys
import warnings
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from revnet.data import load_image
from revnet.data.decoding.crop import CenterCrop, RandomResizedCrop
from revnet.data.decoding.decode import UndecodableError, decode, decode_whole
from revnet.data.decoding.image_draw import Draw
from revnet.errors import DataError, MissingDependencyError
from tests.data.samples import encode, random_images, write_image

FIRST = Draw(0, 0, 0)
WHOLE = CenterCrop(1.0)


def save(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    stream = BytesIO()
    image.save(stream, format=format, **options)
    return stream.getvalue()


def smooth(width: int, height: int) -> Image.Image:
    """Return ramps in two directions, which reveal rotations and reflections."""
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([x * 255 / width, y * 255 / height, (x + y) * 255 / (width + height)], -1)
    return Image.fromarray(pixels.astype(np.uint8))


def mean(encoded: bytes) -> list[float]:
    return decode(encoded, WHOLE, (4, 4), FIRST).reshape(-1, 3).mean(0).round(1).tolist()


# ---- sizes


def test_an_image_of_the_right_size_is_unchanged() -> None:
    image = random_images(1, height=6, width=6)[0]
    pixels = decode(encode(image), WHOLE, (6, 6), FIRST)
    assert pixels.dtype == np.uint8
    assert np.array_equal(pixels.transpose(2, 0, 1), image.numpy())


def test_center_crop_is_resize_then_crop() -> None:
    image = smooth(300, 400)
    resized = image.resize((64, 85), Image.Resampling.BILINEAR)
    expected = np.asarray(resized.crop((4, 14, 60, 70))).astype(int)
    pixels = decode(save(image), CenterCrop(), (56, 56), FIRST).astype(int)
    assert abs(pixels - expected).max() <= 4  # the ramp rises by 3 to 4 per pixel, and the two differ by half a pixel


@pytest.mark.parametrize("crop", [RandomResizedCrop(), CenterCrop()])
@pytest.mark.parametrize("size", [(1, 1), (1, 1000), (1000, 1), (2, 3)])
@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_extreme_sizes(crop: Any, size: tuple[int, int], format: str) -> None:
    encoded = save(Image.new("RGB", size, (200, 100, 50)), format)
    pixels = decode(encoded, crop, (8, 8), FIRST)
    assert pixels.shape == (8, 8, 3)
    assert pixels.reshape(-1, 3).mean(0).tolist() == pytest.approx([200, 100, 50], abs=3)  # JPEG rounds


def test_shrinking_averages() -> None:
    # A filter that used only the nearest pixels would see stripes.
    stripes = Image.fromarray(np.tile(np.array([0, 255], dtype=np.uint8), (64, 32)))
    assert decode(save(stripes), WHOLE, (8, 8), FIRST)[1:-1, 1:-1].std() == 0


@pytest.mark.parametrize("crop", [WHOLE, CenterCrop(), RandomResizedCrop((0.3, 1.0))])
def test_a_jpeg_decoded_at_a_fraction_is_the_same_image(crop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = save(smooth(1600, 1200), "JPEG", quality=95)
    fast = decode(encoded, crop, (64, 64), FIRST).astype(int)
    monkeypatch.setattr(Image.Image, "draft", lambda *_: None)
    monkeypatch.setattr("PIL.JpegImagePlugin.JpegImageFile.draft", lambda *_: None)
    slow = decode(encoded, crop, (64, 64), FIRST).astype(int)
    assert abs(fast - slow).max() <= 3


def test_large_jpegs_are_decoded_at_a_fraction(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    load = Image.Image.load
    monkeypatch.setattr(Image.Image, "load", lambda self: loaded.append(self.size) or load(self))
    decode(save(smooth(1600, 1200), "JPEG"), CenterCrop(), (64, 64), FIRST)
    assert (200, 150) in loaded  # an eighth: the crop of 64 pixels needs 131 of them


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("crop", [WHOLE, RandomResizedCrop()])
@pytest.mark.parametrize(
    ("format", "size", "tolerance"),
    [("JPEG", (30, 20), 14), ("JPEG", (900, 600), 14), ("PNG", (30, 20), 0), ("TIFF", (30, 20), 0)],
    ids=["small", "shrunk by JPEG", "PNG", "TIFF"],
)
def test_photographs_are_rotated_upright(
    orientation: int, crop: Any, format: str, size: tuple[int, int], tolerance: int
) -> None:
    upright = smooth(*size)
    transpose = Image.Transpose
    turned_back = {
        2: transpose.FLIP_LEFT_RIGHT,
        3: transpose.ROTATE_180,
        4: transpose.FLIP_TOP_BOTTOM,
        5: transpose.TRANSPOSE,
        6: transpose.ROTATE_90,
        7: transpose.TRANSVERSE,
        8: transpose.ROTATE_270,
    }
    stored = upright.transpose(turned_back[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    encoded = save(stored, format, quality=95, exif=exif)
    pixels = decode(encoded, crop, (10, 12), FIRST)
    expected = decode(save(upright), crop, (10, 12), FIRST)
    assert abs(pixels.astype(int) - expected).max() <= tolerance  # JPEG halves the resolution of colors
    assert decode_whole(encoded).shape == (*size[::-1], 3)


# ---- kinds of images


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("L", (5, 5), 90), [90, 90, 90]),
        (Image.new("1", (5, 5), 1), [255, 255, 255]),
        (Image.new("RGB", (5, 5), (10, 20, 30)).quantize(2), [10, 20, 30]),
        (Image.new("RGBA", (5, 5), (10, 20, 30, 255)), [10, 20, 30]),
        (Image.new("RGBA", (5, 5), (10, 20, 30, 0)), [255, 255, 255]),
        (Image.new("RGBA", (5, 5), (0, 0, 0, 51)), [204, 204, 204]),
        (Image.new("LA", (5, 5), (90, 255)), [90, 90, 90]),
        (Image.new("LA", (5, 5), (90, 0)), [255, 255, 255]),
        (Image.fromarray(np.full((5, 5), 90 * 257, dtype=np.uint16)), [90, 90, 90]),
        (Image.fromarray(np.full((5, 5), 65535, dtype=np.uint16)), [255, 255, 255]),
    ],
    ids=["gray", "bit", "palette", "opaque", "clear", "tinted", "gray-opaque", "gray-clear", "16-bit", "16-bit-white"],
)
def test_every_kind_of_image(image: Image.Image, expected: list[int]) -> None:
    assert mean(save(image)) == expected
    whole = decode_whole(save(image))
    assert whole.shape[:2] == (5, 5)
    assert whole.ndim == (2 if image.mode in ("L", "1", "I;16") else 3)


def test_transparent_color_in_a_palette() -> None:
    image = Image.new("RGB", (4, 4), (10, 20, 30)).quantize(2)
    assert mean(save(image, transparency=image.getpixel((0, 0)))) == [255, 255, 255]


@pytest.mark.parametrize("image", [Image.new("1", (4, 4), 0), Image.fromarray(np.full((4, 4), 300, np.uint16))])
def test_transparent_color_without_a_palette(image: Image.Image) -> None:
    value = image.getpixel((0, 0))
    assert mean(save(image, transparency=value)) == [255, 255, 255]
    assert mean(save(image, transparency=255 - value)) == mean(save(image))


def test_cmyk() -> None:
    image = Image.new("CMYK", (16, 16), (255, 0, 0, 0))  # cyan
    for format in ("JPEG", "TIFF"):
        assert mean(save(image, format)) == pytest.approx([0, 255, 255], abs=4)


def test_32_bit_gray_is_read_as_16_bit() -> None:
    image = Image.fromarray(np.full((5, 5), 90 * 257, dtype=np.int32))
    assert mean(save(image, "TIFF")) == [90, 90, 90]


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (5, 5), color) for color in ("red", "blue")]
    assert mean(save(frames[0], "GIF", save_all=True, append_images=frames[1:])) == [255, 0, 0]


# ---- undecodable images


def bomb() -> bytes:
    """Return a PNG that claims to have 40,000 x 40,000 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


JPEG = save(Image.fromarray(random_images(1, height=64, width=64)[0].permute(1, 2, 0).numpy()), "JPEG")


@pytest.mark.parametrize(
    ("encoded", "reason"),
    [
        (b"", "it is empty"),
        (b"not an image", "it is not an image"),
        (bytes(1000), "it is not an image"),
        (JPEG[: len(JPEG) // 2], "image file is truncated"),
        (JPEG[:300], "Truncated File Read"),
        (encode(random_images(1)[0])[:-30], "."),
        (bomb(), "more than 100,000,000 pixels"),
        (save(Image.fromarray(np.zeros((4, 4), dtype=np.float32)), "TIFF"), "floating-point numbers"),
        (save(Image.fromarray(np.array([[0, 65536]], dtype=np.int32)), "TIFF"), "32-bit integers of unknown range"),
        (save(Image.fromarray(np.array([[0, -1]], dtype=np.int32)), "TIFF"), "32-bit integers of unknown range"),
    ],
    ids=["empty", "text", "zeros", "half a JPEG", "its header", "half a PNG", "bomb", "float", "large", "negative"],
)
def test_undecodable_images(encoded: bytes, reason: str) -> None:
    for call in (lambda: decode(encoded, WHOLE, (4, 4), FIRST), lambda: decode_whole(encoded)):
        with pytest.raises(UndecodableError, match=reason) as caught:
            call()
        assert "\n" not in str(caught.value)
        assert "0x" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.mkdir(), "is a directory"),
        (lambda path: path.touch(), "it is empty"),
    ],
    ids=["missing", "folder", "empty"],
)
def test_unreadable_files(tmp_path: Path, make: Any, reason: str) -> None:
    make(tmp_path / "x.jpg")
    with pytest.raises(UndecodableError, match=f"^{reason}"):
        decode(str(tmp_path / "x.jpg"), WHOLE, (4, 4), FIRST)


def test_odd_metadata_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        broken = JPEG[:2] + b"\xff\xe1" + struct.pack(">H", 40) + b"Exif\0\0" + b"MM\0*" + b"\xff" * 28 + JPEG[2:]
        assert decode(broken, WHOLE, (4, 4), FIRST).shape == (4, 4, 3)
    assert caught == []


# ---- single files


def test_load_image(tmp_path: Path) -> None:
    image = random_images(1, height=6, width=8)[0]
    write_image(tmp_path / "x.png", image)
    assert torch.equal(load_image(tmp_path / "x.png", image_size=(6, 8), in_channels=3), image)
    cropped = load_image(str(tmp_path / "x.png"), image_size=(6, 6), in_channels=3)
    assert torch.equal(cropped, image[:, :, 1:7])
    gray = load_image(tmp_path / "x.png", image_size=(6, 8), in_channels=1)
    assert gray.shape == (1, 6, 8)
    assert gray.dtype == torch.uint8
    assert gray.is_contiguous()
    # 5 of the 6 rows and 5 of the 8 columns.
    part = load_image(tmp_path / "x.png", image_size=(5, 5), in_channels=3, crop_fraction=5 / 6)
    assert part.shape == (3, 5, 5)
    assert abs(part.float().mean() - image[:, :, 1:7].float().mean()) < 20


def test_load_image_equals_a_test_split(tmp_path: Path) -> None:
    smooth(300, 200).save(tmp_path / "x.jpg")
    pixels = decode(str(tmp_path / "x.jpg"), CenterCrop(), (64, 64), FIRST)
    image = load_image(tmp_path / "x.jpg", image_size=(64, 64), in_channels=3, crop_fraction=0.875)
    assert np.array_equal(image.permute(1, 2, 0).numpy(), pixels)


def test_load_image_from_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_image(tmp_path / "x.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_image("~/x.png", image_size=(4, 4), in_channels=3).shape == (3, 4, 4)


def test_load_image_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(b"text")
    with pytest.raises(
        DataError, match=r"^'.*x\.jpg' cannot be decoded: it is not an image; pass the path of an image"
    ):
        load_image(tmp_path / "x.jpg", image_size=(4, 4), in_channels=3)
    with pytest.raises(DataError, match=r"^'.*gone\.jpg' cannot be decoded: no such file or directory;"):
        load_image(tmp_path / "gone.jpg", image_size=(4, 4), in_channels=3)
    with pytest.raises(DataError, match=r"^'~unknown_user/x' cannot be decoded"):
        load_image("~unknown_user/x", image_size=(4, 4), in_channels=3)


def test_load_image_rejects_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"`in_channels` \(=2\) must be 1 \(gray\) or 3 \(RGB\)"):
        load_image("x.png", image_size=(4, 4), in_channels=2)
    for size in ((0, 4), (4,), 4):
        with pytest.raises(ValueError, match=r"`image_size` \(=.*\) must be positive; pass \(height, width\)"):
            load_image("x.png", image_size=size, in_channels=3)
    with pytest.raises(ValueError, match=r"`crop_fraction` \(=1.5\) must be above 0 and at most 1"):
        load_image("x.png", image_size=(4, 4), in_channels=3, crop_fraction=1.5)


def test_without_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(MissingDependencyError, match=r"decoding images needs Pillow, .*`pip install .*\[cli\]'`"):
        load_image("x.png", image_size=(4, 4), in_channels=3)
