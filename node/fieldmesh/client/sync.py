"""The client for threads. Owns: channels, waiting, and cancelling; every decision is failover's.

A client may be used by many threads at once; a stream belongs to the thread that reads it, but any thread may
close it. Must not: be used across a fork (grpc does not survive one); make the client after it.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self, Unpack

import grpc

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

    channel: grpc.Channel
    heard_at: float
    calls: int = 0
    waiting: set[Any] = field(default_factory=set)
    silent: set[Any] = field(default_factory=set)
    probing: bool = False


class Client:
    """Asks a mesh, through any of its nodes, from any number of threads.

    ``seeds``: client listeners (``"host:port"``, port 7420 if left out), asked in this order; the others of
    the mesh are learned from the first that answers. Without seeds, nodes of ``mesh`` are looked for by
    multicast DNS at the first call. ``timeout_s`` bounds calls that bring no timeout of their own; None
    leaves it to the node's default. ``persistence`` says how long a failing call goes on.

    The loss of the node that was asked is survived: before the first token another node is asked with the
    same request id, after it ``StreamLost`` is raised with ``metadata["tokens_delivered"]``. Everything
    raised is a ``fieldmesh.core.errors.FieldmeshError``, with ``code``, ``retryable`` and
    ``retry_after_s``.

    >>> with Client(["127.0.0.1:7420", "127.0.0.1:7422"]) as client:
    ...     with client.chat("Write a function that adds two numbers", domain="code") as stream:
    ...         for chunk in stream:
    ...             print(chunk.text, end="")
    ...     print(stream.result().served_by)
    """

    def __init__(
        self,
        seeds: str | Address | Iterable[str | Address] = (),
        *,
        mesh: str = "fieldmesh",
        timeout_s: float | None = None,
        persistence: Persistence | None = None,
    ) -> None:
        self._lock = threading.RLock()  # guards the book and the links; never held while waiting
        self._book = AddressBook(calls.seeds(seeds))
        self._mesh = mesh
        self._timeout_s = timeout_s
        self._persistence = persistence or Persistence()
        self._links: dict[Address, _Link] = {}
        self._closed = threading.Event()

    # --- generations -----------------------------------------------------------------

    def chat(self, turns: Turns, **options: Unpack[Options]) -> Stream:
        """Continue a conversation: a question, or its turns so far. Begins when the stream is read."""
        return self._stream(calls.ask(calls.prompt_of_turns(turns, options), options), options)

    def generate(self, prompt: str | Sequence[int], **options: Unpack[Options]) -> Stream:
        """Continue text as it stands, or token ids (name their ``model`` or ``profile``)."""
        return self._stream(calls.ask(calls.prompt_of_text(prompt), options), options)

    def abort(self, request_id: str, *, timeout_s: float | None = calls.UNARY_TIMEOUT_S) -> bool:
        """End a running generation, wherever in the mesh it runs; whether one was found."""
        request = pb.AbortRequest(request_id=request_id)
        answer: pb.AbortResponse = self._unary(InferenceServiceStub, "Abort", request, timeout_s)
        return answer.aborted

    # --- the mesh --------------------------------------------------------------------

    def tokenize(
        self,
        turns: Turns,
        *,
        timeout_s: float | None = calls.UNARY_TIMEOUT_S,
        **options: Unpack[TargetOptions],
    ) -> Tokens:
        """Token ids of plain text (a string) or of a conversation passed through the chat template."""
        request = calls.tokenize_request(turns, options)
        answer: pb.TokenizeResponse = self._unary(InferenceServiceStub, "Tokenize", request, timeout_s)
        return Tokens(token_ids=tuple(answer.token_ids), model=answer.model)

    def embed(
        self,
        texts: str | Sequence[str],
        *,
        timeout_s: float | None = None,
        **options: Unpack[TargetOptions],
    ) -> Embedded:
        """Vectors of 1 to 128 texts."""
        request = calls.embed_request(texts, options)
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        answer: pb.EmbedResponse = self._unary(InferenceServiceStub, "Embed", request, timeout_s, slow=True)
        return records.embedded_from_proto(answer)

    def models(self, *, timeout_s: float | None = calls.UNARY_TIMEOUT_S) -> tuple[Offer, ...]:
        """What the mesh offers: one entry for each profile of each node."""
        request = pb.ListModelsRequest()
        answer: pb.ListModelsResponse = self._unary(InferenceServiceStub, "ListModels", request, timeout_s)
        return tuple(records.offer_from_proto(entry) for entry in answer.models)

    def loads(self, *, timeout_s: float | None = calls.UNARY_TIMEOUT_S) -> tuple[NodeLoad, ...]:
        """How busy each node says it is."""
        request = pb.GetLoadsRequest()
        answer: pb.GetLoadsResponse = self._unary(InferenceServiceStub, "GetLoads", request, timeout_s)
        return tuple(records.load_from_proto(entry) for entry in answer.loads)

    def nodes(self, *, timeout_s: float | None = calls.UNARY_TIMEOUT_S) -> Mesh:
        """Every node of the mesh, as the node that is asked sees it."""
        request = mesh_pb2.ListNodesRequest()
        answer: mesh_pb2.ListNodesResponse = self._unary(MeshServiceStub, "ListNodes", request, timeout_s)
        return records.mesh_from_proto(answer)

    def trace(self, name: str, *, timeout_s: float | None = calls.UNARY_TIMEOUT_S) -> Traced:
        """What the nodes keep of a trace; ``name`` is its id (8 digits do) or a request's. Raises
        TraceNotFound."""
        request = trace_pb2.GetTraceRequest(id=name)
        answer: trace_pb2.GetTraceResponse = self._unary(TraceServiceStub, "GetTrace", request, timeout_s)
        return records.traced_from_proto(answer)

    # --- life ------------------------------------------------------------------------

    def close(self) -> None:
        """Close all channels; streams that still run end with Cancelled."""
        self._closed.set()
        with self._lock:
            links, self._links = self._links, {}
        for link in links.values():
            link.channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- calls -----------------------------------------------------------------------

    def _stream(self, asked: Ask, options: Options) -> Stream:
        trace = calls.trace_context(options)
        return Stream(self, asked, options.get("timeout_s", self._timeout_s), trace)

    def _begin(self, timeout_s: float | None) -> Attempts:
        deadline = calls.deadline(timeout_s, time.monotonic())
        if len(self._book) == 0:
            # Here because zeroconf takes a while to import, and most clients are told their seeds.
            from fieldmesh.client.discovery import browse

            # In a thread of its own, because this one may be running an event loop (a notebook does).
            with ThreadPoolExecutor(1) as pool:
                found = pool.submit(browse, self._mesh, calls.DISCOVERY_TIMEOUT_S).result()
            with self._lock:
                if len(self._book) == 0:
                    self._book = AddressBook(address for node in found for address in node)
        return Attempts(self._book, self._persistence, deadline)

    def _next(self, attempts: Attempts) -> tuple[Address, float | None]:
        """The node to ask and the time left for it."""
        if self._closed.is_set():
            raise Cancelled("This client is closed.")
        with self._lock:
            return attempts.next_address(time.monotonic()), attempts.time_left_s(time.monotonic())

    def _failed(
        self, attempts: Attempts, address: Address, error: FieldmeshError, tokens_delivered: int | None = None
    ) -> None:
        """Wait until the next attempt is due; raises when there is none."""
        with self._lock:
            now, jitter = time.monotonic(), random.random()
            wait_s = attempts.failed(address, error, now, tokens_delivered=tokens_delivered, jitter=jitter)
        if wait_s > 0:
            self._closed.wait(wait_s)

    def _answered(self, address: Address) -> None:
        with self._lock:
            self._book.answered(address)

    def _unary(
        self, stub: type[Any], method: str, request: object, timeout_s: float | None, *, slow: bool = False
    ) -> Any:
        """One short call; ``slow`` ones compute something and may take all the time there is."""
        attempts = self._begin(timeout_s)
        while True:
            address, left_s = self._next(attempts)
            try:
                with self._link(address) as link:
                    answer = getattr(stub(link.channel), method)(
                        request, timeout=left_s if slow else calls.unary_timeout_s(left_s)
                    )
                self._answered(address)
                return answer
            except grpc.RpcError as failure:
                error = calls.translated(failure, address)
                error = error if slow else calls.unary_error(error, address, left_s)
            self._failed(attempts, address, error)

    @contextmanager
    def _link(self, address: Address) -> Iterator[_Link]:
        """The link to ``address``, kept for later calls; of too many, the longest unused goes."""
        dropped: list[_Link] = []
        with self._lock:
            link = self._links.pop(address, None)
            if link is None:
                channel = grpc.insecure_channel(str(address), options=calls.CHANNEL_OPTIONS)
                link = _Link(channel, heard_at=time.monotonic())  # connecting is bounded, and hears something
                unused = [other for other, held in self._links.items() if held.calls == 0]
                surplus = max(0, len(self._links) + 1 - calls.CHANNELS_MAX)
                dropped = [self._links.pop(other) for other in unused[:surplus]]
            self._links[address] = link
            link.calls += 1
            refresh = self._book.refresh_begins(time.monotonic())
        for other in dropped:
            other.channel.close()
        try:
            if refresh:
                self._refresh_through(address, link.channel)
            yield link
        except ValueError:  # what grpc raises for a call on a channel that another thread closed
            if self._closed.is_set():
                raise Cancelled("This client is closed.") from None
            raise
        finally:
            with self._lock:
                link.calls -= 1

    def _refresh_through(self, address: Address, channel: grpc.Channel) -> None:
        """Ask for the other nodes, beside the call that goes the same way."""

        def done(call: Any) -> None:
            # A future that failed or was cancelled raises; the call that goes the same way tells of it.
            succeeded = not call.cancelled() and call.exception() is None
            mesh = records.mesh_from_proto(call.result()) if succeeded else None
            with self._lock:
                self._book.refresh_ends(address, mesh, time.monotonic())

        request = mesh_pb2.ListNodesRequest()
        pending: Any = MeshServiceStub(channel).ListNodes.future(request, timeout=calls.REFRESH_TIMEOUT_S)
        pending.add_done_callback(done)

    def _waits(self, link: _Link, call: Any) -> None:
        """``call`` begins to wait; see that the node still says something at all, if it has not for a
        while.
        """

        def done(check: Any) -> None:
            with self._lock:
                link.probing = False
                if check.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
                    link.heard_at = time.monotonic()
                    return
                given_up = list(link.waiting)
                link.silent.update(given_up)
            for waiting in given_up:
                waiting.cancel()

        with self._lock:
            link.waiting.add(call)
            if link.probing or time.monotonic() - link.heard_at <= calls.SILENCE_S:
                return
            link.probing = True
        health: Any = link.channel.unary_unary(calls.HEALTH_METHOD)
        health.future(b"", timeout=calls.PROBE_TIMEOUT_S).add_done_callback(done)

    def _heard(self, link: _Link, call: Any, address: Address) -> None:
        with self._lock:
            link.heard_at = time.monotonic()
            link.waiting.discard(call)
            self._book.answered(address)

    def _forget(self, link: _Link, call: Any) -> None:
        with self._lock:
            link.waiting.discard(call)
            link.silent.discard(call)


class Stream:
    """One answer as it comes: iterate for chunks, or call ``result`` for all of it.

    Iterating yields ``fieldmesh.core.model.Chunk`` records (``text``, ``token_ids``,
    ``first_token_index``). The call begins with the first read, can be read once, and is cancelled (the
    mesh stops within a step) by ``close`` or by leaving ``with stream``.
    """

    def __init__(self, client: Client, asked: Ask, timeout_s: float | None, trace: TraceContext) -> None:
        self.request_id: str = asked.request_id
        self.trace_id: str = trace.trace_id
        self._metadata = metadata_of(trace)
        self._client = client
        self._reply = Reply(trace.trace_id)
        self._call: Any = None
        self._closed = threading.Event()
        self._chunks = self._read(asked, timeout_s)

    @property
    def text(self) -> str:
        """The text that has arrived so far, of the first completion."""
        return self._reply.text

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Chunk:
        return next(self._chunks)

    def result(self) -> Result:
        """Read what is left and return how it ended. Raises what ended it otherwise."""
        for _ in self:
            pass
        if self._reply.result is None:
            raise self._cancelled()
        return self._reply.result

    def close(self) -> None:
        """Cancel what still runs; a thread that reads meets Cancelled."""
        self._closed.set()
        if self._call is not None:
            self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        self._chunks.close()

    def _cancelled(self) -> Cancelled:
        return Cancelled(
            "The stream was closed before its end.",
            metadata={"tokens_delivered": str(self._reply.tokens)},
        )

    def _read(self, asked: Ask, timeout_s: float | None) -> Generator[Chunk]:
        client, reply, request = self._client, self._reply, calls.request(asked)
        attempts = client._begin(timeout_s)
        while True:
            if self._closed.is_set():
                raise self._cancelled()
            address, left_s = client._next(attempts)
            error: FieldmeshError = calls.cut_short(address)
            with client._link(address) as link:
                self._call = getattr(InferenceServiceStub(link.channel), calls.method(request))(
                    request, timeout=left_s, metadata=self._metadata
                )
                if self._closed.is_set():  # by another thread, before there was a call to cancel
                    self._call.cancel()
                call = self._call
                client._waits(link, call)
                try:
                    for message in call:
                        client._heard(link, call, address)
                        chunk = reply.take(message)
                        if chunk is not None:
                            yield chunk
                except grpc.RpcError as failure:
                    silent = call in link.silent
                    error = calls.silent(address) if silent else calls.translated(failure, address)
                finally:
                    client._forget(link, call)
                    call.cancel()
            if reply.result is not None:
                return
            client._failed(attempts, address, error, reply.tokens if reply.begun else None)
