"""`revnet models`."""

import csv
from importlib.resources import files

from revnet._text_table import aligned


def models() -> None:
    """List all models with their parameters and the FLOPs of a forward pass.

    The figures are for models as published, with the number of classes and the image size in the table, and color
    images. A multiply-add counts as two FLOPs, as in PyTorch.
    """
    rows = [("name", "parameters", "image", "classes", "MFLOPs", "reversible")]
    # The figures come with the package: importing PyTorch and counting would take many seconds.
    table = files("revnet") / "models" / "published.csv"
    for model in csv.DictReader(table.read_text(encoding="utf-8").splitlines()):
        size, flops = model["image_size"], int(model["flops"])
        numbers = (f"{int(model['parameters']):,}", f"{size}x{size}", model["num_classes"], f"{flops / 1e6:,.1f}")
        rows.append((model["name"], *numbers, model["is_reversible"]))
    print("\n".join(aligned(rows, num_left=1)))
