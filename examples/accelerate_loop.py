# A loop with accelerate: bfloat16, accumulation over two batches and clipping, reversed and stored:
# the same losses, fewer bytes of activations. Run: python examples/accelerate_loop.py
import accelerate
import torch

import revnet

for policy in ("reverse", "store"):
    torch.manual_seed(0)
    model = revnet.models.ReversibleTransformer(vocab_size=64, dim=32, depth=8, num_heads=2)
    revnet.set_coupling(model, revnet.FixedPoint())
    revnet.set_policy(model, policy)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
    data = torch.utils.data.DataLoader(torch.randint(64, (32, 33)), batch_size=8)
    model, optimizer, data = accelerator.prepare(model, torch.optim.AdamW(model.parameters()), data)
    losses = []
    for tokens in data:
        with accelerator.accumulate(model):
            loss = model(tokens[:, :-1], targets=tokens[:, 1:])
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    memory = revnet.memory.predict(model, tokens[:, 1:], kwargs={"targets": tokens[:, 1:]})
    print(f"{policy}: {memory.activation_bytes:,} bytes, losses", *losses)
