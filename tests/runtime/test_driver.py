"""The driver: real meshes over real sockets on loopback, and the promise about effects and the disk."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from random import Random

import grpc.aio
import pytest

from fieldmesh.core.errors import InvalidRequest, StateUnwritable
from fieldmesh.core.events import Note, Persist, Send, Tick
from fieldmesh.core.joining import HintSource
from fieldmesh.core.mesh import Effect, Event, JoinHint, Mesh, OfferChanged
from fieldmesh.core.mesh import Identity as MeshIdentity
from fieldmesh.core.messages import ControlMessage, Goodbye, Refused
from fieldmesh.core.model import (
    Address,
    Domain,
    EngineState,
    Load,
    Member,
    MeshView,
    NodeId,
    NodeState,
    ProfileOffer,
)
from fieldmesh.rpc import wire
from fieldmesh.runtime.driver import SAVES_WAITING_MAX, Driver, Saver, Storage
from fieldmesh.runtime.gate import CONTROL_METHOD, Caller
from fieldmesh.runtime.identity import EnvelopeSealer, Identity
from fieldmesh.runtime.links import LinksConfig, server_options

PATIENCE_S = 15
SECOND_HOST = "127.0.0.2"
"""Loopback's whole network is this box's."""


class Memory:
    """Storage without a disk."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}

    def write(self, key: str, value: bytes) -> None:
        self.values[key] = value


class Node:
    """A mesh on a real port, driven in real time."""

    def __init__(self, name: str, driver: Driver, server: grpc.aio.Server, identity: MeshIdentity) -> None:
        self.name = name
        self.driver = driver
        self.id = identity.id
        self.address = identity.addresses[0]
        self._server = server

    def join(self, other: Node) -> None:
        self.driver.handle(JoinHint(address=other.address, source=HintSource.SEED))

    def sees(self, other: Node) -> Member | None:
        return next((member for member in self.driver.view.members if member.id == other.id), None)

    async def until(self, condition: Callable[[MeshView], bool]) -> MeshView:
        """Wait for a published view that fulfils ``condition``."""
        view = await self.driver.wait_view_changed(-1)
        async with asyncio.timeout(PATIENCE_S):
            while not condition(view):
                view = await self.driver.wait_view_changed(view.revision)
        return view

    async def until_sees(self, other: Node, state: NodeState) -> None:
        await self.until(lambda view: any(m.id == other.id and m.state is state for m in view.members))

    async def vanish(self) -> None:
        """End without a goodbye, as a killed process does."""
        await self.driver.links.close()
        await self._server.stop(None)

    async def leave(self) -> None:
        await self.driver.close()
        await self._server.stop(None)


@asynccontextmanager
async def running(
    name: str, mesh_name: str = "driven", storage: Storage | None = None
) -> AsyncIterator[Node]:
    server = grpc.aio.server(options=server_options(LinksConfig()))
    port = server.add_insecure_port("127.0.0.1:0")
    server.add_insecure_port(f"{SECOND_HOST}:{port}")
    key = Identity.generate()
    identity = MeshIdentity(
        id=key.id, name=name, mesh=mesh_name, addresses=(Address(host="127.0.0.1", port=port),)
    )
    mesh = Mesh(identity=identity, sealer=EnvelopeSealer(key, "row"), codec=wire, rng=Random(name))
    driver = Driver(mesh, local=key.id, storage=storage or Memory())
    server.add_generic_rpc_handlers((driver.receiver.handler(),))
    await server.start()
    driver.start()
    node = Node(name, driver, server, identity)
    try:
        yield node
    finally:
        await node.leave()


@asynccontextmanager
async def trio() -> AsyncIterator[tuple[Node, Node, Node]]:
    async with AsyncExitStack() as stack:
        a, b, c = [await stack.enter_async_context(running(name)) for name in ("anna", "bert", "carl")]
        b.join(a)
        c.join(b)
        yield a, b, c


async def test_three_nodes_find_each_other_and_each_others_offers() -> None:
    offer = ProfileOffer(name="general", model="m", fingerprint="f" * 64)
    async with trio() as nodes:
        for node in nodes:
            node.driver.handle(OfferChanged(profiles=(offer,)))
        for node in nodes:
            view = await node.until(
                lambda view: (
                    len(view.members) == 3
                    and all(m.state is NodeState.ALIVE and m.row and m.row.profiles for m in view.members)
                )
            )
            assert {m.name for m in view.members} == {"anna", "bert", "carl"}


async def test_what_goes_along_with_the_beats_is_called_at_each() -> None:
    async with running("anna") as a:
        called: asyncio.Queue[None] = asyncio.Queue(3)
        a.driver.accompany(lambda: None if called.full() else called.put_nowait(None))
        async with asyncio.timeout(PATIENCE_S):
            for _ in range(3):
                await called.get()


