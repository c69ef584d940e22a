"""`MemoryBudget` in two processes under DDP: one plan for both, for the smallest budget and the largest batch."""

import os
import re

import lightning.pytorch as lightning
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, TensorDataset

from revnet import BudgetError, PredictionError
from revnet.lightning import MemoryBudget
from revnet.training.run.trainer import quiet
from tests.distributed.processes import assert_passed, run_checks
from tests.integrations.test_lightning import COPIES_OF_THE_LOSS, ReadsTheLoss, Watch, WithoutDropout, make

KIB = 1024
LARGER = 48
"""Batch size of the second process, where it differs from 32."""


def fit(module, *callbacks, batch_size=32, num_epochs=1, ckpt_path=None, folder=None):
    """Train under DDP, on other data in each process."""
    # Lightning reads these variables, which torchrun sets.
    rank = str(dist.get_rank())
    os.environ |= {"TORCHELASTIC_RUN_ID": "0", "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2"}
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    torch.manual_seed(dist.get_rank())
    data = TensorDataset(torch.randn(2 * batch_size, 8), torch.randint(5, (2 * batch_size,)))
    with quiet():
        trainer = lightning.Trainer(
            max_epochs=num_epochs,
            callbacks=list(callbacks),
            accelerator="cpu",
            devices=2,
            strategy=DDPStrategy(process_group_backend="gloo"),
            use_distributed_sampler=False,
            logger=False,
            enable_progress_bar=False,
            enable_checkpointing=folder is not None,
            default_root_dir=folder,
            enable_model_summary=False,
        )
        trainer.fit(module, DataLoader(data, batch_size=batch_size), ckpt_path=ckpt_path)


def gathered(value):
    values = [None, None]
    dist.all_gather_object(values, value)
    return values


def own(first, second):
    """Return the value of this process."""
    return (first, second)[dist.get_rank()]


def check_same_plan_and_weights():
    module, callback, watch = make(), MemoryBudget(own("340KiB", "320KiB")), Watch()
    fit(module, callback, watch)
    policies, other = gathered(module.net.policies)
    assert policies == other
    assert len({type(policy) for policy in policies}) > 1
    assert len(set(gathered(callback.planned_peak_bytes))) == 1
    # The smaller budget counts. DDP allocates its buckets again in the second update, where `Watch` sees them.
    assert callback.planned_peak_bytes <= 320 * KIB
    gradient_bytes = sum(parameter.nbytes for parameter in module.parameters())
    assert callback.planned_peak_bytes - gradient_bytes < max(watch.peaks)
    assert max(watch.peaks) <= callback.planned_peak_bytes + COPIES_OF_THE_LOSS
    assert [plan is not None for plan in gathered(callback.plan)] == [True, False]
    by_hand = make()
    by_hand.net.set_policies(policies)
    fit(by_hand)
    assert all(map(torch.equal, module.state_dict().values(), by_hand.state_dict().values()))
    assert len(set(gathered(float(module.head.weight.detach().double().sum())))) == 1


def check_largest_batch():
    """The second process has the larger batch, and so makes the plan."""
    module, callback = make(), MemoryBudget("380KiB")
    fit(module, callback, batch_size=own(32, LARGER))
    expected, reference = make(), MemoryBudget("380KiB")
    fit(expected, reference, batch_size=LARGER)
    assert [plan is not None for plan in gathered(callback.plan)] == [False, True]
    assert gathered(module.net.policies) == [expected.net.policies] * 2
    assert gathered(callback.planned_peak_bytes) == [reference.planned_peak_bytes] * 2


def check_errors():
    with pytest.raises(BudgetError, match=re.escape("`budget` (=200.0 KiB) is")) as caught:
        fit(make(), MemoryBudget(own("1MiB", "200KiB")))
    assert caught.value.missing_bytes > 0
    with pytest.raises(PredictionError, match="take that out of `training_step`"):
        fit(make(ReadsTheLoss), MemoryBudget("1MiB"))


def check_resuming():
    folder = gathered(os.environ["REVNET_TEST_FOLDER"])[0]
    whole = make(WithoutDropout)
    saving = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    fit(whole, MemoryBudget("320KiB"), saving, num_epochs=2, folder=folder)
    resumed, callback = make(WithoutDropout), MemoryBudget(own("400KiB", "320KiB"))
    fit(resumed, callback, num_epochs=2, ckpt_path=f"{folder}/epoch=0.ckpt")
    assert callback.plan is None
    assert gathered(resumed.net.policies) == [whole.net.policies] * 2
    # Another budget in one process makes another plan in both.
    other, callback = make(WithoutDropout), MemoryBudget(own("320KiB", "300KiB"))
    fit(other, callback, num_epochs=2, ckpt_path=f"{folder}/epoch=0.ckpt")
    assert len(set(gathered(str(other.net.policies)))) == 1
    assert gathered(callback.planned_peak_bytes <= 300 * KIB) == [True, True]


CHECKS = {
    "same plan and weights": check_same_plan_and_weights,
    "largest batch": check_largest_batch,
    "errors": check_errors,
    "resuming": check_resuming,
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lightning")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REVNET_TEST_FOLDER", str(folder / "run"))
        return run_checks(__name__, folder)


@pytest.mark.slow  # 15 s
@pytest.mark.parametrize("name", CHECKS)
def test_in_two_processes(name, outcomes):
    assert_passed(outcomes, name)
