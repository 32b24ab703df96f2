"""The examples of `deploy/examples`, run as their heads say, at a node that does not own the domain."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
EXAMPLES = ROOT / "deploy" / "examples"
PROTO = "proto/fieldmesh/v1/inference.proto"
SERVED_BY = "\n— code\n"
ELSEWHERE = {"extra-openai-models.yaml", "README.md"}
"""What test_llm tries, and what is no program."""


def said(*command: str | Path, **variables: str) -> str:
    """What a command prints. It must succeed."""
    done = subprocess.run(
        [str(word) for word in command], cwd=ROOT, env={**os.environ, **variables}, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_curl_streams_and_is_told_who_answered(http: str) -> None:
    told = said("sh", EXAMPLES / "curl.sh", http)
    assert told.startswith("data: {")
    assert "data: [DONE]" in told
    assert "x-fieldmesh-served-by: code" in told
    assert json.loads(told.splitlines()[-1])["choices"][0]["message"]["content"]


def test_openais_library_streams_and_is_told_who_answered(http: str) -> None:
    assert said(sys.executable, EXAMPLES / "openai_chat.py", http).endswith(SERVED_BY)


def test_litellm_streams(http: str) -> None:
    assert len(said(sys.executable, EXAMPLES / "litellm_chat.py", http)) > 40


def test_langchain_streams_makes_an_object_and_vectors(http: str) -> None:
    told = said(sys.executable, EXAMPLES / "langchain_chat.py", http)
    assert "\ncity='" in told
    assert told.endswith("576 numbers\n")


def test_ollamas_library_streams(http: str) -> None:
    first, _, answer = said(sys.executable, EXAMPLES / "ollama_chat.py", http).partition("\n")
    assert first.startswith("There is auto, code, general")
    assert len(answer) > 40


def test_grpc_needs_nothing_but_an_address(grpc_address: str) -> None:
    told = said(sys.executable, EXAMPLES / "grpc_by_reflection.py", grpc_address)
    assert "fieldmesh.v1.InferenceService" in told.partition("\n")[0]
    assert told.endswith(SERVED_BY)


def test_grpc_works_with_stubs_made_from_the_protocol(grpc_address: str, tmp_path: Path) -> None:
    said(
        sys.executable, "-m", "grpc_tools.protoc", "-I", "proto",
        f"--python_out={tmp_path}", f"--grpc_python_out={tmp_path}", PROTO,
    )  # fmt: skip
    told = said(sys.executable, EXAMPLES / "grpc_by_stubs.py", grpc_address, PYTHONPATH=str(tmp_path))
    assert told.endswith(SERVED_BY)


@pytest.mark.skipif(
    shutil.which("grpc_tools_ruby_protoc") is None,
    reason="RUBY'S GRPC IS MISSING: the example in Ruby was not tried (Debian: ruby-grpc, ruby-grpc-tools)",
)
def test_ruby_asks_with_debians_packages_alone(grpc_address: str, tmp_path: Path) -> None:
    said("grpc_tools_ruby_protoc", "-I", "proto", f"--ruby_out={tmp_path}", f"--grpc_out={tmp_path}", PROTO)
    told = said("ruby", "-I", tmp_path, EXAMPLES / "grpc_chat.rb", grpc_address, LANG="C.UTF-8")
    assert told.endswith(SERVED_BY)


def test_every_example_is_tried_here() -> None:
    programs = {path.name for path in EXAMPLES.iterdir() if path.is_file()} - ELSEWHERE
    here = Path(__file__).read_text(encoding="utf-8")
    assert {name for name in programs if f'"{name}"' not in here} == set()
