"""Write a function for inference to a file, and compare the file with the function."""

import json
import logging
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from revnet._atomic_file import atomic_path
from revnet._outside_text import shorten
from revnet.errors import MissingDependencyError
from revnet.training.export.inference import Inference

Format = Literal["onnx", "pt2"]
TOLERANCE = 1e-5
"""Largest difference between a file and the model, as a share of the largest output, or of 1 if outputs are below 1."""
BATCHES = (1, 7)
"""Batch sizes at which a file is compared with the model."""
_EXAMPLE_BATCH = 2
"""Batch size of the traced example; a batch of 1 would be a constant in the file."""
_MOST_BYTES = 2**31 - 2**20
"""Largest number of bytes of parameters in an ONNX file. Its format, protobuf, ends at 2 GiB."""
_METADATA = "revnet.json"
"""Name of the metadata in a `.pt2` file."""

_ONNX_HEAD = b"\x08"
"""First byte of an ONNX file, which announces its version; no text begins with it."""

_Run = Callable[[Tensor], Tensor]
_Writer = Callable[[Inference, Path], None]
_Opener = Callable[[Inference, Path], _Run]


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """Result of an export."""

    path: Path
    """File that was written."""

    difference: float
    """Largest difference from the model, as a share of the largest output, or of 1 if outputs are below 1."""

    runtime: str
    """Program that ran the file for the comparison."""

    def __str__(self) -> str:
        batches = " and ".join(map(str, BATCHES))
        return f"{self.path}: {self.runtime} equals PyTorch up to {self.difference:.1e} at batch sizes {batches}"


def write_inference(inference: Inference, path: Path, format: Format) -> ExportReport:
    """Write a file that computes `inference` without revnet, and compare both on random inputs.

    Args:
        inference: The function.
        path: File to write. It is replaced if it exists, but only by a file that has passed the comparison.
        format: "onnx" for ONNX, or "pt2" for a program of `torch.export`.

    Raises:
        MissingDependencyError: A package that writes or runs ONNX is missing.
        NotImplementedError: The function cannot be written in this format.
        OSError: The file cannot be written.
        ValueError: The outputs of the file and the function differ by more than `TOLERANCE`.
    """
    write, open_file, runtime = {
        "onnx": (_write_onnx, _open_onnx, "onnxruntime"),
        "pt2": (_write_pt2, _open_pt2, "torch.export.load"),
    }[format]
    if format == "onnx":
        check_can_be_onnx(inference)
    with atomic_path(path) as temporary:
        temporary.touch()  # A place that cannot be written to is an error before the work.
        with _quiet():
            try:
                write(inference, temporary)
                run = open_file(inference, temporary)
                difference = max(_compare(inference, run, batch) for batch in BATCHES)
            except Exception as error:
                raise _reason(error, format) from error
        if not difference <= TOLERANCE:  # also true for NaN
            raise ValueError(
                f"`format` (={format}) would give a file whose outputs in {runtime} differ from PyTorch by "
                f"{difference:.1e}, more than {TOLERANCE:.0e}, so no file was written; pass another format."
            )
    return ExportReport(path=path, difference=difference, runtime=runtime)


def is_inference_file(path: Path) -> bool:
    """Return whether a file may come from `write_inference`, by its content."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(f"/{_METADATA}") for name in archive.namelist())
    with path.open("rb") as file:
        return file.read(1) == _ONNX_HEAD


def check_can_be_onnx(inference: Inference) -> None:
    """Raise unless the function can be written as ONNX here.

    Raises:
        MissingDependencyError: A package that writes or runs ONNX is missing.
        NotImplementedError: The function rounds to a grid, or is too large for a file.
    """
    if inference.on_grid:
        raise NotImplementedError(
            "`format` (=onnx) is not for streams on a fixed-point grid (`exact`, or LSH attention): onnxruntime rounds "
            "some values to the next step of the grid, which is larger than the tolerance; pass pt2."
        )
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if find_spec(package) is None:
            raise MissingDependencyError.of(package, "a file in the format onnx")
    num_bytes = sum(tensor.nbytes for tensor in inference.module.state_dict().values())
    if num_bytes > _MOST_BYTES:
        raise NotImplementedError(
            f"`format` (=onnx) holds at most 2 GiB, but the model has {num_bytes / 2**30:.1f} GiB; pass pt2."
        )


def _write_onnx(inference: Inference, path: Path) -> None:
    program = torch.onnx.export(
        inference.module,
        (_draw(inference, _EXAMPLE_BATCH),),
        dynamo=True,
        dynamic_shapes=_dynamic_shapes(inference),
        input_names=[inference.input_name],
        output_names=[inference.output_name],
        verbose=False,
    )
    assert program is not None
    model: Any = program.model
    for node in model.graph:
        node.metadata_props.clear()  # the names of files and the lines of code on this machine
    model.metadata_props.clear()
    model.metadata_props.update(inference.metadata)
    program.save(path, external_data=False)


def _dynamic_shapes(inference: Inference) -> tuple[dict[int, Any]]:
    return ({dim: torch.export.Dim(size.name, max=size.most) for dim, size in inference.free_sizes.items()},)


def _open_onnx(inference: Inference, path: Path) -> _Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(x: Tensor) -> Tensor:
        (output,) = session.run([inference.output_name], {inference.input_name: x.numpy()})
        return torch.from_numpy(output)

    return run


def _write_pt2(inference: Inference, path: Path) -> None:
    example = (_draw(inference, _EXAMPLE_BATCH),)
    with torch.no_grad():
        program = torch.export.export(inference.module, example, dynamic_shapes=_dynamic_shapes(inference))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # the names of files and the lines of code on this machine
    # Given a path, PyTorch writes the name of the temporary file into the archive.
    archive = BytesIO()
    torch.export.save(program, archive, extra_files={_METADATA: json.dumps(inference.metadata, indent=2)})
    path.write_bytes(archive.getbuffer())


def _open_pt2(inference: Inference, path: Path) -> _Run:
    return torch.export.load(BytesIO(path.read_bytes())).module()


def _compare(inference: Inference, run: _Run, batch: int) -> float:
    """Return the largest difference between a file and the function, for random inputs."""
    x = _draw(inference, batch)
    outputs = []
    for function in (inference.module, run):
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            outputs.append(function(x).double())
    expected, actual = outputs
    if expected.shape != actual.shape:
        return float("inf")
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=1))


def _draw(inference: Inference, batch: int) -> Tensor:
    return inference.draw_input(batch, torch.Generator().manual_seed(batch))


def _reason(error: Exception, format: Format) -> Exception:
    """Return the innermost reason why PyTorch could not write the file, as an error in one line."""
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    if isinstance(error, OSError):  # The disk is full, for instance.
        return error
    reason = shorten(" ".join(str(error).split()), 300) or type(error).__name__
    return NotImplementedError(
        f"`format` (={format}) cannot hold this model, says PyTorch: {reason}; pass another format."
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the warnings of the exporters, which are about their own code."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
