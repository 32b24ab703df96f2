"""Both clients over real sockets, against nodes that fail as scripted. Every test runs for each client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc.aio
import pytest

from fieldmesh.client import AsyncClient, Client, Message, Persistence, Result, calls, discovery
from fieldmesh.core.errors import (
    Cancelled,
    DeadlineExceeded,
    Draining,
    EngineLost,
    FieldmeshError,
    Internal,
    InvalidRequest,
    ModelNotFound,
    NodeUnreachable,
    ProtocolMismatch,
    QueueFull,
    SlowReader,
    StreamLost,
)
from fieldmesh.core.model import Address, EngineState, FinishReason, NodeState
from tests.client.scripted import ScriptedNode, answers, ends_early, hangs, refuses

HASTY = Persistence(pause_min_s=0.01, rounds_max=3)
Start = Callable[..., Awaitable[ScriptedNode]]


class Driver:
    """The two clients behind one face for the tests."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.client: Any = None

    def connect(self, *nodes: ScriptedNode | Address | str, **options: Any) -> Driver:
        seeds = [node.address if isinstance(node, ScriptedNode) else node for node in nodes]
        make = AsyncClient if self.kind == "async" else Client
        self.client = make(seeds, persistence=options.pop("persistence", HASTY), **options)
        return self

    async def call(self, method: str, *arguments: Any, **options: Any) -> Any:
        bound = getattr(self.client, method)
        if self.kind == "async":
            return await bound(*arguments, **options)
        return await asyncio.to_thread(bound, *arguments, **options)

    async def next(self, stream: Any) -> Any:
        if self.kind == "async":
            return await anext(stream)
        return await asyncio.to_thread(next, stream)

    async def result(self, stream: Any) -> Result:
        if self.kind == "async":
            return await stream.result()  # type: ignore[no-any-return]
        return await asyncio.to_thread(stream.result)

    async def close(self, stream: Any) -> None:
        if self.kind == "async":
            await stream.close()
        else:
            stream.close()

    async def ask(self, question: Any = "hello", **options: Any) -> Result:
        return await self.result(self.client.chat(question, **options))


@pytest.fixture(params=["async", "sync"])
async def driver(request: pytest.FixtureRequest) -> AsyncIterator[Driver]:
    made = Driver(request.param)
    yield made
    if made.client is not None:
        await made.call("close")


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    started: list[ScriptedNode] = []

    async def make(name: str, *script: Any, **fields: Any) -> ScriptedNode:
        node = await ScriptedNode(name=name, script=list(script), **fields).start()
        started.append(node)
        return node

    yield make
    for node in started:
        await node.die()


# --- what comes back ---------------------------------------------------------------------


async def test_chunks_come_one_by_one_and_the_result_tells_all(driver: Driver, start: Start) -> None:
    node = await start("alpha", answers("one ", "two ", "three"))
    stream = driver.connect(node).client.chat("hello", domain="code", explain=True)
    first = await driver.next(stream)
    assert (first.text, first.token_ids, stream.text) == ("one ", (100,), "one ")
    result = await driver.result(stream)
    assert result.text == stream.text == "one two three"
    assert result.token_ids == (100, 101, 102)
    assert (result.served_by, result.entry_node, result.domain, result.fallback) == (
        "alpha",
        "alpha",
        "code",
        True,
    )
    assert (result.prompt_tokens, result.cached_tokens, result.completion_tokens) == (7, 3, 3)
    assert (result.finish_reason, result.seed, result.hops) == (FinishReason.STOP, 11, 0)
    assert [attempt.reason for attempt in result.attempts] == ["served"]
    assert result.explanation is not None
    assert result.explanation.candidates[0].reason == "here"


async def test_a_request_carries_what_was_asked_and_nothing_else(driver: Driver, start: Start) -> None:
    node = await start("alpha")
    driver.connect(node)
    await driver.ask(
        [Message(role="system", content="s"), ("user", "u"), {"role": "assistant", "content": "a"}],
        profile="p",
        model="m",
        temperature=0.0,
        max_tokens=5,
        stop=["x"],
        seed=2**32 - 1,
        priority="batch",
        request_id="mine-1",
    )
    sent = node.requests[0]
    assert [(turn.role, turn.content) for turn in sent.messages] == [
        ("system", "s"),
        ("user", "u"),
        ("assistant", "a"),
    ]
    assert (sent.request_id, sent.target.profile, sent.target.model) == ("mine-1", "p", "m")
    params = sent.sampling_params
    assert (params.temperature, params.max_tokens, list(params.stop), params.seed) == (
        0.0,
        5,
        ["x"],
        2**32 - 1,
    )
    assert params.HasField("temperature")
    assert not params.HasField("top_p")
    assert not params.HasField("ignore_eos")


