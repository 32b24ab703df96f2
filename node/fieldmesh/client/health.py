"""The standard health check, from a client. Owns: asking one node, once.

The two messages of ``grpc.health.v1`` are one field each, so they are read and written here rather than by
another package.
"""

from __future__ import annotations

from typing import Any, Final

import grpc

from fieldmesh.client import calls
from fieldmesh.core.errors import DeadlineExceeded, InvalidRequest, NodeUnreachable
from fieldmesh.core.model import Address

_SERVING: Final = b"\x08\x01"
SERVICE_BYTES_MAX: Final = 127


def serving(node: str | Address, service: str = "", *, timeout_s: float = 3.0) -> bool:
    """Whether ``node`` (client listener, ``host:port``) says SERVING of ``service``; empty: of itself.

    A profile is ``fieldmesh.v1.InferenceService/NAME``; one that the node does not have is not serving.
    Raises NodeUnreachable where nobody answers within ``timeout_s``, ConfigError for what is no address,
    InvalidRequest for a timeout or a service that is none.
    """
    (address,) = calls.seeds(node)
    calls.deadline(timeout_s, 0.0)
    name = service.encode()
    if len(name) > SERVICE_BYTES_MAX:
        raise InvalidRequest(f"The service's name has more than {SERVICE_BYTES_MAX} bytes.", field="service")
    request = b"\x0a" + bytes([len(name)]) + name if name else b""
    with grpc.insecure_channel(str(address), options=calls.CHANNEL_OPTIONS) as channel:
        check: Any = channel.unary_unary(
            calls.HEALTH_METHOD, request_serializer=None, response_deserializer=None
        )
        try:
            return bool(check(request, timeout=timeout_s) == _SERVING)
        except grpc.RpcError as failure:
            if failure.code() is grpc.StatusCode.NOT_FOUND:
                return False
            error = calls.translated(failure, address)
            if isinstance(error, DeadlineExceeded):
                raise NodeUnreachable(f"{address} did not answer within {timeout_s:g} s.") from failure
            raise error from failure
