"""`revnet models`."""

from __future__ import annotations

_IMAGE_SHAPE = (3, 32, 32)


def models() -> None:
    """List all models: parameters, and FLOPs of one forward pass on a 32x32 colour image, for 10 classes.

    A multiply-add counts as two FLOPs, as in PyTorch.
    """
    import torch

    from revnet.memory import count_flops
    from revnet.models import create_model, list_models

    rows = [("name", "parameters", "MFLOPs", "reversible")]
    with torch.device("meta"):  # shapes only: nothing is allocated or computed
        for name in list_models():
            model = create_model(name)
            num_parameters = sum(parameter.numel() for parameter in model.parameters())
            flops = count_flops(model, torch.empty(1, *_IMAGE_SHAPE))
            is_reversible = "yes" if getattr(model, "is_reversible", False) else "no"
            rows.append((name, f"{num_parameters:,}", f"{flops / 1e6:,.1f}", is_reversible))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *cells in rows:
        right = [f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True)]
        print("  ".join([f"{name:{widths[0]}}", *right]))
