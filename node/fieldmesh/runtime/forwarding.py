"""Passes requests to peers. Owns: the client side of ``PeerService``'s request methods. Must not: choose."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable

import grpc

from fieldmesh.core.dispatch import Resumption
from fieldmesh.core.errors import Cancelled, FieldmeshError, NodeUnreachable
from fieldmesh.core.model import (
    Address,
    Ask,
    Chunk,
    Completion,
    Embeddings,
    Member,
    NodeId,
    Prompt,
    RequestId,
    Result,
)
from fieldmesh.core.routing import Candidate
from fieldmesh.core.tracing import TraceContext
from fieldmesh.engine.port import Started
from fieldmesh.rpc import inference as wire
from fieldmesh.rpc.errors import error_from_call
from fieldmesh.rpc.tracing import metadata_of
from fieldmesh.runtime import log
from fieldmesh.runtime.links import Lane, PeerBytes
from fieldmesh.v1 import inference_pb2, peer_pb2, peer_pb2_grpc

HOP_BUDGET_S = 0.02
TOKENIZE_TIMEOUT_S = 10.0

logger = log.get()

Channels = Callable[[Address], grpc.aio.Channel]
"""A warm channel for tokens to the peer at this address."""


class Forwarder:
    """Runs requests at peers, over channels that are kept warm."""

    def __init__(self, channels: Channels, counted: PeerBytes) -> None:
        self._channels = channels
        self._bytes = counted

    async def run(
        self,
        ask: Ask,
        candidate: Candidate,
        *,
        generation_id: str,
        epoch: int,
        path: tuple[NodeId, ...],
        hops_left: int,
        deadline_s: float,
        trace: TraceContext,
        resumption: Resumption | None = None,
    ) -> AsyncGenerator[Started | Chunk | Completion | Result, None]:
        """Run ``ask`` at the candidate. Closing the generator cancels the run there.

        Raises what that node ended it with, and NodeUnreachable.
        """
        request = peer_pb2.ForwardRequest(
            generation_id=generation_id,
            epoch=epoch,
            path=path,
            hops_left=hops_left,
            profile=candidate.offer.name,
        )
        if resumption is not None:
            request.delivered_token_ids.extend(resumption.token_ids)
            request.state.CopyFrom(peer_pb2.StateSource(node=resumption.node, epoch=resumption.epoch))
        if ask.prompt.messages:
            request.chat.CopyFrom(wire.chat_from_ask(ask))
        else:
            request.generate.CopyFrom(wire.generate_from_ask(ask))
        call = self._stub(candidate.member).Forward(
            request, timeout=max(0.001, deadline_s - HOP_BUDGET_S), metadata=metadata_of(trace)
        )
        peer = candidate.member.id, Lane.TOKENS.value
        self._bytes.sent.add(peer, request.ByteSize())
        try:
            async for response in call:
                self._bytes.received.add(peer, response.ByteSize())
                match response.WhichOneof("response"):
                    case "admitted":
                        yield Started(prompt_tokens=response.admitted.prompt_tokens)
                    case "chunk":
                        yield wire.chunk_from_proto(response.chunk)
                    case "complete":
                        result = wire.result_from_proto(response.complete)
                        # Attempts of its own are what a node tells that passed the request on further.
                        yield result if result.attempts else result.completion
                    case _:
                        continue  # a newer peer may say more than we understand
        except grpc.aio.AioRpcError as error:
            raise _translated(error, candidate.member) from None
        finally:
            call.cancel()

    async def abort(self, member: Member, request_id: RequestId, *, timeout_s: float) -> bool:
        """End a run of this request there; False where none was found or the peer does not answer."""
        request = peer_pb2.AbortForwardedRequest(request_id=request_id)
        try:
            return (await self._stub(member).AbortForwarded(request, timeout=timeout_s)).aborted
        except grpc.aio.AioRpcError as error:
            logger.warning("abort_not_delivered", node=member.name, code=error.code().name)
            return False

    async def tokenize(self, candidate: Candidate, prompt: Prompt) -> tuple[tuple[int, ...], str]:
        """Token ids by the candidate's tokenizer, and the model whose they are."""
        request = peer_pb2.TokenizeForwardedRequest(
            profile=candidate.offer.name,
            request=inference_pb2.TokenizeRequest(
                prompt=prompt.text or "", messages=wire.messages_to_proto(prompt.messages)
            ),
        )
        try:
            response = await self._stub(candidate.member).TokenizeForwarded(
                request, timeout=TOKENIZE_TIMEOUT_S
            )
        except grpc.aio.AioRpcError as error:
            raise _translated(error, candidate.member) from None
        return tuple(response.token_ids), response.model

    async def embed(
        self, candidate: Candidate, texts: tuple[str, ...], *, deadline_s: float, trace: TraceContext
    ) -> Embeddings:
        """Vectors of texts by the candidate's model."""
        request = peer_pb2.EmbedForwardedRequest(
            profile=candidate.offer.name, request=inference_pb2.EmbedRequest(inputs=texts)
        )
        try:
            response = await self._stub(candidate.member).EmbedForwarded(
                request, timeout=max(0.001, deadline_s - HOP_BUDGET_S), metadata=metadata_of(trace)
            )
        except grpc.aio.AioRpcError as error:
            raise _translated(error, candidate.member) from None
        return wire.embeddings_from_proto(response)

    def _stub(self, member: Member) -> peer_pb2_grpc.PeerServiceAsyncStub:
        return peer_pb2_grpc.PeerServiceStub(self._channels(member.address))


def _translated(error: grpc.aio.AioRpcError, member: Member) -> FieldmeshError:
    translated = error_from_call(error)
    # Whoever cancelled it there, it was not our caller: that would have ended this call here.
    if isinstance(translated, (NodeUnreachable, Cancelled)):
        return NodeUnreachable(f"{member.name} at {member.address} cannot be reached: {translated.message}")
    return translated
