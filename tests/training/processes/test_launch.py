import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from revnet.errors import ProcessError
from revnet.training.processes.launch import RemoteError, run_in_processes
from revnet.training.processes.world import World
from tests.training.processes import programs

TWO = World(num_processes=2)


def workers() -> list[str]:
    """Return the processes that `run_in_processes` has started here and that are left."""
    output = subprocess.run(["ps", "-o", "ppid=,args="], capture_output=True, text=True, check=True).stdout
    return [line for line in output.splitlines() if line.split()[0] == str(os.getpid()) and "worker" in line]


def test_processes_join_more_than_once():
    ranks = run_in_processes(programs.describe_world, {}, TWO)
    assert [rank[:2] for rank in ranks] == [(0, 2), (1, 2)]
    assert all(threads is not None for *_, threads in ranks)


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("raise in both", ValueError, r"^`number` \(=3\) must be even\.$"),
        ("raise before the other", OSError, "No space left on device: 'folder/file'"),
        pytest.param("own error", KeyError, "a bug", marks=pytest.mark.slow),
        ("die", ProcessError, "^process 1 of 2 was ended by SIGKILL, so the others were stopped"),
        pytest.param("exit", ProcessError, "^process 1 of 2 ended with status 3", marks=pytest.mark.slow),
    ],
)
def test_one_failure_ends_all_processes(how, error, message, capfd):
    with pytest.raises(error, match=message) as failure:
        run_in_processes(programs.fail, {"how": how}, TWO)
    if error is not ProcessError:
        assert isinstance(failure.value.__cause__, RemoteError)
        assert "programs.py" in str(failure.value.__cause__)
    assert workers() == []
    assert capfd.readouterr().out == ""


@pytest.mark.slow
def test_signal_reaches_the_processes():
    timer = threading.Timer(3.0, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt) as stop:
        run_in_processes(programs.wait, {}, TWO)
    assert stop.value.signal_number == signal.SIGTERM
    assert time.monotonic() - start < 60


def test_rejects_what_other_processes_cannot_know():
    with pytest.raises(
        TypeError, match=r"^`callbacks` cannot be sent to other processes: .*torchrun --nproc-per-node 2"
    ):
        run_in_processes(print, {"callbacks": [lambda: None]}, TWO)
    local = type("Local", (), {"__module__": "__main__"})
    with pytest.raises(TypeError, match=r"^`callbacks` \(a Local\) is defined in the script itself"):
        run_in_processes(print, {"callbacks": [local()]}, TWO)


@pytest.mark.slow
def test_processes_end_with_their_starter(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from revnet.training.processes.launch import run_in_processes\n"
        "from revnet.training.processes.world import World\n"
        "from tests.training.processes import programs\n"
        f"run_in_processes(programs.wait, {{'folder': {str(tmp_path)!r}}}, World(num_processes=2))\n"
    )
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(temporary)}
    starter = subprocess.Popen([sys.executable, script], env=environment)
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("*.pid"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert list(temporary.glob("revnet-*"))
    starter.kill()
    starter.wait()
    pids = [int(path.stem) for path in tmp_path.glob("*.pid")]
    assert len(pids) == 2
    while any(is_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(is_alive(pid) for pid in pids)
    assert not list(temporary.glob("revnet-*"))


def is_alive(pid: int) -> bool:
    output = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(output) and not output.startswith("Z")
