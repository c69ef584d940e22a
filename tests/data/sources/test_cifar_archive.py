import gzip
import io
import pickle
import tarfile
from pathlib import Path

import pytest

from revnet.data.sources import _cifar_files
from revnet.data.sources.cifar_archive import is_cifar_archive, load_cifar_archive
from revnet.errors import DataError
from tests.data.cifar_samples import (
    LAYOUTS,
    assert_is,
    binary10,
    binary100,
    python10,
    python100,
    write_archive,
    write_folder,
    write_official,
)

all_layouts = pytest.mark.parametrize("layout", LAYOUTS)


@all_layouts
def test_archive(tmp_path: Path, layout: str) -> None:
    file = write_official(tmp_path, layout)
    assert is_cifar_archive(file)
    assert_is(load_cifar_archive(file), layout)
    assert list(tmp_path.iterdir()) == [file]


@all_layouts
def test_unpacked_folder_and_its_parent(tmp_path: Path, layout: str) -> None:
    make_files, name = LAYOUTS[layout]
    folder = write_folder(tmp_path / name, make_files())
    for path in (folder, tmp_path):
        assert is_cifar_archive(path)
        assert_is(load_cifar_archive(path), layout)
    renamed = folder.rename(tmp_path / "renamed")
    assert is_cifar_archive(renamed)
    assert_is(load_cifar_archive(renamed), layout)


def test_decompressed_and_renamed_archives(tmp_path: Path) -> None:
    official = write_official(tmp_path, "cifar-10-python")
    tar = tmp_path / "cifar.tar"
    tar.write_bytes(gzip.decompress(official.read_bytes()))
    nameless_tar, nameless_gzip = tar.rename(tmp_path / "download"), official.rename(tmp_path / "download.part")
    for path in (nameless_tar, nameless_gzip):
        assert is_cifar_archive(path)
        assert_is(load_cifar_archive(path), "cifar-10-python")


def test_files_at_the_top_and_in_another_order(tmp_path: Path) -> None:
    files = dict(reversed(python10().items()))
    assert_is(load_cifar_archive(write_archive(tmp_path / "a.tgz", files, folder=".")), "cifar-10-python")


def test_rejects_bad_class_names(tmp_path: Path) -> None:
    files = {**python10(), "batches.meta": pickle.dumps({"label_names": [1, 2, 3]})}
    with pytest.raises(DataError, match="must hold the class names under `label_names`, as a list of text"):
        load_cifar_archive(write_folder(tmp_path / "python", files))
    files = {**binary10(), "batches.meta.txt": b"\xff\xfe"}
    with pytest.raises(DataError, match=r"`batches.meta.txt` in .* must be text, one class name per line"):
        load_cifar_archive(write_folder(tmp_path / "binary", files))
    with pytest.raises(DataError, match=r"`batches.meta.txt` in .* has no class names; download it again"):
        load_cifar_archive(write_folder(tmp_path / "empty", {**binary10(), "batches.meta.txt": b"\n"}))


def test_rejects_bad_binary_files(tmp_path: Path) -> None:
    files = binary100()
    cut = {**files, "train.bin": files["train.bin"][:-1]}
    with pytest.raises(
        DataError, match=r"`train.bin` in .* has 12295 bytes, but must be a multiple of the 3074 bytes of"
    ):
        load_cifar_archive(write_folder(tmp_path / "cut", cut))
    with pytest.raises(DataError, match=r"`test.bin` in .* holds no images"):
        load_cifar_archive(write_folder(tmp_path / "empty", {**files, "test.bin": b""}))
    wrong = bytes([0, 7]) + files["test.bin"][2:]
    with pytest.raises(DataError, match=r"image 0 of `test.bin` in .* has the label 7, but there are 2 classes"):
        load_cifar_archive(write_folder(tmp_path / "label", {**files, "test.bin": wrong}))


@all_layouts
def test_missing_file(tmp_path: Path, layout: str) -> None:
    make_files, name = LAYOUTS[layout]
    files = make_files()
    missing = next(file for file in files if file.startswith("test"))
    del files[missing]
    paths = [write_archive(tmp_path / "a.tar.gz", files), write_folder(tmp_path / name, files)]
    for path in paths:
        assert is_cifar_archive(path)
        with pytest.raises(
            DataError, match=rf"'.*' lacks `{missing}` of the \d files of {name}; complete the download"
        ):
            load_cifar_archive(path)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.7])
@pytest.mark.parametrize("is_compressed", [True, False])
def test_half_downloaded_archive(tmp_path: Path, share: float, is_compressed: bool) -> None:
    file = write_archive(tmp_path / "cifar.tar.gz", python10(), mode="w:gz" if is_compressed else "w:")
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    assert is_cifar_archive(file)
    with pytest.raises(
        DataError, match=r"cifar.tar.gz' (cannot be read to its end|lacks `|\(='|holds none).*\.$"
    ) as caught:
        load_cifar_archive(file)
    assert "\n" not in str(caught.value)


def test_flipped_bit_fails_the_checksum(tmp_path: Path) -> None:
    file = tmp_path / "cifar.tar.gz"
    plain = write_archive(tmp_path / "cifar.tar", binary100(), mode="w:").read_bytes()
    stored = bytearray(gzip.compress(plain, compresslevel=0))
    stored[6000] ^= 1
    file.write_bytes(stored)
    with pytest.raises(DataError, match="cannot be read to its end as a tar archive: CRC check failed"):
        load_cifar_archive(file)


