# What timm's training script does, with timm's own parts: model, optimizer with layer decay, schedule,
# Mixup and EMA. Reversed and stored: the same losses, fewer bytes of activations.
# Run: python examples/timm_training.py
import timm
import torch
from timm import data, optim, scheduler, utils
from timm.loss import SoftTargetCrossEntropy

import revnet.timm  # registers the models

for policy in ("reverse", "store"):
    utils.random_seed(0)
    model = timm.create_model("revnet38", num_classes=10)
    revnet.set_coupling(model, revnet.FixedPoint())
    model.set_grad_checkpointing(policy == "reverse")
    optimizer = optim.create_optimizer_v2(model, "adamw", lr=1e-3, layer_decay=0.9)
    schedule, _ = scheduler.create_scheduler_v2(optimizer, "cosine", num_epochs=4)
    mixup, ema = data.Mixup(mixup_alpha=0.8, num_classes=10), utils.ModelEmaV3(model)
    losses = []
    for epoch in range(4):
        images, targets = mixup(torch.randn(8, 3, 32, 32), torch.randint(10, (8,)))
        loss = SoftTargetCrossEntropy()(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update(model)
        schedule.step(epoch + 1)
        losses.append(loss.item())
    print(f"{policy}: {revnet.memory.predict(model, images).activation_bytes:,} bytes, losses", *losses)
