"""langchain-openai, unmodified. Goal: it notices no mesh.

Its vectors need `check_embedding_ctx_length=False`, as with every server whose tokens are not OpenAI's: by
default it sends token ids of OpenAI's vocabulary, which say nothing to another model.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import openai
import pytest
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel


class Place(BaseModel):
    """A place that a question is about."""

    city: str


def chat(v1: str, **options: object) -> ChatOpenAI:
    given = {"model": "code", "temperature": 0, "max_completion_tokens": 20, "max_retries": 0, **options}
    return ChatOpenAI(base_url=v1, api_key="none", **given)


def test_a_stream_says_the_same_as_one_document(v1: str, coding: str) -> None:
    model = chat(v1)
    whole = model.invoke(coding)
    assert whole.content
    assert whole.usage_metadata["output_tokens"] == 20
    assert whole.response_metadata["finish_reason"] == "length"
    parts = list(model.stream(coding, stream_usage=True))
    assert "".join(part.content for part in parts) == whole.content
    assert sum(part.usage_metadata["output_tokens"] for part in parts if part.usage_metadata) == 20


def test_many_ask_at_once(v1: str, coding: str) -> None:
    answers = chat(v1, model="auto").batch([coding] * 4)
    assert len({answer.content for answer in answers}) == 1

    async def streamed() -> str:
        return "".join([part.content async for part in chat(v1, model="auto").astream(coding)])

    assert asyncio.run(streamed()) == answers[0].content


def test_an_answer_becomes_an_object(v1: str) -> None:
    model = chat(v1, max_completion_tokens=200).with_structured_output(Place, method="json_schema")
    assert isinstance(model.invoke("Where is the Eiffel Tower?").city, str)


def test_log_probabilities_come_with_the_answer(v1: str, coding: str) -> None:
    answer = chat(v1, logprobs=True, top_logprobs=2).invoke(coding)
    assert len(answer.response_metadata["logprobs"]["content"]) == 20


def test_text_is_continued(v1: str) -> None:
    model = OpenAI(base_url=v1, api_key="none", model="code", temperature=0, max_tokens=20)
    assert "".join(model.stream("def add(a, b):")) == model.invoke("def add(a, b):")


def test_a_model_that_nobody_has_is_not_found(v1: str) -> None:
    with pytest.raises(openai.NotFoundError, match="SmolLM2"):
        chat(v1, model="gpt-4").invoke("hello")


def test_texts_become_vectors(v1: str) -> None:
    model = OpenAIEmbeddings(base_url=v1, api_key="none", model="code", check_embedding_ctx_length=False)
    vectors = model.embed_documents(["hello", "there"])
    assert [len(vector) for vector in vectors] == [576, 576]
    assert model.embed_query("hello") == pytest.approx(vectors[0], abs=1e-3)


def test_token_ids_of_another_vocabulary_are_refused_with_what_to_do(
    v1: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import litellm

    # OpenAI's vocabulary comes from the network; litellm brings it.
    tokenizers = Path(litellm.__file__).parent / "litellm_core_utils" / "tokenizers"
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tokenizers))
    model = OpenAIEmbeddings(base_url=v1, api_key="none", model="code")
    with pytest.raises(openai.BadRequestError, match="check_embedding_ctx_length=False"):
        model.embed_documents(["hello"])
