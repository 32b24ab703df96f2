"""`models`. Owns: showing and changing which models one node has in memory."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Final

import typer

from fieldmesh.cli import terminal
from fieldmesh.cli.asking import DEFAULT_NODE, Json

if TYPE_CHECKING:
    from fieldmesh.client.models import LocalModel, ModelKeeper

MIB: Final = 1 << 20

app = typer.Typer(help="The models of one node.", no_args_is_help=True, rich_markup_mode=None)

Which = Annotated[str, typer.Argument(metavar="PROFILE", help="A profile of that node.")]
OneNode = Annotated[
    str, typer.Option("--node", metavar="HOST:PORT", envvar="FIELDMESH_NODE", help="Whose models.")
]


@app.callback()
def group() -> None:
    """The models of one node."""


@contextmanager
def _keeper(node: str) -> Iterator[ModelKeeper]:
    from fieldmesh.client.models import ModelKeeper
    from fieldmesh.config import CLIENT_PORT
    from fieldmesh.values import address

    with ModelKeeper(address(node, default_port=CLIENT_PORT, field_name="--node")) as keeper:
        yield keeper


@app.command("list")
def list_(node: OneNode = DEFAULT_NODE, as_json: Json = False) -> None:
    """List the models of a node: where they are, and what they take."""
    from fieldmesh.client import as_json as plain

    with _keeper(node) as keeper:
        found = keeper.list()
    if as_json:
        terminal.write_json(plain(found))
        return
    shown = terminal.table(
        "profile", "model", "state", "takes at most", "takes now", "runs with", "busy", "problem"
    )
    for model in found.models:
        terminal.add_row(
            shown,
            model.profile,
            model.model,
            _state(model),
            f"{model.estimated_bytes // MIB} MiB",
            f"{model.resident_bytes // MIB} MiB" if model.resident_bytes else "–",
            _settings(model),
            f"{model.running} + {model.queued} waiting",
            model.problem or "–",
        )
    terminal.console().print(shown)
    for model in found.models:
        if model.measured:
            terminal.say(f"Measured for {model.profile}: {model.measured}.")
    terminal.say(f"All together may take {found.budget_bytes // MIB} MiB.")


@app.command()
def load(profile: Which, node: OneNode = DEFAULT_NODE, as_json: Json = False) -> None:
    """Bring a model into memory; others leave where they must. Also one that was given up."""
    last = None
    with _keeper(node) as keeper:
        for model in keeper.load(profile):
            if last is None or _state(model) != _state(last):
                terminal.say(f"{profile}: {_state(model)}")
            last = model
    _tell(last, as_json)


@app.command()
def unload(profile: Which, node: OneNode = DEFAULT_NODE, as_json: Json = False) -> None:
    """Take an idle model out of memory. It is loaded again when it is asked for."""
    with _keeper(node) as keeper:
        _tell(keeper.unload(profile), as_json)


@app.command()
def verify(profile: Which, node: OneNode = DEFAULT_NODE, as_json: Json = False) -> None:
    """Read a model's file anew: is it sound, and is it the one on record? Exit 1 if not."""
    with _keeper(node) as keeper:
        verified = keeper.verify(profile)
    if as_json:
        entry = {"profile": profile, "found": verified.found, "recorded": verified.recorded or None}
        terminal.write_json({**entry, "same": verified.same})
    elif verified.same:
        terminal.write(f"{profile}: the file is sound and the one on record, SHA-256 {verified.found}\n")
    else:
        terminal.write(
            f"{profile}: the file is sound, but it is not the one on record: SHA-256 {verified.found} "
            f"instead of {verified.recorded or 'none'}\n"
        )
    if not verified.same:
        raise typer.Exit(terminal.FAILURE)


def _tell(model: LocalModel | None, as_json: bool) -> None:
    from fieldmesh.client import as_json as plain

    if as_json:
        terminal.write_json(plain(model))
    elif model is not None:
        sys.stdout.write(f"{model.profile}: {model.state}\n")


def _state(model: LocalModel) -> str:
    return f"loading {model.loaded_share:.0%}" if model.state == "loading" else model.state


def _settings(model: LocalModel) -> str:
    if not model.threads:
        return "–"
    threads = f"{model.threads} thread{'s' * (model.threads > 1)}"
    return f"{threads}, steps of {model.prefill_tokens} or {model.mixed_tokens} tokens"
