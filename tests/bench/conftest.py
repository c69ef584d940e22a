import pytest
import torch
from torch import nn

from revnet.bench.cases import Case

CPU = torch.device("cpu")


@pytest.fixture
def case():
    """Return a workload of one kilobyte: two streams of 4 x 8 x 4 float32 values, 512 bytes each."""
    return Case("tiny", "linear and tanh", lambda: (_linear(), _linear()), (4, 8, 4), split_dim=2)


def _linear():
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh())
