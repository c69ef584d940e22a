"""`revnet plan --largest`: the largest batch, image or patch that fits a budget."""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from revnet.cli._errors import UsageError
from revnet.cli._step_flags import StepFlags
from revnet.training.settings.checks import check_integer

if TYPE_CHECKING:
    from torch import Tensor, nn

    from revnet.cli._build import BuiltStep

Largest = Literal["batch", "image", "patch"]
BUDGET_IS_REQUIRED = "`--budget` is required: the memory that the step may use, such as --budget 16GiB."

_SETTINGS = {
    "reverse all": ("checkpoint", "reverse"),  # parts that are not reversible keep the first
    "checkpoint all": ("checkpoint",),
    "plain autograd": ("store",),
}
"""Policies to compare: names in the order in which they are set."""


_AS_BUILT = "as built"
"""Name of the row of a model that has no units with policies."""


@dataclass(frozen=True, kw_only=True)
class LargestFlags:
    """The options of `revnet plan --largest`, checked before PyTorch is loaded.

    Raises:
        ValueError: An option is out of range, or is missing, or conflicts with another.
    """

    largest: Largest | None
    multiple: int | None
    dims: tuple[int, ...] | None

    @property
    def is_given(self) -> bool:
        """Whether a size is to be found."""
        return self.largest is not None

    def __post_init__(self) -> None:
        if self.multiple is not None:
            check_integer("--multiple", self.multiple, at_least=1, at_most=1_000_000)
            if self.largest not in ("image", "patch"):
                raise UsageError("`--multiple` is for `--largest image` and `--largest patch`; leave it out.")
        if self.dims is not None and self.largest != "patch":
            raise UsageError("`--dims` is for `--largest patch`; leave it out.")
        if self.dims is not None and (not self.dims or len(set(self.dims)) < len(self.dims) or min(self.dims) < 1):
            raise UsageError(
                f"`--dims` (={list(self.dims)}) must be different dimensions of the input, with the batch as 0, "
                "such as [2,3,4]."
            )

    def check_with_step(self, flags: StepFlags, *, measure: bool, has_devices: bool, out_dir: str | None) -> None:
        """Raise unless the size can be found for this step."""
        for flag, is_set in {
            "--measure": measure,
            "--devices": has_devices,
            "--out-dir": out_dir is not None,
        }.items():
            if is_set:
                raise UsageError(f"`{flag}` does not go with `--largest`, which only predicts memory; leave it out.")
        if flags.loss != "sum" and self.largest != "batch":
            raise UsageError(f"`--loss` (={flags.loss}) goes with `--largest batch` only; leave it out.")
        if self.largest == "image":
            for flag, value in {"--image": flags.image, "--input-shape": flags.input_shape}.items():
                if value is not None:
                    raise UsageError(f"`{flag}` sets the size that `--largest image` finds; leave one of the two out.")
        if self.largest != "patch":
            return
        shapes = flags.input_shapes
        if shapes is None:
            hint = "such as --input-shape [1,64,64,64]" if flags.is_own else "or pass `--largest image`"
            raise UsageError(f"`--largest patch` needs `--input-shape`, with any sides that the model accepts; {hint}.")
        least = max(self.dims) if self.dims else 2
        if len(shapes[0]) < least:
            raise UsageError(
                f"`--input-shape` (={list(shapes[0])}) has no dimension {least} besides the batch; `--dims` lists the "
                "dimensions to change."
            )


def plan_largest(flags: StepFlags, largest_flags: LargestFlags, budget: str | None) -> None:
    """Print the largest size that fits the budget under each policy.

    Raises:
        BudgetError: Nothing fits.
        ValueError: The budget is missing or not a number of bytes.
    """
    if budget is None:
        raise UsageError(BUDGET_IS_REQUIRED)
    from revnet._text_table import aligned
    from revnet.cli._build import build_step
    from revnet.errors import BudgetError
    from revnet.memory import format_bytes, parse_bytes

    budget_bytes = parse_bytes(budget, "--budget")
    step = build_step(flags)
    search = _Search(step, largest_flags, budget_bytes, flags.step_in_backward)
    rows, found = [], []
    for name, size, peak in search.run():
        found.append(size)
        rows.append([name, search.describe(size) if size else "none fits", format_bytes(peak) if size else ""])
    if not any(found):
        raise BudgetError(
            f"`--budget` (={format_bytes(budget_bytes)}) is too small for any {largest_flags.largest}: the model, its "
            "gradients and the optimizer count, too; raise it, or lower what `revnet memory` shows."
        )
    print(f"{flags.model}: {search.title}, predicted\n{search.conditions}\n")
    print("\n".join(aligned([["policies", f"largest {largest_flags.largest}", "peak"], *rows], 1)))
    # Without units, a plan would only say that there is nothing to choose.
    budget_words = ["--budget", budget.strip()] if search.has_units else []
    words = _step_words(flags, largest_flags, search, max(found), budget_words)
    start = "to plan  revnet plan" if search.has_units else "to see where the bytes are  revnet memory"
    print(f"\n{start} {shlex.join(words)}")


