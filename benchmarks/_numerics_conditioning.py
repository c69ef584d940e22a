"""Fourth table of `numerics.py`: training with and without the conditioning penalty."""

import time
from statistics import median

import torch
import torch.nn.functional as F
from _memory_page import Row, Section, table
from _numerics_nets import Digits, PerceptronClassifier

from revnet.numerics import conditioning_penalty, measure_drift

DEPTH, WIDTH, SCALE, BATCH, LR = 32, 32, 4, 100, 1e-3
WEIGHTS = (0.0, 1.0, 10.0)
SEEDS = (0, 1)


def conditioning_section(num_steps: int) -> Section:
    """Train with each weight of the penalty, from the same initial weights with the same batches."""
    rows = [trained(weight, seed, num_steps) for seed in SEEDS for weight in WEIGHTS]
    cells = [
        [
            f"{row['weight']:g}",
            str(row["seed"]),
            f"{row['first_drift']:.1e}",
            f"{row['last_drift']:.1e}",
            f"{row['last_amplification']:.2f}",
            f"{row['last_gradient_error']:.1e}",
            f"{row['last_loss']:.3f}",
            f"{row['accuracy_percent']:.1f}",
            f"{row['step_ms']:.0f}",
        ]
        for row in rows
    ]
    head = [
        "weight",
        "seed",
        "initial error",
        "final error",
        "amplification",
        "gradient error",
        "loss, last 20",
        "accuracy, %",
        "step, ms",
    ]
    lines = [
        "## Conditioning",
        "",
        f"{DEPTH} perceptron blocks of {WIDTH} features, initial weights times {SCALE}, on the digits: {num_steps}",
        f"updates of {BATCH} images by Adam, learning rate {LR:g}. The penalty is",
        "`conditioning_penalty(blocks, x, num_blocks=1)`, times *weight*, in every update. Accuracy is on the training",
        "images. Errors are from `measure_drift` on one batch.",
        "",
        *table(head, cells),
    ]
    return Section(lines, rows)


def trained(weight: float, seed: int, num_steps: int) -> Row:
    torch.manual_seed(seed)
    model = PerceptronClassifier(DEPTH, WIDTH, SCALE)
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    digits = Digits(BATCH, seed)
    probe = digits.batch()
    first = measure_drift(model, probe[0], loss=lambda logits: F.cross_entropy(logits, probe[1]))
    losses, seconds = [], []
    for _ in range(num_steps):
        start = time.perf_counter()
        images, labels = digits.batch()
        loss = F.cross_entropy(model(images), labels)
        losses.append(loss.item())
        if weight:
            x = model.stem(images.flatten(1))
            loss = loss + weight * conditioning_penalty(model.blocks, x, num_blocks=1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    last = measure_drift(model, probe[0], loss=lambda logits: F.cross_entropy(logits, probe[1]), gradients=True)
    with torch.no_grad():
        accuracy = (model(digits.images).argmax(1) == digits.labels).float().mean().item()
    assert last.gradient is not None
    row = {
        "weight": weight,
        "seed": seed,
        "first_drift": first.error,
        "last_drift": last.error,
        "last_amplification": last.amplification,
        "last_gradient_error": last.gradient.relative_error,
        "last_loss": sum(losses[-20:]) / len(losses[-20:]),
        "accuracy_percent": 100 * accuracy,
        "step_ms": 1000 * median(seconds),
    }
    print(row, flush=True)
    return row
