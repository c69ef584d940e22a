# Make a vision transformer reversible for training, and deploy it as the ordinary network that it was.
# With BDIA, evaluation mode computes the original residual network, on a fixed-point grid. Needs timm.
# Run: python examples/convert_vit.py
import timm
import torch
import torch.nn.functional as F

import revnet
from revnet.conversion import BDIA
from revnet.data.sources.digits import load_digits


def inputs_of(split):
    """Return digits as images of three channels, and their labels."""
    images = F.interpolate((split.images.float() / 255 - 0.3) / 0.37, size=(32, 32))
    return images.expand(-1, 3, -1, -1), split.labels


def main(num_updates=800):
    torch.manual_seed(0)
    options = {"img_size": 32, "patch_size": 8, "num_classes": 10, "embed_dim": 96, "depth": 6, "num_heads": 3}
    model = timm.create_model("vit_tiny_patch16_224", **options)  # pretrained=True for trained weights
    data = load_digits()
    images, labels = inputs_of(data.train)
    before = revnet.memory.predict(model, images[:64]).activation_bytes
    revnet.convert(model.blocks, BDIA(0.25))
    after = revnet.memory.predict(model, images[:64]).activation_bytes
    print(f"activations of a step: {before:,} bytes before, {after:,} after")

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, num_updates)
    for update in range(num_updates):
        rows = torch.randint(len(images), (64,))
        loss = F.cross_entropy(model(images[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if update % 100 == 0 or update == num_updates - 1:
            print(f"update {update}: loss {loss.item():.3f}", flush=True)

    model.eval()
    images, labels = inputs_of(data.test)
    with torch.no_grad():
        on_the_grid = model(images)
        revnet.convert(model, back=True)  # An ordinary model again: export it, quantize it, publish it.
        deployed = model(images)
    correct = (deployed.argmax(1) == labels).float().mean().item()
    print(f"accuracy of the ordinary network: {correct:.3f}")
    print(f"largest difference of the logits: {(deployed - on_the_grid).abs().max().item():.1e}")


if __name__ == "__main__":
    main()
