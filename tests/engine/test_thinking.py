"""Goal: a thinking model's reasoning comes apart from its answer, is switched, counted and bounded.

Method: the embedded default model under a template that opens a reasoning as such models' own templates do.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
import pytest_asyncio

from fieldmesh.core.errors import InvalidRequest
from fieldmesh.core.model import Constraint, ConstraintKind, Message, Prompt, Sampling
from fieldmesh.engine.host import EngineProcess
from fieldmesh.engine.port import Engine, Job
from fieldmesh.engine.settings import EngineSettings
from tests.engine.asking import ask
from tests.engine.tiny_model import default_model_path

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module")]

TEMPLATE = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}<|im_start|>assistant
{% if enable_thinking is not defined or enable_thinking %}<think>
{% else %}<think>

</think>

{% endif %}"""
QUESTION = (Message(role="user", content="How many legs have two spiders?"),)
SAMPLING = Sampling(temperature=0.8, seed=5, max_tokens=60, ignore_eos=True, reasoning_tokens_max=12)


def thought(
    thinking: bool | None = None, sampling: Sampling = SAMPLING, resumed: tuple[int, ...] = ()
) -> Job:
    prompt = Prompt(messages=QUESTION, thinking=thinking)
    return Job(generation_id="t", prompt=prompt, sampling=sampling, resume_token_ids=resumed)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[EngineProcess]:
    made = EngineProcess(
        EngineSettings(
            model_path=str(default_model_path()), slots=2, context_tokens=512, chat_template=TEMPLATE
        )
    )
    await made.start()
    yield made
    await made.close()


@pytest.mark.parametrize("thinking", [None, True])
async def test_the_reasoning_is_told_apart_and_ends_where_it_must(
    engine: Engine, thinking: bool | None
) -> None:
    answer = await ask(engine, thought(thinking))
    reasoning = "".join(chunk.reasoning for chunk in answer.chunks)
    assert answer.completion is not None
    usage = answer.completion.usage
    assert reasoning and answer.text
    assert "think>" not in reasoning
    assert not answer.text.lstrip().startswith("</think>")
    assert 12 < usage.reasoning_tokens < 20  # the marks of its end included
    assert usage.completion_tokens == len(answer.token_ids) == 60


async def test_a_longer_bound_gives_a_longer_reasoning_with_the_same_beginning(engine: Engine) -> None:
    short, long = [
        await ask(engine, thought(True, replace(SAMPLING, reasoning_tokens_max=most))) for most in (8, 30)
    ]
    assert short.token_ids[:8] == long.token_ids[:8]
    assert short.completion is not None and long.completion is not None
    assert long.completion.usage.reasoning_tokens - short.completion.usage.reasoning_tokens == 22


async def test_without_thinking_all_is_answer(engine: Engine) -> None:
    answer = await ask(engine, thought(False))
    assert answer.text
    assert all(not chunk.reasoning for chunk in answer.chunks)
    assert answer.completion is not None and answer.completion.usage.reasoning_tokens == 0


async def test_a_reasoning_that_was_interrupted_at_its_end_is_ended_all_the_same(engine: Engine) -> None:
    whole = await ask(engine, thought(True, replace(SAMPLING, temperature=0.0)))
    for cut in (6, 12, 13, 14, 20):
        resumed = thought(True, replace(SAMPLING, temperature=0.0), tuple(whole.token_ids[:cut]))
        rest = await ask(engine, resumed)
        assert [*whole.token_ids[:cut], *rest.token_ids] == whole.token_ids
        assert rest.completion is not None and whole.completion is not None
        assert rest.completion.usage.reasoning_tokens == whole.completion.usage.reasoning_tokens


async def test_stop_strings_wait_for_the_answer(engine: Engine) -> None:
    sampling = replace(SAMPLING, stop=("e",), temperature=0.0)
    answer = await ask(engine, thought(True, sampling))
    assert "e" in "".join(chunk.reasoning for chunk in answer.chunks)
    assert "e" not in answer.text
    assert answer.completion is not None and answer.completion.matched_stop == "e"


async def test_a_constraint_holds_from_the_first_token_so_nothing_is_thought(engine: Engine) -> None:
    number = Constraint(kind=ConstraintKind.REGEX, source="[0-9]{2}")
    sampling = Sampling(temperature=0, max_tokens=20, constraint=number)
    answer = await ask(engine, thought(None, sampling))
    assert len(answer.text) == 2 and answer.text.isdigit()
    with pytest.raises(InvalidRequest) as caught:
        await ask(engine, thought(True, sampling))
    assert caught.value.field == "enable_thinking"
