"""The client listener: ``InferenceService`` and ``MeshService`` over the node's service object.

Owns: translation between the wire and the service. Must not: decide anything.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from fieldmesh.core.model import Ask, Chunk, EngineState, Member, NodeState, Result
from fieldmesh.rpc import inference as wire
from fieldmesh.rpc.tracing import context_from
from fieldmesh.runtime.door import Context, guarded, guarded_stream
from fieldmesh.runtime.service import Service
from fieldmesh.v1 import inference_pb2 as pb
from fieldmesh.v1 import inference_pb2_grpc, mesh_pb2, mesh_pb2_grpc

INFERENCE = pb.DESCRIPTOR.services_by_name["InferenceService"]
MESH = mesh_pb2.DESCRIPTOR.services_by_name["MeshService"]


class Inference(inference_pb2_grpc.InferenceServiceServicer):
    """``InferenceService`` at this node."""

    def __init__(self, service: Service, limits: Callable[[], wire.RequestLimits]) -> None:
        self._service = service
        self._limits = limits

    @guarded_stream
    async def Generate(
        self, request: pb.GenerateRequest, context: Context
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        async with aclosing(self._answer(wire.ask_from_generate(request, self._limits()), context)) as items:
            async for item in items:
                if isinstance(item, Chunk):
                    yield pb.GenerateResponse(chunk=wire.chunk_to_proto(item))
                else:
                    yield pb.GenerateResponse(complete=wire.result_to_proto(item))

    @guarded_stream
    async def Chat(self, request: pb.ChatRequest, context: Context) -> AsyncGenerator[pb.ChatResponse, None]:
        async with aclosing(self._answer(wire.ask_from_chat(request, self._limits()), context)) as items:
            async for item in items:
                if isinstance(item, Chunk):
                    yield pb.ChatResponse(chunk=wire.chunk_to_proto(item))
                else:
                    yield pb.ChatResponse(complete=wire.result_to_proto(item))

    def _answer(self, ask: Ask, context: Context) -> AsyncGenerator[Chunk | Result, None]:
        trace = context_from(context.invocation_metadata())
        return self._service.ask(ask, deadline_s=context.time_remaining(), trace=trace)

    @guarded
    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        prompt = wire.prompt_from_tokenize(request, self._limits())
        target = wire.target_from_proto(request.target)
        token_ids, model = await self._service.tokenize(prompt, target)
        return pb.TokenizeResponse(token_ids=token_ids, model=model)

    @guarded
    async def Embed(self, request: pb.EmbedRequest, context: Context) -> pb.EmbedResponse:
        texts = wire.texts_from_embed(request, self._limits())
        target = wire.target_from_proto(request.target)
        trace = context_from(context.invocation_metadata())
        made, by = await self._service.embed(texts, target, deadline_s=context.time_remaining(), trace=trace)
        return pb.EmbedResponse(
            embeddings=wire.embeddings_to_proto(made),
            prompt_tokens=made.prompt_tokens,
            profile=by.offer.name,
            model=by.offer.model,
            model_fingerprint=by.offer.fingerprint,
            served_by_id=by.member.id,
            served_by=by.member.name,
        )

    @guarded
    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        offers = [offer for member in self._service.view.members for offer in _offers(member)]
        return pb.ListModelsResponse(models=offers)

    @guarded
    async def GetLoads(self, request: pb.GetLoadsRequest, context: Context) -> pb.GetLoadsResponse:
        loads = [
            pb.NodeLoad(node_id=m.id, node_name=m.name, load=wire.load_to_proto(m.load))
            for m in self._service.view.members
        ]
        return pb.GetLoadsResponse(loads=loads)

    @guarded
    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:
        return pb.AbortResponse(aborted=await self._service.abort(wire.request_id(request.request_id)))


class Mesh(mesh_pb2_grpc.MeshServiceServicer):
    """``MeshService`` at this node."""

    def __init__(self, service: Service, mesh: str) -> None:
        self._service = service
        self._mesh = mesh

    @guarded
    async def ListNodes(
        self, request: mesh_pb2.ListNodesRequest, context: Context
    ) -> mesh_pb2.ListNodesResponse:
        view = self._service.view
        nodes = [_node(member) for member in view.members]
        return mesh_pb2.ListNodesResponse(local_id=view.local, mesh=self._mesh, nodes=nodes)


_STATES = {
    NodeState.ALIVE: mesh_pb2.NODE_STATE_ALIVE,
    NodeState.SUSPECT: mesh_pb2.NODE_STATE_SUSPECT,
    NodeState.UNREACHABLE: mesh_pb2.NODE_STATE_UNREACHABLE,
    NodeState.DEAD: mesh_pb2.NODE_STATE_DEAD,
    NodeState.LEFT: mesh_pb2.NODE_STATE_LEFT,
}


def _node(member: Member) -> mesh_pb2.NodeInfo:
    row = member.row
    return mesh_pb2.NodeInfo(
        id=member.id,
        name=member.name,
        addresses=[str(address) for address in row.client_addresses] if row else [],
        state=_STATES[member.state],
        offers=_offers(member),
        load=wire.load_to_proto(member.load),
        incarnation=member.incarnation,
        rtt_s=member.rtt_s,
        peer_address=str(member.address),
        version=row.version if row else "",
    )


def _offers(member: Member) -> list[pb.ModelEntry]:
    available = member.state is NodeState.ALIVE and member.load.engine is EngineState.READY
    return [
        pb.ModelEntry(
            profile=offer.name,
            model=offer.model,
            fingerprint=offer.fingerprint,
            domains=[domain.name for domain in offer.domains],
            tier=offer.tier,
            context_tokens=offer.context_tokens,
            node_id=member.id,
            node_name=member.name,
            available=available,
        )
        for offer in (member.row.profiles if member.row else ())
    ]
