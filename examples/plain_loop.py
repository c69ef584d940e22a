# A reversible language model in a plain PyTorch loop, and its stored twin: the same losses, fewer
# bytes of activations. `FixedPoint()` makes the losses equal to the last digit.
# Run: python examples/plain_loop.py
import torch

import revnet

for policy in ("reverse", "store"):
    torch.manual_seed(0)
    model = revnet.models.ReversibleTransformer(vocab_size=64, dim=32, depth=8, num_heads=2)
    revnet.set_coupling(model, revnet.FixedPoint())
    revnet.set_policy(model, policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(4):
        tokens = torch.randint(64, (8, 33))
        loss = model(tokens[:, :-1], targets=tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    memory = revnet.memory.predict(model, tokens[:, 1:], kwargs={"targets": tokens[:, 1:]})
    print(f"{policy}: {memory.activation_bytes:,} bytes, losses", *losses)
