"""A GGUF file's header, read with care before llama.cpp sees the file (format: ggml docs/gguf.md).

Owns: telling a missing, foreign, damaged or truncated file from a sound one, in words. Must not: load
tensors. A hostile header costs bounded memory and time.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, TypeAlias

from fieldmesh.core.errors import ModelFileInvalid

KEYS_MAX = 10_000
TENSORS_MAX = 100_000
STRING_BYTES_MAX = 8 << 20
ARRAY_ITEMS_MAX = 8 << 20
HEADER_BYTES_MAX = 512 << 20
LAYERS_MAX = 1024
"""Arrays of numbers up to this length are kept: a value for each layer."""

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# ggml type: (values a block, bytes a block). Types not listed are only checked to begin inside the file.
_BLOCKS = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 36),
    10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292),
    16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82),
    23: (256, 136), 24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2),
    34: (256, 54), 35: (256, 66), 39: (32, 17),
}  # fmt: skip


Value: TypeAlias = str | int | float | bool | tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufHeader:
    """What a sound file says of itself. ``keys`` holds scalars, strings and short arrays of numbers; other
    arrays only by their length. ``weights_bytes`` is the size of all tensors, ``shapes`` their dimensions in
    the file's order (of a matrix: inputs, outputs)."""

    version: int
    tensors: int
    file_bytes: int
    weights_bytes: int
    keys: dict[str, Value]
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def architecture(self) -> str:
        return str(self.keys.get("general.architecture", ""))

    @property
    def name(self) -> str:
        return str(self.keys.get("general.name", ""))

    @property
    def vocabulary(self) -> int:
        """How many tokens the model knows."""
        count = self.keys.get("tokenizer.ggml.tokens", 0)
        return count if isinstance(count, int) else 0

    def number(self, name: str, default: int = 0) -> int:
        """A whole number of the architecture; the largest where there is one for each layer."""
        return max(self.numbers(name, 1), default=default)

    def numbers(self, name: str, layers: int) -> list[int]:
        """A number of the architecture for each layer; empty where the file does not say."""
        value = self.keys.get(f"{self.architecture}.{name}")
        if isinstance(value, tuple):
            return [int(number) for number in value]
        return [value] * min(layers, LAYERS_MAX) if isinstance(value, int) else []


class _Truncated(Exception):
    pass


class _Reader:
    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._size = min(size, HEADER_BYTES_MAX)
        self.at = 0

    def take(self, count: int) -> bytes:
        if self.at + count > self._size:
            raise _Truncated
        data = self._file.read(count)
        if len(data) != count:
            raise _Truncated
        self.at += count
        return data

    def skip(self, count: int) -> None:
        if self.at + count > self._size:
            raise _Truncated
        self._file.seek(count, os.SEEK_CUR)
        self.at += count

    def number(self, code: str) -> int:
        return int(struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0])

    def string(self) -> str:
        length = self.number("Q")
        if length > STRING_BYTES_MAX:
            raise ValueError(f"a string of {length} bytes (at most {STRING_BYTES_MAX})")
        return self.take(length).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Value:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self._array()
        if kind not in _SCALARS:
            raise ValueError(f"an unknown value type {kind}")
        code = _SCALARS[kind]
        value: int | float | bool = struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]
        return value

    def _array(self) -> int | tuple[float, ...]:
        kind, count = self.number("I"), self.number("Q")
        if count > ARRAY_ITEMS_MAX:
            raise ValueError(f"an array of {count} items (at most {ARRAY_ITEMS_MAX})")
        if kind == _STRING:
            for _ in range(count):
                self.skip(self.number("Q"))
        elif kind in _SCALARS and 1 <= count <= LAYERS_MAX:
            code = f"<{count}{_SCALARS[kind]}"
            return struct.unpack(code, self.take(struct.calcsize(code)))
        elif kind in _SCALARS:
            self.skip(count * struct.calcsize(f"<{_SCALARS[kind]}"))
        else:
            raise ValueError(f"an array of type {kind}")
        return count


def read_header(path: str) -> GgufHeader:
    """Check a file from magic to the end of its last tensor. Raises ModelFileInvalid with the remedy."""
    try:
        with Path(path).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            return _read(_Reader(file, size), path, size)
    except FileNotFoundError:
        raise _invalid(path, "does not exist; check the path") from None
    except OSError as error:
        raise _invalid(path, f"cannot be read ({error.strerror}); check its permissions") from None
    except _Truncated:
        raise _invalid(
            path, "ends inside its own header; fetch it again, the download is incomplete"
        ) from None
    except ValueError as error:
        raise _invalid(path, f"has a damaged header ({error}); fetch it again") from None


def _read(reader: _Reader, path: str, size: int) -> GgufHeader:
    if size < 4 or reader.take(4) != b"GGUF":
        raise _invalid(path, "is not a GGUF file (it does not begin with GGUF); give a model in GGUF format")
    version = reader.number("I")
    if version not in (2, 3):
        raise _invalid(path, f"has GGUF version {version}; 2 and 3 can be read, convert the model again")
    tensors, count = reader.number("Q"), reader.number("Q")
    if tensors > TENSORS_MAX or count > KEYS_MAX:
        raise ValueError(f"{tensors} tensors and {count} keys")
    if not tensors:
        raise _invalid(path, "holds no model (no tensors); give a model in GGUF format")
    keys: dict[str, Value] = {}
    for _ in range(count):
        key = reader.string()
        keys[key] = reader.value(reader.number("I"))
    shapes: dict[str, tuple[int, ...]] = {}
    ends = [_tensor_end(reader, shapes) for _ in range(tensors)]
    alignment = keys.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20:
        raise ValueError(f"an alignment of {alignment}")
    data_start = -(-reader.at // alignment) * alignment
    needed = data_start + max(ends, default=0)
    if needed > size:
        raise _invalid(
            path,
            f"has {size} bytes, but its tensors end at {needed}; fetch it again, the download is incomplete",
        )
    if "general.architecture" not in keys:
        raise _invalid(path, "holds no model (it names no architecture); give a model in GGUF format")
    return GgufHeader(
        version=version,
        tensors=tensors,
        file_bytes=size,
        weights_bytes=max(ends, default=0),
        keys=keys,
        shapes=shapes,
    )


def _tensor_end(reader: _Reader, shapes: dict[str, tuple[int, ...]]) -> int:
    """Where one tensor ends, counted from the start of the data. Notes its shape."""
    name = reader.string()
    dimensions = reader.number("I")
    if dimensions > 4:
        raise ValueError(f"a tensor of {dimensions} dimensions")
    shapes[name] = tuple(reader.number("Q") for _ in range(dimensions))
    values = math.prod(shapes[name])
    kind, offset = reader.number("I"), reader.number("Q")
    block_values, block_bytes = _BLOCKS.get(kind, (1, 0))
    return offset + -(-values // block_values) * block_bytes


def _invalid(path: str, problem: str) -> ModelFileInvalid:
    return ModelFileInvalid(f"the file {path} {problem}", field="model_path")
