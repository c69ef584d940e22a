"""Units that a plan decides on."""

import pytest
import torch
from torch import nn

from revnet import Checkpoint, PolicySequential, Reverse, ReversibleBlock, ReversibleSequential, Store
from revnet.memory import plan
from revnet.memory.planning._units import set_policies
from revnet.models import RevNet


def test_units_are_in_the_order_in_which_they_run():
    planned = plan(RevNet(num_blocks=(1, 1), widths=(8, 8, 16)), torch.empty(2, 3, 8, 8, device="meta"), budget="1GiB")
    names = ["stem", "stages.0.reversible.blocks.0", "stages.1.downsample"]
    assert [unit.name for unit in planned.units] == names


def test_units_that_run_more_than_once_keep_their_policy():
    shared = ReversibleSequential(*[ReversibleBlock(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(2)])
    tied = ReversibleSequential(*[ReversibleBlock(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(3)])
    tied[1].g = tied[2].f
    around = PolicySequential(ReversibleSequential(ReversibleBlock(nn.Linear(2, 2), nn.Linear(2, 2))))
    unused = PolicySequential(nn.Linear(4, 4))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared, self.tied, self.around, self.unused = shared, tied, around, unused

        def forward(self, x):
            return self.around(self.tied(self.shared(self.shared(x))))

    planned = plan(Model(), torch.randn(3, 4), budget="1GiB")
    assert [unit.name for unit in planned.units] == ["tied.blocks.0", "around.0.blocks.0"]


def test_sets_policies_by_holder_and_index():
    model = nn.Sequential(ReversibleSequential(*[ReversibleBlock(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(3)]))
    set_policies(model, {("0", 1): Checkpoint(), ("0", 2): Store()})
    assert model[0].policies == (Reverse(), Checkpoint(), Store())


@pytest.mark.parametrize("unit", [("1", 0), ("0", 1)])
def test_rejects_units_that_a_model_does_not_have(unit):
    model = nn.Sequential(ReversibleSequential(ReversibleBlock(nn.Linear(2, 2), nn.Linear(2, 2))))
    with pytest.raises(ValueError, match=f"`model` .* has no unit {unit[1]} in `{unit[0]}`; a plan applies"):
        set_policies(model, {("0", 0): Store(), unit: Store()})
    assert model[0].policies == (Reverse(),)
