"""What this node does for its peers: the server side of ``PeerService``.

Owns: running what others forward here, or passing it on while hops are left. Must not: choose nodes.
"""

from __future__ import annotations

from asyncio import get_running_loop
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace

import grpc

from fieldmesh.core.dispatch import Resumption
from fieldmesh.core.errors import HopLimit, InvalidRequest, ProfileNotFound
from fieldmesh.core.model import Ask, Chunk, Completion, NodeId
from fieldmesh.core.tracing import SpanKind, TraceContext
from fieldmesh.engine.port import Started
from fieldmesh.rpc import inference as wire
from fieldmesh.rpc.snapshot import Flow
from fieldmesh.rpc.tracing import context_from
from fieldmesh.runtime.door import Calls, Context, guarded, guarded_stream, handlers
from fieldmesh.runtime.gate import caller_of
from fieldmesh.runtime.generation import KEY_CHARACTERS
from fieldmesh.runtime.links import Lane, PeerBytes
from fieldmesh.runtime.moving import Moving
from fieldmesh.runtime.service import Service
from fieldmesh.runtime.tracing import asked, code_of, embedding, finished, operation_of, stepping
from fieldmesh.v1 import inference_pb2, peer_pb2

PATH_NODES_MAX = 16


class Peers:
    """The requests of ``PeerService``; Control is ``links.Receiver``'s, which keeps bytes as bytes."""

    def __init__(
        self,
        service: Service,
        limits: Callable[[], wire.RequestLimits],
        counted: PeerBytes,
        moving: Moving,
    ) -> None:
        self._service = service
        self._moving = moving
        self._limits = limits
        self._bytes = counted

    def handler(self, calls: Calls) -> grpc.GenericRpcHandler:
        """What the peer's server is given beside the receiver's handler."""
        return handlers(peer_pb2.DESCRIPTOR.services_by_name["PeerService"], self, calls)

    @guarded_stream
    async def Forward(
        self, request: peer_pb2.ForwardRequest, context: Context
    ) -> AsyncGenerator[peer_pb2.ForwardResponse, None]:
        ask = self._ask(request)
        path = tuple(NodeId(node) for node in request.path)
        deadline_s = context.time_remaining()
        trace = context_from(context.invocation_metadata())
        if request.profile in self._service.local.models.hosted:
            responses = self._run_here(request, ask, path, deadline_s, trace)
        elif request.hops_left > 0 and not request.delivered_token_ids:
            responses = self._pass_on(request, ask, path, deadline_s, trace)
        else:
            raise ProfileNotFound(
                f"This node does not serve profile {request.profile!r} (any more) and may not pass it on",
                field="profile",
            )
        caller = caller_of(context.invocation_metadata())
        peer = caller.node if caller else "other", Lane.TOKENS.value
        self._bytes.received.add(peer, request.ByteSize())
        async with aclosing(responses):
            async for response in responses:
                self._bytes.sent.add(peer, response.ByteSize())
                yield response

    async def _run_here(
        self,
        request: peer_pb2.ForwardRequest,
        ask: Ask,
        path: tuple[NodeId, ...],
        deadline_s: float | None,
        context: TraceContext | None,
    ) -> AsyncGenerator[peer_pb2.ForwardResponse, None]:
        local, entry = self._service.local, self._service.entry
        clock, first_token_at = get_running_loop().time, 0.0
        began = clock()
        trace, model = self._service.tracer.open(context, ask.request_id), local.models.find(request.profile)
        name = f"{operation_of(ask)} {model.settings.model_name}"
        span = trace.begin(name, began, asked(ask) | {"fieldmesh.profile": request.profile}, SpanKind.SERVER)
        error = ""
        guests = self._service.guests
        guest = Flow(
            key=request.generation_id[:KEY_CHARACTERS],
            entry=path[0] if path else entry.node,
            serving=entry.node,
            profile=request.profile,
            state="running",
        )
        guests[guest.key] = guest
        events = local.run(
            ask,
            profile=request.profile,
            generation_id=request.generation_id,
            epoch=request.epoch,
            deadline_s=deadline_s,
            resumption=_resumption(request, ask),
            trace=trace.under(span),
        )
        try:
            async for event in events:
                match event:
                    case Started():
                        admitted = peer_pb2.Admitted(prompt_tokens=event.prompt_tokens)
                        yield peer_pb2.ForwardResponse(admitted=admitted)
                    case Chunk():
                        first_token_at = first_token_at or clock()
                        guests[guest.key] = guest = replace(guest, tokens=guest.tokens + len(event.token_ids))
                        yield peer_pb2.ForwardResponse(chunk=wire.chunk_to_proto(event))
                    case Completion():
                        ttft_s = first_token_at - began if first_token_at else 0.0
                        self._service.latencies.observe("for_peer", ttft_s, clock() - began)
                        trace.end(span, clock(), finished(event))
                        complete = inference_pb2.Complete(
                            request_id=ask.request_id,
                            generation_id=request.generation_id,
                            profile=request.profile,
                            served_by_id=entry.node,
                            served_by=entry.name,
                        )
                        wire.fill_completion(complete, event)
                        yield peer_pb2.ForwardResponse(complete=complete)
        except BaseException as failure:
            error = code_of(failure)
            raise
        finally:
            guests.pop(guest.key, None)
            await events.aclose()
            trace.end(span, clock(), error=error)

    async def _pass_on(
        self,
        request: peer_pb2.ForwardRequest,
        ask: Ask,
        path: tuple[NodeId, ...],
        deadline_s: float | None,
        trace: TraceContext | None,
    ) -> AsyncGenerator[peer_pb2.ForwardResponse, None]:
        items = self._service.ask(
            ask, deadline_s=deadline_s, path=path, hops_left=request.hops_left, trace=trace
        )
        try:
            async for item in items:
                if isinstance(item, Chunk):
                    yield peer_pb2.ForwardResponse(chunk=wire.chunk_to_proto(item))
                else:
                    yield peer_pb2.ForwardResponse(complete=wire.result_to_proto(item))
        finally:
            await items.aclose()

    def _ask(self, request: peer_pb2.ForwardRequest) -> Ask:
        if len(request.path) > PATH_NODES_MAX:
            raise HopLimit(f"path has {len(request.path)} nodes; at most {PATH_NODES_MAX} are accepted")
        if self._service.entry.node in request.path:
            raise HopLimit("This request has been here before: a loop", field="path")
        match request.WhichOneof("request"):
            case "generate":
                return wire.ask_from_generate(request.generate, self._limits())
            case "chat":
                return wire.ask_from_chat(request.chat, self._limits())
            case _:
                raise InvalidRequest("Set generate or chat", field="request")

    @guarded
    async def AbortForwarded(
        self, request: peer_pb2.AbortForwardedRequest, context: Context
    ) -> peer_pb2.AbortForwardedResponse:
        request_id = wire.request_id(request.request_id)
        return peer_pb2.AbortForwardedResponse(
            aborted=await self._service.abort(request_id, everywhere=False)
        )

    @guarded
    async def TokenizeForwarded(
        self, request: peer_pb2.TokenizeForwardedRequest, context: Context
    ) -> peer_pb2.TokenizeForwardedResponse:
        prompt = wire.prompt_from_tokenize(request.request, self._limits())
        token_ids, model = await self._service.local.tokenize(request.profile, prompt)
        return peer_pb2.TokenizeForwardedResponse(token_ids=token_ids, model=model)

    @guarded
    async def EmbedForwarded(
        self, request: peer_pb2.EmbedForwardedRequest, context: Context
    ) -> peer_pb2.EmbedForwardedResponse:
        texts = wire.texts_from_embed(request.request, self._limits())
        local, trace = self._service.local, context_from(context.invocation_metadata())
        step = embedding(local.models.find(request.profile).settings.model_name)
        with stepping(self._service.tracer.open(trace, ""), *step):
            made = await local.embed(request.profile, texts, context.time_remaining())
        return peer_pb2.EmbedForwardedResponse(
            embeddings=wire.embeddings_to_proto(made), prompt_tokens=made.prompt_tokens
        )

    @guarded_stream
    async def FetchState(
        self, request: peer_pb2.FetchStateRequest, context: Context
    ) -> AsyncGenerator[peer_pb2.FetchStateResponse, None]:
        caller = caller_of(context.invocation_metadata())
        async with aclosing(self._moving.leave(request, caller, context.time_remaining())) as pieces:
            async for piece in pieces:
                yield piece


def _resumption(request: peer_pb2.ForwardRequest, ask: Ask) -> Resumption | None:
    """Where the answer is to go on. Raises InvalidRequest."""
    tokens = tuple(request.delivered_token_ids)
    if not tokens:
        return None
    if ask.sampling.n not in (None, 1):
        raise InvalidRequest("Several answers cannot be gone on with", field="delivered_token_ids")
    return Resumption(token_ids=tokens, node=NodeId(request.state.node), epoch=request.state.epoch)