@pytest.mark.parametrize(
    ("option", "value", "sent"),
    [
        ("json_schema", {"type": "object"}, '{"type": "object"}'),
        ("json_schema", '{"type":"array"}', '{"type":"array"}'),
        ("regex", "(yes|no)", "(yes|no)"),
        ("grammar", 'start: "a"', 'start: "a"'),
        ("json_object", True, True),
    ],
)
async def test_what_an_answer_must_match_is_sent_under_its_name(
    driver: Driver, start: Start, option: str, value: object, sent: object
) -> None:
    node = await start("alpha")
    driver.connect(node)
    await driver.ask("hello", **{option: value})
    assert getattr(node.requests[0].sampling_params, option) == sent


async def test_vectors_come_back_in_order_with_who_made_them(driver: Driver, start: Start) -> None:
    node = await start("alpha")
    driver.connect(node)
    made = await driver.call("embed", ["one", "two"], profile="p")
    assert [len(vector) for vector in made.vectors] == [2, 2]
    assert made.vectors[0] == pytest.approx((0.6, -0.8))
    assert (made.prompt_tokens, made.profile, made.served_by) == (3, "code", "alpha")
    (sent,) = node.requests
    assert (list(sent.inputs), sent.target.profile) == (["one", "two"], "p")


def test_an_answer_can_match_one_thing_only() -> None:
    with pytest.raises(InvalidRequest, match="json_schema and regex"):
        Client("127.0.0.1:1").chat("hello", json_schema={}, regex="a", grammar="")
    with pytest.raises(InvalidRequest, match="json_schema is no JSON"):
        Client("127.0.0.1:1").chat("hello", json_schema={"type": object()})


async def test_text_and_token_ids_can_be_continued(driver: Driver, start: Start) -> None:
    node = await start("alpha")
    driver.connect(node)
    await driver.result(driver.client.generate("once upon"))
    await driver.result(driver.client.generate([5, 6], model="tiny"))
    assert node.requests[0].prompt == "once upon"
    assert list(node.requests[1].token_ids.ids) == [5, 6]


async def test_request_ids_are_made_by_the_client_and_differ(driver: Driver, start: Start) -> None:
    node = await start("alpha")
    driver.connect(node)
    stream = driver.client.chat("a")
    await driver.result(stream)
    await driver.ask("b")
    ids = [request.request_id for request in node.requests]
    assert ids[0] == stream.request_id
    assert len(set(ids)) == 2


async def test_short_calls_return_records(driver: Driver, start: Start) -> None:
    node = await start("alpha")
    driver.connect(node)
    tokens = await driver.call("tokenize", "ab", model="tiny")
    assert (tokens.token_ids, tokens.model) == ((97, 98), "tiny")
    assert (await driver.call("tokenize", [("user", "c")])).token_ids == (99,)
    (offer,) = await driver.call("models")
    assert (offer.profile, offer.domains, offer.tier, offer.available) == ("code", ("code",), 2, True)
    (load,) = await driver.call("loads")
    assert (load.node_name, load.load.engine, load.load.slots_free) == ("alpha", EngineState.READY, 3)
    mesh = await driver.call("nodes")
    assert (mesh.name, mesh.local_id, mesh.nodes[0].state) == ("test", node.id, NodeState.ALIVE)
    assert mesh.nodes[0].addresses == (node.address,)
    assert await driver.call("abort", "r") is True
    assert node.aborted == ["r"]


# --- finding nodes -----------------------------------------------------------------------


