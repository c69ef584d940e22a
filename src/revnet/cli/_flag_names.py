"""Parameters in messages of the library, written as the flags that the user typed."""

import re
from collections.abc import Collection, Mapping

from revnet.cli._options import Option

_FLAGS_OF: Mapping[str, str] = {
    "batch_size": "batch",
    "fraction": "val_fraction",
    "image_size": "image",
    "kind": "preprocess",
    "missing": "inpaint",
    "name": "model",
    "name_or_path": "data",
    "num_devices": "devices",
    "num_microbatches": "microbatches",
    "num_samples": "num",
    "num_steps": "steps",
    "path": "data",
    "paths": "images",
    "repository": "data",
}
"""Parameters of the library that have another name on the command line, by the name of the option."""

_WAYS_OUT: Mapping[str, tuple[str, str]] = {
    "input_dtype": ("pass inputs of another dtype", "pass another `--input-dtype`: float32 or int64"),
    "input_shape": ("pass shorter inputs, or smaller numbers", "pass a shorter `--input-shape`"),
}
"""Ways out in messages of the library that an option is for, and their words on the command line."""

_PARAMETER = re.compile(r"`([a-z]\w*)`")
_CHOICES = re.compile(r"must be (?:`[^`]*`(?:, or | or |, )?)+")
"""The words that an option takes, which may also be names of parameters."""


def name_flags(message: str, options: Collection[Option], arguments: Collection[str] = ()) -> str:
    """Return `message` with the flag of each parameter that it names in backticks.

    Args:
        message: An error or a warning of the library, such as "`val_fraction` (=2) must be below 1".
        options: Options of the command.
        arguments: Arguments of the command. A message that repeats one of them in backticks does not name a parameter.
    """
    for option in options:
        if option.name in _WAYS_OUT:
            message = message.replace(*_WAYS_OUT[option.name])
    words = {option.name: f"`{option.word}`" for option in options}
    choices = [match.span() for match in _CHOICES.finditer(message)]

    def replace(match: re.Match[str]) -> str:
        name = match[1]
        if any(start < match.start() < end for start, end in choices):
            return match[0]
        if name in arguments and not message.startswith(" (=", match.end()):
            return match[0]
        return words.get(name) or words.get(_FLAGS_OF.get(name, "")) or match[0]

    return _PARAMETER.sub(replace, message)
