"""Which keys the configuration knows and what their values must look like, asked before a write is proposed.

Owns: the table of keys. Must not: be asked while a committed command is applied; replicas of different
versions may know different keys, and must still compute the same state.

Values are JSON texts. ``validate`` raises InvalidRequest naming the field and what would be accepted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from typing import Any, Final

from fieldmesh.core.errors import InvalidRequest
from fieldmesh.core.settings import CHANGES_MAX, KEY, KEY_CHARACTERS_MAX, VALUE_CHARACTERS_MAX, Change, State

NESTING_MAX: Final = 16
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
FINGERPRINT = re.compile(r"[0-9a-f]{32,128}")

ROUTING_POLICIES: Final = ("expected-time", "round-robin", "least-loaded", "random")
ROUTING_WEIGHT_MIN: Final = 0.01
ROUTING_WEIGHT_MAX: Final = 100.0
LIMITS: Final = {
    "prompt_tokens_max": 1_000_000,
    "output_tokens_max": 1_000_000,
    "streams_max": 10_000,
    "hops_max": 8,
    "request_bytes_max": 64 * 1024 * 1024,
}
QUOTAS: Final = ("requests_per_minute", "tokens_per_minute", "streams_max")
QUOTA_MAX: Final = 10**12
VOTERS_POLICY: Final = "voters/policy"
VOTER_TARGETS: Final = (1, 3, 5)
STABLE_S_MAX: Final = 86_400


def validate(changes: Iterable[Change]) -> None:
    """Raises InvalidRequest for the first change that may not be proposed."""
    changes = tuple(changes)
    if not 0 < len(changes) <= CHANGES_MAX:
        raise InvalidRequest(
            f"{len(changes)} changes at once; 1 to {CHANGES_MAX} are accepted", field="changes"
        )
    seen: set[str] = set()
    for change in changes:
        if change.key in seen:
            raise InvalidRequest(f"key {change.key!r} is changed twice", field="changes")
        seen.add(change.key)
        _validate_one(change)


def _validate_one(change: Change) -> None:
    key = change.key
    if not KEY.fullmatch(key):
        raise InvalidRequest(
            f"key {key!r} is not accepted; it begins with a-z and holds at most {KEY_CHARACTERS_MAX} of "
            "A-Z a-z 0-9 . _ : / -",
            field="key",
        )
    prefix, _, rest = key.partition("/")
    check = _TABLE.get(prefix)
    if check is None or not rest:
        raise InvalidRequest(
            f"key {key!r} is not known; keys begin with {', '.join(f'{p}/' for p in sorted(_TABLE))}",
            field="key",
        )
    if change.value is None:
        return
    if len(change.value) > VALUE_CHARACTERS_MAX:
        raise InvalidRequest(
            f"the value of {key} has {len(change.value)} characters; at most {VALUE_CHARACTERS_MAX}",
            field=key,
        )
    check(rest, parse(change.value, key), key)


def known_value(state: State, key: str) -> Any:
    """What ``key`` says, parsed; None where it says nothing, or what only another version understands."""
    value = state.values.get(key)
    if value is None:
        return None
    try:
        _validate_one(Change(key=key, value=value.text))
        return parse(value.text, key)
    except InvalidRequest:
        return None


def parse(text: str, key: str) -> Any:
    """The JSON value in ``text``. Raises InvalidRequest."""
    depth = deepest = 0
    for character in text:  # counts braces in strings too: a bound, not a parser
        depth += (character in "[{") - (character in "]}")
        deepest = max(deepest, depth)
    if deepest > NESTING_MAX:
        raise InvalidRequest(f"the value of {key} is nested deeper than {NESTING_MAX}", field=key)
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the value of {key} is not JSON: {error}", field=key) from error


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


# --- one check a kind of key -------------------------------------------------------------


def _profile(rest: str, value: Any, key: str) -> None:
    """``profiles/NAME``: which model the profile runs, everywhere."""
    _name(rest, key)
    fields = _object(value, key, required=("model", "fingerprint"), optional=("domains",))
    _text(fields["model"], f"{key}.model")
    if not isinstance(fields["fingerprint"], str) or not FINGERPRINT.fullmatch(fields["fingerprint"]):
        raise InvalidRequest(
            "a model's fingerprint is the hex digest of its content (32 to 128 of 0-9 a-f)",
            field=f"{key}.fingerprint",
        )
    for domain in _list(fields.get("domains", []), f"{key}.domains"):
        _name(domain, f"{key}.domains")


def _domain(rest: str, value: Any, key: str) -> None:
    """``domains/NAME``: which profiles answer a domain, the preferred first."""
    _name(rest, key)
    profiles = _list(_object(value, key, required=("profiles",))["profiles"], f"{key}.profiles")
    if not profiles:
        raise InvalidRequest("a domain needs one profile at least", field=f"{key}.profiles")
    for profile in profiles:
        _name(profile, f"{key}.profiles")


def _routing(rest: str, value: Any, key: str) -> None:
    """``routing/policy`` and ``routing/weights`` (by profile name)."""
    if rest == "policy":
        if value not in ROUTING_POLICIES:
            raise InvalidRequest(f"{key} must be one of {', '.join(ROUTING_POLICIES)}", field=key)
        return
    if rest != "weights":
        raise InvalidRequest("routing/policy and routing/weights are known", field="key")
    if not isinstance(value, dict):
        raise InvalidRequest(f"{key} must be an object from profile names to weights", field=key)
    for name, weight in value.items():
        _name(name, key)
        _number(weight, f"{key}.{name}", ROUTING_WEIGHT_MIN, ROUTING_WEIGHT_MAX)


def _limit(rest: str, value: Any, key: str) -> None:
    """``limits/NAME``: one whole number."""
    if rest not in LIMITS:
        raise InvalidRequest(f"{key} is not known; limits are {', '.join(sorted(LIMITS))}", field="key")
    _whole(value, key, 0 if rest == "hops_max" else 1, LIMITS[rest])


def _quota(rest: str, value: Any, key: str) -> None:
    """``quotas/TENANT``: whole numbers; a missing one is no quota."""
    _name(rest, key)
    for name, number in _object(value, key, optional=QUOTAS).items():
        _whole(number, f"{key}.{name}", 0, QUOTA_MAX)


def _voters(rest: str, value: Any, key: str) -> None:
    """``voters/policy``: whether the mesh chooses its voters itself, how many, from how stable nodes, and
    when one that is silent is gone for good."""
    if key != VOTERS_POLICY:
        raise InvalidRequest("voters/policy is known", field="key")
    fields = _object(value, key, required=("automatic",), optional=("target", "stable_s", "gone_s"))
    if not isinstance(fields["automatic"], bool):
        raise InvalidRequest("true or false is accepted", field=f"{key}.automatic")
    if fields.get("target", 3) not in VOTER_TARGETS or isinstance(fields.get("target"), bool):
        raise InvalidRequest("1, 3 or 5 voters are accepted", field=f"{key}.target")
    for name in ("stable_s", "gone_s"):
        _number(fields.get(name, 0), f"{key}.{name}", 0, STABLE_S_MAX)


def _revocation(rest: str, value: Any, key: str) -> None:
    """``revocations/NODE``: a node (or certificate) that is no longer trusted, and why."""
    if not FINGERPRINT.fullmatch(rest):
        raise InvalidRequest(
            "revocations/ is followed by a node id or a certificate's hex digest", field="key"
        )
    _text(_object(value, key, required=("reason",))["reason"], f"{key}.reason")


def _free(rest: str, value: Any, key: str) -> None:
    """``app/...``: any JSON."""


_TABLE: Final[dict[str, Callable[[str, Any, str], None]]] = {
    "profiles": _profile,
    "domains": _domain,
    "routing": _routing,
    "limits": _limit,
    "quotas": _quota,
    "voters": _voters,
    "revocations": _revocation,
    "app": _free,
}


# --- shapes ------------------------------------------------------------------------------


def _object(
    value: Any, key: str, *, required: tuple[str, ...] = (), optional: tuple[str, ...] = ()
) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidRequest(f"{key} must be an object with {', '.join((*required, *optional))}", field=key)
    for name in required:
        if name not in value:
            raise InvalidRequest(f"{key} lacks {name}", field=f"{key}.{name}")
    for name in value:
        if name not in required and name not in optional:
            raise InvalidRequest(
                f"{key} does not know {name!r}; it knows {', '.join((*required, *optional))}",
                field=f"{key}.{name}",
            )
    return value


def _list(value: Any, field: str) -> list[Any]:
    if not isinstance(value, list):
        raise InvalidRequest("a list is accepted", field=field)
    return value


def _name(value: Any, field: str) -> None:
    if not isinstance(value, str) or not NAME.fullmatch(value):
        raise InvalidRequest(f"{value!r} is no name; 1 to 64 of a-z 0-9 . _ - are accepted", field=field)


def _text(value: Any, field: str) -> None:
    if not isinstance(value, str) or not 0 < len(value) <= 500:
        raise InvalidRequest("a text of 1 to 500 characters is accepted", field=field)


def _whole(value: Any, field: str, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise InvalidRequest(f"a whole number from {low} to {high} is accepted", field=field)


def _number(value: Any, field: str, low: float, high: float) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
        raise InvalidRequest(f"a number from {low} to {high} is accepted", field=field)
