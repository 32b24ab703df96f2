"""OpenAI's and Ollama's own libraries at a real model; `tests/gateway` asks them more, of a fake one."""

from __future__ import annotations

import json

import ollama
import openai
import pytest

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}},
    "required": ["city"],
    "additionalProperties": False,
}
PLACE = [{"role": "user", "content": "Where is the Eiffel Tower?"}]


def test_openai_asks_streams_and_is_told_who_answered(v1: str, coding: str) -> None:
    said = [{"role": "user", "content": coding}]
    with openai.OpenAI(base_url=v1, api_key="none", max_retries=0) as client:
        raw = client.chat.completions.with_raw_response.create(
            model="auto", messages=said, temperature=0, max_tokens=20
        )
        whole = raw.parse()
        assert raw.headers["x-fieldmesh-served-by"] == "code"
        stream = client.chat.completions.create(
            model="auto", messages=said, temperature=0, max_tokens=20, stream=True
        )
        assert (
            "".join(part.choices[0].delta.content or "" for part in stream)
            == whole.choices[0].message.content
        )
        form = {"type": "json_schema", "json_schema": {"name": "place", "strict": True, "schema": SCHEMA}}
        fitting = client.chat.completions.create(model="code", messages=PLACE, response_format=form)
        assert isinstance(json.loads(fitting.choices[0].message.content)["city"], str)
        made = client.embeddings.create(model="code", input=["hello", "there"])
        assert [len(entry.embedding) for entry in made.data] == [576, 576]


def test_ollama_asks_streams_and_is_told_what_there_is(http: str, coding: str) -> None:
    said = [{"role": "user", "content": coding}]
    client = ollama.Client(host=http)
    options = {"temperature": 0, "num_predict": 20}
    whole = client.chat("code", said, options=options)
    parts = client.chat("code", said, options=options, stream=True)
    assert "".join(part.message.content or "" for part in parts) == whole.message.content
    assert whole.eval_count == 20
    assert {"auto", "code", "general"} <= {model.model for model in client.list().models}
    assert isinstance(json.loads(client.chat("code", PLACE, format=SCHEMA).message.content)["city"], str)
    with pytest.raises(ollama.ResponseError, match="SmolLM2"):
        client.chat("gpt-4", said)
