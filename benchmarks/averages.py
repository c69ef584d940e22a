r"""Batch norm: validation accuracy in the first epochs by how the running statistics are averaged.

    python benchmarks/averages.py --seeds 0,1,2
    python benchmarks/averages.py --name cifar10 --data FOLDER --num-images 10000 --epochs 5 --recipe \
        configs/cifar10/quick/revnet38.yaml

Training does not read the running statistics, so a single run measures all: after each update, the script also computes
other averages of the same statistics, and after each validation it validates the network again with these.
Writes a page and its CSV to benchmarks/results/.
"""

import argparse
import datetime
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _memory_page import Row, table, write_csv
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from revnet._hardware import hardware_name
from revnet._provenance import describe_machine
from revnet.training import TrainConfig, train

RESULTS = Path(__file__).parent / "results"


WEIGHTS: dict[str, Callable[[float, int], float]] = {
    "revnet": lambda momentum, n: max(momentum, 10 / (n + 9)),
    "plain mean": lambda momentum, n: max(momentum, 1 / n),
    "PyTorch": lambda momentum, n: momentum,
}
"""Weight of batch number n in the averages, by the momentum. The first is revnet's, the last PyTorch's."""


class OtherAverages(Callback):
    """Keeps averages with other weights, and validates with them, too."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self._norms: list[_BatchNorm] = []
        self._latest: list[Tensor] = []
        self._averages: dict[str, list[Tensor]] = {}
        self._batches: list[tuple[Tensor, Tensor]] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start all averages."""
        self._norms = [module for module in pl_module.modules() if isinstance(module, _BatchNorm)]
        self._latest = [average.double() for average in self._buffers()]
        self._averages = {name: [average.clone() for average in self._latest] for name in WEIGHTS}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Average the statistics of the batch."""
        momentum, count = self._norms[0].momentum, int(self._norms[0].num_batches_tracked)
        weights = {name: weight(momentum, count) for name, weight in WEIGHTS.items()}
        for index, (latest, buffer) in enumerate(zip(self._latest, self._buffers(), strict=True)):
            of_batch = latest + (buffer - latest) / weights["revnet"]
            for name, averages in self._averages.items():
                averages[index].lerp_(of_batch, weights[name])
            latest.copy_(buffer)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the images."""
        self._batches.append(batch)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate with all averages."""
        row: Row = {"epoch": trainer.current_epoch + 1, "updates": trainer.global_step}
        for name, averages in self._averages.items():
            self._set_buffers(averages)
            row[f"{name} accuracy"], row[f"{name} loss"] = self._validate(trainer, pl_module)
        self._set_buffers(self._latest)
        accuracy, _ = self._validate(trainer, pl_module)
        assert abs(accuracy - float(trainer.callback_metrics["val_accuracy"])) < 1e-6  # a float32
        self.rows.append(row)
        self._batches.clear()

    def _buffers(self) -> list[Tensor]:
        return [buffer.data for norm in self._norms for buffer in (norm.running_mean, norm.running_var)]

    def _set_buffers(self, averages: Sequence[Tensor]) -> None:
        for buffer, average in zip(self._buffers(), averages, strict=True):
            buffer.copy_(average)

    def _validate(self, trainer: Trainer, pl_module: LightningModule) -> tuple[float, float]:
        num_right, loss, num_images = 0, 0.0, 0
        with torch.no_grad(), trainer.precision_plugin.val_step_context():
            for images, labels in self._batches:
                logits = pl_module.saved_module.model(images).double()
                num_right += int((logits.argmax(1) == labels).sum())
                loss += float(F.cross_entropy(logits, labels, reduction="sum"))
                num_images += len(labels)
        return num_right / num_images, loss / num_images


def first_images(folder: Path, num_images: int, subset: Path) -> None:
    """Write the first images of a data set of parquet files in the layout of the hub, and its test set."""
    from pyarrow import parquet

    for split, count in (("train", num_images), ("test", num_images)):
        (file,) = folder.glob(f"{split}-*.parquet")
        parquet.write_table(parquet.read_table(file).slice(0, count), subset / file.name)


def measure(given: argparse.Namespace, seed: int, data: str) -> list[Row]:
    """Train once, and return a row for each epoch."""
    config = TrainConfig(data=data) if given.recipe is None else TrainConfig.load(given.recipe)
    config = replace(config, data=data, seed=seed, val_fraction=0.1, num_threads=1, device="cpu")
    if given.epochs is not None:
        config = replace(config, epochs=given.epochs)
    averages = OtherAverages()
    with tempfile.TemporaryDirectory() as folder:
        result = train(replace(config, out_dir=folder), quiet=True, callbacks=[averages])
    return [{"seed": seed, **row, "test_accuracy": result.test.accuracy} for row in averages.rows]


def page(rows: Sequence[Row], subject: str, header: Sequence[str]) -> str:
    """Return the rows as a page."""
    columns = ["seed", "epoch", "updates", *[f"{name} %" for name in WEIGHTS], *[f"{name} loss" for name in WEIGHTS]]
    cells = [
        [
            f"{row['seed']}",
            f"{row['epoch']}",
            f"{row['updates']:,}",
            *[f"{100 * row[f'{name} accuracy']:.2f}" for name in WEIGHTS],
            *[f"{row[f'{name} loss']:.4g}" for name in WEIGHTS],
        ]
        for row in rows
    ]
    tests = {row["seed"]: row["test_accuracy"] for row in rows}
    lines = [
        f"# Running statistics of batch norm in the first updates: RevNet-38 on {subject}",
        "",
        *header,
        "",
        "Accuracy and loss on the validation images with three kinds of running statistics, from one run for each",
        "seed, since training does not read them. Batch number n has the weight max(momentum, 10 / (n + 9)) in revnet,",
        "max(momentum, 1 / n) in the plain mean, and the momentum in PyTorch, where the statistics start at mean 0 and",
        "variance 1.",
        "",
        *table(columns, cells),
        "Accuracy on the test set after the last epoch, with the running statistics of revnet: "
        + ", ".join(f"{100 * accuracy:.2f} % (seed {seed})" for seed, accuracy in tests.items())
        + ".",
    ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write the results."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="digits", help="`digits`, or a folder of parquet files as on the hub")
    parser.add_argument("--num-images", type=int, help="number of images of the folder, of which a tenth validates")
    parser.add_argument("--recipe", type=Path, help="recipe of the run; by default the defaults of `revnet train`")
    parser.add_argument("--epochs", type=int, help="epochs, instead of the recipe's")
    parser.add_argument("--seeds", default="0", help="seeds, one run each")
    parser.add_argument("--name", default="digits", help="name of the data in the title and in the names of the files")
    parser.add_argument("--out-dir", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as subset:
        if given.num_images is not None:
            first_images(Path(given.data).expanduser(), given.num_images, Path(subset))
        data = given.data if given.num_images is None else subset
        for seed in given.seeds.split(","):
            rows += measure(given, int(seed), data)
    stem = f"averages-{given.name}_{hardware_name()}_{datetime.date.today()}"
    header = describe_machine(shlex.join(["python", "benchmarks/averages.py", *arguments]))
    text = page(rows, given.name, header)
    given.out_dir.mkdir(parents=True, exist_ok=True)
    (given.out_dir / f"{stem}.md").write_text(text)
    write_csv(rows, given.out_dir / f"{stem}.csv")
    print(text)


if __name__ == "__main__":
    main()
