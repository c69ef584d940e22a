"""The files of a download, read by their names: from a folder, or from the tar archive as it came."""

import gzip
import tarfile
import zlib
from collections.abc import Collection
from pathlib import Path, PurePosixPath

from revnet.errors import DataError

_MAX_BYTES = 2**29
"""Nearly three times what the largest archive unpacks to."""

_GZIP_MAGIC = b"\x1f\x8b"
_TAR_MAGIC = b"ustar"
_TAR_MAGIC_AT = 257


def is_archive(path: Path) -> bool:
    """Whether a file is a tar archive, compressed by gzip or not: by its name or its first bytes."""
    if path.suffix in (".gz", ".tgz", ".tar"):
        return True  # even if it is empty or was not what was to be downloaded, so that `read_archive` says so
    with path.open("rb") as file:
        start = file.read(512)
    return start.startswith(_GZIP_MAGIC) or start.startswith(_TAR_MAGIC, _TAR_MAGIC_AT)


def read_archive(path: Path, names: Collection[str]) -> dict[str, bytes]:
    """Read those files of an archive that bear one of `names`, in its top folder or one below it.

    One pass, and nothing is written to disk. Links, and whatever lies elsewhere in the archive, are not looked at.

    Raises:
        DataError: The archive is truncated, corrupt or none, holds a name twice, or unpacks to more than 512 MiB.
    """
    try:
        with path.open("rb") as file:
            is_compressed = file.read(2) == _GZIP_MAGIC
            file.seek(0)
            stream = _Bounded(fileobj=file) if is_compressed else file
            with tarfile.open(fileobj=stream, mode="r|") as archive:
                files = _read_members(archive, names)
            while stream.read(2**20):
                pass  # to the very end, where gzip keeps the checksum
    except (EOFError, OSError, zlib.error, tarfile.TarError, DataError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise DataError(f"'{path}' cannot be read to its end as a tar archive: {reason}; download it again.") from error
    return files


def _read_members(archive: tarfile.TarFile, names: Collection[str]) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    for member in archive:
        name = _plain_name(member)
        content = archive.extractfile(member) if name in names else None
        if name is None or content is None:
            continue
        if name in files:
            raise DataError(f"it holds `{name}` twice")
        files[name] = content.read()
    return files


def read_folder(folder: Path, names: Collection[str]) -> dict[str, bytes]:
    """Read those files of a folder that bear one of `names`.

    Raises:
        DataError: A file cannot be read, or has more than 512 MiB.
    """
    files = {}
    for name in names:
        file = folder / name
        try:
            if not file.is_file():
                continue
            if file.stat().st_size > _MAX_BYTES:
                raise DataError(f"'{file}' has more than 512 MiB, and so is no file of CIFAR; pass another folder.")
            files[name] = file.read_bytes()
        except OSError as error:
            raise DataError(f"'{file}' cannot be read: {error}; allow to read it, or copy it again.") from error
    return files


def _plain_name(member: tarfile.TarInfo) -> str | None:
    # Not sparse: the holes of such a file could be of any size.
    if not member.isreg() or member.issparse():
        return None
    path = PurePosixPath(member.name)
    return None if path.is_absolute() or ".." in path.parts or len(path.parts) > 2 else path.name


class _Bounded(gzip.GzipFile):
    """A stream that does not go on for ever, as a few kilobytes of gzip can."""

    _num_left = _MAX_BYTES

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self._num_left -= len(data)
        if self._num_left < 0:
            raise DataError("it unpacks to more than 512 MiB, so it is no archive of CIFAR")
        return data
