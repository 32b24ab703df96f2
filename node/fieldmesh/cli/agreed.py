"""`config get`, `set`, `delete`, `watch`, `history`, `diff` and `rollback`.

Owns: showing and changing what the whole mesh agrees on.
"""

from __future__ import annotations

import getpass
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from fieldmesh.cli import terminal
from fieldmesh.cli.asking import Json, Node, connect
from fieldmesh.core.errors import InvalidRequest, OutcomeUnknown

if TYPE_CHECKING:
    from fieldmesh.client.admin import Admin, Configuration, Difference, Level
    from fieldmesh.core.settings import Record
    from fieldmesh.rpc.admin import Ticket

VALUE_SHOWN_CHARACTERS_MAX: Final = 120

Author = Annotated[
    str | None, typer.Option("--author", help="Who makes the change. [default: you, at this host]")
]
Prefix = Annotated[str, typer.Option("--prefix", help="Only keys that begin so.")]
Retry = Annotated[
    str | None,
    typer.Option("--retry", metavar="TICKET", help="Send an unknown write again; it is done once at most."),
]
Local = Annotated[
    bool, typer.Option("--local", help="What that node knows, without asking a majority of voters.")
]


@contextmanager
def admin_of(node: list[str] | None, author: str | None = None) -> Iterator[Admin]:
    """The configuration as the named nodes reach it."""
    from fieldmesh.client.admin import Admin
    from fieldmesh.config import host_name

    with connect(node) as client:
        yield Admin(client, author=author if author is not None else f"{_user()}@{host_name()}"[:100])


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return "somebody"


# --- reading -----------------------------------------------------------------------------


def get(
    key: Annotated[str | None, typer.Argument(help="The key; left out, all keys.")] = None,
    prefix: Prefix = "",
    node: Node = None,
    local: Local = False,
    as_json: Json = False,
) -> None:
    """Print a value (as JSON), or all of them. Without a majority: the last known, and how old it is."""
    with admin_of(node) as admin:
        level: Level = "local" if local else ""
        found = admin.get(key, level=level) if key else admin.all(prefix, level=level)
    _say_age(found)
    facts = {"revision": found.revision, "current": found.current, "stale_s": found.stale_s}
    if key:
        setting = found.settings[0]
        if as_json:
            facts["revision"] = setting.revision
            terminal.write_json({"key": setting.key, "value": setting.value, **facts})
        else:
            terminal.write(setting.text + "\n")
    elif as_json:
        values = {s.key: {"value": s.value, "revision": s.revision} for s in found.settings}
        terminal.write_json({**facts, "settings": values})
    elif found.settings:
        shown = terminal.table("key", "value", "revision")
        for setting in found.settings:
            terminal.add_row(shown, setting.key, _short(setting.text), setting.revision)
        terminal.console().print(shown)
    else:
        terminal.say("Nothing is set: every node goes by its own options.")


def _say_age(found: Configuration) -> None:
    if found.current:
        return
    age = "of unknown age" if found.stale_s is None else f"last known to be current {found.stale_s:.1f} s ago"
    terminal.say(f"Not confirmed by a majority: revision {found.revision}, {age}.")


def watch(
    prefix: Prefix = "",
    after: Annotated[
        int | None, typer.Option("--after", min=0, help="Only what came after this revision.")
    ] = None,
    node: Node = None,
    as_json: Json = False,
) -> None:
    """Print what is set, then every change as it comes; with --json one document a line."""
    with admin_of(node) as admin:
        for news in admin.watch(prefix, after_revision=after):
            for setting in news.settings or ():
                if as_json:
                    _write_line({"revision": news.revision, "key": setting.key, "value": setting.value})
                else:
                    terminal.write(f"{news.revision}  {setting.key} = {_short(setting.text)}\n")
            for record in news.changes:
                if as_json:
                    _write_line(record_json(record))
                else:
                    what = "removed" if record.after is None else f"= {_short(record.after)}"
                    terminal.write(f"{record.revision}  {record.key} {what}  ({record.author})\n")


def _write_line(value: Any) -> None:
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def history(
    prefix: Prefix = "",
    after: Annotated[int, typer.Option("--after", min=0, help="Only what came after this revision.")] = 0,
    node: Node = None,
    as_json: Json = False,
) -> None:
    """Print who changed what, when and from where, oldest first."""
    with admin_of(node) as admin:
        found = admin.history(prefix, after_revision=after)
    if as_json:
        terminal.write_json(
            {
                "revision": found.revision,
                "forgotten_up_to": found.forgotten_up_to,
                "changes": [record_json(record) for record in found.records],
            }
        )
        return
    shown = terminal.table("revision", "when", "who", "from", "key", "before", "after")
    for record in found.records:
        when = datetime.fromtimestamp(record.time_ms / 1000, UTC).astimezone()
        terminal.add_row(
            shown,
            record.revision,
            when.strftime("%Y-%m-%d %H:%M:%S"),
            record.author,
            record.origin,
            record.key,
            _shown(record.before),
            _shown(record.after),
        )
    terminal.console().print(shown)
    if found.forgotten_up_to > after:
        terminal.say(f"Changes up to revision {found.forgotten_up_to} are forgotten.")


