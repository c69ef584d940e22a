import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from revnet.data.sources.cifar_archive import load_cifar_archive
from revnet.errors import DataError
from tests.data.cifar_samples import (
    CLASSES,
    FINE_CLASSES,
    assert_is,
    pixels_of,
    python10,
    python100,
    write_archive,
    write_folder,
)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("as_key", [str, str.encode], ids=["text", "bytes"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_pickles_of_any_protocol(tmp_path: Path, protocol: int, as_key: Callable[[str], object], order: str) -> None:
    files = python100()
    for name in ("train", "test"):
        pixels = np.asarray(pixels_of(name), order=order)
        batch = {as_key("data"): pixels, as_key("fine_labels"): [0, 1, 1, 0]}
        files[name] = pickle.dumps(batch, protocol=protocol)
    files["meta"] = pickle.dumps({as_key("fine_label_names"): [as_key(x) for x in FINE_CLASSES]}, protocol=protocol)
    assert_is(load_cifar_archive(write_folder(tmp_path / "cifar", files)), "cifar-100-python")


class Evil:
    """Object that runs a command when it is unpickled."""

    def __init__(self, function: Callable[..., object], *args: object) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("file", ["data_batch_3", "batches.meta"])
@pytest.mark.parametrize(
    ("function", "name"),
    [(os.system, f"{os.name}.system"), (eval, "(__builtin__|builtins).eval"), (torch.load, "torch.*load")],
    ids=["os.system", "eval", "torch.load"],
)
def test_pickles_run_nothing(
    tmp_path: Path, protocol: int, file: str, function: Callable[..., object], name: str
) -> None:
    mark = tmp_path / "mark"
    command = f"touch {mark}" if function is os.system else f"open({str(mark)!r}, 'w')"
    evil = pickle.dumps({"data": Evil(function, command), "label_names": CLASSES}, protocol=protocol)
    path = write_archive(tmp_path / "cifar-10-python.tar.gz", {**python10(), file: evil})
    with pytest.raises(DataError, match=rf"`{file}` in '.*' is a pickle that requests '{name}'; the request was ref"):
        load_cifar_archive(path)
    assert not mark.exists()


@pytest.mark.parametrize(
    "program",
    [
        b"cnumpy\nndarray\n(I1000000000000\nttR.",
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I1000000000000\ntVb\ntR.",
        b"cnumpy.core.multiarray\n_reconstruct\n(K\x01tb.",
        b"cnumpy\ndtype\n}(U\x05stateK\x01ub.",
        b"c_codecs\nencode\n(Vabc\nVrot13\ntR.",
        b"\x80\x02cnumpy\ndtype\n)\x81.",
        b"P1\n.",
        b"(I1\nI2\nt.",
        b"\x80\x02]r\xff\xff\xff\xff.",
        b"]p4294967295\n.",
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\x00\x00\x00.",
        b"\x80\x05\x96\xff\xff\xff\xff\xff\x00\x00\x00.",
        b"\x80\x04\x95\xff\xff\xff\xff\xff\x00\x00\x00.",
        b"(" * 10_000 + b"t" * 10_000 + b".",
        b"\x80\xff.",
        b"",
        b"not a pickle",
    ],
)
def test_rejects_pickles_of_other_objects(tmp_path: Path, program: bytes) -> None:
    # A plain unpickler would allocate up to a terabyte for some of them.
    folder = write_folder(tmp_path / "cifar", {**python100(), "meta": program})
    with pytest.raises(
        DataError, match=r"^`meta` in '.*' (cannot be read as a pickle|must hold a dictionary).*again\.$"
    ):
        load_cifar_archive(folder)


def array_pickle(shape: bytes, dtype: bytes = b"u1", raw: bytes = b"abcdef") -> bytes:
    """Return a batch with the given state of its array."""
    return (
        b"(Vfine_labels\n(lVdata\ncnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntVb\ntR"
        b"(I1\n" + shape + b"cnumpy\ndtype\n(V" + dtype + b"\nI0\nI1\ntRI00\nS'" + raw + b"'\ntbd."
    )


@pytest.mark.parametrize(
    "batch",
    [
        array_pickle(b"(I2\nI4\nt"),
        array_pickle(b"(I-2\nI-3\nt"),
        array_pickle(b"(I2\nI3\nI1\nt"),
        array_pickle(b"(I6\nt"),
        array_pickle(b"(I0\nI" + b"9" * 4000 + b"\nt", raw=b""),
        array_pickle(b"(I2\nVx\nt"),
        array_pickle(b"N"),
        array_pickle(b"(I2\nI3\nt", dtype=b"O"),
        array_pickle(b"(I2\nI3\nt", dtype=b"f8"),
        pickle.dumps({"data": [[0] * 3072], "fine_labels": [0]}),
        pickle.dumps({"fine_labels": [0]}),
        pickle.dumps({"data": np.zeros((1, 3072), dtype=np.float32), "fine_labels": [0]}, protocol=2),
        pickle.dumps({"data": np.zeros(3072, dtype=np.uint8), "fine_labels": [0]}, protocol=2),
    ],
)
def test_rejects_other_arrays(tmp_path: Path, batch: bytes) -> None:
    folder = write_folder(tmp_path / "cifar", {**python100(), "train": batch})
    with pytest.raises(DataError, match=r"^`train` in '.*' must hold its images under `data`, as rows of bytes"):
        load_cifar_archive(folder)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"data": np.zeros((2, 3071), dtype=np.uint8), "labels": [0, 0]}, "has 3071 bytes per image, not 3x32x32"),
        ({"data": np.zeros((2, 3072), dtype=np.uint8), "labels": [0]}, "has 2 images but 1 labels"),
        ({"data": np.zeros((1, 3072), dtype=np.uint8), "fine_labels": [0]}, "must hold its labels under `labels`"),
        ({"data": np.zeros((1, 3072), dtype=np.uint8), "labels": [10**5000]}, "must hold its labels under `labels`"),
        ({"data": np.zeros((1, 3072), dtype=np.uint8), "labels": ["0"]}, "as a list of integers"),
        (
            {"data": np.zeros((2, 3072), dtype=np.uint8), "labels": [2, 3]},
            r"^image 1 of `data_batch_4` in '.*' has the label 3, but there are 3 classes, so it must be in 0\.\.2;",
        ),
        ({"data": np.zeros((1, 3072), dtype=np.uint8), "labels": [-1]}, "image 0 of .* has the label -1"),
    ],
)
def test_rejects_bad_batches(tmp_path: Path, batch: dict[str, object], message: str) -> None:
    files = {**python10(), "data_batch_4": pickle.dumps(batch, protocol=2)}
    with pytest.raises(DataError, match=message):
        load_cifar_archive(write_folder(tmp_path / "cifar", files))
