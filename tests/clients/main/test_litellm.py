"""litellm, unmodified, by both of its providers that a mesh can pass for. Goal: it notices no mesh."""

from __future__ import annotations

import asyncio
import json

import litellm
import pytest

WAYS = [("openai/", "/v1"), ("ollama_chat/", "")]


def asking(http: str, way: tuple[str, str], model: str = "code", **options: object) -> dict[str, object]:
    """What one call is given."""
    provider, path = way
    return {
        "model": provider + model,
        "api_base": http + path,
        "api_key": "none",
        "temperature": 0,
        "max_tokens": 20,
        "num_retries": 0,
        "timeout": 60,
        **options,
    }


@pytest.mark.parametrize("way", WAYS)
def test_a_stream_says_the_same_as_one_document(http: str, coding: str, way: tuple[str, str]) -> None:
    said = [{"role": "user", "content": coding}]
    whole = litellm.completion(**asking(http, way), messages=said)
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 20
    assert whole.usage.prompt_tokens > 20
    parts = list(
        litellm.completion(
            **asking(http, way), messages=said, stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert text == whole.choices[0].message.content
    ends = [part.choices[0].finish_reason for part in parts if part.choices and part.choices[0].finish_reason]
    assert ends == ["length"]
    (usage,) = [part.usage for part in parts if getattr(part, "usage", None)]
    assert usage.completion_tokens == 20


@pytest.mark.parametrize("way", WAYS)
def test_many_ask_at_once(http: str, coding: str, way: tuple[str, str]) -> None:
    async def all_at_once() -> list[litellm.ModelResponse]:
        said = [{"role": "user", "content": coding}]
        return await asyncio.gather(
            *(litellm.acompletion(**asking(http, way), messages=said) for _ in range(6))
        )

    texts = {answer.choices[0].message.content for answer in asyncio.run(all_at_once())}
    assert len(texts) == 1


@pytest.mark.parametrize("way", WAYS)
def test_an_answer_fits_a_schema(http: str, way: tuple[str, str]) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}},
        "required": ["city"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "place", "schema": schema, "strict": True}}
    said = [{"role": "user", "content": "Where is the Eiffel Tower?"}]
    answer = litellm.completion(**asking(http, way, max_tokens=60), messages=said, response_format=form)
    assert isinstance(json.loads(answer.choices[0].message.content)["city"], str)


@pytest.mark.parametrize("way", WAYS)
def test_a_model_that_nobody_has_is_not_found(http: str, way: tuple[str, str]) -> None:
    with pytest.raises((litellm.NotFoundError, litellm.APIConnectionError)) as caught:
        litellm.completion(**asking(http, way, "gpt-4"), messages=[{"role": "user", "content": "hello"}])
    assert "SmolLM2" in str(caught.value)


def test_a_prompt_over_the_context_is_known_for_what_it_is(http: str) -> None:
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(
            **asking(http, WAYS[0]), messages=[{"role": "user", "content": "many words " * 5000}]
        )


def test_text_is_continued(http: str) -> None:
    whole = litellm.text_completion(
        **asking(http, ("text-completion-openai/", "/v1")), prompt="def add(a, b):"
    )
    parts = litellm.text_completion(
        **asking(http, ("text-completion-openai/", "/v1")), prompt="def add(a, b):", stream=True
    )
    assert "".join(part.choices[0].text or "" for part in parts) == whole.choices[0].text


@pytest.mark.parametrize("way", [("openai/", "/v1"), ("ollama/", "")])
def test_texts_become_vectors(http: str, way: tuple[str, str]) -> None:
    provider, path = way
    made = litellm.embedding(
        model=provider + "code", api_base=http + path, api_key="none", input=["hello", "there"], timeout=60
    )
    vectors = [entry["embedding"] for entry in made.data]
    assert [len(vector) for vector in vectors] == [576, 576]
    assert sum(x * x for x in vectors[0]) == pytest.approx(1.0, abs=1e-3)
