"""States of running sequences on their way between two nodes, on the connection for what is large.

Owns: both sides of ``FetchState``: who may have a state, its bounds, its pace. Must not: decide who goes on
with a sequence, or believe a state: the engine that takes it in verifies its fingerprint and its SHA-256, and
a job's tokens count whatever a state holds. Where no state can be had, its tokens are computed again.
"""

from __future__ import annotations

import asyncio
import mmap
from collections.abc import AsyncGenerator, Callable

import grpc

from fieldmesh.core.dispatch import Resumption
from fieldmesh.core.errors import FieldmeshError, GenerationNotFound, InvalidRequest, StateRefused
from fieldmesh.core.model import Address, Member, MeshView, NodeId, NodeState
from fieldmesh.engine.front import EngineFront
from fieldmesh.engine.states import Envelope, SequenceState, room, unpacked
from fieldmesh.rpc.errors import error_from_call
from fieldmesh.runtime import log
from fieldmesh.runtime.gate import Caller
from fieldmesh.runtime.links import Lane, PeerBytes
from fieldmesh.runtime.models import Models
from fieldmesh.v1 import peer_pb2, peer_pb2_grpc

FETCH_TIMEOUT_S = 10.0
SEND_TIMEOUT_S = 15.0
"""Above what is asked for: gRPC rounds deadlines up, and clocks differ."""
PIECE_BYTES_MAX = 256 << 10
"""About 0.1 ms of the event loop's time: tokens pass between two pieces."""
RATE_BYTES_PER_S_MAX = 64 << 20
"""Half of what a 1 Gbit/s network carries: the other half is for tokens."""
LEAVING_MAX = 2
"""States that leave this node at once: each is in memory meanwhile."""

_KNOWN = (NodeState.ALIVE, NodeState.SUSPECT)

logger = log.get()


def job_id(generation_id: str, epoch: int, index: int = 0) -> str:
    """What an engine knows one completion of an attempt by."""
    return f"{generation_id}/{epoch}/{index}"


