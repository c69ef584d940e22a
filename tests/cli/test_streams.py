"""Outputs that are closed, full, or unable to print a letter; names that control a terminal or are not UTF-8."""

import errno
import io
import os
import re
import subprocess
import sys

import pytest

from revnet.cli._streams import print_while_writing, safe_streams
from tests.training.samples import make_header, save_checkpoint, write_images

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the shell and the devices of Linux")
REVNET = f'"{sys.executable}" -m revnet.cli.main'


def run(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        encoding="utf-8",
        errors="surrogateescape",
        env=os.environ | environment,
        timeout=300,
    )


@pytest.mark.parametrize(
    ("command", "status", "errors"),
    [
        ("--version >&-", 0, ""),
        ("--version 2>&-", 0, ""),
        ("--version <&- >&- 2>&-", 0, ""),
        ("nonsense 2>&-", 2, ""),
        ("--help >/dev/full", 2, "revnet: error: the output cannot be written: No space left on device\n"),
        ("nonsense 2>/dev/full", 2, ""),
    ],
)
def test_output_that_is_closed_or_full(command, status, errors):
    done = run(f"{REVNET} {command}")
    assert (done.returncode, done.stderr) == (status, errors)


class ClosedPipe(io.StringIO):
    def write(self, text):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


def test_files_are_written_after_the_reader_has_left(monkeypatch):
    events = []

    def command(has_files):
        with print_while_writing(has_files) as print_line:
            print_line("first")
            print_line("second")
            events.append("written")

    monkeypatch.setattr(sys, "stdout", ClosedPipe())
    for has_files in (True, False):
        with pytest.raises(BrokenPipeError):
            command(has_files)
    assert events == ["written"]


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["--csv", "--jsonl"])
def test_table_is_whole_after_the_reader_has_left(tmp_path, flag):
    weights = save_checkpoint(tmp_path / "weights.safetensors", make_header())
    write_images(tmp_path, 5)
    table = tmp_path / "table"
    done = run(f"{REVNET} predict {weights} {tmp_path} --top 1 {flag} {table} | head -0")
    assert "Traceback" not in done.stderr
    assert len(table.read_text().splitlines()) == (6 if flag == "--csv" else 5)


def test_table_in_a_fifo_without_a_reader_is_refused(tmp_path, assert_refused):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    assert_refused(
        ["predict", tmp_path, "cat.jpg", "--csv", fifo],
        f"`--csv` (={fifo}) cannot be written (A FIFO that no process reads); start the process that reads it",
    )


@pytest.mark.slow
def test_locale_without_other_letters(tmp_path):
    """The locale C prints the bytes of a file's name, and a question mark for other letters."""
    folder = tmp_path / "Fotos für später"
    folder.mkdir()
    weights = save_checkpoint(folder / "weights.safetensors", make_header(class_names=("猫", "dog")))
    write_images(folder, 1)
    done = run(f'{REVNET} predict "{weights}" "{folder}"', LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert done.returncode == 0, done.stderr
    assert re.search(r"  (\?|dog) [\d.]+ %  (\?|dog) [\d.]+ %\n$", done.stdout)


def test_letters_that_a_stream_cannot_encode(monkeypatch):
    for errors, printed in (("strict", b"? ?"), ("surrogateescape", b"? \xff")):
        stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors=errors)
        monkeypatch.setattr(sys, "stdout", stream)
        with safe_streams():
            print("猫 \udcff", end="")
        assert stream.buffer.getvalue() == printed
        assert stream.errors == errors


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_names_that_the_output_cannot_print(tmp_path, encoding):
    header = make_header(class_names=("猫", "\x1b[31mdog", "=cmd"))
    weights = save_checkpoint(tmp_path / "weights.safetensors", header)
    (image,) = write_images(tmp_path, 1)
    name = os.fsdecode("Käse 猫".encode() + b"\xe9\x1b[2J.png")
    image = image.rename(tmp_path / name)
    table = tmp_path / "table.csv"
    done = run(
        f'{REVNET} predict {weights} {tmp_path}/K*.png missing_猫.png --csv {table}; echo "status $?"',
        PYTHONIOENCODING=encoding,
    )
    assert "Traceback" not in done.stderr
    assert done.stdout.endswith("status 1\n")
    assert "\x1b" not in done.stdout + done.stderr
    assert r"\x1b[31mdog" in done.stdout
    assert ("猫" in done.stdout) == (encoding == "utf-8")
    content = table.read_bytes()
    assert rb"\udce9\x1b[2J.png" in content
    assert b"'=cmd" in content
    assert b"\x1b" not in content
