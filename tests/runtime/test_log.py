"""The log: one pipeline, request ids, bounds, and nothing that a user wrote."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from fieldmesh.runtime import log


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    yield
    structlog.reset_defaults()
    logging.captureWarnings(False)
    root.handlers, root.level = handlers, level


def lines(stream: io.StringIO, sink: log.Sink) -> list[dict[str, Any]]:
    sink.close()
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_is_one_json_object_that_says_what_matters_first() -> None:
    stream = io.StringIO()
    sink = log.set_up("json", stream=stream)
    log.get(node="kitchen").warning("peer_lost", peer="0a1b", silent_s=1.5)
    (line,) = lines(stream, sink)
    assert list(line)[:3] == ["timestamp", "level", "event"]
    del line["timestamp"]
    assert line == {
        "level": "warning", "event": "peer_lost", "node": "kitchen", "peer": "0a1b", "silent_s": 1.5,
    }  # fmt: skip


async def test_every_line_of_a_request_carries_its_id_in_tasks_and_in_libraries_too() -> None:
    stream = io.StringIO()
    sink = log.set_up("json", stream=stream)

    async def work() -> None:
        log.get().info("from_a_task")

    with log.request("r-1"):
        task = asyncio.create_task(work())
        logging.getLogger("grpc").warning("from a library")
    with log.request("r-2"):
        log.get().info("another")
    await task
    log.get().info("outside")
    found = {line["event"]: line.get("request_id") for line in lines(stream, sink)}
    assert found == {"from_a_task": "r-1", "from a library": "r-1", "another": "r-2", "outside": None}


def test_libraries_and_warnings_take_the_same_way() -> None:
    stream = io.StringIO()
    sink = log.set_up("json", "warning", stream=stream)
    logging.getLogger("zeroconf").info("not severe enough")
    logging.getLogger("zeroconf").error("lost %s", "eth0")
    logging.getLogger("asyncio").warning("%d", "not a number")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old", DeprecationWarning, stacklevel=1)
    found = lines(stream, sink)
    assert [(line["logger"], line["level"]) for line in found] == [
        ("zeroconf", "error"), ("asyncio", "warning"), ("py.warnings", "warning"),
    ]  # fmt: skip
    assert found[0]["event"] == "lost eth0"


def test_what_users_wrote_is_withheld_and_tracebacks_have_no_local_variables() -> None:
    stream = io.StringIO()
    sink = log.set_up("json", stream=stream)
    prompt = "my secret"
    try:
        raise RuntimeError("broken")
    except RuntimeError:
        log.get().exception("failed", prompt=prompt, text=prompt, token_ids=[1, 2])
    (line,) = lines(stream, sink)
    assert "my secret" not in stream.getvalue()
    assert line["prompt"] == line["token_ids"] == "[withheld]"
    assert "RuntimeError: broken" in line["exception"]


@pytest.mark.parametrize("style", ["json", "console"])
def test_a_line_is_bounded_and_cannot_forge_another(style: Any) -> None:
    stream = io.StringIO()
    sink = log.set_up(style, stream=stream)
    log.get().info("big", **{f"field{n}": "x" * 5_000 for n in range(100)})
    log.get().info("forged\n{}", peer="a\nb\x1b[31m")
    sink.close()
    written = stream.getvalue().splitlines()
    assert len(written) == 2
    assert all(len(line.encode()) <= log.LINE_BYTES_MAX + 100 for line in written)
    assert "big" in written[0]
    assert "\x1b" not in stream.getvalue()


def test_a_long_traceback_keeps_both_ends() -> None:
    stream = io.StringIO()
    sink = log.set_up("json", stream=stream)
    try:
        raise RuntimeError("begin" + "x" * 100_000 + "end")
    except RuntimeError:
        log.get().exception("failed")
    (line,) = lines(stream, sink)
    assert line["exception"].startswith("Traceback")
    assert line["exception"].endswith("end")
    assert len(line["exception"]) < 5_000


def test_repeats_are_held_back_and_counted_in_the_next_window() -> None:
    stream, clock = io.StringIO(), Clock()
    sink = log.set_up("json", stream=stream, clock_s=clock)
    for _ in range(log.REPEATS_MAX + 7):
        log.get().info("flood")
    log.get().info("other")
    clock.now = log.REPEAT_WINDOW_S
    log.get().info("flood")
    found = lines(stream, sink)
    assert len(found) == log.REPEATS_MAX + 2
    assert found[-1]["repeats_withheld"] == 7
    assert "repeats_withheld" not in found[-2]


def test_a_line_for_each_request_is_no_repetition() -> None:
    stream, clock = io.StringIO(), Clock()
    sink = log.set_up("json", stream=stream, clock_s=clock)
    for n in range(log.REPEATS_MAX * 3):
        with log.request(f"r-{n}"):
            log.get().info("request_finished")
    assert len(lines(stream, sink)) == log.REPEATS_MAX * 3


def test_distinct_events_do_not_grow_the_memory() -> None:
    limit = log.RepeatLimit(Clock())
    for n in range(log.EVENTS_TRACKED_MAX * 2):
        limit(None, "info", {"event": f"event {n}"})
    assert len(limit._windows) == log.EVENTS_TRACKED_MAX


def test_a_stalled_stream_costs_lines_and_not_time() -> None:
    class Stalled(io.StringIO):
        release = threading.Event()

        def write(self, text: str) -> int:
            self.release.wait(10)
            return super().write(text)

    stream = Stalled()
    sink = log.Sink(stream)
    for n in range(log.LINES_WAITING_MAX + 100):
        sink.msg(f'{{"event": "{n}"}}')  # would hang here
    stream.release.set()
    sink.close(timeout_s=10)
    found = [json.loads(line) for line in stream.getvalue().splitlines()]
    told = [line["lines"] for line in found if line["event"] == "log_lines_dropped"]
    assert sum(told) + len(found) - len(told) == log.LINES_WAITING_MAX + 100
    assert sum(told) >= 98


def test_a_stream_whose_reader_is_gone_is_survived() -> None:
    stream = io.StringIO()
    stream.close()
    sink = log.Sink(stream)
    sink.msg("x")
    sink.close()
    assert not sink._thread.is_alive()


@pytest.mark.parametrize(("no_color", "coloured"), [("", True), ("1", False)])
def test_a_terminal_gets_colours_unless_no_color_is_set(
    monkeypatch: pytest.MonkeyPatch, no_color: str, coloured: bool
) -> None:
    monkeypatch.setenv("NO_COLOR", no_color)
    stream = Terminal()
    sink = log.set_up("auto", stream=stream)
    log.get().info("started", port=7420)
    sink.close()
    assert ("\x1b[" in stream.getvalue()) is coloured
    assert "started" in stream.getvalue()


def test_elsewhere_auto_is_json() -> None:
    stream = io.StringIO()
    sink = log.set_up("auto", stream=stream)
    log.get().info("started")
    assert lines(stream, sink)[0]["event"] == "started"
