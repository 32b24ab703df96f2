"""The command line tool `llm`, its models taken from the file of our examples. Goal: it notices no mesh."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[3] / "deploy" / "examples" / "extra-openai-models.yaml"
SHORT = ("-o", "temperature", "0", "-o", "max_tokens", "20")

Llm = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def llm(http: str, tmp_path: Path) -> Llm:
    """Runs `llm` with a folder of its own."""
    models = EXAMPLE.read_text(encoding="utf-8").replace("http://127.0.0.1:7480", http)
    (tmp_path / EXAMPLE.name).write_text(models, encoding="utf-8")
    variables = {**os.environ, "LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "none"}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["llm", *words], env=variables, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=120, check=False,
        )  # fmt: skip

    return run


def test_a_stream_says_the_same_as_one_document_and_counts_its_tokens(llm: Llm, coding: str) -> None:
    streamed = llm("-m", "mesh-code", *SHORT, "-u", coding)
    whole = llm("-m", "mesh-code", *SHORT, "-u", "--no-stream", coding)
    assert (streamed.returncode, whole.returncode) == (0, 0), streamed.stderr + whole.stderr
    assert streamed.stdout.strip()
    assert streamed.stdout == whole.stdout
    assert "20 output" in streamed.stderr
    assert "20 output" in whole.stderr


def test_a_conversation_goes_on(llm: Llm, coding: str) -> None:
    assert llm("-m", "mesh", *SHORT, coding).returncode == 0
    again = llm("-c", *SHORT, "And three?")
    assert again.returncode == 0, again.stderr
    (first, second) = json.loads(llm("logs", "--json").stdout)
    assert first["conversation_id"] == second["conversation_id"]
    assert second["input_tokens"] > first["input_tokens"]


def test_an_answer_fits_a_schema(llm: Llm) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "people": {"type": "integer"}},
        "required": ["city", "people"],
        "additionalProperties": False,
    }
    done = llm("-m", "mesh", "--schema", json.dumps(schema), "Where is the Eiffel Tower?")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert isinstance(answer["city"], str)
    assert isinstance(answer["people"], int)


def test_text_is_continued(llm: Llm) -> None:
    done = llm("-m", "mesh-text", *SHORT, "def add(a, b):")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_a_model_that_nobody_has_is_named_in_the_error(llm: Llm, tmp_path: Path) -> None:
    path = tmp_path / EXAMPLE.name
    path.write_text(
        path.read_text(encoding="utf-8").replace("model_name: code", "model_name: gpt-4"), encoding="utf-8"
    )
    done = llm("-m", "mesh-code", "hello")
    assert done.returncode == 1
    assert "gpt-4" in done.stderr
    assert "SmolLM2" in done.stderr