class Moving:
    """One node's states that come and go. ``bulk`` gives a channel for what is large to an address."""

    def __init__(
        self,
        models: Models,
        view: Callable[[], MeshView],
        bulk: Callable[[Address], grpc.aio.Channel],
        counted: PeerBytes,
    ) -> None:
        self._models = models
        self._view = view
        self._bulk = bulk
        self._bytes = counted
        self._leaving = asyncio.Semaphore(LEAVING_MAX)

    # --- coming --------------------------------------------------------------------------------

    async def fetch(
        self, engine: EngineFront, profile: str, generation_id: str, resumption: Resumption
    ) -> bool:
        """Bring what was computed for a generation into this engine; False where it must be computed anew."""
        try:
            await self._fetch(engine, profile, generation_id, resumption)
        except FieldmeshError as error:
            logger.info("state_not_moved", code=error.code, error=error.message)
            return False
        return True

    async def _fetch(
        self, engine: EngineFront, profile: str, generation_id: str, resumption: Resumption
    ) -> None:
        if engine.info is None or not engine.info.state_fingerprint:
            raise StateRefused("this engine keeps no states")
        source = self._member(resumption.node)
        if source is None:
            raise StateRefused("the node that has the state is no member of the mesh")
        request = peer_pb2.FetchStateRequest(
            profile=profile,
            generation_id=generation_id,
            epoch=resumption.epoch,
            fingerprint=engine.info.state_fingerprint,
            bytes_max=engine.settings.state_bytes_max,
        )
        stub: peer_pb2_grpc.PeerServiceAsyncStub = peer_pb2_grpc.PeerServiceStub(self._bulk(source.address))
        call = stub.FetchState(request, timeout=FETCH_TIMEOUT_S)
        try:
            envelope = await self._received(call, source.id, engine.settings.state_bytes_max)
        except grpc.aio.AioRpcError as error:
            raise error_from_call(error) from None
        finally:
            call.cancel()
        await engine.import_(SequenceState(unpacked(envelope, len(envelope)).header, envelope))
        logger.info("state_moved", node=source.name, bytes=len(envelope))

    async def _received(
        self,
        call: grpc.aio.UnaryStreamCall[peer_pb2.FetchStateRequest, peer_pb2.FetchStateResponse],
        peer: NodeId,
        bytes_max: int,
    ) -> mmap.mmap:
        """The envelope that a peer sends. Raises StateRefused where it is not what it was announced to be."""
        envelope: mmap.mmap | None = None
        filled = 0
        async for response in call:
            self._bytes.received.add((peer, Lane.BULK.value), response.ByteSize())
            if envelope is None:
                if not 0 < response.total_bytes <= bytes_max:
                    raise StateRefused(
                        f"the state has {response.total_bytes} bytes; accepted are 1 to {bytes_max}"
                    )
                envelope = room(response.total_bytes)
            piece = response.data
            if not 0 < len(piece) <= min(PIECE_BYTES_MAX, len(envelope) - filled):
                raise StateRefused("the state came in pieces of other sizes than were announced")
            envelope[filled : filled + len(piece)] = piece
            filled += len(piece)
        if envelope is None or filled < len(envelope):
            raise StateRefused(f"the state was cut short after {filled} bytes")
        return envelope

    # --- going ---------------------------------------------------------------------------------

    async def leave(
        self, request: peer_pb2.FetchStateRequest, caller: Caller | None, time_left_s: float | None
    ) -> AsyncGenerator[peer_pb2.FetchStateResponse, None]:
        """The state of a sequence that runs here, in pieces; the sequence goes on.

        Raises StateRefused (not a member, another fingerprint, too large), GenerationNotFound,
        InvalidRequest.
        """
        if caller is None or self._member(caller.node) is None:
            raise StateRefused("states are given to members of the mesh alone")
        if time_left_s is None or time_left_s > SEND_TIMEOUT_S:
            raise InvalidRequest(f"a deadline of at most {SEND_TIMEOUT_S:g} s is needed", field="deadline")
        engine = self._engine(request.profile)
        own = engine.info.state_fingerprint if engine.info is not None else ""
        if not own or request.fingerprint != own:
            raise StateRefused(
                "the state was made by another model, or with other settings of its cache; compute the "
                "prompt again instead",
                field="fingerprint",
            )
        async with self._leaving:  # who waits for a turn is bounded by its deadline
            state = await engine.export(job_id(request.generation_id, request.epoch))
            envelope = state.envelope
            if len(envelope) > request.bytes_max:
                raise StateRefused(
                    f"the state has {len(envelope)} bytes; at most {request.bytes_max} were asked for"
                )
            peer = caller.node, Lane.BULK.value
            async for response in _pieces(envelope):
                self._bytes.sent.add(peer, response.ByteSize())
                yield response

    def _engine(self, profile: str) -> EngineFront:
        found = self._models.hosted.get(profile)
        if found is None or found.engine is None:
            raise GenerationNotFound(f"profile {profile[:128]!r} runs nothing here", field="profile")
        return found.engine

    def _member(self, node: NodeId) -> Member | None:
        return next((m for m in self._view().members if m.id == node and m.state in _KNOWN), None)


async def _pieces(envelope: Envelope) -> AsyncGenerator[peer_pb2.FetchStateResponse, None]:
    """An envelope cut up, at the pace that leaves room for others."""
    clock = asyncio.get_running_loop().time
    began, view = clock(), memoryview(envelope)
    for start in range(0, len(view), PIECE_BYTES_MAX):
        piece = bytes(view[start : start + PIECE_BYTES_MAX])
        yield peer_pb2.FetchStateResponse(total_bytes=0 if start else len(view), data=piece)
        await asyncio.sleep(max(0.0, began + (start + len(piece)) / RATE_BYTES_PER_S_MAX - clock()))
