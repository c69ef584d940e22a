# DistributedDataParallel under torchrun, reversed and stored: the same losses, fewer bytes.
# Run: torchrun --nproc-per-node 2 examples/torchrun_ddp.py
import torch
import torch.distributed as dist

import revnet

dist.init_process_group("gloo")  # on GPUs: "nccl"
for policy in ("reverse", "store"):
    torch.manual_seed(0)  # every process begins with the same weights
    model = revnet.models.ReversibleTransformer(vocab_size=64, dim=32, depth=8, num_heads=2)
    revnet.set_coupling(model, revnet.FixedPoint())
    revnet.set_policy(model, policy)
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    torch.manual_seed(dist.get_rank())  # every process reads its own data
    losses = []
    for _ in range(4):
        tokens = torch.randint(64, (8, 33))
        loss = parallel(tokens[:, :-1], targets=tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    if dist.get_rank() == 0:
        memory = revnet.memory.predict(model, tokens[:, 1:], kwargs={"targets": tokens[:, 1:]})
        print(f"{policy}: {memory.activation_bytes:,} bytes, losses", *losses)
dist.destroy_process_group()
