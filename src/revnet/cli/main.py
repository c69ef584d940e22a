"""The `revnet` command: a table of commands, and what they have in common.

Only the requested command is imported, so that `revnet --help` answers at once.
"""

import difflib
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module

import revnet
from revnet.cli._errors import describe_error, is_expected
from revnet.training.processes.world import is_reported

COMMANDS = {
    "train": "train a classifier; by default, a small RevNet on handwritten digits (also `train nice`, `train lm`)",
    "evaluate": "test a checkpoint: errors, hardest classes, confusions",
    "predict": "classify image files",
    "sample": "sample images from a density (`train nice`), or fill in missing halves",
    "score": "compute the likelihood of image files under a density",
    "generate": "continue a text with a language model (`train lm`)",
    "reproduce": "train the networks in a table of results, and compare them with the paper",
    "figure": "reproduce a figure of the paper: gradient angles, or memory and compute against depth",
    "memory": "show where the memory of a training step goes, for any model",
    "plan": "fit a training step into a memory budget: which blocks to reverse, checkpoint or store",
    "doctor": "measure the error of rebuilt activations and gradients, and suggest remedies",
    "models": "list the models with their parameters and FLOPs",
    "bench": "compare memory, time and correctness with other reversible libraries",
}

SUBCOMMANDS = {"train": ("nice", "lm")}
"""Words after a command that select another function: `revnet train nice` runs `train_nice`."""

HELP = f"""\
usage: revnet COMMAND [options]

Reversible residual networks: activation memory that does not grow with depth.

commands:
{chr(10).join(f"  {name:11}{summary}" for name, summary in COMMANDS.items())}

options:
  -h, --help  show this help; `revnet COMMAND --help` shows the help of a command
  --version   show the version

environment:
  REVNET_DEBUG=1  show tracebacks of errors
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: Arguments after `revnet` on the command line; None reads `sys.argv`.

    Returns:
        The exit status: 0 on success; 2 for a usage error, which prints one line; 128 plus its number for a signal.
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
        return _fail("revnet", f"unknown command `{name}`; {hint}")
    return _run(name, rest[:-1])


def _run(name: str, arguments: Sequence[str]) -> int:
    prog = f"revnet {name}"
    if arguments and arguments[0] in SUBCOMMANDS.get(name, ()):
        prog, name, arguments = f"{prog} {arguments[0]}", f"{name}_{arguments[0]}", arguments[1:]
    format_before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_: f"{prog}: warning: {message}\n"
    try:
        parse = import_module("revnet.cli._parser").parse
        command = getattr(import_module(f"revnet.cli.{name}"), name)
        command(**parse(command, prog, arguments))
        sys.stdout.flush()
    except SystemExit as leaving:  # --help and --print-config; an image that `predict` could not read
        return int(leaving.code or 0)
    except KeyboardInterrupt as stop:
        if not is_reported(stop):
            print(f"\n{prog}: {str(stop) or 'stopped.'}", file=sys.stderr)
        return 128 + getattr(stop, "signal_number", signal.SIGINT)
    except BrokenPipeError:  # the reader has closed the pipe: `revnet models | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as error:
        if is_reported(error):
            return 2
        if os.environ.get("REVNET_DEBUG") or not is_expected(error):
            raise
        return _fail(prog, describe_error(error))
    finally:
        warnings.formatwarning = format_before
    return 0


def _fail(prog: str, message: str) -> int:
    print(f"{prog}: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
