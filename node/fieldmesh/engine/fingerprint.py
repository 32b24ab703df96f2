"""What the files of an engine are called by: a hash of their content, and a stamp that needs no reading.

Owns: both, over the model and its adapters. Must not: know what is in the files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from fieldmesh.engine.settings import EngineSettings

BLOCK_BYTES = 64 << 20


def fingerprint(settings: EngineSettings, on_block: Callable[[], None] = lambda: None) -> str:
    """The SHA-256 of the model's file in hex; with adapters, of its digest and of theirs with their scales.

    ``on_block`` is called now and then while a large file is read. Raises OSError.
    """
    model, *others = (_digest(path, on_block) for path in settings.files)
    if not others:
        return model
    parts = [f"{d} {a.scale!r}" for d, a in zip(others, settings.adapters, strict=True)]
    return hashlib.sha256("\n".join([model, *parts]).encode()).hexdigest()


def stamp(settings: EngineSettings) -> str:
    """Changes when a file does, short of reading it. Raises OSError."""
    found = [(path, Path(path).stat()) for path in settings.files]
    parts = [f"{path} {status.st_size} {status.st_mtime_ns}" for path, status in found]
    return " ".join([*parts, *(f"{adapter.scale!r}" for adapter in settings.adapters)])


def _digest(path: str, on_block: Callable[[], None]) -> str:
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            on_block()
    return digest.hexdigest()
