"""One request at its node. Goal: readers see one stream, whoever leaves frees what runs.

Method: attempts are scripted generators; the dispatch, routing and event loop are real.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from random import Random

import pytest

from fieldmesh.core.dispatch import DispatchConfig, Entry, Phase, Start
from fieldmesh.core.effective import Rules
from fieldmesh.core.errors import Cancelled, EngineLost, FieldmeshError, Internal, RequestIdReused
from fieldmesh.core.model import (
    Address,
    Ask,
    Chunk,
    Completion,
    EngineState,
    FinishReason,
    Load,
    Member,
    MeshView,
    NodeId,
    NodeState,
    ProfileOffer,
    Prompt,
    RequestId,
    Result,
    Row,
    Usage,
)
from fieldmesh.engine.port import Started
from fieldmesh.runtime.generation import AttemptEvent, Generation, GenerationConfig, Generations
from fieldmesh.runtime.router import Router
from fieldmesh.runtime.tracing import Tracer

A, B = NodeId("a" * 32), NodeId("b" * 32)
DONE = Completion(finish_reason=FinishReason.STOP, usage=Usage(prompt_tokens=1, completion_tokens=3))
ASK = Ask(request_id=RequestId("r"), prompt=Prompt(text="hello"))

Script = Callable[[Start], AsyncIterator[AttemptEvent]]


def member(node: NodeId) -> Member:
    offer = ProfileOffer(name="general", model="m", fingerprint="f")
    row = Row(
        id=node,
        name=node[0],
        mesh="t",
        incarnation=1,
        sequence=1,
        addresses=(),
        client_addresses=(),
        profiles=(offer,),
    )
    load = Load(engine=EngineState.READY, slots=4, queue_max=4)
    return Member(
        id=node,
        name=node[0],
        address=Address(host="127.0.0.1", port=1),
        state=NodeState.ALIVE,
        incarnation=1,
        load=load,
        row=row,
    )


def generation(script: Script, ask: Ask = ASK, *, lag_tokens_max: int = 100) -> Generation:
    view = MeshView(local=A, members=(member(A), member(B)))
    return Generation(
        ask,
        generation_id="g",
        entry=Entry(node=A, name="a"),
        router=Router(view, rules=Rules(), rng=Random(1)),
        run_attempt=lambda _, start, trace: script(start),
        dispatch_config=DispatchConfig(attempts_max=2),
        lag_tokens_max=lag_tokens_max,
        deadline_s=30.0,
        path=(),
        hops_left=1,
        rng=Random(1),
        on_end=lambda _: None,
        trace=Tracer(Random(1)).open(None, ask.request_id),
    )


def chunk(index: int) -> Chunk:
    return Chunk(generation_id="g", epoch=0, first_token_index=index, token_ids=(index,), text=str(index))


async def three_tokens(start: Start) -> AsyncIterator[AttemptEvent]:
    yield Started(prompt_tokens=1)
    for index in range(3):
        yield chunk(index)
    yield DONE


async def text(made: Generation) -> str:
    return "".join([item.text async for item in made.read() if isinstance(item, Chunk)])


async def test_a_reader_gets_every_chunk_and_then_the_result() -> None:
    made = generation(three_tokens)
    made.begin()
    items = [item async for item in made.read()]
    assert [item.text for item in items[:-1] if isinstance(item, Chunk)] == ["0", "1", "2"]
    assert isinstance(items[-1], Result)


async def test_a_second_reader_gets_the_same_from_the_beginning() -> None:
    made = generation(three_tokens)
    made.begin()
    assert await text(made) == "012"
    assert await text(made) == "012"


async def test_an_attempt_that_fails_at_once_is_followed_by_one_elsewhere() -> None:
    nodes: list[NodeId] = []

    async def script(start: Start) -> AsyncIterator[AttemptEvent]:
        nodes.append(start.candidate.member.id)
        if len(nodes) == 1:
            raise EngineLost("killed")
        async for event in three_tokens(start):
            yield event

    made = generation(script)
    made.begin()
    assert await text(made) == "012"
    assert sorted(nodes) == [A, B]


async def test_when_the_last_reader_leaves_the_attempt_is_closed() -> None:
    closed = asyncio.Event()

    async def script(start: Start) -> AsyncIterator[AttemptEvent]:
        try:
            yield chunk(0)
            await asyncio.Event().wait()
        finally:
            closed.set()

    made = generation(script)
    made.begin()
    async with aclosing(made.read()) as items:
        await anext(items)
    await asyncio.wait_for(closed.wait(), 5)
    assert isinstance(made.outcome, Cancelled)


async def test_an_error_reaches_every_reader() -> None:
    async def script(start: Start) -> AsyncIterator[AttemptEvent]:
        yield chunk(0)
        raise EngineLost("killed")

    made = generation(script)
    made.begin()
    for _ in range(2):
        with pytest.raises(FieldmeshError) as caught:
            await text(made)
        assert caught.value.code == "STREAM_LOST"


@pytest.mark.parametrize("defect", [ValueError("bug"), None])
async def test_a_defect_ends_the_request_with_a_code(defect: ValueError | None) -> None:
    async def script(start: Start) -> AsyncIterator[AttemptEvent]:
        yield Started(prompt_tokens=1)
        if defect is not None:
            raise defect

    made = generation(script)
    made.begin()
    with pytest.raises(Internal):
        await asyncio.wait_for(text(made), 10)
    assert made.phase is Phase.ENDED


async def test_an_attempt_that_is_cancelled_from_below_moves_on() -> None:
    nodes: list[NodeId] = []

    async def script(start: Start) -> AsyncIterator[AttemptEvent]:
        nodes.append(start.candidate.member.id)
        if len(nodes) == 1:
            raise asyncio.CancelledError  # what grpc raises when its channel is closed
        async for event in three_tokens(start):
            yield event

    made = generation(script)
    made.begin()
    assert await asyncio.wait_for(text(made), 10) == "012"
    assert len(nodes) == 2


async def test_a_reader_that_stops_reading_stops_the_source() -> None:
    as_many_as_allowed, more = asyncio.Event(), asyncio.Event()

    async def script(start: Start) -> AsyncIterator[AttemptEvent]:
        for index in range(1000):
            (as_many_as_allowed if index == 10 else more if index > 10 else asyncio.Event()).set()
            yield chunk(index)
        yield DONE

    made = generation(script, lag_tokens_max=10)
    made.begin()
    async with aclosing(made.read()) as items:
        await anext(items)
        await asyncio.wait_for(as_many_as_allowed.wait(), 5)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(more.wait(), 0.05)
        rest = [item async for item in items]
    assert len(rest) == 1000


async def test_a_repeat_finds_the_generation_and_another_request_under_its_id_is_refused() -> None:
    log = Generations(GenerationConfig())
    made = generation(three_tokens)
    log.add(made, 0.0)
    assert log.find(ASK) is made
    with pytest.raises(RequestIdReused):
        log.find(Ask(request_id=RequestId("r"), prompt=Prompt(text="something else")))
    await made.close()


async def test_what_failed_may_be_tried_again_under_the_same_id() -> None:
    log = Generations(GenerationConfig())
    made = generation(three_tokens)
    log.add(made, 0.0)
    made.begin()
    made.stop(Cancelled("gone"))
    assert log.find(ASK) is None


async def test_the_log_forgets_the_oldest_that_ended_and_never_one_that_runs() -> None:
    log = Generations(GenerationConfig(entries_max=3))
    runs = generation(three_tokens, Ask(request_id=RequestId("runs"), prompt=Prompt(text="x")))
    log.add(runs, 0.0)
    for number in range(10):
        ended = generation(three_tokens, Ask(request_id=RequestId(str(number)), prompt=Prompt(text="x")))
        ended.stop(Cancelled("gone"))
        log.add(ended, 1.0)
    assert len(log) <= 4
    assert log.get(RequestId("runs")) is runs
    assert log.get(RequestId("9")) is not None
    await runs.close()


async def test_the_log_forgets_what_ended_long_ago() -> None:
    log = Generations(GenerationConfig(kept_s=10.0))
    old = generation(three_tokens, Ask(request_id=RequestId("old"), prompt=Prompt(text="x")))
    old.stop(Cancelled("gone"))
    log.add(old, 0.0)
    now = asyncio.get_running_loop().time()
    fresh = generation(three_tokens)
    log.add(fresh, now + 20.0)
    log.sweep(now + 20.0)
    assert log.get(RequestId("old")) is None
    await fresh.close()
