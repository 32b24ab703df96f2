"""Whatever is sent to the HTTP listener. Goal: no answer is 500, none is missing where a request was whole.

Method: hypothesis makes requests of every route: bodies that are nearly right, wrong, or no JSON at all, odd
heads, broken framing; as bytes, to one node with a fake engine. ``make fuzz-http`` sends 10,000 of them.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from fieldmesh.config import LimitsSlice, ListenSlice
from fieldmesh.engine.cost import CostModel
from fieldmesh.runtime.node import Node
from tests.runtime.test_http import opened, request, said, status
from tests.runtime.test_node import ANY, idle, new_site, tiny

__all__ = ["tiny"]

EXAMPLES = int(os.environ.get("EXAMPLES", "300"))
PATIENCE_S = 0.02
FREE = CostModel(step_base_s=0.0, decode_row_s=0.0, prefill_token_s=0.0)
Answered = TypeVar("Answered")
Crashes = list[dict[str, Any]]
Run = Callable[[Coroutine[Any, Any, Answered]], Answered]

# --- what is sent ------------------------------------------------------------------------------

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.sampled_from([2**31, 2**53, -(2**63), 10**30, 0.5, -0.0, 1e308, 5e-324])
    | st.text(max_size=9)
    | st.sampled_from(["", "auto", "none", "required", "user", "function", "\x00", "\u202e", "é" * 300])
)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)


def nearly(right: SearchStrategy[Any]) -> SearchStrategy[Any]:
    """Mostly right; now and then anything."""
    return st.integers(0, 14).flatmap(lambda die: anything if die == 7 else right)


def record(**fields: SearchStrategy[Any]) -> SearchStrategy[dict[str, Any]]:
    """An object of these fields, each nearly right."""
    return st.fixed_dictionaries({name: nearly(value) for name, value in fields.items()})


def some(**fields: SearchStrategy[Any]) -> SearchStrategy[dict[str, Any]]:
    """An object with some of the fields, each nearly right."""
    return st.fixed_dictionaries({}, optional={name: nearly(value) for name, value in fields.items()})


words = st.text(min_size=1, max_size=20)
models = st.sampled_from(["auto", *["general"] * 4, "tiny", "nobody"])
names = st.sampled_from(["f", "get_weather"])
schemas = st.just({"type": "object", "properties": {"a": {"type": "string"}}}) | anything
functions = record(name=names, description=words, parameters=schemas, arguments=st.just("{}"))
tools = st.lists(
    record(type=st.just("function"), function=functions, name=names, parameters=schemas), max_size=3
)
parts = st.lists(record(type=st.sampled_from(["text", "input_text"]), text=words), max_size=3)
calls = st.lists(record(id=words, type=st.just("function"), function=functions), max_size=2)
messages = st.lists(
    record(
        role=st.sampled_from(["system", "user", "assistant", "tool", "developer"]),
        content=words | parts,
        images=st.just([]),
    )
    | record(role=st.just("assistant"), tool_calls=calls)
    | record(role=st.just("tool"), content=words, tool_call_id=words),
    min_size=1,
    max_size=4,
)
items = st.lists(
    record(role=st.sampled_from(["user", "assistant", "system"]), content=words | parts)
    | record(type=st.just("function_call"), call_id=words, name=names, arguments=st.just("{}"))
    | record(type=st.just("function_call_output"), call_id=words, output=words | parts)
    | record(type=st.just("reasoning")),
    min_size=1,
    max_size=4,
)
choices = st.sampled_from(["auto", "none", "required"]) | record(
    type=st.just("function"), function=record(name=names), name=names
)
formats = st.sampled_from(["text", "json_object", "json_schema"]).flatmap(
    lambda kind: record(type=st.just(kind), json_schema=record(schema=schemas), schema=schemas, name=names)
)
few = st.integers(1, 4)
sampling: dict[str, SearchStrategy[Any]] = {
    "stream": st.booleans(),
    "temperature": st.floats(0, 5),
    "top_p": st.floats(0, 1),
    "seed": st.integers(-(2**70), 2**70),
    "stop": words | st.lists(words, max_size=3),
    "user": words,
}
completion: dict[str, SearchStrategy[Any]] = {
    **sampling,
    "max_tokens": few,
    "n": few,
    "logit_bias": st.dictionaries(st.sampled_from(["1", "2"]), st.floats(-100, 100)),
    "response_format": formats,
    "stream_options": record(include_usage=st.booleans()),
    "stop_token_ids": st.lists(st.integers(0, 300), max_size=3),
}
options = some(temperature=st.floats(0, 5), num_predict=few, stop=st.lists(words, max_size=2), seed=few)
ollama: dict[str, SearchStrategy[Any]] = {
    "stream": st.booleans(),
    "options": options,
    "format": st.sampled_from(["json", ""]) | schemas,
    "think": st.booleans() | st.just("high"),
    "keep_alive": st.just("5m") | few,
}


def body(
    asked: dict[str, SearchStrategy[Any]], **fields: SearchStrategy[Any]
) -> SearchStrategy[dict[str, Any]]:
    """A body that asks something, with some of the options."""
    return st.tuples(record(model=models, **asked), some(**fields)).map(lambda two: two[0] | two[1])


BODIES = {
    "/v1/chat/completions": body(
        {"messages": messages}, **completion, tools=tools, tool_choice=choices, logprobs=st.booleans(),
        parallel_tool_calls=st.booleans(), top_logprobs=few, reasoning_effort=st.just("none"),
        chat_template_kwargs=record(enable_thinking=st.booleans()), max_completion_tokens=few,
    ),
    "/v1/completions": body(
        {"prompt": words | st.lists(st.integers(0, 300), max_size=5)}, **completion, logprobs=few,
        echo=st.booleans(),
    ),
    "/v1/responses": body(
        {"input": words | items}, **sampling, instructions=words, max_output_tokens=few, tools=tools,
        tool_choice=choices, text=record(format=formats), store=st.booleans(), top_logprobs=few,
        metadata=st.dictionaries(words, words, max_size=2), previous_response_id=words,
        reasoning=record(effort=st.sampled_from(["none", "low"])), include=st.lists(words, max_size=2),
    ),
    "/v1/embeddings": body(
        {"input": words | st.lists(words, max_size=3)}, dimensions=few,
        encoding_format=st.sampled_from(["float", "base64"]),
    ),
    "/api/chat": body({"messages": messages}, **ollama, tools=tools),
    "/api/generate": body({"prompt": words}, **ollama, system=words, raw=st.booleans(), suffix=words),
    "/api/embed": body({"input": words | st.lists(words, max_size=3)}),
    "/api/show": some(model=models, name=models),
}  # fmt: skip
READ = (
    *("/v1/models", "/v1/models/general", "/health", "/api/tags", "/api/ps", "/api/version", "/", "/nowhere"),
    *(
        "/v1/responses/resp_x",
        "/v1/responses/",
        "/v1/models/%00%ff",
        "//",
        "/../etc/passwd",
        "/api/tags?x=%zz",
    ),
)


@st.composite
def spoilt(draw: st.DrawFn, document: bytes) -> bytes:
    """A document with one fault that no JSON encoder makes."""
    at = draw(st.integers(0, len(document)))
    fault = draw(
        st.sampled_from(
            [
                b"\xff",
                b"\x00",
                b'"',
                b"}",
                b"NaN",
                b"Infinity",
                b"1e999",
                b"9" * 5000,
                b"\\ud800",
                b"\xef\xbb\xbf",
            ]
        )
        | st.just(b"[" * 20_000)
        | st.just(b'{"a":' * 20_000)
    )
    return document[:at] + fault + document[draw(st.integers(at, len(document))) :]


@st.composite
def doubled(draw: st.DrawFn, document: dict[str, Any]) -> bytes:
    """A document whose keys come twice, with other values the second time."""
    written = json.dumps(document)[1:-1]
    again = ",".join(f"{json.dumps(key)}:{json.dumps(draw(anything))}" for key in document)
    return f"{{{','.join(text for text in (written, again) if text)}}}".encode()


def documents(right: SearchStrategy[dict[str, Any]]) -> SearchStrategy[bytes]:
    encoded = right.map(lambda document: json.dumps(document).encode())
    plain = anything.map(lambda document: json.dumps(document).encode())
    wrong = st.one_of(encoded.flatmap(spoilt), right.flatmap(doubled), plain, st.binary(max_size=50))
    return st.one_of(encoded, encoded, encoded, wrong)


headers = st.lists(
    st.sampled_from(
        [
            *("Content-Type: application/json", "Content-Type: text/plain", "Content-Encoding: gzip"),
            *("Origin: http://here", "Origin: null", "Origin: http://[", "Host: evil.example"),
            *("Authorization: Bearer x", "Authorization: \xff", "Idempotency-Key: one", "X-Request-ID: mine"),
            *("X-Request-ID: \xe9", "Accept: text/event-stream", "Content-Length: 7", "Content-Length: -1"),
            *("Transfer-Encoding: chunked", "Transfer-Encoding: gzip", "Upgrade: websocket"),
            *("Connection: keep-alive, close", "X-Long: " + "y" * 40_000, "X" * 40_000 + ": y"),
            *("No colon", " Folded: x", "Bad\x00Name: x", "Expect: 100-continue"),
        ]
    ),
    max_size=3,
)  # fmt: skip


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, bytes, bool]:
    """A path, the bytes of a request for it, and whether these are a request by HTTP's own rules."""
    if draw(st.integers(0, 4)):
        path = draw(st.sampled_from(sorted(BODIES)))
        content = draw(documents(BODIES[path]))
    else:
        path, content = draw(st.sampled_from(READ)), b""
    usual = "POST" if path in BODIES else "GET"
    method = draw(
        st.sampled_from([*[usual] * 30, "GET", "POST", "HEAD", "DELETE", "OPTIONS", "PUT", "TRACE", "x"])
    )
    framing = draw(st.sampled_from([*["whole"] * 6, "chunked", "odd head", "short", "broken chunk", "cut"]))
    line = f"{method} {path}"
    if framing == "chunked":
        data = chunked(draw, line, content)
    elif framing == "broken chunk":
        data = chunked(draw, line, content).replace(
            b"\r\n0\r\n", draw(st.sampled_from([b"\r\nzz\r\n", b"\r\n-1\r\n", b"0"]))
        )
    elif framing == "odd head":
        data = (
            request(line, content, *draw(headers))
            .decode("utf-8", "surrogateescape")
            .encode("utf-8", "surrogateescape")
        )
    else:
        data = request(line, content)
    if framing == "short":
        data = data.replace(b"Content-Length: ", b"Content-Length: 9")
    elif framing == "cut":
        data = data[: draw(st.integers(0, len(data)))]
    return path, data, framing in ("whole", "chunked")


