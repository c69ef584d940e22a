"""Small copies of CIFAR's official archives."""

import io
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from revnet.data import ImageDataset

CLASSES = ["airplane", "automobile", "bird"]
FINE_CLASSES = ["apple", "aquarium_fish"]
NUM_IMAGES = 4
"""Number of images in each file."""


def pixels_of(file: str) -> np.ndarray:
    """Return noise that depends on the name of the file: rows of 3072 bytes."""
    return np.random.default_rng(sum(file.encode())).integers(0, 256, (NUM_IMAGES, 3072), dtype=np.uint8)


def python10() -> dict[str, bytes]:
    """Return the files of `cifar-10-python.tar.gz`."""
    meta = {"num_cases_per_batch": NUM_IMAGES, "label_names": CLASSES, "num_vis": 3072}
    files = {"batches.meta": pickle.dumps(meta, protocol=0), "readme.html": b"<meta>"}
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        files[name] = python2_pickle(pixels_of(name), [0, 1, 2, 1], b"labels")
    return files


def python100() -> dict[str, bytes]:
    meta = {"fine_label_names": FINE_CLASSES, "coarse_label_names": ["fruit"]}
    files = {"meta": pickle.dumps(meta, protocol=2), "file.txt~": b""}
    for name in ("train", "test"):
        files[name] = python2_pickle(pixels_of(name), [0, 1, 1, 0], b"fine_labels")
    return files


def binary10() -> dict[str, bytes]:
    files = {"batches.meta.txt": "\n".join([*CLASSES, "", ""]).encode(), "readme.html": b"<meta>"}
    for name in [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]:
        labels = np.array([[0], [1], [2], [1]], dtype=np.uint8)
        files[name] = np.hstack([labels, pixels_of(name.removesuffix(".bin"))]).tobytes()
    return files


def binary100() -> dict[str, bytes]:
    files = {"fine_label_names.txt": "\n".join(FINE_CLASSES).encode(), "coarse_label_names.txt": b"fruit\n"}
    for name in ("train", "test"):
        labels = np.array([[9, 0], [8, 1], [9, 1], [8, 0]], dtype=np.uint8)  # coarse, fine
        files[f"{name}.bin"] = np.hstack([labels, pixels_of(name)]).tobytes()
    return files


def python2_pickle(pixels: np.ndarray, labels: list[int], label_key: bytes) -> bytes:
    """Return the output of Python 2 with NumPy 1.4, opcode by opcode."""

    def short(text: bytes) -> bytes:
        return b"U" + bytes([len(text)]) + text

    raw = pixels.tobytes()
    return b"".join(
        [
            b"\x80\x02}q\x01(",
            short(b"batch_label") + b"q\x02" + short(b"training batch 1 of 5") + b"q\x03",
            short(label_key) + b"q\x04]q\x05(" + b"".join(b"K" + bytes([label]) for label in labels) + b"e",
            short(b"data")
            + b"q\x06cnumpy.core.multiarray\n_reconstruct\nq\x07cnumpy\nndarray\nq\x08K\x00\x85U\x01b\x87",
            b"Rq\x09(K\x01K"
            + bytes([len(pixels)])
            + b"M\x00\x0c\x86cnumpy\ndtype\nq\nU\x02u1K\x00K\x01\x87Rq\x0b(K\x03",
            b"U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T" + len(raw).to_bytes(4, "little") + raw + b"tb",
            short(b"filenames") + b"q\x0c]q\x0d(" + b"".join(short(b"x_s_000001.png") for _ in labels) + b"e",
            b"u.",
        ]
    )


LAYOUTS: dict[str, tuple[Callable[[], dict[str, bytes]], str]] = {
    "cifar-10-python": (python10, "cifar-10-batches-py"),
    "cifar-100-python": (python100, "cifar-100-python"),
    "cifar-10-binary": (binary10, "cifar-10-batches-bin"),
    "cifar-100-binary": (binary100, "cifar-100-binary"),
}


def write_folder(path: Path, files: dict[str, bytes]) -> Path:
    path.mkdir(parents=True)
    for name, content in files.items():
        (path / name).write_bytes(content)
    return path


def write_archive(path: Path, files: dict[str, bytes], folder: str = "cifar", mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as archive:
        top = tarfile.TarInfo(folder)
        top.type = tarfile.DIRTYPE
        archive.addfile(top)
        for name, content in files.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_official(path: Path, layout: str) -> Path:
    make_files, folder = LAYOUTS[layout]
    return write_archive(path / f"{layout}.tar.gz", make_files(), folder)


def assert_is(dataset: ImageDataset, layout: str) -> None:
    is_fine = "100" in layout
    train_files = ["train"] if is_fine else [f"data_batch_{i}" for i in range(1, 6)]
    assert dataset.name == ("cifar100" if is_fine else "cifar10")
    assert dataset.class_names == tuple(FINE_CLASSES if is_fine else CLASSES)
    for split, files in ((dataset.train, train_files), (dataset.test, ["test" if is_fine else "test_batch"])):
        pixels = np.concatenate([pixels_of(file) for file in files]).reshape(-1, 3, 32, 32)
        assert torch.equal(split.images, torch.from_numpy(pixels))
        assert split.labels.tolist() == ([0, 1, 1, 0] if is_fine else [0, 1, 2, 1]) * len(files)
