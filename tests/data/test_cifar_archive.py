import gzip
import io
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from revnet.data import ImageDataset, _cifar_files
from revnet.data.cifar_archive import is_cifar_archive, load_cifar_archive
from revnet.errors import DataError

CLASSES = ["airplane", "automobile", "bird"]
FINE_CLASSES = ["apple", "aquarium_fish"]
NUM_IMAGES = 4
"""In each file."""


def pixels_of(file: str) -> np.ndarray:
    """Noise that depends on the name of the file: rows of 3072 bytes."""
    return np.random.default_rng(sum(file.encode())).integers(0, 256, (NUM_IMAGES, 3072), dtype=np.uint8)


def python10() -> dict[str, bytes]:
    """The files of `cifar-10-python.tar.gz`."""
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
    """What Python 2 with NumPy 1.4 wrote, opcode by opcode."""

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
all_layouts = pytest.mark.parametrize("layout", LAYOUTS)


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


@all_layouts
def test_archive(tmp_path: Path, layout: str) -> None:
    file = write_official(tmp_path, layout)
    assert is_cifar_archive(file)
    assert_is(load_cifar_archive(file), layout)
    assert list(tmp_path.iterdir()) == [file]


@all_layouts
def test_unpacked_folder_and_the_folder_around_it(tmp_path: Path, layout: str) -> None:
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
    """Runs a command as it is unpickled."""

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
    with pytest.raises(DataError, match=rf"`{file}` in '.*' is a pickle that asks for '{name}'; that was refused, not"):
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
def test_what_is_no_dictionary(tmp_path: Path, program: bytes) -> None:
    # Some would have a plain unpickler reserve up to a terabyte.
    folder = write_folder(tmp_path / "cifar", {**python100(), "meta": program})
    with pytest.raises(
        DataError, match=r"^`meta` in '.*' (cannot be read as a pickle|must hold a dictionary).*again\.$"
    ):
        load_cifar_archive(folder)


def array_pickle(shape: bytes, dtype: bytes = b"u1", raw: bytes = b"abcdef") -> bytes:
    """A batch with whatever is put into the state of its array."""
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
def test_what_is_no_matrix_of_bytes(tmp_path: Path, batch: bytes) -> None:
    folder = write_folder(tmp_path / "cifar", {**python100(), "train": batch})
    with pytest.raises(DataError, match=r"^`train` in '.*' must hold its images under `data`, as rows of bytes"):
        load_cifar_archive(folder)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"data": np.zeros((2, 3071), dtype=np.uint8), "labels": [0, 0]}, "has 3071 bytes an image, not 3x32x32"),
        ({"data": np.zeros((2, 3072), dtype=np.uint8), "labels": [0]}, "has 2 images but 1 labels"),
        ({"data": np.zeros((1, 3072), dtype=np.uint8), "fine_labels": [0]}, "must hold its labels under `labels`"),
        ({"data": np.zeros((1, 3072), dtype=np.uint8), "labels": [10**5000]}, "must hold its labels under `labels`"),
        ({"data": np.zeros((1, 3072), dtype=np.uint8), "labels": ["0"]}, "as a list of integers"),
        (
            {"data": np.zeros((2, 3072), dtype=np.uint8), "labels": [2, 3]},
            r"^image 1 of `data_batch_4` in '.*' has the label 3, but there are 3 classes, so it must lie in 0\.\.2;",
        ),
        ({"data": np.zeros((1, 3072), dtype=np.uint8), "labels": [-1]}, "image 0 of .* has the label -1"),
    ],
)
def test_bad_batches(tmp_path: Path, batch: dict[str, object], message: str) -> None:
    files = {**python10(), "data_batch_4": pickle.dumps(batch, protocol=2)}
    with pytest.raises(DataError, match=message):
        load_cifar_archive(write_folder(tmp_path / "cifar", files))


