"""The example of the page on pipelines runs in two processes; `tests/test_documents.py` runs it in one."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[3] / "docs" / "pipeline.md"


@pytest.mark.slow
def test_example_runs_in_two_processes(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    # Four microbatches of 8 x 16 x 8 x 8 numbers of 4 bytes, back with their gradients.
    assert re.search(
        r"stage 0: loss [\d.]+, sent 131,072 bytes forward and 0 bytes backward in 8 tensors", result.stdout
    )
    assert re.search(
        r"stage 1: loss [\d.]+, sent 0 bytes forward and 262,144 bytes backward in 16 tensors", result.stdout
    )
