"""The border between our errors and gRPC's: every method that a server offers passes through here.

Owns: translating what a method raises into a coded status with details, the request id on the log lines
that a call causes, and counting calls by how they ended. Must not: know any method.
"""

from __future__ import annotations

import asyncio
import functools
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import DecodeError
from google.protobuf.message import Message as ProtoMessage
from google.protobuf.message_factory import GetMessageClass

from fieldmesh.core.errors import Cancelled, FieldmeshError, Internal, InvalidRequest, SlowReader
from fieldmesh.core.tally import Counts
from fieldmesh.rpc.errors import clipped, error_metadata
from fieldmesh.runtime import log

Context = grpc.aio.ServicerContext[Any, Any]
Request = TypeVar("Request")
Response = TypeVar("Response")
Unary = Callable[[Any, Request, Context], Awaitable[Response]]
Stream = Callable[[Any, Request, Context], AsyncIterator[Response]]

WRITE_TIMEOUT_S = 60.0
"""How long one message may wait for a caller that does not read."""

ENDINGS_MAX = 512
OK = "OK"
Calls = Counts[tuple[str, str]]
"""Calls by full method name and the code that they ended with: ``OK``, or that of an error."""

_ending: ContextVar[list[str]] = ContextVar("ending")
_CODES = {code.value[0]: code for code in grpc.StatusCode}

logger = log.get()


def no_calls() -> Calls:
    """No calls yet; methods and codes are few, and what a defect adds to them is bounded."""
    return Counts(ENDINGS_MAX, ("other", "other"))


def new_request_id() -> str:
    """An id for a request that came without one."""
    return uuid.uuid4().hex


def _request_id(request: Any) -> str:
    """The request id that a message carries, made and written into it where it may be left out."""
    if isinstance(request, Malformed):
        return ""
    which = request.WhichOneof("request") if "request" in request.DESCRIPTOR.oneofs_by_name else None
    holder = getattr(request, which) if which else request
    if "request_id" not in holder.DESCRIPTOR.fields_by_name:
        return ""
    if not holder.request_id:
        holder.request_id = new_request_id()
    return str(holder.request_id)[:64]


async def _refuse(context: Context, error: FieldmeshError) -> None:
    if ending := _ending.get(None):
        ending[0] = error.code
    logger.info("request_refused", code=error.code, error=error.message, field=error.field)
    await context.abort(_CODES[error.status.value], clipped(error.message), error_metadata(error))


async def _write(context: Context, response: Any) -> None:
    try:
        async with asyncio.timeout(WRITE_TIMEOUT_S):
            await context.write(response)
    except TimeoutError:
        raise SlowReader(
            f"The stream was not read for {WRITE_TIMEOUT_S:g} s; it was ended and freed"
        ) from None


@dataclass(frozen=True, slots=True)
class Malformed:
    """Bytes that are not the message that the method takes."""

    message: str


def handlers(
    service: ServiceDescriptor, servicer: object, calls: Calls | None = None
) -> grpc.GenericRpcHandler:
    """What a server is given for the methods of ``service`` that ``servicer`` has; ``calls`` counts them.

    Unlike with the generated code, bytes that cannot be parsed reach the method's guard, which answers with a
    coded error; gRPC itself would say UNKNOWN and write a traceback.
    """
    calls = no_calls() if calls is None else calls
    found: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
    for method in service.methods:
        behaviour = getattr(servicer, method.name, None)
        if behaviour is not None:
            make = (
                grpc.unary_stream_rpc_method_handler
                if method.server_streaming
                else grpc.unary_unary_rpc_method_handler
            )
            found[method.name] = make(
                _counted(behaviour, method.full_name, calls),
                request_deserializer=functools.partial(_parsed, GetMessageClass(method.input_type)),
                response_serializer=GetMessageClass(method.output_type).SerializeToString,
            )
    return grpc.method_handlers_generic_handler(service.full_name, found)


def _counted(
    behaviour: Callable[[Any, Context], Awaitable[Any]], method: str, calls: Calls
) -> Callable[[Any, Context], Awaitable[Any]]:
    """``behaviour``, counted when it ends."""

    @functools.wraps(behaviour)
    async def wrapper(request: Any, context: Context) -> Any:
        ending = [OK]
        _ending.set(ending)
        try:
            return await behaviour(request, context)
        except asyncio.CancelledError:
            ending[0] = Cancelled.code
            raise
        finally:
            calls.add((method, ending[0]))

    return wrapper


def _parsed(kind: type[ProtoMessage], data: bytes) -> ProtoMessage | Malformed:
    message = kind()
    try:
        message.ParseFromString(data)
    except DecodeError:
        return Malformed(
            f"The bytes are no {kind.DESCRIPTOR.full_name}: malformed, or text that is not UTF-8"
        )
    return message


def _checked(request: Any) -> Any:
    if isinstance(request, Malformed):
        raise InvalidRequest(request.message, field="request")
    return request


def _defect() -> Internal:
    logger.exception("request_crashed")
    return Internal("A defect of Fieldmesh ended this request; the node's log has the details")


def guarded(method: Unary[Request, Response]) -> Unary[Request, Response]:
    """A unary method whose errors leave as coded statuses."""

    @functools.wraps(method)
    async def wrapper(self: Any, request: Request, context: Context) -> Response:
        with log.request(_request_id(request)):
            try:
                return await method(self, _checked(request), context)
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
                async with aclosing(method(self, _checked(request), context)) as responses:  # type: ignore[type-var]
                    async for response in responses:
                        await _write(context, response)
            except FieldmeshError as error:
                await _refuse(context, error)
            except Exception:  # noqa: BLE001 - the caller must get a code, and the log the traceback
                await _refuse(context, _defect())

    return cast(Stream[Request, Response], wrapper)  # gRPC takes either; the stubs know one
