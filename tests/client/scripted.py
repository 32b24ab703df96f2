"""Nodes that do what a test says: a real grpc.aio server whose answers are scripted call by call."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from fieldmesh.core.errors import FieldmeshError
from fieldmesh.core.model import (
    Address,
    Attempt,
    CandidateNote,
    Chunk,
    Completion,
    Explanation,
    FinishReason,
    NodeId,
    RequestId,
    Result,
    Usage,
)
from fieldmesh.rpc import inference as codec
from fieldmesh.rpc.errors import error_metadata
from fieldmesh.v1 import inference_pb2 as pb
from fieldmesh.v1 import mesh_pb2, trace_pb2
from fieldmesh.v1.inference_pb2_grpc import InferenceServiceServicer, add_InferenceServiceServicer_to_server
from fieldmesh.v1.mesh_pb2_grpc import MeshServiceServicer, add_MeshServiceServicer_to_server
from fieldmesh.v1.trace_pb2_grpc import TraceServiceServicer, add_TraceServiceServicer_to_server

STATUS = {code.value[0]: code for code in grpc.StatusCode}
Act = Callable[["ScriptedNode", Any, grpc.aio.ServicerContext[Any, Any]], AsyncIterator[tuple[str, Any]]]


def chunk(index: int, text: str, *, tokens: int = 1) -> tuple[str, pb.Chunk]:
    made = Chunk(
        generation_id="g",
        epoch=0,
        first_token_index=index,
        token_ids=tuple(range(100 + index, 100 + index + tokens)),
        text=text,
    )
    return "chunk", codec.chunk_to_proto(made)


def complete(
    request: Any, node: ScriptedNode, *, tokens: int, explain: bool = False
) -> tuple[str, pb.Complete]:
    note = CandidateNote(
        node=NodeId(node.id), node_name=node.name, profile="general", score=0.5, eligible=True, reason="here"
    )
    result = Result(
        request_id=RequestId(request.request_id),
        generation_id="g",
        completion=Completion(
            finish_reason=FinishReason.STOP,
            usage=Usage(prompt_tokens=7, cached_tokens=3, completion_tokens=tokens),
            matched_stop="",
            seed=11,
        ),
        profile=request.target.profile or "general",
        model="tiny",
        domain=request.target.domain,
        fallback=bool(request.target.domain),
        entry_node=NodeId(node.id),
        entry_node_name=node.name,
        served_by=NodeId(node.id),
        served_by_name=node.name,
        attempts=(
            Attempt(
                node=NodeId(node.id),
                node_name=node.name,
                model_fingerprint="f",
                epoch=0,
                first_token_index=0,
                last_token_index=tokens,
                reason="served",
            ),
        ),
        hops=0,
        ttft_s=0.01,
        duration_s=0.02,
        explanation=Explanation(policy="expected-time", candidates=(note,)) if explain else None,
    )
    return "complete", codec.result_to_proto(result)


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: FieldmeshError) -> None:
    await context.abort(STATUS[error.status.value], error.message, error_metadata(error))


def answers(*texts: str) -> Act:
    """Stream ``texts``, one token each, and complete."""

    async def act(node: ScriptedNode, request: Any, context: Any) -> AsyncIterator[tuple[str, Any]]:
        for index, text in enumerate(texts):
            yield chunk(index, text)
        yield complete(request, node, tokens=len(texts), explain=request.explain)

    return act


def refuses(error: FieldmeshError, *, after: tuple[str, ...] = ()) -> Act:
    """End with ``error``, after some chunks."""

    async def act(node: ScriptedNode, request: Any, context: Any) -> AsyncIterator[tuple[str, Any]]:
        for index, text in enumerate(after):
            yield chunk(index, text)
        await abort(context, error)

    return act


def hangs(*, after: tuple[str, ...] = ()) -> Act:
    """Go silent after some chunks: sets ``node.hanging``, and ``node.cancelled`` when the caller has gone."""

    async def act(node: ScriptedNode, request: Any, context: Any) -> AsyncIterator[tuple[str, Any]]:
        try:
            for index, text in enumerate(after):
                yield chunk(index, text)
            node.hanging.set()
            await asyncio.Event().wait()
        finally:
            node.cancelled.set()

    return act


def ends_early(*texts: str) -> Act:
    """Stream ``texts`` and end the stream well without a Complete."""

    async def act(node: ScriptedNode, request: Any, context: Any) -> AsyncIterator[tuple[str, Any]]:
        for index, text in enumerate(texts):
            yield chunk(index, text)

    return act


class _Health(health.aio.HealthServicer):  # type: ignore[misc]
    """The standard servicer, silent while its node is frozen."""

    def __init__(self, node: ScriptedNode) -> None:
        super().__init__()
        self._node = node

    async def Check(self, request: Any, context: Any) -> Any:
        self._node.health_asked.set()
        if self._node.frozen:
            await asyncio.Event().wait()
        return await super().Check(request, context)


@dataclass
class ScriptedNode(InferenceServiceServicer, MeshServiceServicer, TraceServiceServicer):
    """One node. ``script`` is taken from the front by Generate and Chat; without one it answers its name."""

    name: str
    script: list[Act] = field(default_factory=list)
    unary_errors: list[FieldmeshError] = field(default_factory=list)
    peers: list[ScriptedNode] = field(default_factory=list)
    requests: list[Any] = field(default_factory=list)
    metadata: list[dict[str, str]] = field(default_factory=list)
    trace: trace_pb2.GetTraceResponse = field(default_factory=trace_pb2.GetTraceResponse)
    aborted: list[str] = field(default_factory=list)
    listed: asyncio.Event = field(default_factory=asyncio.Event)
    hanging: asyncio.Event = field(default_factory=asyncio.Event)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    health_asked: asyncio.Event = field(default_factory=asyncio.Event)
    port: int = 0
    frozen: bool = False
    engine: pb.EngineState = pb.ENGINE_STATE_READY

    @property
    def id(self) -> str:
        return self.name.encode().hex().ljust(32, "0")

    @property
    def address(self) -> Address:
        return Address(host="127.0.0.1", port=self.port)

    async def start(self) -> ScriptedNode:
        self.server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        add_InferenceServiceServicer_to_server(self, self.server)
        add_MeshServiceServicer_to_server(self, self.server)
        add_TraceServiceServicer_to_server(self, self.server)
        self.health = _Health(self)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self.server)
        await self.tell_health("", serves=True)
        self.port = self.server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self.server.start()
        return self

    async def tell_health(self, service: str, *, serves: bool) -> None:
        status = health_pb2.HealthCheckResponse
        await self.health.set(service, status.SERVING if serves else status.NOT_SERVING)

    async def die(self) -> None:
        await self.server.stop(None)

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[pb.GenerateResponse]:  # type: ignore[override]
        self.requests.append(request)
        act = self.script.pop(0) if self.script else answers(self.name)
        async for kind, message in act(self, request, context):
            yield pb.GenerateResponse(**{kind: message})

    async def Chat(self, request: Any, context: Any) -> AsyncIterator[pb.ChatResponse]:  # type: ignore[override]
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        act = self.script.pop(0) if self.script else answers(self.name)
        async for kind, message in act(self, request, context):
            yield pb.ChatResponse(**{kind: message})

    async def _unary(self, request: Any, context: Any) -> None:
        self.requests.append(request)
        if self.unary_errors:
            await abort(context, self.unary_errors.pop(0))

    async def GetTrace(self, request: Any, context: Any) -> trace_pb2.GetTraceResponse:  # type: ignore[override]
        await self._unary(request, context)
        return self.trace

    async def Tokenize(self, request: Any, context: Any) -> pb.TokenizeResponse:  # type: ignore[override]
        await self._unary(request, context)
        text = request.prompt or "".join(message.content for message in request.messages)
        return pb.TokenizeResponse(token_ids=list(text.encode()), model="tiny")

    async def Embed(self, request: Any, context: Any) -> pb.EmbedResponse:  # type: ignore[override]
        await self._unary(request, context)
        vectors = [pb.Embedding(values=[0.6, -0.8]) for _ in request.inputs]
        return pb.EmbedResponse(embeddings=vectors, prompt_tokens=3, profile="code", served_by=self.name)

    async def ListModels(self, request: Any, context: Any) -> pb.ListModelsResponse:  # type: ignore[override]
        await self._unary(request, context)
        return pb.ListModelsResponse(models=[self._offer()])

    async def GetLoads(self, request: Any, context: Any) -> pb.GetLoadsResponse:  # type: ignore[override]
        await self._unary(request, context)
        load = pb.Load(engine=pb.ENGINE_STATE_READY, slots=4, running=1)
        return pb.GetLoadsResponse(loads=[pb.NodeLoad(node_id=self.id, node_name=self.name, load=load)])

    async def Abort(self, request: Any, context: Any) -> pb.AbortResponse:  # type: ignore[override]
        await self._unary(request, context)
        self.aborted.append(request.request_id)
        return pb.AbortResponse(aborted=True)

    async def ListNodes(self, request: Any, context: Any) -> mesh_pb2.ListNodesResponse:  # type: ignore[override]
        self.listed.set()
        nodes = [
            mesh_pb2.NodeInfo(
                id=node.id,
                name=node.name,
                addresses=[str(node.address)],
                state=mesh_pb2.NODE_STATE_ALIVE,
                offers=[node._offer()],
                load=pb.Load(engine=node.engine, slots=4, running=1, queued=2),
                incarnation=3,
                peer_address="127.0.0.1:1",
                version="0.0.1",
            )
            for node in (self, *self.peers)
        ]
        return mesh_pb2.ListNodesResponse(local_id=self.id, mesh="test", nodes=nodes)

    def _offer(self) -> pb.ModelEntry:
        return pb.ModelEntry(
            profile="code",
            model="tiny",
            fingerprint="f",
            domains=["code"],
            tier=2,
            context_tokens=512,
            node_id=self.id,
            node_name=self.name,
            available=True,
        )
