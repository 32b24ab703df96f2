"""The format of profile files (TOML): what makes a node a specialist.

Owns: every key and its bounds, reading the text of a file, writing it. Must not: touch files.

Whatever is unknown, malformed or out of bounds is refused with a ``ProfileInvalid`` that names the file, the
key, and what would be accepted.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
from msgspec import UNSET, Meta, UnsetType

from fieldmesh.core.errors import ProfileInvalid
from fieldmesh.core.model import Adapter, Domain, ProfileOffer, Sampling
from fieldmesh.values import shown

BUILTIN: Final = "builtin"
"""Model of profiles that name none: the one that ``make mesh`` installs."""

FILE_BYTES_MAX: Final = 262_144
DOMAINS_MAX: Final = 16
EXAMPLES_MAX: Final = 1000
EXAMPLE_CHARS_MAX: Final = 500
DOMAINS_BYTES_MAX: Final = 49_152
"""Names, descriptions and examples of one profile together, in UTF-8: they travel in one directory row."""


# --- the format --------------------------------------------------------------------------


def _whole(least: int, most: int, unit: str = "") -> Meta:
    words = f"a whole number from {least} to {most}" + (f" {unit}" if unit else "")
    return Meta(ge=least, le=most, description=words)


def _number(least: float, most: float) -> Meta:
    return Meta(ge=least, le=most, description=f"a number from {least:g} to {most:g}")


def _text(least: int, most: int) -> Meta:
    return Meta(min_length=least, max_length=most, description=f"text of {least} to {most} characters")


def _list(most: int, of: str) -> Meta:
    return Meta(max_length=most, description=f"a list of at most {most} {of}")


_NAME: Final = Meta(
    pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?\Z",
    description="1 to 63 letters, digits, '.', '_' or '-', beginning and ending with a letter or digit",
)


class _Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of the file."""


class _DomainTable(_Table, frozen=True):
    name: Annotated[str, _NAME]
    description: Annotated[str, _text(1, 2000)]
    examples: Annotated[
        tuple[Annotated[str, _text(1, EXAMPLE_CHARS_MAX)], ...], _list(EXAMPLES_MAX, "example questions")
    ] = ()


class _AdapterTable(_Table, frozen=True):
    path: Annotated[str, _text(1, 4096)]
    scale: Annotated[float, _number(-8, 8)] = 1.0


class _SamplingTable(_Table, frozen=True):
    temperature: Annotated[float, _number(0, 5)] | UnsetType = UNSET
    top_k: Annotated[int, _whole(0, 1000)] | UnsetType = UNSET
    top_p: Annotated[float, _number(0.001, 1)] | UnsetType = UNSET
    min_p: Annotated[float, _number(0, 1)] | UnsetType = UNSET
    repetition_penalty: Annotated[float, _number(0.1, 5)] | UnsetType = UNSET
    frequency_penalty: Annotated[float, _number(-2, 2)] | UnsetType = UNSET
    presence_penalty: Annotated[float, _number(-2, 2)] | UnsetType = UNSET
    max_tokens: Annotated[int, _whole(1, 1_048_576, "tokens")] | UnsetType = UNSET
    stop: Annotated[tuple[Annotated[str, _text(1, 256)], ...], _list(16, "stop strings")] | UnsetType = UNSET


class _ProfileTable(_Table, frozen=True):
    name: Annotated[str, _NAME]
    description: Annotated[str, _text(0, 300)] = ""
    model: Annotated[str, _text(1, 4096)] = BUILTIN
    chat_template: Annotated[str, _text(0, 65_536)] = ""
    system_prompt: Annotated[str, _text(0, 16_384)] = ""
    tier: Annotated[int, _whole(1, 9)] = 1
    context_tokens: Annotated[int, _whole(128, 1_048_576, "tokens")] = 2048
    slots: Annotated[int, _whole(1, 256)] = 4
    kv_type: Annotated[str, Meta(pattern="^(f16|q8_0)\\Z", description='"f16" or "q8_0"')] = "f16"
    n_gpu_layers: Annotated[int, _whole(0, 10_000, "layers")] = 0
    main_gpu: Annotated[int, _whole(0, 15)] = 0
    tensor_split: Annotated[tuple[Annotated[float, _number(0, 1000)], ...], _list(16, "shares")] = ()
    sampling: _SamplingTable = _SamplingTable()
    adapters: Annotated[tuple[_AdapterTable, ...], _list(8, "tables with a path and a scale")] = ()
    domains: Annotated[
        tuple[_DomainTable, ...], _list(DOMAINS_MAX, "tables with a name and a description")
    ] = ()


