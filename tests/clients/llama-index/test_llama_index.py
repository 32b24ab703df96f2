"""llama-index's OpenAI-like model, unmodified. Goal: it notices no mesh."""

from __future__ import annotations

import asyncio

import openai
import pytest
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike


def model(v1: str, name: str = "code", *, chat: bool = True) -> OpenAILike:
    return OpenAILike(
        model=name, api_base=v1, api_key="none", is_chat_model=chat, temperature=0, max_tokens=20,
        context_window=2048, max_retries=0, timeout=60,
    )  # fmt: skip


def test_a_stream_says_the_same_as_one_document(v1: str, coding: str) -> None:
    said = [ChatMessage(role="user", content=coding)]
    whole = model(v1).chat(said)
    assert whole.message.content
    assert whole.raw.usage.completion_tokens == 20
    parts = list(model(v1).stream_chat(said))
    assert "".join(part.delta or "" for part in parts) == whole.message.content
    assert parts[-1].message.content == whole.message.content


def test_a_prompt_is_a_question_to_a_chat_model(v1: str, coding: str) -> None:
    asked = model(v1).complete(coding)
    assert asked.text == model(v1).chat([ChatMessage(role="user", content=coding)]).message.content


def test_text_is_continued_by_one_that_does_not_chat(v1: str) -> None:
    continuing = model(v1, chat=False)
    whole = continuing.complete("def add(a, b):")
    assert whole.text
    assert "".join(part.delta or "" for part in continuing.stream_complete("def add(a, b):")) == whole.text


def test_many_ask_at_once(v1: str, coding: str) -> None:
    async def streamed() -> str:
        stream = await model(v1, "auto").astream_chat([ChatMessage(role="user", content=coding)])
        return "".join([part.delta or "" async for part in stream])

    async def all_at_once() -> list[str]:
        return await asyncio.gather(*(streamed() for _ in range(4)))

    assert len(set(asyncio.run(all_at_once()))) == 1


def test_a_model_that_nobody_has_is_not_found(v1: str) -> None:
    with pytest.raises(openai.NotFoundError, match="SmolLM2"):
        model(v1, "gpt-4").chat([ChatMessage(role="user", content="hello")])
