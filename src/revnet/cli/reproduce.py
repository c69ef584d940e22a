"""`revnet reproduce`."""

import difflib
from pathlib import Path
from typing import Any

from revnet._paths import expand_user
from revnet.cli._errors import UsageError


def reproduce(
    table: str,
    *,
    data: str | None = None,
    models: str | None = None,
    seeds: str = "0",
    epochs: int | None = None,
    precision: str | None = None,
    device: str | None = None,
    num_threads: int | None = None,
    num_workers: int | None = None,
    out_dir: str | None = None,
    report_only: bool = False,
) -> None:
    """Train the networks in a table of results, and compare them with the paper.

    The tables are cifar10, cifar100 and imagenet, trained by the paper's recipe. A suffix selects another recipe:
    `-modern` for a modern recipe, `-quick` for a short one that runs on a CPU, and `-cpu`, for cifar10, for one of a
    few hours. To continue an interrupted table, run the same command again.

    Runs are independent. To spread a table over several machines, split it with `--models` and `--seeds`, copy the
    folders of the runs into one folder, and run the command again with `--report-only`.

    Examples:
        revnet reproduce cifar10-quick --data path/to/cifar10 --seeds 0,1
        revnet reproduce cifar100 --models resnet164,revnet164 --device cuda
        revnet reproduce cifar100 --report-only

    Args:
        table: Name of the table.
        data: Name or path of the data set; downloaded from the Hugging Face hub by default.
        models: Rows of the table, separated by commas; all by default.
        seeds: Seeds, separated by commas; each row is trained once per seed.
        epochs: Number of epochs, which the table states; as in the recipe by default.
        precision: Precision of the arithmetic, 32-true or bf16-mixed; as in the recipe by default.
        device: Device to train on: auto, cpu, cuda, mps; as in the recipe by default.
        num_threads: Number of CPU threads; as in the recipe by default.
        num_workers: Number of processes that decode images; as in the recipe by default.
        out_dir: Folder of the runs and of the table; `runs/<table>` by default.
        report_only: Write the table from existing runs, without training.
    """
    from revnet.paper.tables import TABLES

    if table not in TABLES:
        close = difflib.get_close_matches(table, TABLES, n=1)
        hint = f"did you mean `{close[0]}`?" if close else f"the tables are {', '.join(TABLES)}."
        raise UsageError(f"unknown table `{table}`; {hint}")
    if not all(seed.strip().isdecimal() for seed in seeds.split(",")):
        raise UsageError(f"`--seeds` (={seeds}) must be nonnegative integers separated by commas, such as 0,1.")
    given: dict[str, Any] = {
        "data": data,
        "epochs": epochs,
        "precision": precision,
        "device": device,
        "num_threads": num_threads,
        "num_workers": num_workers,
    }
    folder = Path("runs", table) if out_dir is None else expand_user(out_dir)
    options = {"models": models, "seeds": seeds, "epochs": epochs, "precision": precision}
    command = " ".join(
        [f"revnet reproduce {table}", *(f"--{name} {value}" for name, value in options.items() if value is not None)]
    )

    from revnet.paper.reproduction import reproduce as reproduce_table  # PyTorch and Lightning load here

    reproduce_table(
        TABLES[table],
        folder,
        models=None if models is None else [model.strip() for model in models.split(",")],
        seeds=[int(seed) for seed in seeds.split(",")],
        report_only=report_only,
        command=command,
        **{name: value for name, value in given.items() if value is not None},
    )
    written = [str(path) for name in ("table.csv", "table.png") if (path := folder / name).is_file()]
    print(f"\n{(folder / 'table.md').read_text()}\nwrote {', '.join([str(folder / 'table.md'), *written])}")
