"""Ollama's API at this node, for the programs that know no other.

Owns: the routes, and which call of the service each one is. Must not: decide anything, or know the shapes of
bodies (``rpc.ollama`` does).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial

from starlette.routing import Route

from fieldmesh import __version__
from fieldmesh.core.errors import ModelNotFound
from fieldmesh.core.model import Embeddings, ProfileOffer
from fieldmesh.core.routing import Candidate
from fieldmesh.rpc import inference as wire
from fieldmesh.rpc import ollama, openai
from fieldmesh.rpc.inference import RequestLimits
from fieldmesh.rpc.openai_answers import encode
from fieldmesh.rpc.tracing import context_from
from fieldmesh.runtime.door import Calls
from fieldmesh.runtime.http_answers import Api, answer, served_by
from fieldmesh.runtime.http_door import Exchange, Handler
from fieldmesh.runtime.service import Service
from fieldmesh.v1 import inference_pb2


class Ollama(Api):
    """The routes of Ollama's API over one service."""

    def __init__(
        self, service: Service, limits: Callable[[], RequestLimits], *, calls: Calls, body_bytes_max: int
    ) -> None:
        super().__init__(service, limits, calls=calls, body_bytes_max=body_bytes_max)
        self._since = time.time()

    def routes(self) -> list[Route]:
        """Every route."""
        return [
            self._route("POST", "/api/chat", self._chat),
            self._route("POST", "/api/generate", self._generate),
            self._route("POST", "/api/embed", self._embed),
            self._route("POST", "/api/embeddings", self._embed_one),
            self._route("POST", "/api/show", self._show),
            self._route("GET", "/api/tags", self._list),
            self._route("GET", "/api/ps", self._list_loaded),
            self._route("GET", "/api/version", self._version),
        ]

    def _route(self, method: str, path: str, handler: Handler) -> Route:
        methods = ("GET", "HEAD") if method == "GET" else (method,)
        return Route(path, self._endpoint(path, handler, methods, ollama.error_line, ollama.error_line))

    async def _chat(self, exchange: Exchange) -> None:
        if not await self._loaded(exchange, chat=True):
            wanted = ollama.chat_wanted(
                exchange.body, exchange.request_id, self._resolve, self._limits(), exchange.caller
            )
            await self._answer(exchange, wanted, chat=True)

    async def _generate(self, exchange: Exchange) -> None:
        if not await self._loaded(exchange, chat=False):
            wanted = ollama.generate_wanted(
                exchange.body, exchange.request_id, self._resolve, self._limits(), exchange.caller
            )
            await self._answer(exchange, wanted, chat=False)

    async def _loaded(self, exchange: Exchange, *, chat: bool) -> bool:
        """Answer who only wants a model to be loaded: the mesh does that when it is asked something."""
        name = ollama.loads_only(exchange.body)
        if name is None:
            return False
        self._known(name)
        await exchange.reply(ollama.loaded_document(name, chat=chat, created=time.time()))
        return True

    async def _answer(self, exchange: Exchange, wanted: openai.Wanted, *, chat: bool) -> None:
        lines = partial(ollama.Lines, chat=chat, created=time.time())
        await answer(self._service, exchange, wanted, lambda model: lines(model=model))

    async def _embed(self, exchange: Exchange) -> None:
        began = time.monotonic()
        made, by = await self._vectors(exchange, ollama.embed_request(exchange.body, self._resolve))
        body = ollama.embeddings_document(made, by.offer.model, time.monotonic() - began)
        await exchange.reply(body, headers=served_by(by.member.name, by.offer.name, 1))

    async def _embed_one(self, exchange: Exchange) -> None:
        """What ``/api/embed`` has replaced, and older clients still ask."""
        made, by = await self._vectors(exchange, ollama.embed_one_request(exchange.body, self._resolve))
        body = encode({"embedding": made.vectors[0]})
        await exchange.reply(body, headers=served_by(by.member.name, by.offer.name, 1))

    async def _vectors(
        self, exchange: Exchange, request: inference_pb2.EmbedRequest
    ) -> tuple[Embeddings, Candidate]:
        texts = wire.texts_from_embed(request, self._limits())
        target = wire.target_from_proto(request.target)
        trace = context_from(exchange.headers.items())
        return await self._service.embed(texts, target, deadline_s=None, trace=trace)

    async def _list(self, exchange: Exchange) -> None:
        await self._reply_with(exchange, ollama.offers_by_name(self._service.view))

    async def _list_loaded(self, exchange: Exchange) -> None:
        await self._reply_with(exchange, ollama.loaded_by_name(self._service.view))

    async def _reply_with(self, exchange: Exchange, offers: Mapping[str, ProfileOffer | None]) -> None:
        models = [ollama.model_entry(name, offer, self._since) for name, offer in offers.items()]
        await exchange.reply(encode({"models": models}))

    async def _show(self, exchange: Exchange) -> None:
        body = openai.parsed(exchange.body, ollama.Show)
        offer = self._known(ollama.plain(body.model or body.name))
        await exchange.reply(ollama.show_document(offer, self._since))

    def _known(self, name: str) -> ProfileOffer | None:
        """What ``name`` is; see ``ollama.offers_by_name``. Raises ModelNotFound."""
        offers = ollama.offers_by_name(self._service.view)
        if name not in offers:
            raise ModelNotFound(
                f"No node offers {name[:128]!r}; there are {', '.join(offers)}", field="target.model"
            )
        return offers[name]

    async def _version(self, exchange: Exchange) -> None:
        await exchange.reply(encode({"version": ollama.SPOKEN_VERSION, "fieldmesh": __version__}))