async def test_the_death_of_a_node_is_noticed_within_two_seconds() -> None:
    async with trio() as (a, b, c):
        for node in (a, b):
            await node.until_sees(c, NodeState.ALIVE)
        began = asyncio.get_running_loop().time()
        await c.vanish()
        for node in (a, b):
            await node.until(
                lambda view: all(m.id != c.id or m.state is not NodeState.ALIVE for m in view.members)
            )
        assert asyncio.get_running_loop().time() - began < 2.0
        survivor = b.sees(a)
        assert survivor is not None
        assert survivor.state is NodeState.ALIVE


async def test_a_goodbye_is_heard_by_all_at_once() -> None:
    async with trio() as (a, b, c):
        for node in (a, b):
            await node.until_sees(c, NodeState.ALIVE)
        began = asyncio.get_running_loop().time()
        await c.leave()
        for node in (a, b):
            await node.until_sees(c, NodeState.LEFT)
        assert asyncio.get_running_loop().time() - began < 1.0


async def test_load_reaches_the_others_at_once_where_it_says_who_may_be_asked() -> None:
    async with trio() as (a, b, _):
        await b.until_sees(a, NodeState.ALIVE)
        ready = Load(engine=EngineState.READY, slots=4)
        a.driver.load_changed(ready)
        assert a.driver.view.members  # told without waiting
        await b.until(lambda view: any(m.id == a.id and m.load == ready for m in view.members))
        for running_now in range(1, 4):
            a.driver.load_changed(Load(engine=EngineState.READY, slots=4, running=running_now))
        await b.until(lambda view: any(m.id == a.id and m.load.running == 3 for m in view.members))


async def test_a_node_that_loses_an_address_stays_alive_for_the_others() -> None:
    async with trio() as (a, b, c):
        await a.until_sees(b, NodeState.ALIVE)
        await b.until_sees(a, NodeState.ALIVE)
        moved = Address(host=SECOND_HOST, port=a.address.port)
        a.driver.announce([a.address, moved], [])
        a.driver.announce([moved], [])
        view = await b.until(lambda view: any(m.row and m.row.addresses == (moved,) for m in view.members))
        assert all(member.state is NodeState.ALIVE for member in view.members)
        assert c.sees(b) is not None


async def test_a_node_of_another_mesh_is_kept_out() -> None:
    async with running("anna") as a, running("eve", "another-mesh") as eve, running("bert") as b:
        eve.join(a)
        b.join(a)
        await a.until_sees(b, NodeState.ALIVE)
        assert a.sees(eve) is None
        assert eve.sees(a) is None


async def test_observers_get_the_present_view_and_each_new_one() -> None:
    seen: list[int] = []
    async with running("anna") as a, running("bert") as b:
        a.driver.observe(lambda view: seen.append(len(view.members)))
        assert seen == [1]
        b.join(a)
        await a.until_sees(b, NodeState.ALIVE)
        assert seen[-1] == 2


async def test_nonsense_on_a_stream_is_counted_and_survived() -> None:
    async with running("anna") as a, running("bert") as b:
        foreign = wire.encode(b.id, Goodbye(incarnation=1, sequence=1))
        carl = Caller(node=NodeId("c" * 32), mesh="driven").user_agent()
        options = (("grpc.primary_user_agent", carl),)
        async with grpc.aio.insecure_channel(str(a.address), options=options) as channel:
            call: grpc.aio.StreamUnaryCall[bytes, bytes] = channel.stream_unary(CONTROL_METHOD)()
            for data in (b"", b"\xff" * 100, foreign):
                await call.write(data)
            await call.done_writing()
            await call
        assert a.driver.malformed == 3
        b.join(a)
        await a.until_sees(b, NodeState.ALIVE)


async def test_a_node_that_closed_handles_nothing_and_closes_again() -> None:
    async with running("anna") as a:
        await a.driver.close()
        a.join(a)
        await a.driver.close()


async def test_a_defect_of_the_core_does_not_stop_the_beat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fieldmesh.runtime.driver.TICK_AFTER_DEFECT_S", 0.01)
    reported: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context["exception"]))
    async with running("anna") as a, running("bert") as b:
        mesh, over = a.driver._mesh, asyncio.Event()
        real, defects = mesh.handle, [AssertionError("a defect")] * 3

        def handle(event: Event, now: float) -> list[Effect]:
            if isinstance(event, Tick) and defects:
                raise defects.pop()
            if isinstance(event, Tick):
                over.set()
            return real(event, now)

        monkeypatch.setattr(mesh, "handle", handle)
        async with asyncio.timeout(PATIENCE_S):
            await over.wait()
        assert [str(defect) for defect in reported] == ["a defect"] * 3
        b.join(a)
        await b.until_sees(a, NodeState.ALIVE)
        await a.until_sees(b, NodeState.ALIVE)


# --- effects -------------------------------------------------------------------------------


