"""Goal: any file that is no sound model is refused in words. Method: damage to a sound one, everywhere."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fieldmesh.core.errors import ModelFileInvalid
from fieldmesh.engine.gguf import read_header


def refused(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    with pytest.raises(ModelFileInvalid) as error:
        read_header(str(path))
    return error.value.message


def test_a_sound_file_says_what_it_holds(tiny_model: Path) -> None:
    header = read_header(str(tiny_model))
    assert (header.architecture, header.name, header.version, header.tensors) == ("llama", "tiny", 3, 21)
    assert header.keys["llama.context_length"] == 8192


def test_the_sizes_of_a_model_are_told(tiny_model: Path) -> None:
    header = read_header(str(tiny_model))
    assert (header.number("block_count"), header.number("nothing"), header.vocabulary) == (2, 0, 297)
    assert header.numbers("attention.head_count_kv", 2) == [4, 4]
    assert 0 < header.weights_bytes < header.file_bytes


def test_a_number_for_each_layer_is_kept(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_head_count_kv([4, 0, 2])
    writer.add_tensor("t", np.zeros(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = read_header(str(tmp_path / "m.gguf"))
    assert header.numbers("attention.head_count_kv", 3) == [4, 0, 2]
    assert header.number("attention.head_count_kv") == 4


def test_a_missing_file_and_a_folder_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ModelFileInvalid, match="does not exist"):
        read_header(str(tmp_path / "no"))
    with pytest.raises(ModelFileInvalid, match="cannot be read"):
        read_header(str(tmp_path))


@pytest.mark.parametrize("data", [b"", b"GG", b"PK\x03\x04" + b"x" * 100, b"<!doctype html>"])
def test_a_foreign_file_is_no_gguf(tmp_path: Path, data: bytes) -> None:
    assert "is not a GGUF file" in refused(tmp_path / "f", data)


def test_an_unknown_version_is_named(tmp_path: Path) -> None:
    assert "version 9" in refused(tmp_path / "f", b"GGUF" + struct.pack("<IQQ", 9, 1, 1))


def test_a_file_without_tensors_is_no_model(tmp_path: Path) -> None:
    assert "holds no model" in refused(tmp_path / "f", b"GGUF" + struct.pack("<IQQ", 3, 0, 0))


@pytest.mark.parametrize("count", [1 << 20, 1 << 62])
def test_absurd_counts_cost_nothing(tmp_path: Path, count: int) -> None:
    assert "damaged" in refused(tmp_path / "f", b"GGUF" + struct.pack("<IQQ", 3, 1, count))


def test_a_key_of_absurd_length_costs_nothing(tmp_path: Path) -> None:
    assert "damaged" in refused(tmp_path / "f", b"GGUF" + struct.pack("<IQQQ", 3, 1, 1, 1 << 60))


@pytest.mark.parametrize("cut", [1, 100, 10_000])
def test_missing_tensor_data_is_an_incomplete_download(tiny_model: Path, tmp_path: Path, cut: int) -> None:
    assert "incomplete" in refused(tmp_path / "f", tiny_model.read_bytes()[:-cut])


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_header_cut_anywhere_is_refused(tiny_model: Path, tmp_path: Path, data: st.DataObject) -> None:
    whole = tiny_model.read_bytes()
    assert refused(tmp_path / "f", whole[: data.draw(st.integers(0, 12_000))])


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 12_000), value=st.binary(min_size=1, max_size=8))
def test_a_damaged_header_is_read_or_refused_but_never_worse(
    tiny_model: Path, tmp_path: Path, at: int, value: bytes
) -> None:
    damaged = bytearray(tiny_model.read_bytes())
    damaged[at : at + len(value)] = value
    path = tmp_path / "f"
    path.write_bytes(damaged)
    try:
        assert read_header(str(path)).tensors > 0
    except ModelFileInvalid as error:
        assert str(path) in error.message