# --- the record --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What a node serves.

    ``model`` is a path (relative ones are relative to the profile's file) or ``builtin``.
    ``context_tokens`` is what prompt and answer may have together; ``slots`` how many generations run at
    once; ``kv_type`` how their KV cache is kept (q8_0 halves it); ``n_gpu_layers`` how many layers go
    to graphics cards, in the shares of ``tensor_split`` or all to ``main_gpu``. Among nodes that would be
    done at about the same time, the higher ``tier`` answers. The path of an adapter is relative to the
    profile's file, or the name of a shipped one. ``folder`` is where the profile was read from.
    """

    name: str
    description: str = ""
    model: str = BUILTIN
    chat_template: str = ""
    system_prompt: str = ""
    tier: int = 1
    context_tokens: int = 2048
    slots: int = 4
    kv_type: str = "f16"
    n_gpu_layers: int = 0
    main_gpu: int = 0
    tensor_split: tuple[float, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    adapters: tuple[Adapter, ...] = ()
    domains: tuple[Domain, ...] = ()
    folder: Path | None = field(default=None, compare=False)

    def offer(self, model: str, fingerprint: str) -> ProfileOffer:
        """What the directory says of this profile, once its model has a name and a fingerprint."""
        return ProfileOffer(
            name=self.name,
            model=model,
            fingerprint=fingerprint,
            domains=self.domains,
            tier=self.tier,
            context_tokens=self.context_tokens,
        )


# --- reading -----------------------------------------------------------------------------


def parse(data: bytes, *, source: str, folder: Path | None = None) -> Profile:
    """A profile from the bytes of its file; ``source`` names it in errors. Raises ProfileInvalid."""
    if len(data) > FILE_BYTES_MAX:
        raise ProfileInvalid(
            f"{source} is larger than {FILE_BYTES_MAX} bytes: that is no profile.", field="profile"
        )
    try:
        tables = tomllib.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ProfileInvalid(
            f"{source} is not UTF-8: byte {error.start} (line {line}) is no character; save it as UTF-8.",
            field="profile",
        ) from error
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ProfileInvalid(f"{source} is not valid TOML: {reason}.", field="profile") from error
    _refuse_unknown(tables, _ProfileTable, source)
    try:
        table = msgspec.convert(tables, _ProfileTable)
    except msgspec.ValidationError as error:
        raise _invalid(str(error), tables, source) from error
    return _checked(table, source, folder)


def _refuse_unknown(table: Mapping[str, object], kind: type[_Table], source: str, prefix: str = "") -> None:
    """Raise for the first key that a table does not have, at any depth, with the nearest that it has."""
    known = {f.name: f.type for f in msgspec.structs.fields(kind)}
    for key, value in table.items():
        if key not in known:
            name = f"{prefix}{key}"
            raise ProfileInvalid(
                f"{source}: there is no key {shown(name)}.{did_you_mean(key, list(known))} "
                f"Keys {'of ' + prefix[:-1] if prefix else 'of a profile'}: {', '.join(known)}.",
                field=name[:128],
            )
        inner = _TABLES.get(f"{prefix}{key}")
        if inner is not None:
            for entry in value if isinstance(value, list) else [value]:
                if isinstance(entry, dict):
                    _refuse_unknown(entry, inner, source, f"{prefix}{key}.")


_TABLES: Final[Mapping[str, type[_Table]]] = {
    "sampling": _SamplingTable,
    "adapters": _AdapterTable,
    "domains": _DomainTable,
}


def did_you_mean(wrong: str, names: list[str]) -> str:
    near = difflib.get_close_matches(wrong[:64], names, n=1, cutoff=0.5)
    return f" Did you mean {near[0]}?" if near else ""


def _invalid(message: str, tables: Mapping[str, object], source: str) -> ProfileInvalid:
    """msgspec's complaint in our words: file, key, value, and what would be accepted."""
    complaint, _, place = message.partition(" - at `$")
    missing = re.search(r"missing required field `(\w+)`", complaint)
    key = place.removesuffix("`").removeprefix(".")
    if missing:
        key = f"{key}.{missing[1]}" if key else missing[1]
        return ProfileInvalid(f"{source}: {key} is missing: it must be {_accepted(key)}.", field=key)
    return ProfileInvalid(
        f"{source}: {key} is {shown(_at(tables, key))}: it must be {_accepted(key)}.", field=key
    )


def _steps(key: str) -> list[str]:
    return re.findall(r"\w+", key)


def _at(value: Any, key: str) -> object:
    for step in _steps(key):
        value = value[int(step)] if isinstance(value, list) else value[step]
    return value


def _accepted(key: str) -> str:
    """What the key of that place may be, from the annotations of the format."""
    steps = _steps(key)
    kind: Any = msgspec.inspect.type_info(_ProfileTable)
    words = "of another type"
    for step in [*steps, ""]:
        while isinstance(kind, msgspec.inspect.UnionType | msgspec.inspect.Metadata):
            if isinstance(kind, msgspec.inspect.Metadata):
                words = (kind.extra_json_schema or {}).get("description", words)
                kind = kind.type
            else:
                kind = kind.types[0]
        if not step:
            break
        if step.isdigit():
            kind, words = kind.item_type, "of another type"
        else:
            kind, words = next(f.type for f in kind.fields if f.name == step), "a table"
    return words


def _checked(table: _ProfileTable, source: str, folder: Path | None) -> Profile:
    """The profile, after the rules that span several keys."""
    names = [domain.name for domain in table.domains]
    for name in names:
        if names.count(name) > 1:
            raise ProfileInvalid(
                f"{source}: domain {name} is declared twice: put its examples together.", field="domains"
            )
    size = sum(len(text.encode()) for d in table.domains for text in (d.name, d.description, *d.examples))
    if size > DOMAINS_BYTES_MAX:
        raise ProfileInvalid(
            f"{source}: the domains have {size} bytes of text; at most {DOMAINS_BYTES_MAX} are accepted, "
            "because they travel to every node: keep the examples that differ most.",
            field="domains",
        )
    given = {
        f: getattr(table.sampling, f)
        for f in table.sampling.__struct_fields__
        if getattr(table.sampling, f) is not UNSET
    }
    sampling = Sampling(**given)
    if sampling.max_tokens >= table.context_tokens:
        raise ProfileInvalid(
            f"{source}: sampling.max_tokens is {sampling.max_tokens}: it must be less than context_tokens, "
            f"which is {table.context_tokens}, so that there is room for a prompt.",
            field="sampling.max_tokens",
        )
    if table.tensor_split and not any(table.tensor_split):
        raise ProfileInvalid(
            f"{source}: tensor_split has nothing but zeros: give each card its share, or leave it out.",
            field="tensor_split",
        )
    return Profile(
        name=table.name,
        description=table.description,
        model=table.model,
        chat_template=table.chat_template,
        system_prompt=table.system_prompt,
        tier=table.tier,
        context_tokens=table.context_tokens,
        slots=table.slots,
        kv_type=table.kv_type,
        n_gpu_layers=table.n_gpu_layers,
        main_gpu=table.main_gpu,
        tensor_split=table.tensor_split,
        sampling=sampling,
        adapters=tuple(Adapter(path=a.path, scale=a.scale) for a in table.adapters),
        domains=tuple(
            Domain(name=d.name, description=d.description, examples=d.examples) for d in table.domains
        ),
        folder=folder,
    )


# --- writing -----------------------------------------------------------------------------


def dump(profile: Profile) -> str:
    """The profile as the text of its file; ``parse`` gives the same profile back."""
    lines = [f"name = {_quoted(profile.name)}"]
    texts = ("description", "model", "chat_template", "system_prompt", "kv_type")
    lines += [f"{key} = {_quoted(getattr(profile, key))}" for key in texts if getattr(profile, key)]
    lines += [f"{key} = {getattr(profile, key)}" for key in ("tier", "context_tokens", "slots")]
    lines += [
        f"{key} = {json.dumps(getattr(profile, key))}"
        for key in ("n_gpu_layers", "main_gpu", "tensor_split")
        if getattr(profile, key)
    ]
    lines += ["", "[sampling]"]
    for key in _SamplingTable.__struct_fields__:
        value = getattr(profile.sampling, key)
        lines.append(f"{key} = {json.dumps(value) if key != 'stop' else _quoted_list(value)}")
    for adapter in profile.adapters:
        lines += [
            "",
            "[[adapters]]",
            f"path = {_quoted(adapter.path)}",
            f"scale = {json.dumps(adapter.scale)}",
        ]
    for domain in profile.domains:
        lines += [
            "",
            "[[domains]]",
            f"name = {_quoted(domain.name)}",
            f"description = {_quoted(domain.description)}",
        ]
        lines.append(f"examples = {_quoted_list(domain.examples)}")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """A TOML string; over several lines where the text has several."""
    escaped = [
        json.dumps(line, ensure_ascii=False)[1:-1].replace("\x7f", "\\u007f") for line in text.split("\n")
    ]
    return f'"{escaped[0]}"' if len(escaped) == 1 else '"""\n' + "\n".join(escaped) + '"""'


def _quoted_list(texts: tuple[str, ...]) -> str:
    return "[\n" + "".join(f"  {_quoted(text)},\n" for text in texts) + "]" if texts else "[]"
