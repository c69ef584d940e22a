"""Random command lines: any command and option, with values that suit it and values that do not."""

import random
from importlib import import_module
from pathlib import Path

from revnet.cli._commands import COMMANDS, SUBCOMMANDS
from revnet.cli._options import list_options
from revnet.cli._values import is_list, is_switch

FUNCTIONS = [*COMMANDS, *(f"{name}_{word}" for name, words in SUBCOMMANDS.items() for word in words)]

ODD = [
    *("", " ", "-", "--", "-1", "0", "1e400", "nan", "inf", "-0.0", "1" * 40, "1e-3", "0x10", "null", "true", "no"),
    *("[]", "[1]", "[0.5,0.75]", "[a", "{}", "{a: b}", "!!python/name:os.system", "&a [*a]", "1_000", "a,b,,c", ","),
    *("ünïcödé", "日本", "\u202e", "a b", "$HOME", "~nobody", "x" * 300, "%s", "%", "{0}", "`data`", "data", "*"),
    *("cpu", "cuda", "cuda:7", "mps", "auto", "2", "3", "0.5", "1e3", "digits", "revnet38", "sgd", "adamw", "store"),
    *("cifar10/paper/revnet38", "hub:", "hub:a", "a.b:c", "tiny:model", ":", "tiny:", "16GiB", "1KiB", "3 apples"),
    *("/", ".", "..", "/proc/nothing", "/dev/null", "no/such/path", "empty.txt", "folder", "image.png", "classifier"),
    *("nice", "lm", "text.txt", "broken.yaml", "good.yaml", "--epochs", "--help", "-h", "=", "1h", "10%", "1.5"),
]
"""Values of any option."""

SUITABLE = {
    "batch": ["1", "2", "8"],
    "checkpoint": ["classifier", "nice", "lm", "classifier/best.safetensors", "lm/last.safetensors"],
    "data": ["digits", "folder", "text.txt", "image.png", "cifar100"],
    "images": ["image.png", "image.png", "empty.txt", "folder"],
    "image": ["8", "16"],
    "model": ["tiny:model", "tiny:model", "tiny:Plain", "revnet38"],
    "name": ["gradient-angle", "complexity"],
    "num": ["1", "3"],
    "out_dir": ["out", "out/new"],
    "resume": ["classifier", "nice", "lm", "auto"],
    "steps": ["1", "2"],
    "table": ["cifar10", "cifar10-quick", "imagenet", "cifar11"],
    "weights": ["classifier", "nice"],
}
"""Values that suit an option, by name."""

SIZES = {
    "batch",
    "batch_size",
    "image",
    "image_size",
    "input_shape",
    "num",
    "num_workers",
    "steps",
    "top",
    "num_samples",
}
"""Options whose large values need much time or memory, as they should."""


def make_lines(seed: int, count: int) -> list[list[str]]:
    """Return `count` command lines; a longer list begins with a shorter one."""
    numbers = random.Random(seed)
    options = {name: list_options(getattr(import_module(f"revnet.cli.{name}"), name)) for name in FUNCTIONS}
    return [_make_line(numbers, options) for _ in range(count)]


def _make_line(numbers: random.Random, options: dict[str, list]) -> list[str]:
    name = numbers.choice(FUNCTIONS)
    own = options[name]
    words: list[str] = []
    for option in own:
        if option.is_required and numbers.random() < 0.95:
            words += [_value(numbers, option) for _ in range(numbers.choice([1, 1, 2]) if option.takes_many else 1)]
    optional = [option for option in own if not option.is_required]
    for _ in range(numbers.choice([0, 1, 1, 2, 2, 3, 5])):
        if optional and numbers.random() < 0.93:
            words += _option(numbers, numbers.choice(optional))
        elif numbers.random() < 0.5:
            words += _option(numbers, numbers.choice([o for others in options.values() for o in others]))
        else:
            words.append(numbers.choice(ODD))
    if numbers.random() < 0.05:
        numbers.shuffle(words)
    if numbers.random() < 0.03:
        words.append("--help")
    return [*name.split("_", 1), *words]


def _option(numbers: random.Random, option) -> list[str]:
    flag = option.flag
    spelling = numbers.random()
    if spelling < 0.05:
        flag = flag.replace("-", "_").replace("__", "--")
    elif spelling < 0.08:
        flag = flag[:-1]
    elif spelling < 0.1:
        flag = flag.upper()
    if (is_switch(option.kind) and numbers.random() < 0.6) or numbers.random() < 0.03:
        return [flag]
    value = _value(numbers, option)
    return [f"{flag}={value}"] if numbers.random() < 0.3 else [flag, value]


def _value(numbers: random.Random, option) -> str:
    if numbers.random() < 0.45:
        odd = numbers.choice(ODD)
        is_large = option.name in SIZES and any(character.isdigit() for character in odd)
        return numbers.choice(["0", "-1", "x"]) if is_large else odd
    if option.name in SUITABLE:
        return numbers.choice(SUITABLE[option.name])
    if option.choices:
        return numbers.choice(option.choices)
    if is_list(option.kind):
        return numbers.choice(["[0.5]", "[0.1,0.9]", "[3,8,8]", "[4]"])
    return numbers.choice(["1", "2", "0.1", "0.5", "3"])


def write_files(folder: Path) -> None:
    """Write the files that the command lines name, except the runs."""
    (folder / "folder").mkdir()
    (folder / "empty.txt").touch()
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    (folder / "broken.yaml").write_text("epochs: [1\n")
    (folder / "good.yaml").write_text("epochs: 2\nlr: 0.05\n")
    (folder / "tiny.py").write_text(
        "from torch import nn\n"
        "from revnet import ReversibleBlock, ReversibleSequential\n\n\n"
        "class Plain(nn.Sequential):\n"
        "    def __init__(self):\n"
        "        super().__init__(nn.Flatten(), nn.LazyLinear(2))\n\n\n"
        "def model():\n"
        "    block = ReversibleBlock(nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1))\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 1), ReversibleSequential(block), nn.Flatten())\n"
    )