async def test_without_seeds_nodes_of_the_mesh_are_looked_for(
    driver: Driver, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = await start("alpha")
    found: dict[str, list[tuple[Address, ...]]] = {"home": [(node.address,)]}

    async def browse_async(mesh: str, timeout_s: float) -> list[tuple[Address, ...]]:
        return found.get(mesh, [])

    def browse(mesh: str, timeout_s: float) -> list[tuple[Address, ...]]:
        return asyncio.run(browse_async(mesh, timeout_s))

    monkeypatch.setattr(discovery, "browse", browse)
    monkeypatch.setattr(discovery, "browse_async", browse_async)
    assert (await driver.connect(mesh="home").ask()).served_by == "alpha"
    await driver.call("close")
    with pytest.raises(NodeUnreachable, match="No node is known"):
        await driver.connect(mesh="elsewhere").ask()


# --- surviving loss ----------------------------------------------------------------------


async def test_a_dead_seed_is_passed_over(driver: Driver, start: Start) -> None:
    dead = await start("dead")
    await dead.die()
    alive = await start("alive")
    assert (await driver.connect(dead, alive).ask()).served_by == "alive"


async def test_a_node_that_dies_before_the_first_token_is_replaced_under_the_same_request_id(
    driver: Driver, start: Start
) -> None:
    dying, other = await start("dying", hangs()), await start("other")
    driver.connect(dying, other)
    asking = asyncio.create_task(driver.ask())
    await dying.hanging.wait()
    await dying.die()
    assert (await asking).served_by == "other"
    assert dying.requests[0].request_id == other.requests[0].request_id


async def test_nodes_that_were_only_heard_of_take_over(driver: Driver, start: Start) -> None:
    other = await start("other")
    seed = await start("seed", peers=[other])
    driver.connect(seed)
    assert (await driver.ask()).served_by == "seed"
    await seed.listed.wait()
    await driver.call("nodes")  # on the same connection, so the answer to the first listing has arrived too
    await seed.die()
    assert (await driver.ask()).served_by == "other"
    assert (await driver.call("nodes")).local_id == other.id


async def test_a_node_that_dies_mid_stream_ends_it_with_the_count_of_tokens(
    driver: Driver, start: Start
) -> None:
    dying, other = await start("dying", hangs(after=("a", "b"))), await start("other")
    stream = driver.connect(dying, other).client.chat("hello")
    assert [(await driver.next(stream)).text for _ in range(2)] == ["a", "b"]
    await dying.hanging.wait()
    waiting = asyncio.create_task(driver.next(stream))
    await dying.die()
    with pytest.raises(StreamLost) as caught:
        await waiting
    assert caught.value.metadata["tokens_delivered"] == "2"
    assert caught.value.metadata["cause"] == "NODE_UNREACHABLE"
    assert stream.text == "ab"
    assert not other.requests


async def test_a_node_that_froze_since_it_last_spoke_is_left_for_another(
    driver: Driver, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "SILENCE_S", 0.0)
    monkeypatch.setattr(calls, "PROBE_TIMEOUT_S", 0.2)
    frozen, other = await start("frozen"), await start("other")
    driver.connect(frozen, other)
    assert (await driver.ask()).served_by == "frozen"
    frozen.frozen, frozen.script = True, [hangs()]
    assert (await asyncio.wait_for(driver.ask(), 10)).served_by == "other"
    await asyncio.wait_for(frozen.cancelled.wait(), 10)


async def test_a_slow_answer_of_a_node_that_lives_is_waited_for(
    driver: Driver, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "SILENCE_S", 0.0)

    async def slow(node: ScriptedNode, request: Any, context: Any) -> AsyncIterator[Any]:
        await asyncio.wait_for(node.health_asked.wait(), 10)
        async for entry in answers("late")(node, request, context):
            yield entry

    node, other = await start("alpha", slow), await start("other")
    assert (await driver.connect(node, other).ask()).text == "late"


@pytest.mark.parametrize("error", [Draining("leaving"), EngineLost("gone")])
async def test_a_node_that_cannot_serve_is_left_for_the_next_at_once(
    driver: Driver, start: Start, error: FieldmeshError
) -> None:
    first, second = await start("first", refuses(error)), await start("second")
    patient = Persistence(pause_min_s=30.0)  # a pause would run into the test's time limit
    driver.connect(first, second, persistence=patient)
    assert (await asyncio.wait_for(driver.ask(), 10)).served_by == "second"


async def test_a_full_mesh_is_asked_again_after_the_time_it_named(driver: Driver, start: Start) -> None:
    loop = asyncio.get_running_loop()
    full = QueueFull("full", retry_after_s=0.15)
    node = await start("alpha", refuses(full), refuses(full))
    driver.connect(node)
    began = loop.time()
    assert (await driver.ask()).served_by == "alpha"
    assert loop.time() - began >= 0.3
    assert len({request.request_id for request in node.requests}) == 1


async def test_a_pause_that_is_longer_than_the_client_waits_is_told_to_the_caller(
    driver: Driver, start: Start
) -> None:
    node = await start("alpha", refuses(QueueFull("full", retry_after_s=60.0)))
    with pytest.raises(QueueFull) as caught:
        await driver.connect(node).ask()
    assert caught.value.retry_after_s == 60.0


async def test_attempts_are_bounded(driver: Driver, start: Start) -> None:
    node = await start("alpha", *[refuses(EngineLost("gone")) for _ in range(9)])
    with pytest.raises(EngineLost):
        await driver.connect(node).ask()
    assert len(node.requests) == HASTY.rounds_max


async def test_when_no_node_can_be_reached_the_error_lists_them(driver: Driver, start: Start) -> None:
    nodes = [await start("a"), await start("b")]
    for node in nodes:
        await node.die()
    with pytest.raises(NodeUnreachable) as caught:
        await driver.connect(*nodes).ask()
    for node in nodes:
        assert str(node.address) in caught.value.message


async def test_short_calls_survive_loss_too(driver: Driver, start: Start) -> None:
    dead, alive = await start("dead"), await start("alive", unary_errors=[Draining("leaving")])
    await dead.die()
    driver.connect(dead, alive)
    assert (await driver.call("models"))[0].node_name == "alive"


# --- errors ------------------------------------------------------------------------------


async def test_errors_come_back_typed_and_are_not_retried_where_that_cannot_help(
    driver: Driver, start: Start
) -> None:
    error = ModelNotFound("no such model", field="target.model", metadata={"model": "x"})
    node, other = await start("alpha", refuses(error)), await start("other")
    with pytest.raises(ModelNotFound) as caught:
        await driver.connect(node, other).ask(model="x")
    assert (caught.value.message, caught.value.field) == ("no such model", "target.model")
    assert caught.value.metadata["model"] == "x"
    assert not other.requests


@pytest.mark.parametrize(
    ("value", "after_s"), [("1500", 1.5), ("-1", None), ("soon", None), ("9" * 400, None)]
)
async def test_pushback_in_metadata_alone_is_understood(
    driver: Driver, start: Start, value: str, after_s: float | None
) -> None:
    async def pushes(node: Any, request: Any, context: Any) -> AsyncIterator[Any]:
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "busy", (("grpc-retry-pushback-ms", value),))
        yield

    node = await start("alpha", pushes)
    with pytest.raises(FieldmeshError) as caught:
        await driver.connect(node).ask()
    assert (caught.value.message, caught.value.retry_after_s) == ("busy", after_s)


