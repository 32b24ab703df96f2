"""What reaches the terminal. Owns: data on stdout, messages on stderr, an exit code for each error.

Must not: know a command.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from fieldmesh.core.errors import FieldmeshError, Status

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

OK: Final = 0
FAILURE: Final = 1
USAGE: Final = 2
UNAVAILABLE: Final = 3
NOT_FOUND: Final = 4
UNKNOWN: Final = 5
INTERRUPTED: Final = 130
TERMINATED: Final = 143
# A table that goes to a file or a pager is not folded to the width of a terminal that is not there.
WIDTH_PIPED: Final = 240

_EXIT_CODES: Final = {
    Status.INVALID_ARGUMENT: USAGE,
    Status.UNAVAILABLE: UNAVAILABLE,
    Status.RESOURCE_EXHAUSTED: UNAVAILABLE,
    Status.DEADLINE_EXCEEDED: UNAVAILABLE,
    Status.NOT_FOUND: NOT_FOUND,
    Status.UNKNOWN: UNKNOWN,
}


@dataclass(slots=True)
class Verbosity:
    """How much is said on stderr; set once by the options before the command."""

    quiet: bool = False
    verbose: bool = False
    debug: bool = False


VERBOSITY = Verbosity()


def exit_code(error: FieldmeshError) -> int:
    """What the process returns for ``error``."""
    return _EXIT_CODES.get(error.status, FAILURE)


def sentence(error: FieldmeshError) -> str:
    """What ``error`` says to a person, with the code that scripts and manuals know it by."""
    again = f" (try again in {error.retry_after_s:.3g} s)" if error.retry_after_s is not None else ""
    return f"{error.message}{again} [{error.code}]"


def say(text: str) -> None:
    """A message for the person, unless --quiet."""
    if not VERBOSITY.quiet:
        print(printable(text), file=sys.stderr, flush=True)  # noqa: T201


def murmur(text: str) -> None:
    """Part of a message that comes in pieces, unless --quiet."""
    if not VERBOSITY.quiet:
        print(printable(text), end="", file=sys.stderr, flush=True)  # noqa: T201


def detail(text: str) -> None:
    """A message for the person who asked for more (--verbose)."""
    if VERBOSITY.verbose:
        say(text)


def complain(text: str) -> None:
    """What went wrong, always."""
    print(f"fieldmesh: {printable(text)}", file=sys.stderr, flush=True)  # noqa: T201


def write(text: str) -> None:
    """Data, at once. What a model or a node wrote must not steer a terminal, so escapes stay out of one."""
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def write_json(value: Any) -> None:
    """One JSON document."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, indent=2) + "\n")
    sys.stdout.flush()


def let_go_of_stdout() -> None:
    """Nothing more can be written there: Python must not try once more when it ends."""
    with contextlib.suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def shortened(text: str, chars_max: int) -> str:
    """``text`` in at most ``chars_max`` characters, its middle left out: names differ at the ends."""
    if len(text) <= chars_max:
        return text
    tail = (chars_max - 1) // 2
    return f"{text[: chars_max - 1 - tail]}…{text[len(text) - tail :]}"


def printable(text: str) -> str:
    """``text`` without control characters other than line ends and tabs."""
    return "".join(char for char in text if char in "\n\t" or not _is_control(char))


def _is_control(char: str) -> bool:
    return char < " " or "\x7f" <= char <= "\x9f"


def console(*, stderr: bool = False) -> Console:
    """A rich console that takes text as it is: no markup, no guesses about numbers."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else WIDTH_PIPED
    return Console(stderr=stderr, markup=False, highlight=False, emoji=False, width=width)


def table(*columns: str, title: str = "") -> Table:
    """An empty table in the house's style."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title or None, title_justify="left")
    for column in columns:
        made.add_column(column, overflow="fold")
    return made


def add_row(to: Table, *cells: object) -> None:
    """One row of plain text."""
    from rich.text import Text

    to.add_row(*(Text(printable(str(cell))) for cell in cells))
