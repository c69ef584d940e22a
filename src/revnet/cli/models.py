"""`revnet models`."""


def models() -> None:
    """List all models with their parameters and the FLOPs of a forward pass.

    Models are built as published, for the number of classes and the image size in the table, with color images. A
    multiply-add counts as two FLOPs, as in PyTorch.
    """
    import torch

    from revnet.memory import count_flops
    from revnet.models import create_model, list_models, published_image_size

    rows = [("name", "parameters", "image", "classes", "MFLOPs", "reversible")]
    with torch.device("meta"):  # shapes only: nothing is allocated or computed
        for name in list_models():
            model, size = create_model(name), published_image_size(name)
            num_parameters = sum(parameter.numel() for parameter in model.parameters())
            flops = count_flops(model, torch.empty(1, 3, size, size))
            numbers = (f"{num_parameters:,}", f"{size}x{size}", f"{model.num_classes}", f"{flops / 1e6:,.1f}")
            rows.append((name, *numbers, "yes" if model.is_reversible else "no"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *cells in rows:
        right = [f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True)]
        print("  ".join([f"{name:{widths[0]}}", *right]))
