import errno
import os

import pytest

from revnet.cli.main import main


@pytest.fixture
def revnet(capsys):
    """Return a function that runs a command line and returns its exit code, output and errors."""

    def run(*arguments):
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def assert_refused(revnet):
    """Return a function that runs a command line and asserts exit code 2 and a single line with `message`."""

    def run(arguments, message):
        code, output, errors = revnet(*arguments)
        assert (code, output) == (2, "")
        assert errors.startswith(f"revnet {arguments[0]}: error: ")
        assert message in errors
        assert errors.count("\n") == 1

    return run


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory):
    """Return the folder of a run of one epoch, shared by all tests."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert main(["train", "--epochs", "1", "--batch-size", "400", "--out-dir", str(folder)]) == 0
    return folder


@pytest.fixture
def full_disk(monkeypatch):
    """Let every file fail for lack of room, once it is written."""

    def fail(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("revnet._atomic_file.os.fsync", fail)
