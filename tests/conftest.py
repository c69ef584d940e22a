import pytest
import torch


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


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
