"""`config check`. Owns: showing what a node would run with, and where each value comes from.

What the whole mesh agrees on is ``cli.agreed``'s.
"""

from __future__ import annotations

import typer

from fieldmesh.cli import terminal
from fieldmesh.cli.asking import Json
from fieldmesh.cli.serving import ConfigFile

app = typer.Typer(
    help="The configuration of a node (check), and what the whole mesh agrees on (the rest).",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.callback()
def group() -> None:
    """The configuration of a node (check), and what the whole mesh agrees on (the rest)."""


@app.command()
def check(config: ConfigFile = None, as_json: Json = False) -> None:
    """Check the configuration; print every value and where it comes from (-v: and what it is for)."""
    from fieldmesh import profiles
    from fieldmesh.config import load, options

    loaded = load(file=config)
    for profile in loaded.config.node.profiles:
        profiles.load(profile)
    values = loaded.values()
    if as_json:
        entries = {
            key: {
                "value": values[key],
                "source": loaded.sources[key],
                "variable": option.variable,
                "description": option.doc,
            }
            for key, option in options().items()
        }
        file = str(loaded.file) if loaded.file else None
        folder = str(loaded.config.state_folder)
        terminal.write_json({"file": file, "state_folder": folder, "values": entries})
        return
    more = ("variable", "what it is") if terminal.VERBOSITY.verbose else ()
    shown = terminal.table("option", "value", "source", *more)
    for key, option in options().items():
        terminal.add_row(
            shown, key, _toml(values[key]), loaded.sources[key], *(option.variable, option.doc)[: len(more)]
        )
    terminal.console().print(shown)
    terminal.say(f"The configuration is valid. State folder: {loaded.config.state_folder}")


def _toml(value: object) -> str:
    import json

    return json.dumps(value, ensure_ascii=False)
