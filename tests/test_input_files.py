import os
import socket
import time
from pathlib import Path

import pytest

from revnet._input_files import open_regular, read_bytes, read_text

pytestmark = pytest.mark.skipif(os.name != "posix", reason="FIFOs, devices and links of POSIX")


def make_socket(path: Path) -> None:
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(path))
    server.close()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (os.mkfifo, "Not a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "Not a regular file"),
        (lambda path: path.mkdir(), "Is a directory"),
        (make_socket, "No such device or address"),
        (lambda path: path.symlink_to(path), "Too many levels of symbolic links"),
        (lambda path: None, "No such file or directory"),
    ],
    ids=["fifo", "device", "folder", "socket", "loop", "missing"],
)
def test_refuses_what_is_not_a_regular_file(tmp_path, monkeypatch, make, reason):
    monkeypatch.chdir(tmp_path)  # the path of a socket is short
    make(Path("x.jpg"))
    start = time.monotonic()
    with pytest.raises(OSError, match=reason):
        read_bytes("x.jpg", 2**20)
    assert time.monotonic() - start < 60  # a FIFO would wait for ever


def test_follows_links_to_files(tmp_path):
    (tmp_path / "file").write_text("content")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert read_text(tmp_path / "link", 100) == "content"


def test_drops_one_byte_order_mark(tmp_path):
    (tmp_path / "file").write_text("\ufeffa\ufeff", encoding="utf-8-sig")
    assert read_text(tmp_path / "file", 100) == "\ufeffa\ufeff"


def test_refuses_more_than_the_limit(tmp_path):
    (tmp_path / "file").write_bytes(bytes(2**20 + 1))
    with pytest.raises(OSError, match="more than 1,024 KiB"):
        read_bytes(tmp_path / "file", 2**20)
    (tmp_path / "file").write_bytes(bytes(2**20))
    assert len(read_bytes(tmp_path / "file", 2**20)) == 2**20


def test_refuses_a_large_file_that_consists_of_a_hole(tmp_path):
    for size, content in ((2**40, b"start"), (2**40, b""), (2**27, b"start")):
        with (tmp_path / "file").open("wb") as file:
            file.write(content)
            file.truncate(size)
        with pytest.raises(OSError, match="A sparse file"):
            read_bytes(tmp_path / "file", 2**50)


def test_opens_a_file_with_small_holes(tmp_path):
    with (tmp_path / "file").open("wb") as file:
        file.write(os.urandom(2**22))
        file.truncate(2**27)
    with open_regular(tmp_path / "file") as file:
        assert len(file.read()) == 2**27