async def test_a_coded_end_of_a_stream_is_raised_as_it_is(driver: Driver, start: Start) -> None:
    node = await start("alpha", refuses(SlowReader("too slow"), after=("a",)))
    with pytest.raises(SlowReader) as caught:
        await driver.connect(node).ask()
    assert caught.value.metadata["tokens_delivered"] == "1"


async def test_a_stream_that_stops_without_an_end_is_no_answer(driver: Driver, start: Start) -> None:
    node, other = await start("alpha", ends_early(), ends_early("a")), await start("other")
    driver.connect(node, other)
    assert (await driver.ask()).served_by == "other"
    driver.client._book.answered(node.address)
    with pytest.raises(StreamLost):
        await driver.ask()


async def test_lost_tokens_are_noticed(driver: Driver, start: Start) -> None:
    async def skips(node: Any, request: Any, context: Any) -> AsyncIterator[Any]:
        from tests.client.scripted import chunk

        yield chunk(0, "a")
        yield chunk(2, "c")

    node = await start("alpha", skips)
    with pytest.raises(Internal, match="went on at token 2 after 1"):
        await driver.connect(node).ask()


async def test_the_deadline_covers_all_attempts(driver: Driver, start: Start) -> None:
    node = await start("alpha", hangs(), refuses(Draining("leaving", retry_after_s=9.0)))
    driver.connect(node, timeout_s=0.2)
    with pytest.raises(DeadlineExceeded):
        await driver.ask()
    await node.cancelled.wait()
    # A pause beyond the deadline is not begun: the error says what was wrong instead.
    with pytest.raises(Draining):
        await asyncio.wait_for(driver.ask(timeout_s=8.0), 6)
    with pytest.raises(InvalidRequest):
        await driver.call("nodes", timeout_s=-1.0)


