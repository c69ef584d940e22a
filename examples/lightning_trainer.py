# Lightning's Trainer with `MemoryBudget`: a budget that needs reversal, and one that stored
# activations fit: the same losses. Run: python examples/lightning_trainer.py
import lightning.pytorch as lightning
import torch

import revnet
from revnet.lightning import MemoryBudget


class LanguageModel(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = revnet.models.ReversibleTransformer(vocab_size=64, dim=32, depth=8, num_heads=2)
        revnet.set_coupling(self.model, revnet.FixedPoint())

    def training_step(self, tokens):
        return self.model(tokens[:, :-1], targets=tokens[:, 1:])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


for policy, budget in {"reverse": "5MiB", "store": "64MiB"}.items():
    torch.manual_seed(0)
    module, callback, losses = LanguageModel(), MemoryBudget(budget, policies=["reverse", "store"]), []
    module.on_train_batch_end = lambda outputs, *_, losses=losses: losses.append(outputs["loss"].item())
    loader = torch.utils.data.DataLoader(torch.randint(64, (32, 33)), batch_size=8)
    lightning.Trainer(max_epochs=1, callbacks=[callback], accelerator="cpu").fit(module, loader)
    print(f"{policy}: {callback.planned_peak_bytes:,} bytes, losses", *losses)
