# Make a trained ResNet reversible and fine-tune it on CIFAR-10 in less memory. Needs timm and datasets.
# Run: python examples/convert_resnet.py
# Without a connection: python examples/convert_resnet.py FOLDER_OF_PARQUET_FILES --random-weights
import argparse
from pathlib import Path

import datasets
import numpy as np
import timm
import torch
import torch.nn.functional as F

import revnet
from revnet.conversion import Consistent


def images_of(rows):
    """Return a batch of images, normalized, and their labels."""
    arrays = [np.asarray(row["img"].convert("RGB")) for row in rows]
    images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 255
    return (images - 0.47) / 0.25, torch.tensor([row["label"] for row in rows])


def main(arguments=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("data", nargs="?", default="uoft-cs/cifar10", help="name on the hub, or folder")
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--random-weights", action="store_true", help="download no weights")
    parser.add_argument("--num-updates", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=64)
    given = parser.parse_args(arguments)
    source = ("parquet", given.data) if Path(given.data).is_dir() else (given.data, None)
    data = datasets.load_dataset(source[0], data_dir=source[1]).shuffle(seed=0)

    torch.manual_seed(0)
    model = timm.create_model(given.model, pretrained=not given.random_weights, num_classes=10)
    images, _ = images_of(list(data["train"].select(range(given.batch_size))))
    before = revnet.memory.predict(model, images).activation_bytes
    # The first block of a stage changes the shape and stays as it is; the report lists it.
    print(revnet.convert(model, Consistent(0.25), blocks=["layer1", "layer2", "layer3", "layer4"]))
    after = revnet.memory.predict(model, images).activation_bytes
    print(f"activations of a step: {before:,} bytes before, {after:,} after")

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-4, given.num_updates)
    train = data["train"].with_format(None)
    for update in range(given.num_updates):
        rows = torch.randint(len(train), (given.batch_size,)).tolist()
        images, labels = images_of(list(train.select(rows)))
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if update % 20 == 0 or update == given.num_updates - 1:
            print(f"update {update}: loss {loss.item():.3f}", flush=True)

    model.eval()
    correct = 0
    with torch.no_grad():
        for start in range(0, 1000, 100):
            images, labels = images_of(list(data["test"].select(range(start, start + 100))))
            correct += int((model(images).argmax(1) == labels).sum())
    print(f"accuracy on 1,000 test images: {correct / 1000:.3f}")


if __name__ == "__main__":
    main()