async def test_another_program_behind_the_address_is_named_as_such(driver: Driver) -> None:
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        with pytest.raises(ProtocolMismatch, match="no client listener"):
            await driver.connect(f"127.0.0.1:{port}").ask()
    finally:
        await server.stop(None)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"request_id": "two words"}, "request_id"),
        ({"priority": "high"}, "priority"),
        ({"tenant": "two words"}, "tenant"),
        ({"temprature": 1}, "temprature"),
        ({"stop": "x"}, "stop"),
        ({"max_tokens": 2**40}, "sampling_params.max_tokens"),
        ({"seed": -1}, "sampling_params.seed"),
        ({"temperature": "hot"}, "sampling_params.temperature"),
        ({"timeout_s": 0.0}, "timeout_s"),
        ({"timeout_s": float("nan")}, "timeout_s"),
        ({"timeout_s": 1e9}, "timeout_s"),
    ],
)
async def test_what_cannot_be_sent_is_refused_here(
    driver: Driver, options: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await driver.connect("127.0.0.1:1").ask(**options)
    assert caught.value.field == field


@pytest.mark.parametrize("turns", [[], [("user",)], [3], ["loose text"], "\ud800"])
async def test_turns_that_are_none_are_refused_here(driver: Driver, turns: Any) -> None:
    with pytest.raises(InvalidRequest):
        await driver.connect("127.0.0.1:1").ask(turns)


# --- cancelling and closing --------------------------------------------------------------


async def test_closing_a_stream_cancels_it_at_the_node(driver: Driver, start: Start) -> None:
    node = await start("alpha", hangs(after=("a",)))
    stream = driver.connect(node).client.chat("hello")
    assert (await driver.next(stream)).text == "a"
    await driver.close(stream)
    await asyncio.wait_for(node.cancelled.wait(), 10)
    with pytest.raises(Cancelled) as caught:
        await driver.result(stream)
    assert caught.value.metadata["tokens_delivered"] == "1"


async def test_closing_the_client_ends_streams_with_a_code(driver: Driver, start: Start) -> None:
    node = await start("alpha", hangs())
    reading = asyncio.create_task(driver.result(driver.connect(node).client.chat("hello")))
    await node.hanging.wait()
    await driver.call("close")
    with pytest.raises(Cancelled):
        await reading
    with pytest.raises(Cancelled):
        await driver.ask()
    with pytest.raises(Cancelled):
        await driver.call("nodes")


async def test_a_result_can_be_had_after_reading_and_after_closing(driver: Driver, start: Start) -> None:
    node = await start("alpha")
    stream = driver.connect(node).client.chat("hello")
    first = await driver.result(stream)
    await driver.close(stream)
    assert await driver.result(stream) is first


async def test_cancelling_the_reading_task_cancels_the_call(start: Start) -> None:
    node = await start("alpha", hangs())
    async with AsyncClient(node.address, persistence=HASTY) as client:
        reading = asyncio.create_task(client.chat("hello").result())
        await node.hanging.wait()
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        await asyncio.wait_for(node.cancelled.wait(), 10)


async def test_leaving_the_context_of_a_stream_cancels_it(start: Start) -> None:
    node = await start("alpha", hangs(after=("a",)), hangs(after=("a",)))
    async with AsyncClient(node.address) as client, client.chat("hello") as stream:
        await anext(stream)
    await asyncio.wait_for(node.cancelled.wait(), 10)
    node.cancelled.clear()

    def leave() -> None:
        with Client(node.address) as client, client.chat("hello") as stream:
            next(stream)

    await asyncio.to_thread(leave)
    await asyncio.wait_for(node.cancelled.wait(), 10)


async def test_many_threads_share_one_client(start: Start) -> None:
    node = await start("alpha")
    with Client(node.address) as client:
        asked = [asyncio.to_thread(client.chat(f"q{index}").result) for index in range(8)]
        assert {result.text for result in await asyncio.gather(*asked)} == {"alpha"}
    assert len(node.requests) == 8
