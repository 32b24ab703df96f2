"""The asynchronous client. Owns: channels, waiting, and cancelling; every decision is failover's.

Must not: be used from several event loops; make one client for each.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self, Unpack

import grpc.aio

from fieldmesh.client import calls, records
from fieldmesh.client.calls import Options, TargetOptions, Turns
from fieldmesh.client.failover import AddressBook, Attempts, Persistence
from fieldmesh.client.records import Embedded, Mesh, NodeLoad, Offer, Reply, Result, Tokens, Traced
from fieldmesh.core.errors import Cancelled, FieldmeshError
from fieldmesh.core.model import Address, Ask, Chunk
from fieldmesh.core.tracing import TraceContext
from fieldmesh.rpc.tracing import metadata_of
from fieldmesh.v1 import inference_pb2 as pb
from fieldmesh.v1 import mesh_pb2, trace_pb2
from fieldmesh.v1.inference_pb2_grpc import InferenceServiceStub
from fieldmesh.v1.mesh_pb2_grpc import MeshServiceStub
from fieldmesh.v1.trace_pb2_grpc import TraceServiceStub


@dataclass(slots=True)
class _Link:
    """A channel to one node. ``waiting`` holds calls that have heard nothing yet, ``silent`` those given
    up.
    """

    channel: grpc.aio.Channel
    heard_at: float
    calls: int = 0
    waiting: set[Any] = field(default_factory=set)
    silent: set[Any] = field(default_factory=set)
    probe: asyncio.Task[None] | None = None

    def heard(self, call: object) -> None:
        """The node has said something."""
        self.heard_at = time.monotonic()
        self.waiting.discard(call)


class AsyncClient:
    """Asks a mesh, through any of its nodes, from one event loop.

    ``seeds``: client listeners (``"host:port"``, port 7420 if left out), asked in this order; the others of
    the mesh are learned from the first that answers. Without seeds, nodes of ``mesh`` are looked for by
    multicast DNS at the first call. ``timeout_s`` bounds calls that bring no timeout of their own; None
    leaves it to the node's default. ``persistence`` says how long a failing call goes on.

    The loss of the node that was asked is survived: before the first token another node is asked with the
    same request id, after it ``StreamLost`` is raised with ``metadata["tokens_delivered"]``. Everything
    raised is a ``fieldmesh.core.errors.FieldmeshError``, with ``code``, ``retryable`` and
    ``retry_after_s``.

    >>> async with AsyncClient("127.0.0.1:7420") as client:
    ...     stream = client.chat("Write a haiku about antennas", domain="poetry", max_tokens=64)
    ...     async for chunk in stream:
    ...         print(chunk.text, end="")
    ...     print((await stream.result()).served_by)
    """

    def __init__(
        self,
        seeds: str | Address | Iterable[str | Address] = (),
        *,
        mesh: str = "fieldmesh",
        timeout_s: float | None = None,
        persistence: Persistence | None = None,
    ) -> None:
        self._book = AddressBook(calls.seeds(seeds))
        self._mesh = mesh
        self._timeout_s = timeout_s
        self._persistence = persistence or Persistence()
        self._links: dict[Address, _Link] = {}
        self._refresh: asyncio.Task[None] | None = None
        self._closed = False

    # --- generations -----------------------------------------------------------------

    def chat(self, turns: Turns, **options: Unpack[Options]) -> AsyncStream:
        """Continue a conversation: a question, or its turns so far. Begins when the stream is read."""
        return self._stream(calls.ask(calls.prompt_of_turns(turns, options), options), options)

    def generate(self, prompt: str | Sequence[int], **options: Unpack[Options]) -> AsyncStream:
        """Continue text as it stands, or token ids (name their ``model`` or ``profile``)."""
        return self._stream(calls.ask(calls.prompt_of_text(prompt), options), options)

    async def abort(self, request_id: str, *, timeout_s: float | None = calls.UNARY_TIMEOUT_S) -> bool:
        """End a running generation, wherever in the mesh it runs; whether one was found."""
        request = pb.AbortRequest(request_id=request_id)
        answer: pb.AbortResponse = await self._unary(InferenceServiceStub, "Abort", request, timeout_s)
        return answer.aborted

    # --- the mesh --------------------------------------------------------------------

    async def tokenize(
        self,
        turns: Turns,
        *,
        timeout_s: float | None = calls.UNARY_TIMEOUT_S,
        **options: Unpack[TargetOptions],
    ) -> Tokens:
        """Token ids of plain text (a string) or of a conversation passed through the chat template."""
        request = calls.tokenize_request(turns, options)
        answer: pb.TokenizeResponse = await self._unary(InferenceServiceStub, "Tokenize", request, timeout_s)
        return Tokens(token_ids=tuple(answer.token_ids), model=answer.model)

    async def embed(
        self,
        texts: str | Sequence[str],
        *,
        timeout_s: float | None = None,
        **options: Unpack[TargetOptions],
    ) -> Embedded:
        """Vectors of 1 to 128 texts."""
        request = calls.embed_request(texts, options)
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        answer: pb.EmbedResponse = await self._unary(
            InferenceServiceStub, "Embed", request, timeout_s, slow=True
        )
        return records.embedded_from_proto(answer)

    async def models(self, *, timeout_s: float | None = calls.UNARY_TIMEOUT_S) -> tuple[Offer, ...]:
        """What the mesh offers: one entry for each profile of each node."""
        answer: pb.ListModelsResponse = await self._unary(
            InferenceServiceStub, "ListModels", pb.ListModelsRequest(), timeout_s
        )
        return tuple(records.offer_from_proto(entry) for entry in answer.models)

    async def loads(self, *, timeout_s: float | None = calls.UNARY_TIMEOUT_S) -> tuple[NodeLoad, ...]:
        """How busy each node says it is."""
        answer: pb.GetLoadsResponse = await self._unary(
            InferenceServiceStub, "GetLoads", pb.GetLoadsRequest(), timeout_s
        )
        return tuple(records.load_from_proto(entry) for entry in answer.loads)

    async def nodes(self, *, timeout_s: float | None = calls.UNARY_TIMEOUT_S) -> Mesh:
        """Every node of the mesh, as the node that is asked sees it."""
        answer: mesh_pb2.ListNodesResponse = await self._unary(
            MeshServiceStub, "ListNodes", mesh_pb2.ListNodesRequest(), timeout_s
        )
        return records.mesh_from_proto(answer)

    async def trace(self, name: str, *, timeout_s: float | None = calls.UNARY_TIMEOUT_S) -> Traced:
        """What the nodes keep of a trace; ``name`` is its id (8 digits do) or a request's. Raises
        TraceNotFound."""
        request = trace_pb2.GetTraceRequest(id=name)
        answer: trace_pb2.GetTraceResponse = await self._unary(
            TraceServiceStub, "GetTrace", request, timeout_s
        )
        return records.traced_from_proto(answer)

    # --- life ------------------------------------------------------------------------

    async def close(self) -> None:
        """Close all channels; streams that still run end with Cancelled."""
        self._closed = True
        links, self._links = self._links, {}
        beside = [
            task for task in (self._refresh, *(link.probe for link in links.values())) if task is not None
        ]
        for task in beside:
            task.cancel()
        await asyncio.gather(*beside, return_exceptions=True)
        for link in links.values():
            await link.channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # --- calls -----------------------------------------------------------------------

    def _stream(self, asked: Ask, options: Options) -> AsyncStream:
        trace = calls.trace_context(options)
        return AsyncStream(self, asked, options.get("timeout_s", self._timeout_s), trace)

    async def _begin(self, timeout_s: float | None) -> Attempts:
        deadline = calls.deadline(timeout_s, time.monotonic())
        if self._closed:
            raise Cancelled("This client is closed.")
        if len(self._book) == 0:
            # Here because zeroconf takes a while to import, and most clients are told their seeds.
            from fieldmesh.client.discovery import browse_async

            found = await browse_async(self._mesh, calls.DISCOVERY_TIMEOUT_S)
            self._book = AddressBook(address for node in found for address in node)
        return Attempts(self._book, self._persistence, deadline)

    async def _unary(
        self, stub: type[Any], method: str, request: object, timeout_s: float | None, *, slow: bool = False
    ) -> Any:
        """One short call; ``slow`` ones compute something and may take all the time there is."""
        attempts = await self._begin(timeout_s)
        while True:
            address = attempts.next_address(time.monotonic())
            left_s = attempts.time_left_s(time.monotonic())
            try:
                with self._link(address) as link:
                    answer = await getattr(stub(link.channel), method)(
                        request, timeout=left_s if slow else calls.unary_timeout_s(left_s)
                    )
                self._book.answered(address)
                return answer
            except grpc.aio.AioRpcError as failure:
                error = calls.translated(failure, address)
                error = error if slow else calls.unary_error(error, address, left_s)
            await asyncio.sleep(
                attempts.failed(
                    address, error, time.monotonic(), tokens_delivered=None, jitter=random.random()
                )
            )

    @contextmanager
    def _link(self, address: Address) -> Iterator[_Link]:
        """The link to ``address``, kept for later calls; of too many, the longest unused goes."""
        link = self._links.pop(address, None)
        if link is None:
            channel = grpc.aio.insecure_channel(str(address), options=calls.CHANNEL_OPTIONS)
            link = _Link(channel, heard_at=time.monotonic())  # connecting is bounded, and hears something
        self._links[address] = link
        link.calls += 1
        try:
            self._refresh_through(address, link.channel)
            yield link
        except grpc.aio.UsageError:  # what grpc raises for a call on a channel that was closed meanwhile
            if self._closed:
                raise Cancelled("This client is closed.") from None
            raise
        finally:
            link.calls -= 1

    def _refresh_through(self, address: Address, channel: grpc.aio.Channel) -> None:
        if self._book.refresh_begins(time.monotonic()):
            self._refresh = asyncio.create_task(self._learn(address, channel))

    async def _learn(self, address: Address, channel: grpc.aio.Channel) -> None:
        mesh: Mesh | None = None
        try:
            mesh = records.mesh_from_proto(
                await MeshServiceStub(channel).ListNodes(
                    mesh_pb2.ListNodesRequest(), timeout=calls.REFRESH_TIMEOUT_S
                )
            )
        except grpc.aio.AioRpcError:
            pass  # the call that goes the same way tells of it
        finally:
            self._book.refresh_ends(address, mesh, time.monotonic())
            await self._drop_unused()

    def _probe(self, link: _Link) -> None:
        """See that the node still says something at all, if it has not for a while."""
        if link.probe is None and time.monotonic() - link.heard_at > calls.SILENCE_S:
            link.probe = asyncio.create_task(self._listen(link))

    async def _listen(self, link: _Link) -> None:
        try:
            check: Any = link.channel.unary_unary(calls.HEALTH_METHOD)
            await check(b"", timeout=calls.PROBE_TIMEOUT_S)
            link.heard_at = time.monotonic()
        except grpc.aio.AioRpcError as failure:
            if failure.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                link.silent |= link.waiting
                for call in link.waiting:
                    call.cancel()
        finally:
            link.probe = None

    async def _drop_unused(self) -> None:
        surplus = len(self._links) - calls.CHANNELS_MAX
        unused = [address for address, link in self._links.items() if link.calls == 0]
        for address in unused[: max(0, surplus)]:
            await self._links.pop(address).channel.close()


class AsyncStream:
    """One answer as it comes: iterate for chunks, or await ``result`` for all of it.

    Iterating yields ``fieldmesh.core.model.Chunk`` records (``text``, ``token_ids``,
    ``first_token_index``). The call begins with the first read, can be read once, and is cancelled (the
    mesh stops within a step) by ``close``, by leaving ``async with stream``, or by cancelling the task that
    reads.
    """

    def __init__(self, client: AsyncClient, asked: Ask, timeout_s: float | None, trace: TraceContext) -> None:
        self.request_id: str = asked.request_id
        self.trace_id: str = trace.trace_id
        self._metadata = metadata_of(trace)
        self._reply = Reply(trace.trace_id)
        self._chunks = self._read(client, asked, timeout_s)

    @property
    def text(self) -> str:
        """The text that has arrived so far, of the first completion."""
        return self._reply.text

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        return await anext(self._chunks)

    async def result(self) -> Result:
        """Read what is left and return how it ended. Raises what ended it otherwise."""
        async for _ in self:
            pass
        if self._reply.result is None:
            raise Cancelled("The stream was closed before its end.", metadata=self._delivered())
        return self._reply.result

    async def close(self) -> None:
        """Cancel what still runs; nothing more is read."""
        await self._chunks.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _delivered(self) -> dict[str, str]:
        return {"tokens_delivered": str(self._reply.tokens)}

    async def _read(self, client: AsyncClient, asked: Ask, timeout_s: float | None) -> AsyncGenerator[Chunk]:
        request, reply = calls.request(asked), self._reply
        attempts = await client._begin(timeout_s)
        while True:
            address = attempts.next_address(time.monotonic())
            left_s = attempts.time_left_s(time.monotonic())
            error: FieldmeshError = calls.cut_short(address)
            with client._link(address) as link:
                call = getattr(InferenceServiceStub(link.channel), calls.method(request))(
                    request, timeout=left_s, metadata=self._metadata
                )
                link.waiting.add(call)
                client._probe(link)
                try:
                    async for message in call:
                        link.heard(call)
                        client._book.answered(address)
                        chunk = reply.take(message)
                        if chunk is not None:
                            yield chunk
                except grpc.aio.AioRpcError as failure:
                    error = calls.translated(failure, address)
                except asyncio.CancelledError:
                    task = asyncio.current_task()
                    if task and task.cancelling():
                        raise
                    if client._closed:
                        raise Cancelled("The client was closed.", metadata=self._delivered()) from None
                    if call not in link.silent:
                        raise
                    error = calls.silent(address)
                finally:
                    link.waiting.discard(call)
                    link.silent.discard(call)
                    call.cancel()
            if reply.result is not None:
                return
            tokens_delivered = reply.tokens if reply.begun else None
            now, jitter = time.monotonic(), random.random()
            await asyncio.sleep(
                attempts.failed(address, error, now, tokens_delivered=tokens_delivered, jitter=jitter)
            )