@dataclass(frozen=True)
class _Search:
    """The search for the largest size of a step, under several policies."""

    step: "BuiltStep"
    flags: LargestFlags
    budget_bytes: int
    step_in_backward: bool

    @property
    def multiple(self) -> int:
        """Number of which a side is a multiple."""
        own: int = getattr(self.step.model, "size_multiple", 1)
        return self.flags.multiple or own

    @property
    def dims(self) -> tuple[int, ...]:
        """Dimensions of the first input that change."""
        if self.flags.largest == "batch":
            return (0,)
        return self.flags.dims or tuple(range(2, self.step.inputs[0].dim()))

    @property
    def title(self) -> str:
        """Line that says what is found."""
        from revnet.memory import format_bytes

        return f"the largest {self.flags.largest} of a training step within {format_bytes(self.budget_bytes)}"

    @property
    def conditions(self) -> str:
        """Line that says what stays the same."""
        if self.flags.largest == "batch":
            words = f"inputs of {self.step.shapes}"
        else:
            words = f"batch {len(self.step.inputs[0])}"
            words += f", sides in steps of {self.multiple}" if self.multiple > 1 else ""
        return f"{words}, {self.step.conditions}"

    def shape(self, size: int) -> list[int]:
        """Return the shape of the first input at a size."""
        return [size if dim in self.dims else side for dim, side in enumerate(self.step.inputs[0].shape)]

    def describe(self, size: int) -> str:
        """Return the size in a cell."""
        if self.flags.largest == "batch":
            return f"{size:,}"
        return "x".join(map(str, self.shape(size)[1 if 1 in self.dims else 2 :]))

    def run(self) -> Iterator[tuple[str, int, int]]:
        """Yield the policies, the largest size and its peak in bytes."""
        from revnet.memory import predict

        inputs = self.step.inputs
        for name in self._names():
            with _policies(self.step.model, _SETTINGS.get(name, ())):
                size = self._find(inputs)
                peak = 0
                if size:
                    inputs = self._resized(size)  # the next search begins where this one ended
                    peak = predict(self.step.model, *inputs, **self._options(inputs)).peak_bytes
            yield name, size, peak

    @property
    def has_units(self) -> bool:
        """Whether policies can be chosen for parts of the model."""
        return self._names() != [_AS_BUILT]

    def _names(self) -> list[str]:
        """Return the policies that the model has units for."""
        names = []
        for name, policies in _SETTINGS.items():
            try:
                with _policies(self.step.model, policies[-1:]):
                    names.append(name)
            except ValueError:  # no unit accepts it
                pass
        return names or [_AS_BUILT]

    def _options(self, inputs: "tuple[Tensor, ...]") -> dict[str, Any]:
        options = {**self.step.options, "device": self.step.device, "step_in_backward": self.step_in_backward}
        if "kwargs" in options:  # targets, which have the shape of the tokens
            options["kwargs"] = {
                name: targets.new_empty(inputs[0].shape) for name, targets in options["kwargs"].items()
            }
        return options

    def _find(self, inputs: "tuple[Tensor, ...]") -> int:
        from revnet.memory import max_batch_size, max_patch_size

        options: dict[str, Any] = {**self._options(inputs), "budget": self.budget_bytes}
        if self.flags.largest == "batch":
            return max_batch_size(self.step.model, *inputs, **options)
        return max_patch_size(
            self.step.model,
            *inputs,
            dims=self.dims,
            multiple=self.multiple,
            **options,
        )

    def _resized(self, size: int) -> "tuple[Tensor, ...]":
        """Return the inputs at a size; those change that have the sizes of the first in the same dimensions."""
        first = self.step.inputs[0]

        def resize(tensor: "Tensor") -> "Tensor":
            sizes = [side for dim, side in enumerate(tensor.shape) if dim in self.dims]
            if sizes != [first.shape[dim] for dim in self.dims]:
                return tensor
            return tensor.new_empty([size if dim in self.dims else side for dim, side in enumerate(tensor.shape)])

        return tuple(map(resize, self.step.inputs))


@contextmanager
def _policies(model: "nn.Module", policies: tuple[str, ...]) -> Iterator[None]:
    """Set policies within the context, one after the other."""
    from revnet.nn import set_policy
    from revnet.nn._restore import restoring_policies

    with restoring_policies(model):
        for policy in policies:
            set_policy(model, policy)
        yield


def _step_words(
    flags: StepFlags, largest_flags: LargestFlags, search: _Search, size: int, budget: list[str]
) -> list[str]:
    """Return the arguments of a command that examines the step of the largest size."""
    batch = size if largest_flags.largest == "batch" else flags.batch
    words = [flags.model, "--batch", str(batch), *budget]
    if largest_flags.largest == "image":
        words += ["--image", str(size)]
    elif flags.image is not None:
        words += ["--image", str(flags.image)]
    if flags.input_shapes is not None:
        shapes = [tuple(tensor.shape[1:]) for tensor in search._resized(size)]
        words += ["--input-shape", str([list(shape) for shape in shapes] if len(shapes) > 1 else list(shapes[0]))]
    if flags.input_dtype != "float32":
        dtypes = flags.input_dtypes
        words += ["--input-dtype", dtypes[0] if len(set(dtypes)) == 1 else str(list(dtypes)).replace("'", "")]
    if flags.optimizer != "sgd":
        words += ["--optimizer", flags.optimizer]
    if flags.precision != "32-true":
        words += ["--precision", flags.precision]
    if flags.step_in_backward:
        words.append("--step-in-backward")
    if flags.loss != "sum":
        words += ["--loss", flags.loss]
    return [word.replace(" ", "") if word.startswith("[") else word for word in words]
