# FSDP2 in bfloat16: `shard_blocks` keeps the streams in float32. The same losses, fewer bytes.
# Run: torchrun --nproc-per-node 2 examples/torchrun_fsdp2.py
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy

import revnet

dist.init_process_group("gloo")  # on GPUs: "nccl"
for policy in ("reverse", "store"):
    torch.manual_seed(0)  # every process begins with the same weights
    model = revnet.models.ReversibleTransformer(vocab_size=64, dim=32, depth=8, num_heads=2)
    revnet.set_coupling(model, revnet.FixedPoint())
    revnet.set_policy(model, policy)
    memory = revnet.memory.predict(model, torch.ones(8, 32, dtype=torch.long), autocast=torch.bfloat16)
    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    revnet.distributed.shard_blocks(model, mp_policy=precision)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)  # after sharding
    torch.manual_seed(dist.get_rank())  # every process reads its own data
    losses = []
    for _ in range(4):
        tokens = torch.randint(64, (8, 33))
        loss = model(tokens[:, :-1], targets=tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    if dist.get_rank() == 0:
        print(f"{policy}: {memory.activation_bytes:,} bytes, losses", *losses)
dist.destroy_process_group()
