"""Switches of a residual function: attributes whose values choose what the function does.

The compiler does not see inside a function, so a graph would outlive a change such as `dropout.p = 0.5` or
`function.warm_up = False`, and the findings of the probe with it. The trace therefore reads the switches, which makes
`torch.compile` guard them and trace again after a change, as it does for code that it sees.

Flags and names are switches, and so are numbers that are zero, which usually turn something off. Other numbers, such as
a temperature, change what a function computes and not on which tensors it depends. The function reads their current
values, without a new graph for each of them.
"""

from inspect import isdatadescriptor

from torch import nn

from revnet._torch_release import constant_of_object
from revnet.engine.compile._side_effects import own_attributes


def read_switches(function: nn.Module) -> None:
    """Let the trace of the caller depend on the switches of a function."""
    for module, names in zip(function.modules(), _switches_of(function), strict=True):
        for name in names:
            bool(getattr(module, name))  # The compiler guards an attribute when its value is used.


@constant_of_object
def _switches_of(function: nn.Module) -> list[list[str]]:
    """Return the names of the switches of each module of a function."""
    return [
        [name for name, value in own_attributes(module).items() if _is_switch(module, name, value)]
        for module in function.modules()
    ]


def _is_switch(module: nn.Module, name: str, value: object) -> bool:
    if isdatadescriptor(getattr(type(module), name, None)):
        return False  # A property, whose code the trace would run.
    return type(value) in (bool, str) or (type(value) in (int, float) and value == 0)
