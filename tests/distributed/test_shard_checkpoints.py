"""A sharded checkpoint loads on another number of processes: the same weights, and the same optimizer state."""

import os
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from revnet.distributed import shard_blocks
from revnet.models import ReversibleViT, RevNet
from tests.distributed.gradients import whole
from tests.distributed.processes import assert_all_pass

MODELS = {
    "vit": lambda: ReversibleViT(img_size=8, patch_size=4, dim=8, depth=2, num_heads=2, num_classes=5),
    "revnet": lambda: RevNet(num_blocks=(2, 2), widths=(4, 6, 8)),
}
FOLDER = "REVNET_TEST_CHECKPOINTS"


def folder_of(name: str) -> Path:
    return Path(os.environ[FOLDER]) / name


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    torch.manual_seed(1)
    x = torch.randn(4, 3, 8, 8)  # the same in all processes, so that batch norm sees the same
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def save(name: str) -> None:
    torch.manual_seed(0)
    model = shard_blocks(MODELS[name]())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    train(model, optimizer)
    states = get_state_dict(model, optimizer)
    dcp.save(dict(zip(("model", "optimizer"), states, strict=True)), checkpoint_id=folder_of(name) / "sharded")
    all_whole = get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
    if dist.get_rank() == 0:
        torch.save(all_whole, folder_of(name) / "whole.pt")


def load(name: str, unit: str = "block") -> None:
    """Load the checkpoint into another model, which is sharded if there is a process group, and compare."""
    torch.manual_seed(dist.get_rank() + 1 if dist.is_initialized() else 1)
    model = MODELS[name]()
    if dist.is_initialized():
        shard_blocks(model, unit=unit)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.load(states, checkpoint_id=folder_of(name) / "sharded", no_dist=not dist.is_initialized())
    set_state_dict(model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
    expected_model, expected_optimizer = torch.load(folder_of(name) / "whole.pt")
    for key, tensor in model.state_dict().items():
        assert torch.equal(whole(tensor), expected_model[key]), key
    for key, parameter in model.named_parameters():
        for part, value in optimizer.state[parameter].items():
            assert torch.equal(whole(value), expected_optimizer["state"][key][part]), (key, part)


SAVE = {name: partial(save, name) for name in MODELS}
LOAD = {f"{name}, {unit}": partial(load, name, unit) for name in MODELS for unit in ("block", "function")}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Save the checkpoints of all models with two processes."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name in MODELS:
        (folder / name).mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOLDER, str(folder))
        assert_all_pass(__name__, tmp_path_factory.mktemp("processes"), name="SAVE")
        yield folder


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("name", MODELS)
def test_loads_on_one_process(name, checkpoints):
    load(name)


@pytest.mark.slow
def test_loads_on_four_processes(checkpoints, tmp_path):
    assert_all_pass(__name__, tmp_path, 4, "LOAD")
