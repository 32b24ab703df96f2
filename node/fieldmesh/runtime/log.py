"""What a node writes to stderr. Owns: the shape of a line, its bounds, and the request id on every line.

One pipeline for our own events (structlog) and for those of libraries (standard logging). Writing happens in
a thread behind a bounded queue: a stalled terminal or journal costs lines, which are counted, and never the
event loop. Must not: write what users ask or are answered. Such fields are withheld by name, as a net under
the rule that nobody passes them.
"""

from __future__ import annotations

import contextlib
import contextvars
import json
import logging
import os
import queue
import re
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any, Literal, TextIO, assert_never

import structlog

LINE_BYTES_MAX = 8_192
VALUE_CHARS_MAX = 1_024
TRACEBACK_CHARS_MAX = 4_096
FIELDS_MAX = 32
LINES_WAITING_MAX = 1_024
REPEAT_WINDOW_S = 10.0
REPEATS_MAX = 20
"""Lines of one event and level in REPEAT_WINDOW_S; what exceeds it is counted and told afterwards."""
REPEATS_OF_REQUESTS_MAX = 2_000
"""The same for lines with a request id: a line a request is no repetition, 200 a second are a flood."""
EVENTS_TRACKED_MAX = 512

_WITHHELD = frozenset(
    [
        "prompt",
        "text",
        "messages",
        "content",
        "completion",
        "question",
        "answer",
        "stop",
        "token_ids",
        "delivered_token_ids",
        "resume_token_ids",
    ]
)
_FIRST = ("timestamp", "level", "event", "request_id", "logger", "repeats_withheld")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_CONTROL_IN_TRACEBACK = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029]")
_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}

_request_id: contextvars.ContextVar[str] = contextvars.ContextVar("fieldmesh_request_id", default="")

Fields = MutableMapping[str, Any]


@contextlib.contextmanager
def request(request_id: str) -> Iterator[None]:
    """Put ``request_id`` on every line that is logged inside, tasks started inside included."""
    token = _request_id.set(request_id)
    try:
        yield
    finally:
        _request_id.reset(token)


def get(**bound: object) -> structlog.typing.FilteringBoundLogger:
    """A logger whose lines carry ``bound``. Works before ``set_up`` too, and follows it."""
    logger: structlog.typing.FilteringBoundLogger = structlog.get_logger(**bound)
    return logger


def set_up(
    style: Literal["auto", "json", "console"] = "auto",
    level: Literal["debug", "info", "warning", "error"] = "info",
    stream: TextIO | None = None,
    clock_s: Callable[[], float] = time.monotonic,
) -> Sink:
    """Send everything that is logged to ``stream`` (stderr). Close the sink to flush, at the very end.

    ``auto`` is coloured lines on a terminal and JSON elsewhere; NO_COLOR (https://no-color.org) is honoured.
    """
    stream = stream or sys.stderr
    sink = Sink(stream)
    terminal = stream.isatty()
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _add_request_id,
            RepeatLimit(clock_s),
            _format_exception,
            _bound_fields,
            _renderer(style, terminal, colours=terminal and not os.environ.get("NO_COLOR")),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        logger_factory=lambda *_: sink,
        cache_logger_on_first_use=False,
    )
    root = logging.getLogger()
    root.handlers = [_FromStandardLogging()]
    root.setLevel(max(_LEVELS[level], logging.INFO))  # libraries' debug lines drown ours
    logging.captureWarnings(True)
    return sink


# --- writing -------------------------------------------------------------------------------


