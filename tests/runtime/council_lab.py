"""Several councils in one process with real stores and real connections, and nothing else of a node.

Who is known and alive comes from the lab instead of the mesh, so that a test can cut nodes off at will: a
node that is cut off knows nobody's address, and nobody knows its.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import grpc

from fieldmesh.core.mesh import NOWHERE
from fieldmesh.core.model import Address, Member, MeshView, NodeId, NodeState, Row, Seat
from fieldmesh.core.raft_model import RaftConfig, Save
from fieldmesh.core.settings import Change, Command, Kind, Outcome
from fieldmesh.runtime.council import Council
from fieldmesh.runtime.council_model import CouncilConfig
from fieldmesh.runtime.gate import Caller, Gate
from fieldmesh.runtime.links import Links, LinksConfig, server_options
from fieldmesh.runtime.raft_links import RaftLinks
from fieldmesh.runtime.raft_service import RaftService
from fieldmesh.runtime.raft_store import RaftStore

WAIT_S_MAX = 15.0
FAST = CouncilConfig(
    raft=RaftConfig(heartbeat_s=0.04, election_timeout_s=0.25),
    timeout_s=4.0,
    leader_patience_s=1.2,
    found_wait_s=0.0,
    follow_after_s=0.5,
)


class Shelf(dict[str, bytes]):
    """Where an observer keeps what it knows."""

    def read(self, key: str) -> bytes | None:
        return self.get(key)

    def write(self, key: str, value: bytes) -> None:
        self[key] = value


class Store(RaftStore):
    """A store whose disk can fail."""

    broken: Exception | None = None

    def save(self, *saves: Save) -> None:
        if self.broken is not None:
            raise self.broken
        super().save(*saves)


@dataclass
class Box:
    """One node of the lab."""

    name: str
    id: NodeId
    lab: Lab
    shelf: Shelf
    council: Council = field(init=False)
    links: Links = field(init=False)
    raft_links: RaftLinks = field(init=False)
    service: RaftService = field(init=False)
    server: grpc.aio.Server = field(init=False)
    address: Address = field(init=False)
    watcher: asyncio.Task[None] | None = None
    running: bool = False
    cut_off: bool = False

    async def start(self, *, found: bool = False) -> Council:
        caller = Caller(node=self.id, mesh="lab")
        self.links = Links(caller, lambda *_: None)
        self.raft_links = RaftLinks(self.view, self.links.log)
        self.council = Council(
            self.id,
            open_store=lambda: Store.open(self.lab.folder / f"{self.name}.sqlite3", self.id),
            shelf=self.shelf,
            colleagues=self.raft_links,
            rng=Random(self.name),
            config=self.lab.config,
        )
        self.service = RaftService(self.council)
        self.server = grpc.aio.server(interceptors=(Gate(caller),), options=server_options(LinksConfig()))
        self.server.add_generic_rpc_handlers(self.service.handlers())
        self.address = Address(host="127.0.0.1", port=self.server.add_insecure_port("127.0.0.1:0"))
        await self.server.start()
        self.running = True
        await self.council.start(found=found)
        self.watcher = asyncio.get_running_loop().create_task(self._watch_seat())
        self.lab.tell()
        return self.council

    async def stop(self) -> None:
        """End this node, without a word to the others; what it has on its disk stays."""
        if not self.running:
            return
        self.running = False
        if self.watcher is not None:
            self.watcher.cancel()
            await asyncio.gather(self.watcher, return_exceptions=True)
        await self.council.close()
        self.service.close()
        await self.raft_links.close()
        await self.links.close()
        await self.server.stop(None)
        self.lab.tell()

    async def _watch_seat(self) -> None:
        told: Seat | None = None
        while True:
            news = self.council.news
            if (seat := self.council.seat) != told:
                told = seat
                self.lab.tell()
            await news.wait()

    def view(self) -> MeshView:
        """The mesh as this node is told of it."""
        return MeshView(local=self.id, members=tuple(self._member(box) for box in self.lab.boxes.values()))

    def _member(self, box: Box) -> Member:
        known = box is self or not (box.cut_off or self.cut_off)
        seat = box.council.seat if box.running else None
        row = Row(
            id=box.id,
            name=box.name,
            mesh="lab",
            incarnation=1,
            sequence=1,
            addresses=(),
            client_addresses=(),
            seat=seat,
        )
        alive = box.running and known
        return Member(
            id=box.id,
            name=box.name,
            address=box.address if alive else NOWHERE,
            state=NodeState.ALIVE if alive else NodeState.DEAD,
            incarnation=1,
            row=row,
        )


class Lab:
    """Some boxes and their folder."""

    def __init__(self, folder: Path, config: CouncilConfig = FAST) -> None:
        self.folder = folder
        self.config = config
        self.boxes: dict[str, Box] = {}

    def box(self, name: str) -> Box:
        """The box of this name, made where there is none."""
        if name not in self.boxes:
            node = NodeId(name.encode().hex().rjust(32, "0"))
            self.boxes[name] = Box(name=name, id=node, lab=self, shelf=Shelf())
        return self.boxes[name]

    def __getitem__(self, name: str) -> Council:
        return self.boxes[name].council

    def tell(self) -> None:
        """Everybody looks at everybody again."""
        for box in self.boxes.values():
            if box.running:
                box.council.neighbours_changed()

    def cut(self, *names: str) -> None:
        """Cut these off from everybody; nobody is cut off but these."""
        for box in self.boxes.values():
            box.cut_off = box.name in names
        self.tell()

    async def voters(self, *names: str) -> None:
        """A log with these voters, the first its founder."""
        for name in names:
            await self.box(name).start(found=name == names[0])
        founder = self[names[0]]
        await self.until(lambda: founder.leading)
        for name in names[1:]:
            await founder.add(self.box(name).id)
        for name in names[1:]:
            node = self.box(name).id
            await self.until(lambda node=node: node in founder.status().caught_up)  # type: ignore[misc]
            await founder.promote(node)
        await self.until(lambda: all(len(self[name].status().voters) == len(names) for name in names))

    @property
    def leader(self) -> str:
        """The name of who leads, of those that run and are not cut off; empty for nobody."""
        leading = [
            box for box in self.boxes.values() if box.running and box.council.leading and not box.cut_off
        ]
        return max(leading, key=lambda box: box.council.status().term).name if leading else ""

    async def until(self, holds: Callable[[], bool], timeout_s: float = WAIT_S_MAX) -> None:
        """Return when ``holds``; raises TimeoutError with what everybody says."""
        try:
            async with asyncio.timeout(timeout_s):
                while not holds():
                    events = [
                        asyncio.ensure_future(b.council.news.wait()) for b in self.boxes.values() if b.running
                    ]
                    await asyncio.wait(events, timeout=0.05, return_when=asyncio.FIRST_COMPLETED)
                    for event in events:
                        event.cancel()
        except TimeoutError:
            said = {box.name: box.council.status() for box in self.boxes.values() if box.running}
            raise TimeoutError(str(said)) from None

    async def have(self, revision: int, *names: str) -> None:
        """Return when these nodes (all that run) have this revision."""
        chosen = [box for box in self.boxes.values() if box.running and (not names or box.name in names)]
        await self.until(lambda: all(box.council.state.revision >= revision for box in chosen))

    async def close(self) -> None:
        for box in self.boxes.values():
            await box.stop()


@asynccontextmanager
async def open_lab(folder: Path, config: CouncilConfig = FAST) -> AsyncIterator[Lab]:
    lab = Lab(folder, config)
    try:
        yield lab
    finally:
        await lab.close()


async def put(council: Council, key: str, value: object, timeout_s: float | None = None) -> Outcome:
    """Set one key."""
    change = Change(key=key, value=json.dumps(value))
    outcome, _ = await council.write([change], author="tester", origin="test", timeout_s=timeout_s)
    return outcome


def command(session: int, sequence: int, key: str, value: object) -> Command:
    """A write under a session of its own."""
    return Command(
        kind=Kind.WRITE,
        session=session,
        sequence=sequence,
        acknowledged=sequence - 1,
        changes=(Change(key=key, value=json.dumps(value)),),
        author="tester",
    )
