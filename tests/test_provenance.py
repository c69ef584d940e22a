import re

from revnet._hardware import hardware_name
from revnet._provenance import describe_machine


def test_machine_is_described(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    hardware, versions, date, command = describe_machine("some command", peers={"peer": "1.2"})
    assert re.match(r"- Hardware: \d+ cores of .+, threads used: \d+, no GPU", hardware)
    assert re.match(
        r"- Versions: PyTorch \S+, Python \S+, revnet (at commit [0-9a-f]+(-dirty)?|\S+), peer 1.2$", versions
    )
    assert re.match(r"- Date: \d{4}-\d\d-\d\d$", date)
    assert command == "- Command: `OMP_NUM_THREADS=1 some command`"


def test_hardware_name_fits_a_file_name():
    assert re.fullmatch(r"cpu\d+", hardware_name())
