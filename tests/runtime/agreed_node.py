"""A client listener with the real ``AdminService`` over a real council of one voter, without an engine."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from random import Random
from typing import Any

import grpc

from fieldmesh.core.errors import NodeUnreachable
from fieldmesh.core.model import Address, Member, MeshView, NodeId, NodeState, Seat
from fieldmesh.core.raft_model import RaftConfig
from fieldmesh.runtime.admin import ADMIN, Admin
from fieldmesh.runtime.council import Council
from fieldmesh.runtime.council_model import CouncilConfig
from fieldmesh.runtime.door import Context, guarded, handlers
from fieldmesh.runtime.inference import MESH
from fieldmesh.runtime.raft_store import RaftStore
from fieldmesh.v1 import mesh_pb2

ME = NodeId("a" * 32)
OTHER = NodeId("b" * 32)
FAST = CouncilConfig(
    raft=RaftConfig(heartbeat_s=0.02, election_timeout_s=0.1),
    timeout_s=2.0,
    leader_patience_s=0.3,
    found_wait_s=0.0,
)


class Alone:
    """Colleagues of a node whom nobody answers."""

    def send(self, to: NodeId, message: object) -> None:
        pass

    def seats(self) -> Mapping[NodeId, Seat]:
        return {}

    async def submit(self, *_: object) -> Any:
        raise NodeUnreachable("nobody is there")

    async def watch(self, *_: object) -> AsyncGenerator[Any, None]:
        raise NodeUnreachable("nobody is there")
        yield

    read_index = change = submit


class Shelf(dict[str, bytes]):
    """Where an observer keeps what it knows."""

    def read(self, key: str) -> bytes | None:
        return self.get(key)

    def write(self, key: str, value: bytes) -> None:
        self[key] = value


class Nodes:
    """``MeshService`` as far as `status` asks it."""

    def __init__(self, view: MeshView) -> None:
        self._view = view

    @guarded
    async def ListNodes(self, request: object, context: Context) -> mesh_pb2.ListNodesResponse:
        nodes = [
            mesh_pb2.NodeInfo(id=m.id, name=m.name, state=mesh_pb2.NODE_STATE_ALIVE)
            for m in self._view.members
        ]
        return mesh_pb2.ListNodesResponse(local_id=self._view.local, mesh="m", nodes=nodes)


class AgreedNode:
    """One node; ``address`` is where it listens."""

    def __init__(self, folder: Path, *, found: bool = True) -> None:
        self.folder = folder
        self.founds = found
        self.address = Address(host="127.0.0.1", port=0)
        self.others = [OTHER]
        self._stack = AsyncExitStack()

    async def start(self) -> None:
        self.council = Council(
            ME,
            open_store=lambda: RaftStore.open(self.folder / "log.sqlite3", ME),
            shelf=Shelf(),
            colleagues=Alone(),
            rng=Random(1),
            config=FAST,
        )
        await self.council.start(found=self.founds)
        self._stack.push_async_callback(self.council.close)
        admin = Admin(self.council, name="alpha", view=self.view, advice=lambda: "one voter is right")
        server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
        server.add_generic_rpc_handlers((handlers(ADMIN, admin), handlers(MESH, Nodes(self.view()))))
        self.address = Address(
            host="127.0.0.1", port=server.add_insecure_port(f"127.0.0.1:{self.address.port}")
        )
        await server.start()
        self._stack.push_async_callback(server.stop, None)
        while self.founds and not self.council.leading:
            await self.council.wait_changed()

    async def close(self) -> None:
        await self._stack.aclose()

    def view(self) -> MeshView:
        names = {ME: "alpha", **dict.fromkeys(self.others, "beta")}
        members = tuple(
            Member(id=node, name=name, address=self.address, state=NodeState.ALIVE, incarnation=1)
            for node, name in sorted(names.items())
        )
        return MeshView(local=ME, members=members)
