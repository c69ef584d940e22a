"""Damaged archives of CIFAR, and archives that hold something else."""

import gzip
import io
import pickle
import tarfile
from pathlib import Path

import pytest

from revnet.data import load_dataset
from revnet.data.sources.cifar_archive import load_cifar_archive
from revnet.errors import DataError
from tests.damaged.damage import assert_ends_well, damage_bytes, other_file, seeded
from tests.damaged.test_checkpoints import Plant
from tests.data.cifar_samples import LAYOUTS, assert_is, write_archive, write_official

CASES = [pytest.param(range(12), id="few"), pytest.param(range(100), marks=pytest.mark.slow, id="many")]
_KINDS = (
    tarfile.SYMTYPE,
    tarfile.LNKTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
    tarfile.FIFOTYPE,
    tarfile.DIRTYPE,
    tarfile.GNUTYPE_SPARSE,
    tarfile.CONTTYPE,
)


def odd_archive(files: dict[str, bytes], folder: str, draw) -> bytes:
    """Return an archive in which one member is a link, a device, of another size, or somewhere else."""
    odd = draw.choice(list(files))
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=draw.choice(("w:gz", "w"))) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content)
            if name == odd:
                match draw.randrange(4):
                    case 0:
                        member.type = draw.choice(_KINDS)
                        member.linkname = draw.choice(("/etc/passwd", "../../x", "/dev/zero", member.name))
                        member.size = 0
                    case 1:
                        member.name = draw.choice((f"/{member.name}", f"../{member.name}", f"a/b/c/{name}", "x" * 300))
                    case 2:
                        member.size = draw.choice((2**40, 2**33, 2**62, 1, 0))
                    case 3:
                        content = draw.choice((b"", damage_bytes(content, draw), other_file(draw)))
                        member.size = len(content)
                archive.fileobj.write(member.tobuf(tarfile.GNU_FORMAT))
                archive.fileobj.write(content + bytes(-len(content) % 512))
                continue
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("numbers", CASES)
def test_damaged_archives(tmp_path, layout, numbers):
    original = write_official(tmp_path, layout)
    packed = original.read_bytes()
    plain = gzip.decompress(packed)
    make_files, folder = LAYOUTS[layout]
    path = tmp_path / "damaged" / original.name
    path.parent.mkdir()
    for number in numbers:
        draw = seeded(f"archives {layout}", number)
        match number % 4:
            case 0:
                content = damage_bytes(packed, draw) if number % 20 else other_file(draw)
            case 1:
                content = gzip.compress(damage_bytes(plain, draw), 1)
            case 2:
                content = damage_bytes(plain, draw)
            case _:
                content = odd_archive(make_files(), folder, draw)
        path.write_bytes(content)
        assert_ends_well(lambda: load_cifar_archive(path), f"archives {layout} {number}")
    assert_is(load_cifar_archive(original), layout)


@pytest.mark.parametrize("layout", ["cifar-10-python", "cifar-100-python"])
def test_planted_code_does_not_run(tmp_path, layout):
    marker = tmp_path / "marker"
    make_files, folder = LAYOUTS[layout]
    for name in make_files():
        if name in ("readme.html", "file.txt~"):
            continue
        for protocol in (0, 2, 4):
            files = make_files() | {name: pickle.dumps({b"data": Plant(marker)}, protocol)}
            path = write_archive(tmp_path / f"{layout}.tar.gz", files, folder)
            error = assert_ends_well(lambda path=path: load_cifar_archive(path), name)
            assert isinstance(error, DataError)
    assert not marker.exists()


def test_an_archive_that_is_a_hole_is_refused(tmp_path):
    path = tmp_path / "cifar-10-python.tar"
    with path.open("wb") as file:
        file.truncate(2**40)
    error = assert_ends_well(lambda: load_dataset(Path(path)), "sparse")
    assert isinstance(error, DataError)
    assert "sparse" in str(error)
