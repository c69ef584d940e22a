"""Damage to files, drawn at random from a seed, and the check that a program ends well on a damaged file."""

import os
import random
import resource
import secrets
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from revnet.cli._errors import describe_error, is_expected

SEED = int(os.environ.get("REVNET_DAMAGE_SEED") or secrets.randbelow(2**31))
"""Seed of this run; set the variable to the number in a failure to repeat it."""
SECONDS = 60
"""Time after which a file hangs. Not a bound of speed: a file takes a fraction of a second."""
SPARE_BYTES = 3 * 2**30
"""Address space that reading a small file may take."""
MOST_CHARACTERS = 2500
_MEMORY = Path("/proc/self/statm")

HOSTILE_NUMBERS = (0, -1, 1, 2, 3, 10**6, 2**17, 10**9, 2**31, 2**63, 2**64, 10**30, -(2**63), 1.5, 1e308)
HOSTILE_VALUES: tuple[Any, ...] = (
    *HOSTILE_NUMBERS,
    None,
    True,
    False,
    "",
    "x",
    "\x1b[31m",
    "\udce9",
    "=cmd",
    "a" * 10_000,
    [],
    [1, 0, 0],
    [[[[]]]],
    [10**9, 10**9, 10**9],
    ["a", 1],
    {},
    {"a": {"b": {"c": 1}}},
)


class HangError(Exception):
    """A file took too long."""


def seeded(kind: str, number: int) -> random.Random:
    """Return the source of random numbers for one damaged file."""
    return random.Random(f"{SEED} {kind} {number}")


def damage_bytes(content: bytes, draw: random.Random) -> bytes:
    """Return `content` after one to three random changes."""
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        if not data:
            break
        # The beginning and the end hold most of the structure.
        span = draw.choice((len(data), len(data), 64, 512))
        at = draw.randrange(min(span, len(data)))
        if draw.random() < 0.25:
            at = len(data) - 1 - at
        length = min(len(data) - at, draw.choice((1, 1, 2, 4, 8, 100, 5000)))
        match draw.randrange(9):
            case 0 | 1:
                data[at] ^= 1 << draw.randrange(8)
            case 2:
                del data[at:]
            case 3:
                del data[at : at + length]
            case 4:
                data[at : at + length] = draw.randbytes(length)
            case 5:
                data[at : at + length] = bytes([draw.choice((0, 255))]) * length
            case 6:
                data[at:at] = draw.randbytes(length)
            case 7:
                data[at:at] = data[at : at + length]
            case 8:
                number = draw.choice((2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1, 0, 10**6, 10**9))
                layout = draw.choice(("<Q", ">Q", "<I", ">I", "<H"))
                packed = struct.pack(layout, number & (2 ** (8 * struct.calcsize(layout)) - 1))
                data[at : at + len(packed)] = packed
    return bytes(data)


def other_file(draw: random.Random) -> bytes:
    """Return the content of a file of another kind."""
    return draw.choice(
        (
            b"",
            b"\n",
            b"hello\n",
            bytes(1000),
            draw.randbytes(1000),
            b"PK\x05\x06" + bytes(18),
            b"\x1f\x8b" + bytes(20),
            b"<html><body>404 Not Found</body></html>",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
            b"\xff\xfeh\x00i\x00",
            b"PAR1PAR1",
            b"\x80\x04\x95",
            b"{}",
            b"%!PS-Adobe-3.0 EPSF-3.0\n",
        )
    )


def damage_tree(value: Any, draw: random.Random, hostile: tuple[Any, ...] = HOSTILE_VALUES) -> Any:
    """Return a copy of nested dictionaries and lists in which one entry is wrong, missing or additional."""
    copy = _copy(value)
    parents = list(_containers(copy))
    parent = draw.choice([container for container in parents if container] or [copy])
    keys = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
    if not keys:
        return draw.choice(hostile)
    key = draw.choice(keys)
    match draw.randrange(5):
        case 0:
            del parent[key]
        case 1 if isinstance(parent, dict):
            parent[draw.choice(("extra", "", "\x1b[2J", 7))] = draw.choice(hostile)
        case _:
            parent[key] = draw.choice(hostile)
    return copy


def assert_ends_well(call: Callable[[], Any], case: str) -> Any:
    """Call a function on a damaged file: it returns, or raises an error that the command line prints as one line.

    Returns:
        What the function returned; the error if it raised one.
    """
    with _limits(case):
        try:
            return call()
        except MemoryError as error:
            raise AssertionError(f"{case}: takes more than {SPARE_BYTES:,} bytes; REVNET_DAMAGE_SEED={SEED}") from error
        except HangError:
            raise AssertionError(f"{case}: hangs; REVNET_DAMAGE_SEED={SEED}") from None
        except Exception as error:
            if not is_expected(error):
                raise AssertionError(f"{case}: {type(error).__name__}; REVNET_DAMAGE_SEED={SEED}") from error
            raised = error
    text = describe_error(raised)
    assert "\n" not in text, f"{case}: several lines; REVNET_DAMAGE_SEED={SEED}"
    assert len(text) < MOST_CHARACTERS, f"{case}: {len(text)} characters; REVNET_DAMAGE_SEED={SEED}"
    assert "out of memory" not in text, f"{case}: {text}; REVNET_DAMAGE_SEED={SEED}"
    return raised


@contextmanager
def _limits(case: str) -> Iterator[None]:
    """Bound time and memory."""

    def stop(*_: object) -> None:
        raise HangError

    def used_bytes() -> int:
        return int(_MEMORY.read_text().split()[0]) * resource.getpagesize()

    before = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (used_bytes() + SPARE_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_copy(item) for item in value]
    return value


def _containers(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list):
        yield value
        for item in value.values() if isinstance(value, dict) else value:
            yield from _containers(item)
