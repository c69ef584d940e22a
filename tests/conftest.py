import gc
import getpass
import os
import tempfile
from pathlib import Path

import pytest
import torch

# TorchInductor's cache does not tell instruction sets apart: a kernel that was generated for AVX-512 and is compiled
# again for AVX2, as under `ATEN_CPU_CAPABILITY=avx2`, leaves half of its output unwritten.
CACHE = f"torchinductor-revnet-{getpass.getuser()}-{torch.backends.cpu.get_cpu_capability()}"
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / CACHE))

# Without a device, PyTorch keeps each seed with a stack trace, in case the device comes: 8 % of the time of the tests.
for module in (torch.cuda, torch.xpu, torch.mtia):
    if not module.is_available():
        module.manual_seed_all = lambda seed: None


def pytest_collection_finish():
    gc.freeze()  # A full collection needs half a second for the objects of all the modules that were imported.


@pytest.fixture(autouse=True)
def reproducible():
    """Every test starts from the same random state and leaves PyTorch's global settings as they were."""
    torch.manual_seed(0)
    dtype = torch.get_default_dtype()
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(num_threads)


@pytest.fixture
def own_temporary_folder(tmp_path, monkeypatch):
    """Put what a test creates with `tempfile` into its own folder, which pytest deletes."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
