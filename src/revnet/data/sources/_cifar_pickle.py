"""Reading of the pickles in CIFAR's Python version as data: nothing that they request is run.

They were written by Python 2, and hold a dictionary of lists, strings and one array of bytes.
"""

import pickle
import pickletools
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray

from revnet.errors import DataError

_NUMPY_CORES = ("numpy.core", "numpy._core")  # before and since NumPy 2
_REBUILDS = {f"{core}.multiarray._reconstruct" for core in _NUMPY_CORES}
_WRAPS = {f"{core}.numeric._frombuffer" for core in _NUMPY_CORES}  # pickle protocol 5
_ENCODES = "_codecs.encode"  # how Python 3 writes bytes in the protocols of Python 2
_KNOWN = {_ENCODES, "numpy.ndarray", "numpy.dtype", *_REBUILDS, *_WRAPS}


def read_batch(data: bytes, where: str, *, label_key: str) -> tuple[NDArray[np.uint8], list[int]]:
    """Return the pixels, one row per image, and the labels of a file.

    Args:
        data: Content of the file.
        where: Name of the file in errors.
        label_key: Key of the labels.

    Raises:
        DataError: The file is not a pickle, requests anything but a NumPy array of bytes, or lacks pixels or labels.
    """
    batch = _read_dictionary(data, where)
    pixels, labels = _to_array(batch.get("data")), batch.get(label_key)
    if pixels is None:
        raise DataError(f"{where} must hold its images under `data`, as rows of bytes; download it again.")
    # Numbers of any length can be pickled, but not printed.
    if not isinstance(labels, list) or not all(type(label) is int and label.bit_length() < 64 for label in labels):
        raise DataError(f"{where} must hold its labels under `{label_key}`, as a list of integers; download it again.")
    return pixels, labels


def read_class_names(data: bytes, where: str, *, key: str) -> tuple[str, ...]:
    """Return the list of names under `key`; arguments and errors are as in `read_batch`."""
    names = _read_dictionary(data, where).get(key)
    if not isinstance(names, list) or not all(isinstance(name, str | bytes) for name in names):
        raise DataError(f"{where} must hold the class names under `{key}`, as a list of text; download it again.")
    return tuple(_to_text(name) for name in names)


@dataclass(eq=False)
class _Record:
    """Record of an object that a pickle requests by name, and of the call, which does not happen.

    A pickle cannot reach the class of a record, and so cannot reach anything else that could be called.
    """

    name: str
    args: tuple[Any, ...] = ()
    state: Any = None

    def __call__(self, *args: Any) -> "_Record | bytes":
        if self.name == _ENCODES:
            text, encoding = args
            if not isinstance(text, str) or encoding not in ("latin1", "latin-1", b"latin1"):
                raise ValueError("bytes in an unknown code")
            return text.encode("latin-1")
        return _Record(self.name, args)

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Recorder(pickle.Unpickler):
    """Unpickler of lists, dictionaries, numbers and text; every named object becomes a `_Record`."""

    def __init__(self, data: bytes, where: str) -> None:
        super().__init__(BytesIO(data), encoding="bytes")
        self._where = where

    def find_class(self, module: str, name: str) -> _Record:
        full_name = f"{module}.{name}"
        if full_name not in _KNOWN:
            raise DataError(
                f"{self._where} is a pickle that requests {full_name[:100]!a}; the request was refused, not run, "
                "since a CIFAR file needs only NumPy arrays; download the archive from its official page."
            )
        return _Record(full_name)


def _read_dictionary(data: bytes, where: str) -> dict[str, Any]:
    try:
        _check_lengths(data)
        content = _Recorder(data, where).load()
    except DataError:
        raise
    except Exception as error:  # a broken pickle can raise almost anything
        raise DataError(f"{where} cannot be read as a pickle; the copy is broken, download it again.") from error
    if not isinstance(content, dict) or not all(isinstance(key, str | bytes) for key in content):
        raise DataError(f"{where} must hold a dictionary with text as keys; download it again.")
    return {_to_text(key): value for key, value in content.items()}


def _check_lengths(data: bytes) -> None:
    # In many versions of Python, the unpickler allocates what a length or an index asks for before it checks the length
    # of the data (python/cpython#115952): gigabytes for a file of a few bytes. `genops` checks first.
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in ("PUT", "LONG_BINPUT") and (argument or 0) > len(data):
            raise ValueError(f"index {argument} into the memo of a file of {len(data)} bytes")


def _to_array(value: Any) -> NDArray[np.uint8] | None:
    """Return the array that NumPy would have created, or None if `value` is not a complete matrix of bytes."""
    if not isinstance(value, _Record):
        return None
    match value:
        case _Record(name, _, (_, shape, dtype, is_fortran, raw)) if name in _REBUILDS:
            pass
        case _Record(name, (raw, dtype, shape, order)) if name in _WRAPS:
            is_fortran = order == "F"
        case _:
            return None
    if not isinstance(raw, bytes | bytearray) or not isinstance(dtype, _Record):
        return None
    if dtype.name != "numpy.dtype" or dtype.args[:1] not in (("u1",), (b"u1",)):
        return None
    # The numbers in the file can have any size and sign.
    match shape:
        case (int(height), int(width)) if 0 < height <= len(raw) and 0 < width <= len(raw) == height * width:
            return np.frombuffer(raw, dtype=np.uint8).reshape((height, width), order="F" if is_fortran is True else "C")
    return None


def _to_text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode("latin-1")
