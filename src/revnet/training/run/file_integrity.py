"""Checks of a file that `torch.save` wrote before PyTorch reads it: its checksums and its size."""

import io
import zipfile
from pathlib import Path
from typing import BinaryIO

from revnet._input_files import open_regular


def check_zip(path: Path) -> None:
    """Check the checksums of a file that `torch.save` wrote, which `torch.load` ignores.

    Raises:
        OSError: The file cannot be read, or is not a regular file.
        ValueError: A byte has changed, or the file unpacks to more bytes than it has.
        zipfile.BadZipFile: The file is truncated, or in another format.
    """
    with open_regular(path) as file:
        check_members(file, path.stat().st_size)


def check_members(file: BinaryIO | io.BytesIO, size: int) -> None:
    """Check the checksums of an open file of `size` bytes.

    Raises:
        ValueError: A byte has changed, or the file unpacks to more bytes than it has.
        zipfile.BadZipFile: The file is truncated, or in another format.
    """
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ValueError("its parts are compressed, which `torch.save` does not do")
        if sum(member.file_size for member in members) > size:
            raise ValueError("its parts overlap")
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"the checksum of its part {damaged} is wrong")
