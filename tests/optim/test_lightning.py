"""Lightning's automatic optimization, whose optimizer runs the backward pass as a closure of its step."""

import lightning
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from revnet import ReversibleBlock, ReversibleSequential
from revnet.optim import StepInBackward

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*LeafSpec", "ignore:.*litlogger"
)


class Training(lightning.LightningModule):
    def __init__(self, *, in_backward):
        super().__init__()
        torch.manual_seed(0)
        self.in_backward = in_backward
        block = ReversibleBlock(nn.Linear(3, 3), nn.Linear(3, 3))
        self.network = nn.Sequential(ReversibleSequential(block), nn.Linear(6, 2))

    def training_step(self, batch, index):
        return self.network(batch[0]).square().mean()

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        if self.in_backward:
            StepInBackward(optimizer)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def fit(*, in_backward, **options):
    """Return the parameters, the optimizer's state and the number of steps after two epochs."""
    torch.manual_seed(1)
    module = Training(in_backward=in_backward)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, DataLoader(TensorDataset(torch.randn(12, 6)), 3))
    return list(module.parameters()), trainer.optimizers[0].state_dict(), trainer.global_step


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_automatic_optimization(precision):
    outcomes = [fit(in_backward=in_backward, precision=precision) for in_backward in (True, False)]
    assert outcomes[0][2] == 8
    torch.testing.assert_close(*outcomes, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient_clip_val": 1.0}, "cannot be accumulated, clipped, unscaled or reduced"),
        ({"accumulate_grad_batches": 2}, r"received a second gradient before `optimizer.step\(\)`"),
    ],
)
def test_refuses_options_that_need_gradients_later(options, message):
    with pytest.raises(RuntimeError, match=message):
        fit(in_backward=True, **options)