class Sink:
    """Writes lines in a thread of its own; drops, and counts, what the stream does not take in time."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lines: queue.Queue[str | None] = queue.Queue(LINES_WAITING_MAX)
        self._dropped = 0
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def msg(self, line: str) -> None:
        """Take one line; never blocks."""
        if self._closed:
            return
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._dropped += 1

    debug = info = warning = warn = error = critical = exception = fatal = log = msg

    def close(self, timeout_s: float = 1.0) -> None:
        """Write what waits, for at most ``timeout_s``. Harmless when repeated."""
        if not self._closed:
            self._closed = True
            with contextlib.suppress(queue.Full):
                self._lines.put(None, timeout=timeout_s)
                self._thread.join(timeout_s)

    def _run(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                if self._dropped:
                    dropped, self._dropped = self._dropped, 0
                    self._stream.write(json.dumps({"event": "log_lines_dropped", "lines": dropped}) + "\n")
                self._stream.write(line + "\n")
                if self._lines.empty():
                    self._stream.flush()
            except (OSError, ValueError):  # the reader is gone; a node does not end for that
                self._dropped += 1
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()


class _FromStandardLogging(logging.Handler):
    """Hands what libraries log to structlog; their name is the field ``logger``."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            message = record.getMessage()
        except Exception as error:  # noqa: BLE001 - a library's broken format string must not end anything
            message = f"unprintable log record: {type(error).__name__}"
        level = min(
            max(record.levelno // 10 * 10, logging.DEBUG), logging.CRITICAL
        )  # structlog knows these five
        structlog.get_logger().log(level, message, logger=record.name, exc_info=record.exc_info or False)


# --- the shape of a line -------------------------------------------------------------------


def _add_request_id(_: object, __: str, fields: Fields) -> Fields:
    if (request_id := _request_id.get()) and "request_id" not in fields:
        fields["request_id"] = request_id
    return fields


@dataclass(slots=True)
class _Window:
    ends: float
    count: int = 0


class RepeatLimit:
    """Lets so many lines of one event and level through in REPEAT_WINDOW_S, and tells what it held back.

    The first line of the next window carries ``repeats_withheld``.
    """

    def __init__(self, clock_s: Callable[[], float]) -> None:
        self._clock_s = clock_s
        self._windows: OrderedDict[tuple[str, str, bool], _Window] = OrderedDict()

    def __call__(self, _: object, method: str, fields: Fields) -> Fields:
        now = self._clock_s()
        of_request = "request_id" in fields
        lines_max = REPEATS_OF_REQUESTS_MAX if of_request else REPEATS_MAX
        key = (str(fields.get("event"))[:80], method, of_request)
        window = self._windows.get(key)
        if window is None or now >= window.ends:
            if window is not None and (withheld := window.count - lines_max) > 0:
                fields["repeats_withheld"] = withheld
            window = self._windows[key] = _Window(now + REPEAT_WINDOW_S)
        self._windows.move_to_end(key)
        while len(self._windows) > EVENTS_TRACKED_MAX:
            self._windows.popitem(last=False)
        window.count += 1
        if window.count > lines_max:
            raise structlog.DropEvent
        return fields


def _format_exception(logger: object, method: str, fields: Fields) -> Fields:
    """Render exc_info as a traceback without local variables: those may hold a prompt."""
    fields = structlog.processors.format_exc_info(logger, method, fields)
    trace = fields.get("exception")
    if isinstance(trace, str) and len(trace) > TRACEBACK_CHARS_MAX:
        half = TRACEBACK_CHARS_MAX // 2
        fields["exception"] = f"{trace[:half]}\n[{len(trace) - 2 * half} characters]\n{trace[-half:]}"
    return fields


def _bound_fields(_: object, __: str, fields: Fields) -> Fields:
    """Withhold what users wrote, cut what is long, make values plain, and put what matters first."""
    names = [name for name in _FIRST if name in fields]
    names += [name for name in fields if name not in _FIRST][:FIELDS_MAX]
    return {name: _plain(name, fields[name]) for name in names}


def _plain(name: str, value: object) -> object:
    if name in _WITHHELD:
        return "[withheld]"
    if isinstance(value, bool | int | float | None):
        return value
    text = value if isinstance(value, str) else str(value)
    if name == "exception":
        return _CONTROL_IN_TRACEBACK.sub(_escaped, text)
    cut = text[:VALUE_CHARS_MAX] + "[...]" if len(text) > VALUE_CHARS_MAX else text
    return _CONTROL.sub(_escaped, cut)


def _escaped(match: re.Match[str]) -> str:
    return f"\\x{ord(match[0]):02x}"


def _renderer(
    style: Literal["auto", "json", "console"], terminal: bool, colours: bool
) -> Callable[[object, str, Fields], str]:
    match style:
        case "auto":
            return _renderer("console" if terminal else "json", terminal, colours)
        case "json":
            return _render_json
        case "console":
            console = structlog.dev.ConsoleRenderer(
                colors=colours, exception_formatter=structlog.dev.plain_traceback, pad_event_to=32
            )
            return lambda logger, method, fields: _cut(console(logger, method, fields))
        case _:
            assert_never(style)


def _render_json(_: object, __: str, fields: Fields) -> str:
    """One object on one line; where it is too long, the fields that say what happened are kept."""
    line = json.dumps(fields, ensure_ascii=False, default=str)
    line_bytes = len(line.encode("utf-8", "replace"))
    if line_bytes <= LINE_BYTES_MAX:
        return line
    kept = {name: fields[name] for name in _FIRST if name in fields}
    return json.dumps(
        {**kept, "line_bytes": line_bytes, "exception": str(fields.get("exception", ""))[-1024:]},
        ensure_ascii=False,
        default=str,
    )


def _cut(line: str) -> str:
    encoded = line.encode("utf-8", "replace")
    return (
        line
        if len(encoded) <= LINE_BYTES_MAX
        else encoded[:LINE_BYTES_MAX].decode("utf-8", "ignore") + "[...]"
    )