def test_a_web_page_instead_of_the_archive(tmp_path: Path) -> None:
    file = tmp_path / "cifar-10-python.tar.gz"
    file.write_text("<html>404 Not Found</html>" * 100)
    assert is_cifar_archive(file)
    with pytest.raises(DataError, match=r"cannot be read to its end as a tar archive: .*; download it again\.$"):
        load_cifar_archive(file)


def test_archive_of_something_else(tmp_path: Path) -> None:
    file = write_archive(tmp_path / "other.tar.gz", {"train": b"", "weights.bin": b"1"})
    with pytest.raises(
        DataError, match=r"`path` \(='.*'\) holds none of the official CIFAR layouts; pass `cifar-10-pyt"
    ):
        load_cifar_archive(file)


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME], ids=str)
@pytest.mark.parametrize("name", ["train", "other"])
def test_decompression_bombs(tmp_path: Path, kind: bytes, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cifar_files._Bounded, "_num_left", 2**20)
    member = tarfile.TarInfo(f"cifar/{name}")
    member.type, member.size = kind, 2**22
    file = tmp_path / "bomb.tar.gz"
    file.write_bytes(gzip.compress(member.tobuf(tarfile.GNU_FORMAT) + bytes(member.size)))
    with pytest.raises(DataError, match="it unpacks to more than 512 MiB, so it is not a CIFAR archive; download"):
        load_cifar_archive(file)


def test_sparse_files_are_ignored(tmp_path: Path) -> None:
    member = tarfile.TarInfo("cifar/train")
    member.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(2**42)}
    member.size = 512
    path = tmp_path / "holes.tar"
    with tarfile.open(path, "w:", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(member, io.BytesIO(b"1\n4398046511000\n0\n".ljust(512, b"\0")))
        for name in ("test", "meta"):
            archive.addfile(tarfile.TarInfo(f"cifar/{name}"))
    with pytest.raises(DataError, match="lacks `train` of"):
        load_cifar_archive(path)


def test_large_files_in_folders(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "tokens", {"test.bin": b""})
    with (folder / "train.bin").open("wb") as file:
        file.truncate(2**30)
    with pytest.raises(DataError, match=r"train.bin' has more than 512 MiB, so it is not a CIFAR file; pass another"):
        load_cifar_archive(folder)


def test_links_and_members_outside_the_folder_are_ignored(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(python100()["train"])
    path = tmp_path / "cifar.tar"
    with tarfile.open(path, "w:") as archive:
        for name, content in python100().items():
            for folder in ("cifar", "..", "/tmp", "cifar/../..", "cifar/deep/down"):
                member = tarfile.TarInfo(f"{folder}/{name}")
                content = content if folder == "cifar" else b"bad"
                member.size = len(content)
                if name == "train" and folder == "cifar":
                    member.type, member.linkname, member.size = tarfile.SYMTYPE, str(secret), 0
                archive.addfile(member, io.BytesIO(content))
    with pytest.raises(DataError, match="lacks `train` of the 3 files of cifar-100-python"):
        load_cifar_archive(path)


def test_rejects_two_data_sets_in_one_folder(tmp_path: Path) -> None:
    for name, files in (("cifar-10-batches-py", python10()), ("cifar-100-python", python100())):
        write_folder(tmp_path / "data" / name, files)
    with pytest.raises(DataError, match=r"holds several data sets \(cifar-10-batches-py, cifar-100-python\); pass one"):
        load_cifar_archive(tmp_path / "data")
    with pytest.raises(DataError, match="holds several data sets"):
        load_cifar_archive(write_archive(tmp_path / "both.tar.gz", {**python10(), **python100()}))


def test_rejects_the_same_file_twice(tmp_path: Path) -> None:
    path = tmp_path / "twice.tar"
    write_archive(path, python100(), mode="w:")
    with tarfile.open(path, "a") as archive:
        archive.addfile(tarfile.TarInfo("other/train"))
    with pytest.raises(DataError, match="it holds `train` twice"):
        load_cifar_archive(path)


def test_other_data_are_not_detected_as_cifar(tmp_path: Path, folder: Path) -> None:
    images = tmp_path / "images"
    for part in ("train", "test", "meta"):
        (images / part / "cat").mkdir(parents=True)
    tokens = write_folder(tmp_path / "tokens", {"train.bin": b"", "val.bin": b""})
    text = tmp_path / "notes.txt"
    text.write_text("train test meta")
    paths = [folder, images, images / "train", tokens, text, tmp_path / "nowhere", tmp_path / ("x" * 300)]
    assert not any(is_cifar_archive(path) for path in [*paths, Path("~unknown_user/data")])


def test_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_official(tmp_path, "cifar-100-binary")
    path = Path("~/cifar-100-binary.tar.gz")
    assert is_cifar_archive(path)
    assert_is(load_cifar_archive(path), "cifar-100-binary")


def test_missing_path(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds none of the official CIFAR layouts"):
        load_cifar_archive(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"`path` \(='.*'\) cannot be opened: .*; pass a path that can be read"):
        load_cifar_archive(tmp_path / ("x" * 300))
