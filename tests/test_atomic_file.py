import errno
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from revnet import _atomic_file
from revnet._atomic_file import atomic_path, open_early, remove_leftovers, write_csv, write_text
from revnet._outside_text import csv_cell

POSIX = pytest.mark.skipif(os.name != "posix", reason="modes, links and devices of POSIX")


def test_file_appears_whole(tmp_path):
    path = tmp_path / "weights"
    path.write_text("old")
    with atomic_path(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.parent == path.parent  # a rename is atomic within one file system only
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_failure_keeps_the_old_file(tmp_path):
    path = tmp_path / "weights"
    path.write_text("old")

    def write_half():
        with atomic_path(path) as temporary:
            temporary.write_text("ne")
            raise RuntimeError("disk")

    with pytest.raises(RuntimeError, match="disk"):
        write_half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_removes_leftovers_of_a_killed_process(tmp_path):
    (tmp_path / ".last.ckpt.123.tmp").write_text("half")
    (tmp_path / "last.ckpt").write_text("whole")
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


@POSIX
@pytest.mark.parametrize("mode", [0o600, 0o664, 0o755])
def test_keeps_the_mode(tmp_path, mode):
    path = tmp_path / "table.csv"
    path.write_text("old")
    path.chmod(mode)
    write_text(path, "new")
    assert stat.S_IMODE(path.stat().st_mode) == mode


@POSIX
def test_new_file_has_the_usual_mode(tmp_path):
    (tmp_path / "usual").write_text("")
    write_text(tmp_path / "new", "")
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "usual").stat().st_mode


@POSIX
def test_follows_links(tmp_path):
    (tmp_path / "folder").mkdir()
    target, link, dangling = tmp_path / "folder" / "target", tmp_path / "link", tmp_path / "dangling"
    target.write_text("old")
    link.symlink_to(target)
    dangling.symlink_to(tmp_path / "folder" / "missing")
    write_text(link, "new")
    write_text(dangling, "new")
    assert link.is_symlink()
    assert dangling.is_symlink()
    assert (target.read_text(), dangling.read_text()) == ("new", "new")
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == ["missing", "target"]


@POSIX
def test_writes_into_a_fifo(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    received: list[str] = []
    reader = threading.Thread(target=lambda: received.append(fifo.read_text()))
    reader.start()
    write_text(fifo, "through the pipe")
    reader.join(60)
    assert received == ["through the pipe"]
    assert fifo.is_fifo()


@POSIX
def test_writes_into_a_device(tmp_path):
    device = tmp_path / "null"
    try:
        os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 3))  # like /dev/null
        device.write_text("")
    except PermissionError:
        pytest.skip("only the superuser may make a device, and not everywhere")
    write_text(device, "gone")
    assert device.is_char_device()
    assert stat.S_IMODE(device.stat().st_mode) == 0o666 & ~_umask()
    assert list(tmp_path.iterdir()) == [device]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@POSIX
def test_writes_to_standard_output_between_the_lines(tmp_path):
    program = (
        "from pathlib import Path; from revnet._atomic_file import write_text; print('before'); "
        "write_text(Path('/dev/stdout'), 'table\\n'); print('after')"
    )
    output = tmp_path / "output.txt"
    with output.open("w") as file:
        subprocess.run([sys.executable, "-c", program], stdout=file, check=True, timeout=120)
    assert output.read_text() == "before\ntable\nafter\n"


@POSIX
def test_syncs_the_folder_after_the_rename(tmp_path, monkeypatch):
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def log_fsync(descriptor):
        events.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def log_replace(self, target):
        events.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", log_fsync)
    monkeypatch.setattr(Path, "replace", log_replace)
    write_text(tmp_path / "file", "content")
    assert events == ["file", "rename", "folder"]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_folder_that_cannot_be_synced_does_not_matter(tmp_path, monkeypatch, code):
    fsync = os.fsync

    def refuse_folders(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    monkeypatch.setattr(_atomic_file.os, "fsync", refuse_folders)
    write_text(tmp_path / "file", "content")
    assert (tmp_path / "file").read_text() == "content"


def test_error_names_the_file_and_not_the_temporary_one(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        write_text(tmp_path / "missing" / "table.csv", "")
    assert caught.value.filename == str(tmp_path / "missing" / "table.csv")

    def fill_disk():
        with atomic_path(tmp_path / "table.csv"):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left on device") as full:
        fill_disk()
    assert full.value.filename == str(tmp_path / "table.csv")


def test_long_names_fit(tmp_path):
    path = tmp_path / ("x" * 250)
    write_text(path, "content")
    assert path.read_text() == "content"


@POSIX
def test_a_fifo_without_a_reader_is_refused(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for write in (open_early, lambda path: write_text(path, "lost")):
        with pytest.raises(OSError, match="A FIFO that no process reads") as caught:
            write(fifo)
        assert caught.value.filename == str(fifo)


@POSIX
def test_reader_of_a_fifo_that_is_opened_early_gets_the_file(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    received: list[str] = []
    reader = threading.Thread(target=lambda: received.append(fifo.read_text()))
    reader.start()
    open_early(fifo)
    write_text(fifo, "late")
    reader.join(60)
    assert received == ["late"]


def test_names_that_are_not_utf8_are_escaped_in_a_table(tmp_path):
    write_csv(tmp_path / "table.csv", [["file"], [csv_cell(os.fsdecode(b"caf\xe9.jpg"))]])
    assert (tmp_path / "table.csv").read_bytes() == b"file\r\ncaf\\udce9.jpg\r\n"
