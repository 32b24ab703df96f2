"""What the value of an option may be. Owns: the rules, and reading a value (typed or text) under them.

Must not: know which options there are.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal, get_args, get_origin

from fieldmesh.core.errors import ConfigError
from fieldmesh.core.model import Address

VALUE_CHARS_SHOWN_MAX: Final = 80


@dataclass(frozen=True, slots=True)
class Between:
    """Bounds of a number, both included."""

    least: float
    most: float
    unit: str = ""

    def words(self, kind: str) -> str:
        return f"{kind} from {self.least} to {self.most}" + (f" {self.unit}" if self.unit else "")


@dataclass(frozen=True, slots=True)
class Name:
    """A name that is safe in a path, a DNS label list and a log line."""

    pattern: ClassVar = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
    words: ClassVar = "1 to 63 letters, digits, '.', '_' or '-', beginning and ending with a letter or digit"

    def accepts(self, value: str) -> bool:
        return self.pattern.fullmatch(value) is not None


@dataclass(frozen=True, slots=True)
class Text:
    """Printable text of a bounded length."""

    chars_max: int
    words: str

    def accepts(self, value: str) -> bool:
        return len(value) <= self.chars_max and (value == "" or value.isprintable())


@dataclass(frozen=True, slots=True)
class Url:
    """The address of an HTTP server, or nothing."""

    pattern: ClassVar = re.compile(r"https?://[^\s/?#@\"<>]{1,253}(/[!-~]{0,1024})?")
    words: ClassVar = "an address such as http://127.0.0.1:4318 or https://collector.example/otlp, or nothing"

    def accepts(self, value: str) -> bool:
        return value == "" or self.pattern.fullmatch(value) is not None


@dataclass(frozen=True, slots=True)
class Port:
    """Which port an address gets when it names none. Listeners may take port 0: any free one."""

    default: int
    least: int = 1


@dataclass(frozen=True, slots=True)
class OrOff:
    """The word ``off`` is accepted too, and means None."""


@dataclass(frozen=True, slots=True)
class Many:
    """Bound of a list."""

    entries_max: int


class Refused(Exception):
    """A value is not acceptable; ``accepted`` completes "it must be"."""

    def __init__(self, accepted: str) -> None:
        super().__init__(accepted)
        self.accepted = accepted


def read(kind: Any, rules: tuple[object, ...], value: object) -> object:
    """``value`` as ``kind``, within ``rules``. A file's values are typed, a variable's are text.

    Raises Refused.
    """

    def rule(wanted: type[Any]) -> Any:
        return next(entry for entry in rules if isinstance(entry, wanted))

    if any(isinstance(entry, OrOff) for entry in rules):
        try:
            return None if value in ("off", None) else parse_address(value, rule(Port))
        except Refused as refused:
            raise Refused(f"off, or {refused.accepted}") from None
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        if value not in choices:
            raise Refused("one of " + ", ".join(choices))
        return value
    if kind is bool:
        return _boolean(value)
    if kind is int or kind is float:
        return _number(value, rule(Between), whole=kind is int)
    if kind is Address:
        return parse_address(value, rule(Port))
    if kind is str:
        return _text(value, next(entry for entry in rules if isinstance(entry, (Name, Text, Url))))
    return _addresses(value, rule(Many), rule(Port))


def _boolean(value: object) -> bool:
    if isinstance(value, bool):
        return value
    word = value.strip().lower() if isinstance(value, str) else ""
    if word in ("true", "yes", "on", "1"):
        return True
    if word in ("false", "no", "off", "0"):
        return False
    raise Refused("true or false")


def _number(value: object, bounds: Between, *, whole: bool) -> int | float:
    accepted = bounds.words("a whole number" if whole else "a number")
    try:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise ValueError
        number = (int(value) if isinstance(value, str) else value) if whole else float(value)
    except (ValueError, OverflowError):
        raise Refused(accepted) from None
    # The comparison is also what refuses NaN.
    if (whole and not isinstance(number, int)) or not bounds.least <= number <= bounds.most:
        raise Refused(accepted)
    return number


def _text(value: object, rule: Name | Text | Url) -> str:
    if not isinstance(value, str) or not rule.accepts(value):
        raise Refused(rule.words)
    return value


def parse_address(value: object, port: Port) -> Address:
    """``host:port``, ``[v6]:port``, or a bare host for the default port."""
    accepted = "an address such as 127.0.0.1:7420 or [::1]:7420"
    if isinstance(value, Address):
        return value
    if not isinstance(value, str) or not 0 < len(value) <= 300:
        raise Refused(accepted)
    match = re.fullmatch(
        r"(?:\[([0-9A-Fa-f:.%\w]+)\]|([^\s:\[\]/@]+))(?::([0-9]{1,5}))?", value.strip(), re.ASCII
    )
    if match is None:
        raise Refused(accepted)
    bracketed, plain, digits = match.groups()
    number = int(digits) if digits is not None else port.default
    if not port.least <= number <= 65_535:
        raise Refused(f"{accepted}, with a port from {port.least} to 65535")
    if bracketed is not None:
        try:
            ipaddress.IPv6Address(bracketed)
        except ValueError:
            raise Refused(accepted) from None
    return Address(host=bracketed or plain, port=number)


def _addresses(value: object, many: Many, port: Port) -> tuple[Address, ...]:
    accepted = f"at most {many.entries_max} addresses such as 192.168.1.7:{port.default}"
    if isinstance(value, str):  # a variable: separated by commas
        value = [part.strip() for part in value.split(",") if part.strip()]
    if not isinstance(value, (list, tuple)) or len(value) > many.entries_max:
        raise Refused(accepted)
    return tuple(dict.fromkeys(parse_address(entry, port) for entry in value))


def address(text: str, *, default_port: int, field_name: str) -> Address:
    """An address that a person typed, for borders outside of this table. Raises ConfigError."""
    try:
        return parse_address(text, Port(default_port))
    except Refused as refused:
        raise ConfigError(
            f"{field_name} is {shown(text)}: it must be {refused.accepted}.", field=field_name
        ) from None


def is_loopback(host: str) -> bool:
    """Whether only this box reaches a listener on ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def shown(value: object) -> str:
    """``value`` as an error message may quote it."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to write out whole numbers of thousands of digits
        return "a number too long to show"
    return text if len(text) <= VALUE_CHARS_SHOWN_MAX else text[:VALUE_CHARS_SHOWN_MAX] + "…"
