"""OpenAI's API at this node: chat and text completions, the list of models, and whether the node serves.

Owns: the routes, and which call of the service each one is. Must not: decide anything, or know the shapes of
bodies (``rpc.openai`` and ``rpc.openai_answers`` do).
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

from starlette.routing import Route

from fieldmesh.core.errors import Draining, ModelNotFound
from fieldmesh.core.model import Chunk, RequestId, Result, Target
from fieldmesh.rpc import openai
from fieldmesh.rpc.inference import RequestLimits
from fieldmesh.rpc.openai_answers import Answer, encode, error_document, error_event
from fieldmesh.runtime.door import Calls
from fieldmesh.runtime.http_door import Endpoint, Exchange, Handler
from fieldmesh.runtime.service import Service

EVENTS = "text/event-stream; charset=utf-8"
OWNER = "fieldmesh"


class OpenAi:
    """The routes of OpenAI's API over one service."""

    def __init__(
        self,
        service: Service,
        limits: Callable[[], RequestLimits],
        *,
        calls: Calls,
        body_bytes_max: int,
    ) -> None:
        self._service = service
        self._limits = limits
        self._calls = calls
        self._body_bytes_max = body_bytes_max
        self._began = int(time.time())

    def routes(self) -> list[Route]:
        """Every route."""
        read = ("GET", "HEAD")
        return [
            self._route("/v1/chat/completions", self._chat, ("POST",)),
            self._route("/v1/completions", self._complete, ("POST",)),
            self._route("/v1/models", self._models, read),
            self._route("/v1/models/{name:path}", self._model, read),
            self._route("/health", self._health, read),
        ]

    def _route(self, path: str, handler: Handler, methods: Sequence[str]) -> Route:
        endpoint = Endpoint(
            handler,
            name=f"{methods[0]} {path.partition('/{')[0]}",
            methods=methods,
            calls=self._calls,
            body_bytes_max=self._body_bytes_max,
            document=error_document,
            event=error_event,
        )
        return Route(path, endpoint)

    async def _chat(self, exchange: Exchange) -> None:
        wanted = openai.chat_wanted(exchange.body, exchange.request_id, self._resolve, self._limits())
        await self._answer(exchange, wanted, chat=True)

    async def _complete(self, exchange: Exchange) -> None:
        wanted = openai.text_wanted(exchange.body, exchange.request_id, self._resolve, self._limits())
        await self._answer(exchange, wanted, chat=False)

    async def _answer(self, exchange: Exchange, wanted: openai.Wanted, *, chat: bool) -> None:
        """Nothing is sent before the first token: until then an error has a status of its own."""
        async with aclosing(self._service.ask(wanted.ask)) as items:
            first = await anext(items)
            headers, model = self._served_by(wanted.ask.request_id, first)
            answer = Answer(
                chat=chat,
                answer_id=f"{'chatcmpl' if chat else 'cmpl'}-{exchange.request_id}",
                model=model,
                created=int(time.time()),
                include_usage=wanted.include_usage,
            )
            if not wanted.stream:
                async for item in _and_rest(first, items):
                    if isinstance(item, Chunk):
                        answer.add(item)
                    else:
                        body = answer.document(item)
                await exchange.reply(body, headers=headers)
                return
            await exchange.begin(EVENTS, (*headers, ("x-accel-buffering", "no")))
            async for item in _and_rest(first, items):
                if isinstance(item, Chunk):
                    await exchange.write(answer.event(item))
                else:
                    await exchange.end(answer.end(item))

    def _served_by(self, request_id: RequestId, first: Chunk | Result) -> tuple[list[tuple[str, str]], str]:
        """Headers that say who answers, and the name of the model that does."""
        if isinstance(first, Result):
            node, profile, model = first.served_by_name, first.profile, first.model
            attempts = len(first.attempts)
        else:
            candidate, attempts = self._service.candidate(request_id)
            node, profile, model = candidate.member.name, candidate.offer.name, candidate.offer.model
        headers = [
            ("x-fieldmesh-served-by", node),
            ("x-fieldmesh-profile", profile),
            ("x-fieldmesh-attempts", str(attempts)),
        ]
        return headers, model

    def _resolve(self, name: str) -> Target:
        return openai.target_of(name, self._service.view)

    async def _models(self, exchange: Exchange) -> None:
        entries = [self._entry(name) for name in openai.model_names(self._service.view)]
        await exchange.reply(encode({"object": "list", "data": entries}))

    async def _model(self, exchange: Exchange) -> None:
        name = exchange.parameters["name"]
        known = openai.model_names(self._service.view)
        if name not in known:
            raise ModelNotFound(
                f"No node offers {name[:128]!r}; there are {', '.join(known)}", field="target.model"
            )
        await exchange.reply(encode(self._entry(name)))

    def _entry(self, name: str) -> dict[str, str | int]:
        return {"id": name, "object": "model", "created": self._began, "owned_by": OWNER}

    async def _health(self, exchange: Exchange) -> None:
        if self._service.draining:
            raise Draining("This node is leaving; ask another one", retry_after_s=0.0)
        await exchange.reply(b'{"status":"ok"}')


async def _and_rest(
    first: Chunk | Result, items: AsyncGenerator[Chunk | Result, None]
) -> AsyncGenerator[Chunk | Result, None]:
    yield first
    async for item in items:
        yield item
