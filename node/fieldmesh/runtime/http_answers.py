"""Answering over HTTP, whatever the API: ask the service, say who serves, pass on what comes.

Owns: that nothing is sent before the first token, so that until then an error has a status of its own. Must
not: know the shape of a body.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Protocol

from fieldmesh.core.model import Chunk, RequestId, Result, Target
from fieldmesh.rpc import openai
from fieldmesh.rpc.inference import RequestLimits
from fieldmesh.rpc.openai import Wanted
from fieldmesh.rpc.tracing import context_from
from fieldmesh.runtime.door import Calls
from fieldmesh.runtime.http_door import TRACE_HEADER, Endpoint, Exchange, Handler, Told
from fieldmesh.runtime.service import Service

EXPLAIN = "x-fieldmesh-explain"
"""The header by which the web page has the reasons of a decision kept, to be asked for afterwards."""


class Api:
    """What the routes of an API stand on: one service, the limits of requests, the names of models."""

    def __init__(
        self, service: Service, limits: Callable[[], RequestLimits], *, calls: Calls, body_bytes_max: int
    ) -> None:
        self._service = service
        self._limits = limits
        self._calls = calls
        self._body_bytes_max = body_bytes_max

    def _endpoint(
        self, path: str, handler: Handler, methods: Sequence[str], document: Told, event: Told
    ) -> Endpoint:
        return Endpoint(
            handler,
            name=f"{methods[0]} {path.partition('/{')[0]}",
            methods=methods,
            calls=self._calls,
            body_bytes_max=self._body_bytes_max,
            document=document,
            event=event,
        )

    def _resolve(self, name: str) -> Target:
        return openai.target_of(name, self._service.view)


class Telling(Protocol):
    """How an API tells one answer: as parts, or whole."""

    @property
    def content_type(self) -> str:
        """Of the parts."""
        ...

    def event(self, chunk: Chunk) -> bytes:
        """The part for one chunk; may be empty."""
        ...

    def end(self, result: Result) -> bytes:
        """The last part."""
        ...

    def add(self, chunk: Chunk) -> None:
        """Keep a chunk for ``document``."""
        ...

    def document(self, result: Result) -> bytes:
        """The whole answer."""
        ...


async def answer(
    service: Service, exchange: Exchange, wanted: Wanted, telling: Callable[[str], Telling]
) -> None:
    """Answer one request; ``telling`` is given the name of the model that does. Raises FieldmeshError."""
    ask = replace(wanted.ask, explain=EXPLAIN in exchange.headers)
    trace = context_from(exchange.headers.items())
    async with aclosing(service.ask(ask, trace=trace)) as items:
        first = await anext(items)
        headers, model = _served_by(service, wanted.ask.request_id, first)
        told = telling(model)
        if wanted.stream:
            # Proxies that keep parts back would make a stream of none.
            await exchange.begin(told.content_type, (*headers, ("x-accel-buffering", "no")))
        async for item in _and_rest(first, items):
            if isinstance(item, Chunk):
                if wanted.stream:
                    await exchange.write(told.event(item))
                else:
                    told.add(item)
            elif wanted.stream:
                await exchange.end(told.end(item))
            else:
                await exchange.reply(told.document(item), headers=headers)


def served_by(node: str, profile: str, attempts: int) -> list[tuple[str, str]]:
    """Headers that say who answers."""
    return [
        ("x-fieldmesh-served-by", node),
        ("x-fieldmesh-profile", profile),
        ("x-fieldmesh-attempts", str(attempts)),
    ]


def _served_by(
    service: Service, request_id: RequestId, first: Chunk | Result
) -> tuple[list[tuple[str, str]], str]:
    trace = [(TRACE_HEADER, trace_id)] if (trace_id := service.trace_id(request_id)) else []
    if isinstance(first, Result):
        told = served_by(first.served_by_name, first.profile, len(first.attempts))
        return [*told, *trace], first.model
    candidate, attempts = service.candidate(request_id)
    told = served_by(candidate.member.name, candidate.offer.name, attempts)
    return [*told, *trace], candidate.offer.model


async def _and_rest(
    first: Chunk | Result, items: AsyncGenerator[Chunk | Result, None]
) -> AsyncGenerator[Chunk | Result, None]:
    yield first
    async for item in items:
        yield item
