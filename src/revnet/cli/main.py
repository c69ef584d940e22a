"""The `revnet` command: a table of commands, and what they have in common.

Only the requested command is imported, so that `revnet --help` answers at once.
"""

import difflib
import logging
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module

import revnet
from revnet._outside_text import printable
from revnet.cli._commands import COMMANDS, COMPLETION, SUBCOMMANDS, format_help
from revnet.cli._errors import describe_error, is_expected, one_line
from revnet.cli._streams import safe_streams
from revnet.training.processes.world import is_reported


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: Arguments after `revnet` on the command line; None reads `sys.argv`.

    Returns:
        The exit status: 0 on success; 2 for a usage error, which prints one line; 128 plus its number for a signal.
    """
    with safe_streams() as streams:
        streams.status = _main(sys.argv[1:] if arguments is None else arguments)
    return streams.status


def _main(arguments: Sequence[str]) -> int:
    name, *rest = [*arguments, ""]
    if name in ("", "-h", "--help", "help"):
        print(format_help(), end="")
        return 0
    if name == "--version":
        print(revnet.__version__)
        return 0
    if name.partition("=")[0] == COMPLETION:
        return _run("completion", [*name.split("=", 1)[1:], *rest[:-1]], f"revnet {COMPLETION}")
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean `{close[0]}`?" if close else f"the commands are {', '.join(COMMANDS)}."
        return _fail("revnet", f"unknown command `{name}`; {hint}")
    return _run(name, rest[:-1], f"revnet {name}")


def _run(name: str, arguments: Sequence[str], prog: str) -> int:
    if arguments and arguments[0] in SUBCOMMANDS.get(name, ()):
        prog, name, arguments = f"{prog} {arguments[0]}", f"{name}_{arguments[0]}", arguments[1:]
    format_before = warnings.formatwarning
    matplotlib_log = logging.getLogger("matplotlib")
    level_before = matplotlib_log.level
    matplotlib_log.setLevel(logging.ERROR)  # it warns of its cache of fonts if the home folder cannot be written
    warnings.formatwarning = lambda message, *_: (
        f"{prog}: warning: {printable(_in_flags(str(message), name, arguments))}\n"
    )
    try:
        parse = import_module("revnet.cli._parser").parse
        command = getattr(import_module(f"revnet.cli.{name}"), name)
        command(**parse(command, prog, arguments))
    except SystemExit as leaving:  # --help and --print-config; an image that `predict` could not read
        return int(leaving.code or 0)
    except KeyboardInterrupt as stop:
        if not is_reported(stop):
            print(f"\n{prog}: {str(stop) or 'stopped.'}", file=sys.stderr)
        return 128 + getattr(stop, "signal_number", signal.SIGINT)
    except BrokenPipeError:
        raise
    except Exception as error:
        if is_reported(error):
            return 2
        if os.environ.get("REVNET_DEBUG") or not is_expected(error):
            raise
        return _fail(prog, _in_flags(describe_error(error), name, arguments))
    finally:
        warnings.formatwarning = format_before
        matplotlib_log.setLevel(level_before)
    return 0


def _in_flags(message: str, name: str, arguments: Sequence[str]) -> str:
    """Return a message of the library as one line, with the flags of the command for the parameters in it."""
    from revnet.cli._flag_names import name_flags
    from revnet.cli._options import list_options

    module = sys.modules.get(f"revnet.cli.{name}")  # None if it could not be imported
    options = [] if module is None else list_options(getattr(module, name))
    return name_flags(one_line(message), options, arguments)


def _fail(prog: str, message: str) -> int:
    print(f"{prog}: error: {printable(message)}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