async def test_a_send_waits_for_the_persist_before_it_and_for_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    disk, sent, last = SlowDisk(), [], asyncio.Event()
    first, second = Persist(key="k", data=b"1"), Persist(key="k", data=b"2")
    lists = {
        "durable": [say("1"), first, say("2"), second, say("last")],
        "meanwhile": [say("4"), Note(event="noted", fields=(("n", 1),)), say("5")],
    }

    def send(_: object, __: object, data: bytes) -> None:
        sent.append(spoken(data))
        if sent[-1] == "last":
            last.set()

    async with running("anna", storage=disk) as a:
        monkeypatch.setattr(a.driver.links, "send", send)
        monkeypatch.setattr(a.driver._mesh, "handle", lambda event, now: lists.pop(event, []))
        a.driver.handle("durable")  # type: ignore[arg-type]
        await disk.begun()
        assert sent == ["1"]
        a.driver.handle("meanwhile")  # type: ignore[arg-type]
        assert sent == ["1", "4", "5"]
        disk.finish()
        await disk.begun()
        assert sent == ["1", "4", "5", "2"]
        disk.finish()
        async with asyncio.timeout(PATIENCE_S):
            await last.wait()
        assert disk.written == [("k", b"1"), ("k", b"2")]


def say(code: str) -> Send[ControlMessage]:
    nobody = Address(host="127.0.0.1", port=1)
    return Send(to=None, address=nobody, message=Refused(code=code, message="", dialed=nobody))


def spoken(data: bytes) -> str:
    _, message = wire.decode(data)
    assert isinstance(message, Refused)
    return message.code


# --- the disk ------------------------------------------------------------------------------


class SlowDisk:
    """A disk that finishes a write when it is told to; writes happen in the saver's thread."""

    def __init__(self) -> None:
        self.written: list[tuple[str, bytes]] = []
        self.refuses: Exception | None = None
        self._loop = asyncio.get_running_loop()
        self._begun = asyncio.Event()
        self._gate = threading.Semaphore(0)

    def write(self, key: str, value: bytes) -> None:
        self._loop.call_soon_threadsafe(self._begun.set)
        assert self._gate.acquire(timeout=PATIENCE_S)
        if self.refuses is not None:
            raise self.refuses
        self.written.append((key, value))

    async def begun(self) -> None:
        async with asyncio.timeout(PATIENCE_S):
            await self._begun.wait()
        self._begun.clear()

    def finish(self, writes: int = 1) -> None:
        self._gate.release(writes)


async def test_what_waits_for_the_disk_goes_on_only_when_it_is_durable_and_in_order() -> None:
    disk = SlowDisk()
    done: list[str] = []
    saver = Saver(disk)
    saver.save("a", b"1", lambda: done.append("after a1"))
    await disk.begun()
    saver.save("b", b"1", lambda: done.append("after b1"))
    saver.save("b", b"2", lambda: done.append("after b2"))
    saver.save("a", b"2", lambda: done.append("after a2"))
    assert done == []
    disk.finish()
    await disk.begun()
    assert done == ["after a1"]
    disk.finish(2)
    await saver.close()
    assert done == ["after a1", "after b1", "after b2", "after a2"]
    assert disk.written == [("a", b"1"), ("b", b"2"), ("a", b"2")]


@pytest.mark.parametrize("refusal", [StateUnwritable("the disk is full"), ValueError("too large")])
async def test_where_the_disk_refuses_what_waited_is_not_done_and_the_next_is(refusal: Exception) -> None:
    disk = SlowDisk()
    done: list[str] = []
    saver = Saver(disk)
    disk.refuses = refusal
    saver.save("a", b"1", lambda: done.append("never"))
    await disk.begun()
    disk.finish()
    saver.save("b", b"1", lambda: done.append("after b"))
    await disk.begun()
    disk.refuses = None
    disk.finish()
    await saver.close()
    assert done == ["after b"]
    assert saver.failures == 1


async def test_what_waits_for_a_dead_disk_is_bounded() -> None:
    disk = SlowDisk()
    saver = Saver(disk)
    saver.save("first", b"", lambda: None)
    await disk.begun()
    for n in range(SAVES_WAITING_MAX + 5):
        saver.save(f"key-{n}", b"", lambda: None)
    assert saver.failures == 5
    disk.finish(SAVES_WAITING_MAX + 1)
    await saver.close()


@pytest.mark.parametrize(
    ("profiles", "examples"), [(33, 1), (1, 2_000)], ids=["too many profiles", "too large to be signed"]
)
async def test_an_offer_that_makes_no_row_is_the_callers_error(profiles: int, examples: int) -> None:
    domain = Domain(name="d", description="", examples=("x" * 40,) * examples)
    offer = ProfileOffer(name="p", model="m", fingerprint="f", domains=(domain,))
    async with running("anna") as a:
        with pytest.raises(InvalidRequest):
            a.driver.handle(OfferChanged(profiles=(offer,) * profiles))