def record_json(record: Record) -> dict[str, Any]:
    """A change as `--json` prints it."""
    return {
        "revision": record.revision,
        "time": datetime.fromtimestamp(record.time_ms / 1000, UTC).isoformat(),
        "author": record.author,
        "origin": record.origin,
        "key": record.key,
        "before": _value(record.before),
        "after": _value(record.after),
    }


def _value(text: str | None) -> Any:
    return None if text is None else json.loads(text)


def diff(
    older: Annotated[int, typer.Argument(min=0, help="The earlier revision.")],
    newer: Annotated[int, typer.Argument(min=0, help="The later one; left out, the present one.")] = 0,
    node: Node = None,
    as_json: Json = False,
) -> None:
    """Print which values differ between two revisions."""
    with admin_of(node) as admin:
        _show_differences(admin.diff(older, newer), as_json=as_json)


def _show_differences(differences: tuple[Difference, ...], *, as_json: bool, **facts: Any) -> None:
    if as_json:
        entries = [{"key": d.key, "before": _value(d.before), "after": _value(d.after)} for d in differences]
        terminal.write_json({**facts, "differences": entries})
        return
    if not differences:
        terminal.say("Nothing differs.")
        return
    shown = terminal.table("key", "before", "after")
    for entry in differences:
        terminal.add_row(shown, entry.key, _shown(entry.before), _shown(entry.after))
    terminal.console().print(shown)


# --- writing -----------------------------------------------------------------------------


def set_(
    key: Annotated[str, typer.Argument(help="The key, such as routing/policy.")],
    value: Annotated[str, typer.Argument(help="JSON, or a plain word; - reads it from stdin.")],
    if_revision: Annotated[
        int | None,
        typer.Option(
            "--if-revision", min=0, help="Only if this was the key's last change; 0: if there is no such key."
        ),
    ] = None,
    author: Author = None,
    retry: Retry = None,
    node: Node = None,
    as_json: Json = False,
) -> None:
    """Set a value for the whole mesh; it takes effect on every node without a restart."""
    text = json_text(sys.stdin.read(1_000_000) if value == "-" else value)
    _change(key, text, if_revision, author, retry, node, as_json=as_json)


def delete(
    key: Annotated[str, typer.Argument(help="The key.")],
    if_revision: Annotated[
        int | None, typer.Option("--if-revision", min=1, help="Only if this was the key's last change.")
    ] = None,
    author: Author = None,
    retry: Retry = None,
    node: Node = None,
    as_json: Json = False,
) -> None:
    """Remove a value; every node goes by its own options again."""
    _change(key, None, if_revision, author, retry, node, as_json=as_json)


def json_text(value: str) -> str:
    """What a person typed as JSON: what is JSON already as it is, anything else as a string."""
    try:
        return json.dumps(json.loads(value, parse_constant=_no_constant), ensure_ascii=False)
    except (ValueError, RecursionError):
        return json.dumps(value, ensure_ascii=False)


def _no_constant(name: str) -> Any:
    raise ValueError(name)


def _change(
    key: str,
    text: str | None,
    if_revision: int | None,
    author: str | None,
    retry: str | None,
    node: list[str] | None,
    *,
    as_json: bool,
) -> None:
    from fieldmesh.core.settings import Change

    change = Change(key=key, value=text, expected_revision=if_revision)
    with admin_of(node, author) as admin, _unknown_told(as_json=as_json):
        revision = admin.write([change], ticket=_ticket(retry))
    if as_json:
        terminal.write_json({"outcome": "done", "key": key, "revision": revision})
    else:
        terminal.say(f"{key} is {'removed' if text is None else 'set'}, revision {revision}.")


def rollback(
    revision: Annotated[int, typer.Argument(min=0, help="The revision to go back to.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would change.")] = False,
    author: Author = None,
    retry: Retry = None,
    node: Node = None,
    as_json: Json = False,
) -> None:
    """Bring every key back to what it was at a revision, in one write."""
    with admin_of(node, author) as admin, _unknown_told(as_json=as_json):
        made, differences = admin.rollback(revision, dry_run=dry_run, ticket=_ticket(retry))
    _show_differences(differences, as_json=as_json, revision=made, dry_run=dry_run)
    if differences and not dry_run:
        terminal.say(f"Rolled back to revision {revision} by revision {made}.")


def _ticket(retry: str | None) -> Ticket | None:
    from fieldmesh.rpc.admin import Ticket

    if retry is None:
        return None
    try:
        return Ticket.parse(retry)
    except InvalidRequest as error:
        raise InvalidRequest(f"--retry: {error.message}", field="--retry") from error


@contextmanager
def _unknown_told(*, as_json: bool) -> Iterator[None]:
    """A write whose outcome is unknown ends with what is needed to try it again safely."""
    try:
        yield
    except OutcomeUnknown as error:
        ticket = error.metadata.get("ticket", "")
        if as_json:
            terminal.write_json({"outcome": "unknown", "ticket": ticket})
        if ticket:
            terminal.say(f"To try again: the same command with  --retry {ticket}")
        raise


def _shown(text: str | None) -> str:
    return "–" if text is None else _short(text)


def _short(text: str) -> str:
    most = VALUE_SHOWN_CHARACTERS_MAX
    return text if len(text) <= most else text[: most - 1] + "…"
