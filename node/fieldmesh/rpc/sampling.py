"""The codec of sampling parameters: their bounds, to protobuf and back.

Owns: what may be said about how tokens are drawn. Must not: import grpc.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from fieldmesh.core.errors import ConstraintInvalid, InvalidRequest
from fieldmesh.core.model import Constraint, ConstraintKind, SamplingOverrides
from fieldmesh.v1 import inference_pb2 as pb
from fieldmesh.values import shown

STOPS_MAX: Final = 16
STOP_BYTES_MAX: Final = 256
STOP_TOKEN_IDS_MAX: Final = 64
LOGIT_BIAS_MAX: Final = 300
CONSTRAINT_BYTES_MAX: Final = 65_536


def token_ids(field: str, ids: Iterable[int], count_max: int) -> tuple[int, ...]:
    """At least one and at most ``count_max`` token ids. Raises InvalidRequest."""
    found = tuple(ids)
    if not found:
        raise InvalidRequest(f"{field} is empty; send at least one token id", field=field)
    if len(found) > count_max:
        raise InvalidRequest(
            f"{field} has {len(found)} entries; at most {count_max} are accepted", field=field
        )
    if min(found) < 0:
        raise InvalidRequest(f"{field} holds {min(found)}; token ids are not negative", field=field)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Range:
    low: float
    high: float
    low_excluded: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.low_excluded else value >= self.low
        return math.isfinite(value) and above and value <= self.high

    def __str__(self) -> str:
        return f"{'above ' if self.low_excluded else ''}{self.low:g} to {self.high:g}"


_RANGES: Final = {
    "temperature": _Range(low=0, high=5),
    "top_p": _Range(low=0, high=1, low_excluded=True),
    "top_k": _Range(low=0, high=1000),
    "min_p": _Range(low=0, high=1),
    "frequency_penalty": _Range(low=-2, high=2),
    "presence_penalty": _Range(low=-2, high=2),
    "repetition_penalty": _Range(low=0, high=5, low_excluded=True),
    "logprobs": _Range(low=0, high=20),
    "n": _Range(low=1, high=16),
}
_LOGIT_BIAS: Final = _Range(low=-100, high=100)


_WIRE_RANGES: Final = {
    "max_tokens": "a whole number from 1 to 2147483647",
    "min_tokens": "a whole number from 0 to 2147483647",
    "reasoning_tokens_max": "a whole number from 0 to 2147483647",
    "seed": "a whole number from 0 to 4294967295",
}


def overrides_from_proto(params: pb.SamplingParams, max_tokens_max: int) -> SamplingOverrides:
    """What a request says about sampling. Raises InvalidRequest."""
    ranges = _RANGES | {
        "max_tokens": _Range(low=1, high=max_tokens_max),
        "min_tokens": _Range(low=0, high=max_tokens_max),
        "reasoning_tokens_max": _Range(low=0, high=max_tokens_max),
    }
    given: dict[str, Any] = {}
    for name, accepted in ranges.items():
        if params.HasField(name):  # type: ignore[arg-type]
            value = getattr(params, name)
            if value not in accepted:
                raise InvalidRequest(
                    f"sampling_params.{name} is {value:g}; accepted is {accepted}",
                    field=f"sampling_params.{name}",
                )
            given[name] = value
    if params.HasField("seed"):
        given["seed"] = params.seed
    if params.HasField("ignore_eos"):
        given["ignore_eos"] = params.ignore_eos
    if (constraint := _constraint(params)) is not None:
        given["constraint"] = constraint
    if params.logit_bias:
        given["logit_bias"] = _logit_bias(params.logit_bias)
    if params.stop:
        given["stop"] = _stops(params.stop)
    if params.stop_token_ids:
        field = "sampling_params.stop_token_ids"
        given["stop_token_ids"] = token_ids(field, params.stop_token_ids, STOP_TOKEN_IDS_MAX)
    return SamplingOverrides(**given)


def _constraint(params: pb.SamplingParams) -> Constraint | None:
    name = params.WhichOneof("constraint")
    if name is None or (name == "json_object" and not params.json_object):
        return None
    source = "" if name == "json_object" else getattr(params, name)
    constraint = Constraint(kind=ConstraintKind(name), source=source)
    if name != "json_object" and not source:
        raise ConstraintInvalid(f"{constraint.field} is empty; leave it out", field=constraint.field)
    if len(source.encode()) > CONSTRAINT_BYTES_MAX:
        raise ConstraintInvalid(
            f"{constraint.field} is larger than {CONSTRAINT_BYTES_MAX} bytes of UTF-8", field=constraint.field
        )
    return constraint


def _logit_bias(bias: Mapping[int, float]) -> tuple[tuple[int, float], ...]:
    field = "sampling_params.logit_bias"
    if len(bias) > LOGIT_BIAS_MAX:
        raise InvalidRequest(
            f"{field} has {len(bias)} entries; at most {LOGIT_BIAS_MAX} are accepted", field=field
        )
    for token, value in bias.items():
        if token < 0 or value not in _LOGIT_BIAS:
            raise InvalidRequest(
                f"{field} maps {token} to {value:g}; accepted are token ids, and {_LOGIT_BIAS}", field=field
            )
    return tuple(sorted(bias.items()))


def _stops(stops: Iterable[str]) -> tuple[str, ...]:
    found = tuple(stops)
    field = "sampling_params.stop"
    if len(found) > STOPS_MAX:
        raise InvalidRequest(
            f"{field} has {len(found)} strings; at most {STOPS_MAX} are accepted", field=field
        )
    for index, stop in enumerate(found):
        if not 1 <= len(stop.encode()) <= STOP_BYTES_MAX:
            raise InvalidRequest(
                f"{field}[{index}] must have 1 to {STOP_BYTES_MAX} bytes of UTF-8", field=f"{field}[{index}]"
            )
    return found


def fill_params(params: pb.SamplingParams, sampling: SamplingOverrides) -> None:
    """Write what a request says about sampling. Raises InvalidRequest for what the wire cannot hold."""
    for name in (*_RANGES, *_WIRE_RANGES, "ignore_eos"):
        value = getattr(sampling, name)
        if value is not None:
            try:
                setattr(params, name, value)
            except (TypeError, ValueError):  # of another type, or beyond what the wire can hold
                accepted = _RANGES.get(name) or _WIRE_RANGES.get(name) or "true or false"
                raise InvalidRequest(
                    f"sampling_params.{name} is {shown(value)}; accepted is {accepted}",
                    field=f"sampling_params.{name}",
                ) from None
    if (constraint := sampling.constraint) is not None:
        value = True if constraint.kind is ConstraintKind.JSON_OBJECT else constraint.source
        setattr(params, constraint.kind.value, value)
    for token, bias in sampling.logit_bias or ():
        params.logit_bias[token] = bias
    params.stop.extend(sampling.stop or ())
    params.stop_token_ids.extend(sampling.stop_token_ids or ())
