"""Goal: the real model answers as llama-cpp-python's own Llama does, alone and side by side. Method: the
embedded default model in the engine's process; nothing here depends on how fast the machine is."""

from __future__ import annotations

import asyncio
import tomllib
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio
from llama_cpp import Llama

from fieldmesh.core.model import Chunk, Message, Prompt, Sampling
from fieldmesh.engine.host import EngineProcess
from fieldmesh.engine.port import Engine, Job
from fieldmesh.engine.settings import EngineSettings
from tests.engine.asking import ask, chat, drain, job
from tests.engine.tiny_model import default_model_path

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module")]

GREEDY = Sampling(temperature=0.0, max_tokens=24)
TESTS = Path(__file__).parents[1]
QUESTIONS = [
    "What is the capital of France?",
    "Write a function that adds two numbers.",
    "Repeat after me: 🙂 é 中文",
    "Name three colours.",
]


@pytest.fixture(scope="module")
def path() -> Path:
    return default_model_path()


@pytest.fixture(scope="module")
def llama(path: Path) -> Iterator[Llama]:
    made = Llama(str(path), n_ctx=2048, n_threads=1, n_threads_batch=1, flash_attn=True, verbose=False)
    yield made
    made.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(path: Path) -> AsyncIterator[EngineProcess]:
    made = EngineProcess(EngineSettings(model_path=str(path), slots=5, mixed_tokens=32))
    await made.start()
    yield made
    await made.close()


def llamas_answers(llama: Llama, questions: list[str], tokens: int) -> list[str]:
    """What Llama answers, greedily, one question at a time, each from an empty cache."""
    answers = []
    for question in questions:
        llama.reset()
        reply = llama.create_chat_completion(
            [{"role": "user", "content": question}], temperature=0, max_tokens=tokens, repeat_penalty=1.0
        )
        answers.append(reply["choices"][0]["message"]["content"])
    return answers


@pytest.fixture(scope="module")
def expected(llama: Llama) -> list[str]:
    return llamas_answers(llama, QUESTIONS, GREEDY.max_tokens)


async def test_fifty_questions_are_answered_as_llama_answers_them(engine: Engine, llama: Llama) -> None:
    asked = tomllib.loads((TESTS / "data" / "questions.toml").read_text(encoding="utf-8"))
    questions = [question for texts in asked.values() for question in texts][:50]
    assert len(questions) == 50
    short = replace(GREEDY, max_tokens=12)
    answers = [await ask(engine, chat(f"many-{i}", q, short)) for i, q in enumerate(questions)]
    assert [a.text for a in answers] == llamas_answers(llama, questions, short.max_tokens)


async def test_one_at_a_time_it_answers_as_llama_does(engine: Engine, expected: list[str]) -> None:
    answers = [await ask(engine, chat(f"q{i}", q, GREEDY)) for i, q in enumerate(QUESTIONS)]
    assert [a.text for a in answers] == expected


async def test_side_by_side_it_answers_the_same(engine: Engine, expected: list[str]) -> None:
    answers = await asyncio.gather(*(ask(engine, chat(f"q{i}", q, GREEDY)) for i, q in enumerate(QUESTIONS)))
    assert [a.text for a in answers] == expected


async def test_logprobs_are_those_that_llama_gives(path: Path, engine: Engine) -> None:
    judge = Llama(
        str(path),
        n_ctx=512,
        n_threads=1,
        n_threads_batch=1,
        flash_attn=True,
        verbose=False,
        logits_all=True,
    )
    reply = judge.create_completion(
        "Once upon a time", max_tokens=6, temperature=0, repeat_penalty=1.0, logprobs=5
    )
    judge.close()
    expected = reply["choices"][0]["logprobs"]
    answer = await ask(engine, job("p", "Once upon a time", replace(GREEDY, max_tokens=6, logprobs=5)))
    found = [entry for chunk in answer.chunks for entry in chunk.logprobs]
    assert len(found) == len(answer.token_ids) == 6
    assert [entry.drawn.logprob for entry in found] == pytest.approx(expected["token_logprobs"], abs=0.02)
    for entry, others in zip(found, expected["top_logprobs"], strict=True):
        assert {other.piece.decode() for other in entry.top} == set(list(others)[:5])


async def test_a_plain_text_prompt_has_the_tokens_that_llama_gives_it(engine: Engine, llama: Llama) -> None:
    text = "Once upon a time, 🙂 in 中文 and é"
    assert list(await engine.tokenize(Prompt(text=text))) == llama.tokenize(text.encode(), special=True)


async def test_running_streams_go_on_while_a_long_prompt_is_read(engine: Engine) -> None:
    """400 tokens in steps of at most 32 take at least 12 steps; the running stream gets a token in each."""
    running = engine.submit(
        job("running", "Count: one two three", replace(GREEDY, max_tokens=200, ignore_eos=True))
    )
    delivered = 0
    while not delivered:
        event = await anext(running)
        delivered = len(event.token_ids) if isinstance(event, Chunk) else 0
    long = engine.submit(job("long", "a long, long story of many words " * 50, replace(GREEDY, max_tokens=1)))
    reading = asyncio.create_task(drain(long))
    meanwhile = 0
    while not reading.done():
        event = await anext(running)
        meanwhile += len(event.token_ids) if isinstance(event, Chunk) else 0
    assert meanwhile >= 12
    assert any(isinstance(event, Chunk) for event in reading.result())
    await running.aclose()  # type: ignore[attr-defined]


async def test_a_profiles_system_prompt_comes_before_conversations_without_one(path: Path) -> None:
    settings = EngineSettings(
        model_path=str(path), slots=1, context_tokens=256, system_prompt="You are a field medic."
    )
    engine = EngineProcess(settings)
    await engine.start()
    bare = await engine.tokenize(Prompt(messages=(Message(role="user", content="hi"),)))
    own = Message(role="system", content="You are a field medic.")
    assert bare == await engine.tokenize(Prompt(messages=(own, Message(role="user", content="hi"))))
    await engine.close()


async def test_an_emoji_of_several_tokens_never_comes_in_parts(engine: Engine, expected: list[str]) -> None:
    """The model repeats an emoji; every chunk's text is whole, and token chunks outnumber text chunks."""
    request = Prompt(text="🌾🌾🌾🌾🌾🌾🌾🌾🌾🌾🌾🌾")
    answer = await ask(engine, Job(generation_id="a", prompt=request, sampling=GREEDY))
    assert "🌾🌾" in answer.text
    inner = [chunk for chunk in answer.chunks if "\ufffd" in chunk.text]
    assert inner in ([], [answer.chunks[-1]])  # only the end may cut a character: nothing more comes
