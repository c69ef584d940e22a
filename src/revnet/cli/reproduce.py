"""`revnet reproduce`."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any


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
    output_dir: str | None = None,
    report_only: bool = False,
) -> None:
    """Train the networks of a result table, and write it beside the paper's numbers.

    The tables are cifar10, cifar100 and imagenet, by the paper's recipe; with `-modern` behind the name by a recipe of
    today, with `-quick` by a short one for a CPU. A run that was stopped goes on when the same command is given again.
    Runs share nothing but the code: spread a table over machines by `--models` and `--seeds`, copy the folders of the
    runs together, and give the command once more with `--report-only`.

    Examples:
        revnet reproduce cifar10-quick --data path/to/cifar10 --seeds 0,1
        revnet reproduce cifar100 --models resnet164,revnet164 --device cuda
        revnet reproduce cifar100 --report-only

    Args:
        table: Which table.
        data: The data set, by name or path, if not from the Hugging Face hub.
        models: Rows of the table, separated by commas; all if not given.
        seeds: A run of each row for each of these, separated by commas.
        epochs: Epochs in place of the recipe's; the table says what was made.
        precision: Arithmetic in place of the recipe's: 32-true or bf16-mixed.
        device: Where to train: auto, cpu, cuda, mps.
        num_threads: Threads on the CPU.
        num_workers: Processes that decode images.
        output_dir: Folder of the runs and of the table; `runs/<table>` if not given.
        report_only: Make no runs; write the table of those that are there.
    """
    from revnet.paper.tables import TABLES

    if table not in TABLES:
        close = difflib.get_close_matches(table, TABLES, n=1)
        hint = f"did you mean `{close[0]}`?" if close else f"the tables are {', '.join(TABLES)}."
        raise ValueError(f"`{table}` is no table; {hint}")
    if not all(seed.strip().isdecimal() for seed in seeds.split(",")):
        raise ValueError(f"`--seeds` (={seeds}) must be whole numbers separated by commas, such as 0,1.")
    given: dict[str, Any] = {
        "data": data,
        "epochs": epochs,
        "precision": precision,
        "device": device,
        "num_threads": num_threads,
        "num_workers": num_workers,
    }
    folder = Path("runs", table) if output_dir is None else Path(output_dir).expanduser()
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
    print(f"\n{(folder / 'table.md').read_text()}\nwrote {folder / 'table.md'} and {folder / 'table.csv'}")
