"""The tree of commands. Owns: options before the command, errors as sentences and exit codes."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from fieldmesh import __version__
from fieldmesh.cli import (
    agreed,
    asking,
    configuration,
    founding,
    keeping,
    looking,
    profiling,
    serving,
    terminal,
    tracing,
    up,
    voters,
)
from fieldmesh.core.errors import FieldmeshError, NodeUnreachable

EPILOG = (
    "Exit codes: 0 done, 1 failed, 2 wrong usage or input, 3 not available, 4 not found, 5 not known "
    "whether done, 130 interrupted. "
    "--node and FIELDMESH_NODE say which node to ask; FIELDMESH_DEBUG=1 shows where an error came from."
)

app = typer.Typer(
    name="fieldmesh",
    help="A peer-to-peer mesh of edge inference nodes: ask any box, the best one answers.",
    epilog=EPILOG,
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help starts in a third of the time, and can be piped
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        terminal.write(f"fieldmesh {__version__}\n")
        raise typer.Exit


@app.callback()
def root(
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only data and errors.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say more.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error came from.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """A peer-to-peer mesh of edge inference nodes: ask any box, the best one answers."""
    terminal.VERBOSITY.quiet = quiet
    terminal.VERBOSITY.verbose = verbose
    terminal.VERBOSITY.debug = debug or os.environ.get("FIELDMESH_DEBUG", "") not in ("", "0")


app.command()(up.up)
app.command()(serving.serve)
app.command()(founding.init)
app.command()(asking.ask)
app.command()(asking.chat)
app.command()(asking.embed)
app.command()(looking.status)
app.command()(tracing.trace)
app.add_typer(profiling.app, name="profiles")
app.add_typer(keeping.app, name="models")
app.add_typer(configuration.app, name="config")
for _name, _command in (
    ("get", agreed.get),
    ("set", agreed.set_),
    ("delete", agreed.delete),
    ("watch", agreed.watch),
    ("history", agreed.history),
    ("diff", agreed.diff),
    ("rollback", agreed.rollback),
):
    configuration.app.command(_name)(_command)
app.add_typer(voters.app, name="raft")
app.command()(looking.health)


@app.command()
def version(as_json: asking.Json = False) -> None:
    """Print the version."""
    if as_json:
        terminal.write_json({"version": __version__})
    else:
        terminal.write(f"fieldmesh {__version__}\n")


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; the exit code. Errors are a sentence on stderr (with --debug a traceback)."""
    if sys.stdout is None:  # it was closed by whoever started us: what is written goes nowhere
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that cannot show a character shows another
            stream.reconfigure(errors="replace")
    # What gRPC has to say about a refused connection or a taken port is said by our errors, in words.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        app(args=None if arguments is None else list(arguments), prog_name="fieldmesh")
        sys.stdout.flush()
    except SystemExit as left:  # how typer ends: done, wrong usage, interrupted, or its reader gone
        return left.code if isinstance(left.code, int) else terminal.OK
    except FieldmeshError as error:
        if terminal.VERBOSITY.debug:
            raise
        terminal.complain(terminal.sentence(error))
        if isinstance(error, NodeUnreachable):
            terminal.say(
                "Is a node running there? `fieldmesh up` starts some on this box, --node names another."
            )
        return terminal.exit_code(error)
    except OSError as error:  # a full disk behind stdout, most likely
        if terminal.VERBOSITY.debug:
            raise
        terminal.let_go_of_stdout()
        if not isinstance(error, BrokenPipeError):
            terminal.complain(f"The output could not be written: {error.strerror or error}.")
        return terminal.FAILURE
    except up.Terminated:
        return terminal.TERMINATED
    return terminal.OK
