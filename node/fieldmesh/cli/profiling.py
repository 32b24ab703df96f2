"""`profiles`. Owns: showing, writing and checking profile files; who would get a question."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fieldmesh.cli import terminal
from fieldmesh.cli.asking import Json
from fieldmesh.core.errors import ProfileInvalid

if TYPE_CHECKING:
    from fieldmesh.profile_checks import Confusion
    from fieldmesh.profile_format import Profile
    from fieldmesh.profiles import Found

app = typer.Typer(help="What makes a node a specialist.", no_args_is_help=True, rich_markup_mode=None)

Which = Annotated[str, typer.Argument(help="Name of a profile, or path of its file.")]
With = Annotated[
    list[Path] | None, typer.Option("--with", help="A profile file that is not listed; may be repeated.")
]


@app.command("list")
def list_(as_json: Json = False) -> None:
    """List the profiles that `serve --profile` finds by name."""
    from fieldmesh import profiles

    found = profiles.available()
    if as_json:
        terminal.write_json([_found_json(entry) for entry in found])
        return
    shown = terminal.table("name", "domains", "model", "tier", "description", "from")
    for entry in found:
        where = "shipped" if entry.shipped else str(entry.path)
        if entry.profile is None:
            terminal.add_row(shown, entry.path.stem, "–", "–", "–", f"broken: {entry.problem}", where)
        else:
            profile = entry.profile
            domains = ", ".join(domain.name for domain in profile.domains) or "– (generalist)"
            model = " + ".join([profile.model, *(adapter.path for adapter in profile.adapters)])
            terminal.add_row(shown, profile.name, domains, model, profile.tier, profile.description, where)
    terminal.console().print(shown)


def _found_json(entry: Found) -> dict[str, Any]:
    made: dict[str, Any] = {"path": str(entry.path), "shipped": entry.shipped, "problem": entry.problem}
    return made | {"profile": _profile_json(entry.profile) if entry.profile else None}


def _profile_json(profile: Profile) -> dict[str, Any]:
    from fieldmesh.client import as_json

    made: dict[str, Any] = as_json(profile)
    return made


@app.command()
def show(which: Which, as_json: Json = False) -> None:
    """Print one profile as the text of its file."""
    from fieldmesh import profiles
    from fieldmesh.profile_format import dump

    profile = profiles.load(which)
    if as_json:
        terminal.write_json(_profile_json(profile))
    else:
        terminal.write(dump(profile))


@app.command()
def new(
    gguf: Annotated[str, typer.Option(help="The model: a GGUF file, or `builtin`.")],
    domain: Annotated[str, typer.Option(help="What it is good at, in one word.")],
    examples: Annotated[Path, typer.Option(help="Text file of questions it should get, one a line.")],
    name: Annotated[str | None, typer.Option(help="Name of the profile. [default: the domain]")] = None,
    description: Annotated[
        str, typer.Option(help="The domain in a sentence; it teaches the classifier.")
    ] = "",
    system_prompt: Annotated[str, typer.Option(help="What the model is told before each conversation.")] = "",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="[default: your folder of profiles]")
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Overwrite the file.")] = False,
) -> None:
    """Write a profile for your own model and domain; it is then found by its name."""
    from fieldmesh import profiles
    from fieldmesh.engine.gguf import read_header

    profile = profiles.new(
        name=name or domain,
        gguf=gguf,
        domain=domain,
        examples=examples,
        description=description,
        system_prompt=system_prompt,
    )
    read_header(str(profiles.model_path(profile)))  # refuse what is no model now, not when a node starts
    path = output or profiles.user_folder() / f"{profile.name}.toml"
    profiles.write(profile, path, replace=replace)
    terminal.write(f"{path}\n")
    which = str(output) if output else profile.name
    terminal.say(f"Next: fieldmesh profiles check {which}, then fieldmesh serve --profile {which}")


@app.command()
def check(
    which: Annotated[
        list[str] | None, typer.Argument(help="Profiles (names or files) to check. [default: all listed]")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check profile files, and say with which other profiles each is confused.

    Every example question is held out once and classified by what the rest teaches.
    """
    from fieldmesh import profiles
    from fieldmesh.profile_checks import check as confusion_of

    chosen = [profiles.load(name) for name in which or []]
    for profile in chosen:
        profiles.model_path(profile)
    everything = _together(chosen)
    confusion = confusion_of(everything)
    names = {profile.name for profile in chosen or everything}
    if as_json:
        terminal.write_json(_confusion_json(confusion, names))
    else:
        _show_confusion(confusion, names)


def _together(chosen: list[Profile]) -> list[Profile]:
    """The chosen profiles and the listed ones that they do not replace. Raises ProfileInvalid."""
    from fieldmesh import profiles

    names = {profile.name for profile in chosen}
    listed = []
    for entry in profiles.available():
        if entry.profile is None:
            raise ProfileInvalid(entry.problem, field="profile")
        if entry.profile.name not in names:
            listed.append(entry.profile)
    return [*chosen, *listed]


def _confusion_json(confusion: Confusion, names: set[str]) -> dict[str, Any]:
    from fieldmesh.client import as_json

    return {
        "examples": confusion.examples,
        "right": confusion.right,
        "confused": [
            {"profile": source, "with": target, "examples": count}
            for (source, target), count in confusion.between().items()
            if names & {source, target}
        ],
        "misrouted": [as_json(miss) for miss in confusion.misrouted if miss.profile in names],
        "shared_domains": list(confusion.shared_domains),
        "too_few_examples": list(confusion.too_few),
    }


def _show_confusion(confusion: Confusion, names: set[str]) -> None:
    share = f" ({confusion.right / confusion.examples:.0%})" if confusion.examples else ""
    terminal.write(f"{confusion.right} of {confusion.examples} examples{share} reach their own profile.\n")
    for (source, target), count in confusion.between().items():
        if names & {source, target}:
            terminal.write(f"  {source} → {target or 'a generalist'}: {count}\n")
    for miss in confusion.misrouted:
        if miss.profile in names:
            to = ", ".join(miss.to_profiles) or "a generalist"
            terminal.detail(f"  {miss.profile}: “{miss.example}” → {to}")
    for domain in confusion.shared_domains:
        terminal.say(f"Domain {domain} is declared by several profiles: they share its questions.")
    for domain in confusion.too_few:
        terminal.say(f"Domain {domain} has too few examples for a verdict: give it at least five.")


@app.command("try")
def try_(
    question: Annotated[str, typer.Argument(help="The question to route.")],
    with_: With = None,
    as_json: Json = False,
) -> None:
    """Say who would get a question if every profile had a node, without asking it."""
    from fieldmesh import profiles
    from fieldmesh.client import as_json as plain
    from fieldmesh.profile_checks import try_question

    tried = try_question(_together([profiles.load(str(path)) for path in with_ or []]), question)
    if as_json:
        terminal.write_json(plain(tried))
        return
    who = ", ".join(tried.profiles) or "nobody: no generalist is listed"
    domain = f"domain {tried.domain}" if tried.domain else "no domain is sure enough"
    terminal.write(f"{who} ({domain}, {tried.confidence:.0%})\n")
    for name, score in tried.ranking:
        terminal.detail(f"  {name}: {score:.2f}")
