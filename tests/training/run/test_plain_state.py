import collections
import pathlib
import warnings

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch import Callback
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

from revnet.training import NiceConfig, resume, train
from revnet.training.run.checkpoint import read_checkpoint
from revnet.training.run.checkpoint_folder import CheckpointFolder
from revnet.training.run.plain_state import without_foreign_states
from revnet.training.run.state_digest import digest_state

TINY = {"num_couplings": 2, "hidden_dim": 8, "num_hidden": 1, "batch_size": 600}


class Remembers(Callback):
    """Has a state, and keeps the one that it got back."""

    def __init__(self, state=None):
        self.state, self.restored = state, None

    def state_dict(self):
        return {"best": self.state}

    def load_state_dict(self, state):
        self.restored = state["best"]


@pytest.mark.parametrize(
    ("value", "place"),
    [
        (np.float64(1.5), r"state\['best'\] is .*1\.5.*, of the type numpy\.float64"),
        (
            [0, {"path": pathlib.PurePosixPath("x")}],
            r"state\['best'\]\[1\]\['path'\] is PurePosixPath\('x'\), of the type ",
        ),
        ({np.int64(1): 0}, r"a key of state\['best'\] is .*1.*, of the type numpy\.int64"),
    ],
    ids=["number", "nested", "key"],
)
def test_a_run_continues_without_a_state_that_cannot_be_read(out_dir, value, place):
    other = Remembers({"kept": torch.ones(2)})
    other.__class__ = type("Other", (Remembers,), {})
    with pytest.warns(UserWarning, match=place) as caught:
        train(NiceConfig(epochs=1, out_dir=out_dir, **TINY), quiet=True, callbacks=[Remembers(value), other])
    assert sum("is not saved" in str(warning.message) for warning in caught) == 1
    lost, kept = Remembers(), type(other)()
    assert resume(out_dir, epochs=2, quiet=True, callbacks=[lost, kept]).num_updates == 4
    assert lost.restored is None
    assert torch.equal(kept.restored["kept"], torch.ones(2))


@pytest.mark.parametrize(
    "state",
    [
        {1, 2},
        collections.OrderedDict(a=torch.ones(1)),
        collections.Counter("ab"),
        (1, [2.0, None]),
        torch.Size([2]),
        {},
    ],
    ids=lambda state: type(state).__name__,
)
def test_states_that_can_be_read_are_kept(tmp_path, state):
    checkpoint = {"callbacks": {"mine": state}, "epoch": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert without_foreign_states(checkpoint, set()) == checkpoint
    torch.save(checkpoint, tmp_path / "file")
    assert torch.load(tmp_path / "file", weights_only=True) == checkpoint


def test_digest_of_a_set_does_not_depend_on_its_order():
    first, second = {0, 8}, {8, 0}
    assert list(first) != list(second), "they collide, so the one that came first is first"
    assert digest_state({"a": first}) == digest_state({"a": second})
    assert digest_state({"a": first}) != digest_state({"a": {0, 16}})


def test_shards_of_an_optimizer_without_state_can_be_read(tmp_path):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    path = CheckpointFolder(tmp_path).file(1)
    weights = {f"model.{name}": tensor for name, tensor in get_model_state_dict(model).items()}
    state = {"state_dict": weights, "optimizer_0": get_optimizer_state_dict(model, optimizer)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=path, no_dist=True)
    torch.save({"revnet": {"task": "x"}, "callbacks": {}}, path / "meta.pt")
    (read,) = read_checkpoint(path)["optimizer_states"]
    assert read["state"] == {}
    assert read["param_groups"][0]["params"] == [0, 1]
