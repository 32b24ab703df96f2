"""The border between our errors and gRPC's: every method that a server offers passes through here.

Owns: translating what a method raises into a coded status with details, and the request id on the log lines
that a call causes. Must not: know any method.
"""

from __future__ import annotations

import functools
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeVar, cast

import grpc

from fieldmesh.core.errors import FieldmeshError, Internal
from fieldmesh.rpc.errors import clipped, error_metadata
from fieldmesh.runtime import log

Context = grpc.aio.ServicerContext[Any, Any]
Request = TypeVar("Request")
Response = TypeVar("Response")
Unary = Callable[[Any, Request, Context], Awaitable[Response]]
Stream = Callable[[Any, Request, Context], AsyncIterator[Response]]

_CODES = {code.value[0]: code for code in grpc.StatusCode}

logger = log.get()


def new_request_id() -> str:
    """An id for a request that came without one."""
    return uuid.uuid4().hex


def _request_id(request: Any) -> str:
    """The request id that a message carries, made and written into it where it may be left out."""
    which = request.WhichOneof("request") if "request" in request.DESCRIPTOR.oneofs_by_name else None
    holder = getattr(request, which) if which else request
    if "request_id" not in holder.DESCRIPTOR.fields_by_name:
        return ""
    if not holder.request_id:
        holder.request_id = new_request_id()
    return str(holder.request_id)[:64]


async def _refuse(context: Context, error: FieldmeshError) -> None:
    logger.info("request_refused", code=error.code, error=error.message, field=error.field)
    await context.abort(_CODES[error.status.value], clipped(error.message), error_metadata(error))


def _defect() -> Internal:
    logger.exception("request_crashed")
    return Internal("A defect of Fieldmesh ended this request; the node's log has the details")


def guarded(method: Unary[Request, Response]) -> Unary[Request, Response]:
    """A unary method whose errors leave as coded statuses."""

    @functools.wraps(method)
    async def wrapper(self: Any, request: Request, context: Context) -> Response:
        with log.request(_request_id(request)):
            try:
                return await method(self, request, context)
            except FieldmeshError as error:
                await _refuse(context, error)
            except Exception:  # noqa: BLE001 - the caller must get a code, and the log the traceback
                await _refuse(context, _defect())
        raise AssertionError("abort raises")

    return wrapper


def guarded_stream(method: Stream[Request, Response]) -> Stream[Request, Response]:
    """A streaming method whose errors leave as coded statuses; the generator behind it is always closed.

    What gRPC is given is a coroutine that writes: it is cancelled where it stands when the caller leaves. A
    generator would merely be dropped, and closed whenever it is collected.
    """

    @functools.wraps(method)
    async def wrapper(self: Any, request: Request, context: Context) -> None:
        with log.request(_request_id(request)):
            try:
                async with aclosing(method(self, request, context)) as responses:  # type: ignore[type-var]
                    async for response in responses:
                        await context.write(response)
            except FieldmeshError as error:
                await _refuse(context, error)
            except Exception:  # noqa: BLE001 - the caller must get a code, and the log the traceback
                await _refuse(context, _defect())

    return cast(Stream[Request, Response], wrapper)  # gRPC takes either; the stubs know one