def chunked(draw: st.DrawFn, line: str, content: bytes) -> bytes:
    head = (
        f"{line} HTTP/1.1\r\nHost: here\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    )
    edges = sorted({0, len(content), *draw(st.lists(st.integers(0, len(content)), max_size=3))})
    pieces = [content[a:b] for a, b in pairwise(edges)]
    return head + b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


# --- what is answered --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Iterator[tuple[Run[Any], Node, Crashes]]:
    """One node for all requests, what runs a coroutine beside it, and what its event loop complained of."""
    crashes: Crashes = []
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()
        site = runner.run(stack.enter_async_context(new_site(tmp_path_factory.mktemp("hostile"), tiny)))
        listen = ListenSlice(client=ANY, peer=ANY, metrics=None, http=ANY)
        limits = LimitsSlice(message_bytes_max=65_536, prompt_bytes_max=65_536)
        node = runner.run(site.start("general", listen=listen, limits=limits))
        runner.run(site.formed())
        site.engines["general"]._cost = FREE
        runner.get_loop().set_exception_handler(lambda _, context: crashes.append(context))
        yield runner.run, node, crashes
        assert status(runner.run(said(node, request("GET /health")))) == 200
        runner.run(idle(site))
        runner.run(stack.aclose())


ACCEPTED = {200, 400, 403, 404, 405, 409, 413, 429, 431, 501, 503}


@settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
@given(sent=requests())
def test_whatever_is_sent_is_answered_or_refused(
    running: tuple[Run[bytes], Node, Crashes], sent: tuple[str, bytes, bool]
) -> None:
    run, node, crashes = running
    path, data, whole = sent
    answer = run(said(node, data) if whole else said_and_left(node, data))
    if answer.startswith(b"HTTP/1.1 100"):
        answer = answer.partition(b"\r\n\r\n")[2]
    assert crashes == []
    if not answer and not whole:
        event("cut without an answer")
        return
    code = status(answer)
    event(f"{code}")
    assert code in ACCEPTED
    assert b'"code":"internal"' not in answer
    assert b"A defect of Fieldmesh" not in answer
    _, _, content = answer.partition(b"\r\n\r\n")
    if code >= 400 and whole and content:
        error = json.loads(content)["error"]
        told = error if path.startswith("/api") and isinstance(error, str) else error["message"]
        assert told and isinstance(told, str)


async def said_and_left(node: Node, data: bytes) -> bytes:
    """What is answered to somebody who leaves where nothing more comes for a moment."""
    reader, writer = await opened(node)
    answer = b""
    try:
        writer.write(data)
        with suppress(TimeoutError):
            while part := await asyncio.wait_for(reader.read(65_536), PATIENCE_S):
                answer += part
        writer.write_eof()
        async with asyncio.timeout(20):
            return answer + await reader.read()
    except OSError:
        return answer
    finally:
        writer.close()
