"""OpenAI's Responses API at this node: answers that are kept for a while, to be gone on from.

Owns: the routes, and what is kept, in memory and at this node alone. Must not: decide anything, or know the
shapes of bodies (``rpc.responses`` and ``rpc.responses_answers`` do).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from starlette.routing import Route

from fieldmesh.core.errors import PreviousResponseNotFound
from fieldmesh.core.model import Message
from fieldmesh.core.shelf import Shelf
from fieldmesh.rpc import responses
from fieldmesh.rpc.inference import RequestLimits
from fieldmesh.rpc.openai_answers import encode, error_event
from fieldmesh.rpc.responses_answers import Response, error_document
from fieldmesh.runtime.door import Calls
from fieldmesh.runtime.http_answers import Api, answer
from fieldmesh.runtime.http_door import Exchange, Handler, Refusal
from fieldmesh.runtime.service import Service

KEPT_MAX = 1024
KEPT_BYTES_MAX = 32 << 20
KEPT_S = 6 * 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptResponse:
    """A response, and the conversation up to and with it."""

    document: bytes
    turns: tuple[Message, ...]


class Responses(Api):
    """The routes of the Responses API over one service."""

    def __init__(
        self, service: Service, limits: Callable[[], RequestLimits], *, calls: Calls, body_bytes_max: int
    ) -> None:
        super().__init__(service, limits, calls=calls, body_bytes_max=body_bytes_max)
        self._kept: Shelf[KeptResponse] = Shelf(
            count_max=KEPT_MAX, bytes_max=KEPT_BYTES_MAX, age_max_s=KEPT_S
        )

    def routes(self) -> list[Route]:
        """Every route."""
        return [
            self._route("/v1/responses", self._create, ("POST",)),
            self._route("/v1/responses/{id}", self._one, ("GET", "HEAD", "DELETE")),
        ]

    def _route(self, path: str, handler: Handler, methods: Sequence[str]) -> Route:
        return Route(path, self._endpoint(path, handler, methods, error_document, error_event))

    async def _create(self, exchange: Exchange) -> None:
        wanted = responses.response_wanted(
            exchange.body,
            exchange.request_id,
            self._resolve,
            self._limits(),
            exchange.caller,
            self._earlier,
        )

        def telling(model: str) -> Response:
            response = Response(
                answer_id=exchange.request_id,
                model=model,
                created=int(time.time()),
                told=wanted.told,
                on_end=lambda made: self._keep(made, wanted),
            )
            exchange.failing = response.failed
            return response

        await answer(self._service, exchange, wanted, telling)

    def _keep(self, made: Response, wanted: responses.ResponseWanted) -> None:
        if wanted.store:
            turns = (*wanted.turns, made.turn())
            kept = KeptResponse(document=encode(made.state()), turns=turns)
            size_bytes = len(kept.document) + responses.size_bytes(turns)
            self._kept.put(made.id, kept, size_bytes, time.monotonic())

    def _earlier(self, response_id: str) -> tuple[Message, ...]:
        kept = self._kept.get(response_id, time.monotonic())
        if kept is None:
            raise PreviousResponseNotFound(
                f"Previous response with id '{response_id[:128]}' not found.{WHERE_KEPT}",
                field="previous_response_id",
            )
        return kept.turns

    async def _one(self, exchange: Exchange) -> None:
        response_id, now = exchange.parameters["id"], time.monotonic()
        kept = self._kept.get(response_id, now)
        if kept is None:
            raise Refusal(
                404, "response_not_found", f"Response with id '{response_id[:128]}' not found.{WHERE_KEPT}"
            )
        if exchange.method == "DELETE":
            self._kept.drop(response_id, now)
            await exchange.reply(encode({"id": response_id, "object": "response", "deleted": True}))
        else:
            await exchange.reply(kept.document)


WHERE_KEPT = f" The node that made it keeps it, for {KEPT_S / 3600:g} hours at most and never over a restart."
