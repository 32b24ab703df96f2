"""Errors on the wire: google.rpc.Status with ErrorInfo, RetryInfo and BadRequest, and back.

Owns: the mapping between FieldmeshError and gRPC's rich error model (AIP-193), and to HTTP's statuses. Must
not: import grpc; the shells put the bytes made here into the trailing metadata ``grpc-status-details-bin``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, Protocol

from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from fieldmesh.core import errors
from fieldmesh.core.errors import FieldmeshError, Status

DETAILS_KEY = "grpc-status-details-bin"
PUSHBACK_KEY = "grpc-retry-pushback-ms"
DOMAIN = "fieldmesh"
# gRPC refuses metadata beyond some 16 kB, and a message may quote what a client sent.
MESSAGE_CHARS_MAX = 1000
METADATA_VALUE_CHARS_MAX = 500

_KINDS = errors.by_code()

HTTP_STATUSES: Final = {
    Status.CANCELLED: 499,  # no standard has one; this is what proxies log
    Status.UNKNOWN: 500,
    Status.INVALID_ARGUMENT: 400,
    Status.DEADLINE_EXCEEDED: 504,
    Status.NOT_FOUND: 404,
    Status.ALREADY_EXISTS: 409,
    Status.PERMISSION_DENIED: 403,
    Status.RESOURCE_EXHAUSTED: 429,
    Status.FAILED_PRECONDITION: 409,
    Status.ABORTED: 409,
    Status.OUT_OF_RANGE: 400,
    Status.INTERNAL: 500,
    Status.UNAVAILABLE: 503,
}
"""The HTTP status of an error, by the gRPC status that it travels as between nodes."""


def clipped(text: str, chars_max: int = MESSAGE_CHARS_MAX) -> str:
    """``text``, shortened to ``chars_max`` characters where it is longer."""
    return text if len(text) <= chars_max else text[: chars_max - 1] + "…"


def error_metadata(error: FieldmeshError) -> tuple[tuple[str, str | bytes], ...]:
    """Trailing metadata that carries ``error``: its details, and pushback where a retry is worth while."""
    status = status_pb2.Status(code=error.status.value, message=clipped(error.message))
    facts = {key: clipped(value, METADATA_VALUE_CHARS_MAX) for key, value in error.metadata.items()}
    if error.field:
        facts["field"] = clipped(error.field, METADATA_VALUE_CHARS_MAX)
    facts["retryable"] = "true" if error.retryable else "false"
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=error.code, domain=DOMAIN, metadata=facts))
    trailing: list[tuple[str, str | bytes]] = []
    if error.retry_after_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        status.details.add().Pack(retry)
        trailing.append((PUSHBACK_KEY, str(max(0, int(error.retry_after_s * 1000)))))
    if error.field and error.status is Status.INVALID_ARGUMENT:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=clipped(error.field, METADATA_VALUE_CHARS_MAX), description=clipped(error.message)
        )
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    trailing.append((DETAILS_KEY, status.SerializeToString()))
    return tuple(trailing)


# Statuses that gRPC itself makes, when a call ends without our details.
_BARE: dict[Status, type[FieldmeshError]] = {
    Status.CANCELLED: errors.Cancelled,
    Status.DEADLINE_EXCEEDED: errors.DeadlineExceeded,
    Status.INVALID_ARGUMENT: errors.InvalidRequest,
    Status.RESOURCE_EXHAUSTED: errors.InvalidRequest,
    Status.UNAVAILABLE: errors.NodeUnreachable,
}


def error_from_status(code: int, message: str, details: bytes | None) -> FieldmeshError:
    """The typed error behind a failed call.

    ``code`` is gRPC's number, ``details`` the value of ``grpc-status-details-bin`` if there was one.
    Never raises: what cannot be understood becomes the kind that fits the bare status.
    """
    status = status_pb2.Status()
    try:
        status.ParseFromString(details or b"")
    except DecodeError:
        status.Clear()
    info = error_details_pb2.ErrorInfo()
    retry_after_s: float | None = None
    for detail in status.details:
        try:
            if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
                detail.Unpack(info)
            elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
                retry = error_details_pb2.RetryInfo()
                detail.Unpack(retry)
                retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9
        except DecodeError:
            continue
    facts = dict(info.metadata)
    field = facts.pop("field", "")
    facts.pop("retryable", None)
    kind = _KINDS.get(info.reason) if info.domain == DOMAIN else None
    if kind is None:
        known = {member.value: member for member in Status}.get(code, Status.UNKNOWN)
        kind = _BARE.get(known, errors.Internal)
    return kind(status.message or message, field=field, retry_after_s=retry_after_s, metadata=facts)


class FailedCall(Protocol):
    """What grpc.RpcError and grpc.aio.AioRpcError have in common."""

    def code(self) -> Any: ...

    def details(self) -> str | None: ...

    def trailing_metadata(self) -> Iterable[tuple[str, str | bytes]] | None: ...


def error_from_call(call: FailedCall) -> FieldmeshError:
    """The typed error behind a call that gRPC reports as failed."""
    details = None
    for key, value in call.trailing_metadata() or ():
        if key == DETAILS_KEY and isinstance(value, bytes):
            details = value
    return error_from_status(call.code().value[0], call.details() or "", details)
