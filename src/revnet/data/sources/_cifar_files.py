"""Reading of the named files of a download, from a folder or directly from the tar archive."""

import gzip
import tarfile
import zlib
from collections.abc import Collection
from pathlib import Path, PurePosixPath

from revnet._input_files import open_regular, read_bytes
from revnet.errors import DataError

_MAX_BYTES = 2**29
"""Upper limit of an unpacked archive, nearly three times the largest one."""

_GZIP_MAGIC = b"\x1f\x8b"
_TAR_MAGIC = b"ustar"
_TAR_MAGIC_AT = 257


def is_archive(path: Path) -> bool:
    """Return whether a file is a tar archive, gzipped or not, by its name or its first bytes."""
    if path.suffix in (".gz", ".tgz", ".tar"):
        return True  # even if it is empty or another download, so that `read_archive` reports the problem
    with path.open("rb") as file:
        start = file.read(512)
    return start.startswith(_GZIP_MAGIC) or start.startswith(_TAR_MAGIC, _TAR_MAGIC_AT)


def read_archive(path: Path, names: Collection[str]) -> dict[str, bytes]:
    """Read the files of an archive with the given names, from its top folder or one level below.

    The archive is read in one pass, and nothing is written to disk. Links and files at other places are ignored.

    Raises:
        DataError: The file is not an archive, is truncated or corrupt, holds a name twice, or unpacks to more than 512
            MiB.
    """
    try:
        with open_regular(path) as file:
            is_compressed = file.read(2) == _GZIP_MAGIC
            file.seek(0)
            stream = _Bounded(fileobj=file) if is_compressed else file
            with tarfile.open(fileobj=stream, mode="r|") as archive:
                files = _read_members(archive, names)
            while stream.read(2**20):
                pass  # gzip stores its checksum at the end
    except (EOFError, OSError, zlib.error, tarfile.TarError, DataError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise DataError(f"'{path}' cannot be read to its end as a tar archive: {reason}; download it again.") from error
    return files


def _read_members(archive: tarfile.TarFile, names: Collection[str]) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    for member in archive:
        # To skip what is not there, Python would count to any number. The size of a sparse file includes its holes.
        if archive.offset - member.offset_data > _MAX_BYTES:
            raise DataError("it has a file of more than 512 MiB, so it is not a CIFAR archive")
        name = _plain_name(member)
        content = archive.extractfile(member) if name in names else None
        if name is None or content is None:
            continue
        if name in files:
            raise DataError(f"it holds `{name}` twice")
        files[name] = content.read()
    return files


def read_folder(folder: Path, names: Collection[str]) -> dict[str, bytes]:
    """Read the files of a folder with the given names; missing ones are left out.

    Raises:
        DataError: A file cannot be read, or is larger than 512 MiB.
    """
    files = {}
    for name in names:
        file = folder / name
        try:
            if not file.is_file():
                continue
            if file.stat().st_size > _MAX_BYTES:
                raise DataError(f"'{file}' has more than 512 MiB, so it is not a CIFAR file; pass another folder.")
            files[name] = read_bytes(file, _MAX_BYTES)
        except OSError as error:
            raise DataError(f"'{file}' cannot be read: {error}; change its permissions, or copy it again.") from error
    return files


def _plain_name(member: tarfile.TarInfo) -> str | None:
    # No sparse files: their holes can have any size.
    if not member.isreg() or member.issparse():
        return None
    path = PurePosixPath(member.name)
    return None if path.is_absolute() or ".." in path.parts or len(path.parts) > 2 else path.name


class _Bounded(gzip.GzipFile):
    """A gzip stream of limited length, since a few kilobytes can unpack to any size."""

    _num_left = _MAX_BYTES

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self._num_left -= len(data)
        if self._num_left < 0:
            raise DataError("it unpacks to more than 512 MiB, so it is not a CIFAR archive")
        return data
