# Ray Train on two workers: the same losses, fewer bytes. Run: python examples/ray_train.py
import ray.train.torch
import torch

import revnet


def train(settings):
    torch.manual_seed(0)  # every worker begins with the same weights
    model = revnet.models.ReversibleTransformer(vocab_size=64, dim=32, depth=8, num_heads=2)
    revnet.set_coupling(model, revnet.FixedPoint())
    revnet.set_policy(model, settings["policy"])
    parallel = ray.train.torch.prepare_model(model)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    torch.manual_seed(ray.train.get_context().get_world_rank())  # every worker reads its own data
    for _ in range(4):
        tokens = torch.randint(64, (8, 33))
        loss = parallel(tokens[:, :-1], targets=tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    memory = revnet.memory.predict(model, tokens[:, 1:], kwargs={"targets": tokens[:, 1:]})
    return f"{settings['policy']}: {memory.activation_bytes:,} bytes, losses", *losses


for settings in ({"policy": "reverse"}, {"policy": "store"}):
    workers = ray.train.ScalingConfig(num_workers=2)
    trainer = ray.train.torch.TorchTrainer(train, train_loop_config=settings, scaling_config=workers)
    print(*trainer.fit().return_value)
