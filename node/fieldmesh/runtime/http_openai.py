"""OpenAI's API at this node: completions, embeddings, the list of models; and whether the node serves.

Owns: the routes, and which call of the service each one is. Must not: decide anything, or know the shapes of
bodies (``rpc.openai`` and ``rpc.openai_answers`` do).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

from starlette.routing import Route

from fieldmesh.core.errors import Draining, ModelNotFound
from fieldmesh.rpc import inference as wire
from fieldmesh.rpc import openai
from fieldmesh.rpc.inference import RequestLimits
from fieldmesh.rpc.openai_answers import Answer, embeddings_document, encode, error_document, error_event
from fieldmesh.rpc.tracing import context_from
from fieldmesh.runtime.door import Calls
from fieldmesh.runtime.http_answers import Api, answer, served_by
from fieldmesh.runtime.http_door import Exchange, Handler
from fieldmesh.runtime.service import Service

OWNER = "fieldmesh"


class OpenAi(Api):
    """The routes of OpenAI's API over one service."""

    def __init__(
        self,
        service: Service,
        limits: Callable[[], RequestLimits],
        *,
        calls: Calls,
        body_bytes_max: int,
    ) -> None:
        super().__init__(service, limits, calls=calls, body_bytes_max=body_bytes_max)
        self._began = int(time.time())

    def routes(self) -> list[Route]:
        """Every route."""
        read = ("GET", "HEAD")
        return [
            self._route("/v1/chat/completions", self._chat, ("POST",)),
            self._route("/v1/completions", self._complete, ("POST",)),
            self._route("/v1/embeddings", self._embed, ("POST",)),
            self._route("/v1/models", self._models, read),
            self._route("/v1/models/{name:path}", self._model, read),
            self._route("/health", self._health, read),
        ]

    def _route(self, path: str, handler: Handler, methods: Sequence[str]) -> Route:
        return Route(path, self._endpoint(path, handler, methods, error_document, error_event))

    async def _chat(self, exchange: Exchange) -> None:
        wanted = openai.chat_wanted(
            exchange.body, exchange.request_id, self._resolve, self._limits(), exchange.caller
        )
        await self._answer(exchange, wanted, chat=True)

    async def _complete(self, exchange: Exchange) -> None:
        wanted = openai.text_wanted(
            exchange.body, exchange.request_id, self._resolve, self._limits(), exchange.caller
        )
        await self._answer(exchange, wanted, chat=False)

    async def _answer(self, exchange: Exchange, wanted: openai.Wanted, *, chat: bool) -> None:
        telling = partial(
            Answer,
            chat=chat,
            answer_id=f"{'chatcmpl' if chat else 'cmpl'}-{exchange.request_id}",
            created=int(time.time()),
            include_usage=wanted.include_usage,
        )
        await answer(self._service, exchange, wanted, lambda model: telling(model=model))

    async def _embed(self, exchange: Exchange) -> None:
        wanted = openai.embed_wanted(exchange.body, self._resolve)
        texts = wire.texts_from_embed(wanted.request, self._limits())
        target = wire.target_from_proto(wanted.request.target)
        trace = context_from(exchange.headers.items())
        made, by = await self._service.embed(texts, target, deadline_s=None, trace=trace)
        body = embeddings_document(made, by.offer.model, base64=wanted.base64)
        await exchange.reply(body, headers=served_by(by.member.name, by.offer.name, 1))

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