def test_bad_class_names(tmp_path: Path) -> None:
    files = {**python10(), "batches.meta": pickle.dumps({"label_names": [1, 2, 3]})}
    with pytest.raises(DataError, match="must hold the class names under `label_names`, as a list of text"):
        load_cifar_archive(write_folder(tmp_path / "python", files))
    files = {**binary10(), "batches.meta.txt": b"\xff\xfe"}
    with pytest.raises(DataError, match=r"`batches.meta.txt` in .* must be text, a class name a line"):
        load_cifar_archive(write_folder(tmp_path / "binary", files))
    with pytest.raises(DataError, match=r"`batches.meta.txt` in .* names no class; download it again"):
        load_cifar_archive(write_folder(tmp_path / "empty", {**binary10(), "batches.meta.txt": b"\n"}))


def test_bad_binary_files(tmp_path: Path) -> None:
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


def test_page_saved_in_place_of_the_archive(tmp_path: Path) -> None:
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
def test_bombs(tmp_path: Path, kind: bytes, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cifar_files._Bounded, "_num_left", 2**20)
    member = tarfile.TarInfo(f"cifar/{name}")
    member.type, member.size = kind, 2**22
    file = tmp_path / "bomb.tar.gz"
    file.write_bytes(gzip.compress(member.tobuf(tarfile.GNU_FORMAT) + bytes(member.size)))
    with pytest.raises(DataError, match="it unpacks to more than 512 MiB, so it is no archive of CIFAR; download"):
        load_cifar_archive(file)


def test_holes_of_sparse_files_are_not_filled(tmp_path: Path) -> None:
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
    with pytest.raises(DataError, match=r"train.bin' has more than 512 MiB, and so is no file of CIFAR; pass another"):
        load_cifar_archive(folder)


def test_members_outside_of_the_folder_and_links_are_ignored(tmp_path: Path) -> None:
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


def test_two_data_sets_in_one_place(tmp_path: Path) -> None:
    for name, files in (("cifar-10-batches-py", python10()), ("cifar-100-python", python100())):
        write_folder(tmp_path / "data" / name, files)
    with pytest.raises(DataError, match=r"holds several data sets \(cifar-10-batches-py, cifar-100-python\); pass one"):
        load_cifar_archive(tmp_path / "data")
    with pytest.raises(DataError, match="holds several data sets"):
        load_cifar_archive(write_archive(tmp_path / "both.tar.gz", {**python10(), **python100()}))


def test_same_file_twice(tmp_path: Path) -> None:
    path = tmp_path / "twice.tar"
    write_archive(path, python100(), mode="w:")
    with tarfile.open(path, "a") as archive:
        archive.addfile(tarfile.TarInfo("other/train"))
    with pytest.raises(DataError, match="it holds `train` twice"):
        load_cifar_archive(path)


def test_what_is_not_taken_for_cifar(tmp_path: Path, folder: Path) -> None:
    images = tmp_path / "images"
    for part in ("train", "test", "meta"):
        (images / part / "cat").mkdir(parents=True)
    tokens = write_folder(tmp_path / "tokens", {"train.bin": b"", "val.bin": b""})
    text = tmp_path / "notes.txt"
    text.write_text("train test meta")
    paths = [folder, images, images / "train", tokens, text, tmp_path / "nowhere", tmp_path / ("x" * 300)]
    assert not any(is_cifar_archive(path) for path in [*paths, Path("~nobody-of-this-name/data")])


def test_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_official(tmp_path, "cifar-100-binary")
    path = Path("~/cifar-100-binary.tar.gz")
    assert is_cifar_archive(path)
    assert_is(load_cifar_archive(path), "cifar-100-binary")


def test_missing_path(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds none of the official CIFAR layouts"):
        load_cifar_archive(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"`path` \(='.*'\) cannot be opened: .*; pass one that can be read"):
        load_cifar_archive(tmp_path / ("x" * 300))
