"""The `revnet` command: a table of commands, and what they have in common.

Only the command that is asked for is imported, so that `revnet --help` answers at once.
"""

from __future__ import annotations

import difflib
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module

import revnet
from revnet.cli._blame import is_raised_by_revnet
from revnet.errors import RevnetError

COMMANDS = {
    "train": "train a model; without options, a small RevNet on hand-written digits; also `train nice`, `train lm`",
    "evaluate": "read a test set with a checkpoint: errors, the hardest classes, what is taken for what",
    "predict": "name what is in image files",
    "sample": "draw images from a density (`train nice`), fill in missing halves, tell bits per dimension",
    "generate": "continue a text with a language model (`train lm`)",
    "reproduce": "train the networks of a result table, and write it beside the paper's numbers",
    "figure": "draw a figure of the paper anew: the gradient angle through training, the complexities",
    "memory": "tell where the memory of a training step goes, of any model",
    "plan": "fit a training step into a budget of memory: which blocks reverse, checkpoint or store",
    "doctor": "tell how far rebuilt activations and gradients are off, and what to do about it",
    "models": "list the models with their parameters and FLOPs",
    "bench": "measure memory, time and correctness beside other ways of running reversible blocks",
}

SUBCOMMANDS = {"train": ("nice", "lm")}
"""Words after a command that make it another: `revnet train nice` is the function `train_nice`."""

HELP = f"""\
usage: revnet COMMAND [options]

Reversible residual networks: activation memory that does not grow with depth.

commands:
{chr(10).join(f"  {name:10}{summary}" for name, summary in COMMANDS.items())}

options:
  -h, --help  show this help; `revnet COMMAND --help` shows that of a command
  --version   show the version

environment:
  REVNET_DEBUG=1  show the traceback of an error too
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: What follows `revnet` on the command line; that of this process if None.

    Returns:
        The exit code: 0; 2 for a mistake of the user's, told in one line; 128 plus its number if a signal stopped it.
    """
    name, *rest = [*(sys.argv[1:] if arguments is None else arguments), ""]
    if name in ("", "-h", "--help", "help"):
        print(HELP, end="")
        return 0
    if name == "--version":
        print(revnet.__version__)
        return 0
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean `{close[0]}`?" if close else f"the commands are {', '.join(COMMANDS)}."
        return _fail("revnet", f"`{name}` is no command; {hint}")
    return _run(name, rest[:-1])


def _run(name: str, arguments: Sequence[str]) -> int:
    prog = f"revnet {name}"
    if arguments and arguments[0] in SUBCOMMANDS.get(name, ()):
        prog, name, arguments = f"{prog} {arguments[0]}", f"{name}_{arguments[0]}", arguments[1:]
    try:
        parse = import_module("revnet.cli._parser").parse
        command = getattr(import_module(f"revnet.cli.{name}"), name)
        command(**parse(command, prog, arguments))
        sys.stdout.flush()
    except SystemExit as leaving:  # --help and --print-config; an image that `predict` could not read
        return int(leaving.code or 0)
    except KeyboardInterrupt as stop:
        print(f"\n{prog}: {str(stop) or 'stopped.'}", file=sys.stderr)
        return 128 + getattr(stop, "signal_number", signal.SIGINT)
    except BrokenPipeError:  # `revnet models | head -1`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as error:
        if os.environ.get("REVNET_DEBUG") or not _is_users(error):
            raise
        return _fail(prog, _tell(error))
    return 0


def _is_users(error: Exception) -> bool:
    """Tell a mistake of the user's, or of the machine's, from one of ours, which must keep its traceback."""
    if isinstance(error, RevnetError | OSError):
        return True
    if isinstance(error, ModuleNotFoundError):
        return not str(error.name).startswith("revnet")
    if not isinstance(error, ValueError | TypeError | NotImplementedError):
        return False
    return is_raised_by_revnet(error)


def _tell(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed; run `pip install 'revnet[train]'`."
    if isinstance(error, OSError) and error.strerror and not isinstance(error, RevnetError):
        return f"{error.strerror}: `{error.filename}`" if error.filename else error.strerror
    return " ".join(str(error).split())


def _fail(prog: str, message: str) -> int:
    print(f"{prog}: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
