"""The HTTP listener. Goal: whatever arrives, the node answers in the API's words or cuts the connection.

Method: raw bytes to one node with a fake engine.
"""

from __future__ import annotations

import asyncio
import json
import resource
import socket
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pytest

from fieldmesh.config import LimitsSlice, ListenSlice, NodeConfig
from fieldmesh.core.errors import ConfigError, Status
from fieldmesh.core.model import Address
from fieldmesh.rpc.errors import HTTP_STATUSES
from fieldmesh.runtime import http_door, http_server
from fieldmesh.runtime.http_protocol import BoundedProtocol
from fieldmesh.runtime.node import Node
from tests.runtime.test_node import ANY, Site, idle, new_site, tiny

__all__ = ["tiny"]

FRIEND = "https://friend.example"
ASK = b'{"model":"general","messages":[{"role":"user","content":"hello"}],"max_tokens":2000,"ignore_eos":true'


@pytest.fixture
async def site(tmp_path: Path, tiny: Path) -> AsyncIterator[Site]:
    async with new_site(tmp_path, tiny) as made:
        await made.start(
            "general",
            listen=ListenSlice(
                client=ANY, peer=ANY, metrics=None, http=ANY, http_origins=FRIEND, advertise="clinic.example"
            ),
            limits=LimitsSlice(message_bytes_max=65_536, prompt_bytes_max=65_536),
        )
        await made.formed()
        yield made


@pytest.fixture
def node(site: Site) -> Node:
    return site.nodes["general"]


async def opened(node: Node) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    assert node.http_address is not None
    return await asyncio.open_connection(node.http_address.host, node.http_address.port)


async def said(node: Node, data: bytes, until: str = "") -> bytes:
    """Everything that is answered until the connection is closed, or ``until`` was said."""
    reader, writer = await opened(node)
    writer.write(data)
    try:
        async with asyncio.timeout(20):
            return await (reader.readuntil(until.encode()) if until else reader.read())
    except asyncio.IncompleteReadError as short:
        return short.partial
    except ConnectionError:
        return b""
    finally:
        writer.close()


def request(line: str, body: bytes = b"", *headers: str) -> bytes:
    lines = [line + " HTTP/1.1", "Host: here", "Connection: close", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def error(answer: bytes) -> dict[str, str]:
    found: dict[str, str] = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    return found


def header(answer: bytes, name: str) -> list[str]:
    lines = answer.partition(b"\r\n\r\n")[0].decode().split("\r\n")[1:]
    return [line.partition(": ")[2] for line in lines if line.lower().startswith(name + ":")]


STREAM = b'{"model":"general","prompt":"x","stream":true,"max_tokens":1000,"ignore_eos":true}'
SCHEMA_OF_BYTES = ASK + b',"response_format":{"type":"json_object","schema":{"title":"\xff"}}}'
NONSENSE = [
    (request("GET /nowhere"), 404, "not_found"),
    (request("GET /v1/chat/completions"), 405, "method_not_allowed"),
    (request("DELETE /v1/models"), 405, "method_not_allowed"),
    (request("POST /v1/chat/completions"), 400, "invalid_request"),
    (request("POST /v1/chat/completions", b"{"), 400, "invalid_request"),
    (request("POST /v1/chat/completions", b"[" * 60_000), 400, "invalid_request"),
    (request("POST /v1/chat/completions", b'{"model":"\xff"}'), 400, "invalid_request"),
    (request("POST /v1/chat/completions", b'{"model":"\\ud800"}'), 400, "invalid_request"),
    (request("POST /v1/chat/completions", SCHEMA_OF_BYTES), 400, "invalid_request"),
    (request("POST /v1/chat/completions", b'{"messages":[]}'), 400, "invalid_request"),
    (request("POST /v1/completions", b'{"prompt":[1,"a"],"model":"general"}'), 400, "invalid_request"),
    (request("POST /v1/completions", b'{"prompt":[[-1]],"model":"general"}'), 400, "invalid_request"),
    (request("POST /v1/completions", b'{"prompt":[5]}'), 400, "invalid_request"),
    (request("POST /v1/completions", b'{"prompt":["a","b"]}'), 400, "unsupported_parameter"),
    (request("POST /v1/completions", b'{"prompt":"x","echo":true}'), 400, "unsupported_parameter"),
    (request("POST /v1/chat/completions", b"x" * 70_000), 413, "body_too_large"),
    (request("GET /health", b"", "Origin: https://evil.example"), 403, "origin_not_allowed"),
    (request("GET /health", b"", "Origin: null"), 403, "origin_not_allowed"),
    (request("GET /health", b"", "Origin: http://[evil"), 403, "origin_not_allowed"),
]


async def test_nonsense_is_refused_in_the_apis_words(node: Node) -> None:
    told = []
    for data, _, _ in NONSENSE:
        answer = await said(node, data)
        told.append((data, status(answer), error(answer)["code"]))
        assert header(answer, "x-request-id")
    assert told == NONSENSE
    assert status(await said(node, request("GET /health"))) == 200


async def test_a_body_in_parts_is_bounded_too(node: Node) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: here\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer = await said(node, head + b"8000\r\n" + b"x" * 0x8000 + b"\r\n" + b"9000\r\n" + b"x" * 0x9000)
    assert (status(answer), error(answer)["code"]) == (413, "body_too_large")
    assert status(await said(node, head + b"zz\r\n")) == 400


async def test_pages_of_its_own_and_of_friends_may_ask(node: Node) -> None:
    own = await said(node, request("GET /health", b"", "Origin: http://here"))
    friend = await said(node, request("GET /health", b"", f"Origin: {FRIEND}"))
    assert (status(own), header(own, "access-control-allow-origin")) == (200, [])
    assert (status(friend), header(friend, "access-control-allow-origin")) == (200, [FRIEND])
    asked = f"Origin: {FRIEND}", "Access-Control-Request-Method: POST"
    preflight = await said(node, request("OPTIONS /v1/chat/completions", b"", *asked))
    assert (status(preflight), header(preflight, "access-control-allow-origin")) == (200, [FRIEND])


@pytest.mark.parametrize(
    ("host", "welcome"),
    [
        *[(name, True) for name in ("127.0.0.1", "127.0.0.1:7480", "[::1]:7480", "10.1.2.3", "localhost:1")],
        *[(name, True) for name in ("general", "box.local", "box.lan:80", "BOX.LOCAL.", "a.b.internal")],
        *[(name, True) for name in ("friend.example", "clinic.example:443", "")],
        *[(name, False) for name in ("evil.example", "evil.example:7480", "127.0.0.1.evil.example")],
        *[(name, False) for name in ("local.evil.example", "evil.example.", "[evil.example]", "x.y:z")],
    ],
)
async def test_a_page_that_made_its_own_name_point_here_is_refused(
    node: Node, host: str, welcome: bool
) -> None:
    for origin in ("", f"Origin: http://{host}\r\n"):  # a browser sends none with the GETs of such a page
        head = f"GET /health HTTP/1.1\r\nHost: {host}\r\n{origin}Connection: close\r\n\r\n"
        answer = await said(node, head.encode())
        assert (status(answer) == 200) is welcome
        if not welcome:
            assert (status(answer), error(answer)["code"]) == (403, "host_not_allowed")


async def test_where_any_page_may_ask_no_name_is_refused(tmp_path: Path, tiny: Path) -> None:
    async with new_site(tmp_path, tiny) as made:
        listen = ListenSlice(client=ANY, peer=ANY, metrics=None, http=ANY, http_origins="*")
        node = await made.start("general", listen=listen)
        assert status(await said(node, b"GET /health HTTP/1.0\r\nHost: evil.example\r\n\r\n")) == 200


async def test_requests_of_one_user_or_one_key_share_a_tenant(
    site: Site, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    engine = site.engines["general"]
    submit = engine.submit
    monkeypatch.setattr(engine, "submit", lambda job: seen.append(job.tenant) or submit(job))
    ask = b'{"model":"general","prompt":"x","max_tokens":1,"num_predict":1%s}'
    keys = (
        "Authorization: Bearer sk-1",
        "Authorization: Bearer sk-1",
        "Authorization: Bearer sk-2",
        "X-No: key",
    )
    for key in keys:
        for path in ("/v1/completions", "/api/generate"):
            await said(node, request(f"POST {path}", ask % b"", key))
    users = b',"user":"ann"', b',"user":"Ann Smith"', b',"user":"ann","safety_identifier":"bo"'
    for user in users:
        await said(node, request("POST /v1/completions", ask % user, keys[0]))
    one, _, _, _, two, _, nobody, *_ = seen
    assert seen[:8] == [one] * 4 + [two] * 2 + [nobody] * 2
    assert (len({one, two}), nobody, seen[8], seen[10]) == (2, "", "ann", "bo")
    assert seen[9].startswith("user-")
    assert not any("sk-" in tenant or "Smith" in tenant for tenant in seen)


async def test_a_head_request_has_no_body(node: Node) -> None:
    answer = await said(node, request("HEAD /v1/models"))
    assert (status(answer), answer.partition(b"\r\n\r\n")[2]) == (200, b"")


async def test_ollamas_clients_find_the_server_alive_and_new_enough(node: Node) -> None:
    assert status(await said(node, request("HEAD /"))) == 200
    version = json.loads((await said(node, request("GET /api/version"))).partition(b"\r\n\r\n")[2])["version"]
    assert [int(part) for part in version.split(".")] >= [0, 6, 4]


async def test_a_head_that_is_too_large_or_no_http_is_refused(node: Node) -> None:
    huge = await said(node, b"GET /" + b"x" * 2 * http_server.HEAD_BYTES_MAX)
    assert status(huge) == 400
    assert status(await said(node, b"\x16\x03\x01 nonsense\r\n\r\n")) == 400


async def test_a_head_that_never_ends_is_cut(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "HEAD_TIMEOUT_S", 0.05)
    assert await said(node, b"GET /health HTTP/1.1\r\nX-Slow: ") == b""


async def dripped(node: Node, head: bytes, drop: bytes) -> bytes:
    """What is answered to who sends ``head``, and then ``drop`` again and again until nobody listens."""
    reader, writer = await opened(node)
    writer.write(head)

    async def drip() -> None:
        with suppress(OSError):
            while not writer.is_closing():
                writer.write(drop)
                await writer.drain()
                await asyncio.sleep(0)

    dripping = asyncio.create_task(drip())
    try:
        async with asyncio.timeout(20):
            return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.close()
        await dripping


async def test_a_head_in_drops_is_cut_all_the_same(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "HEAD_TIMEOUT_S", 0.05)
    assert await dripped(node, b"GET /health HTTP/1.1\r\nX: ", b"y") == b""
    assert status(await said(node, request("GET /health"))) == 200


async def test_a_body_in_drops_is_refused_all_the_same(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_door, "BODY_TIMEOUT_S", 0.05)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: here\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer = await dripped(node, head, b"1\r\nx\r\n")
    assert answer == b"" or (status(answer), error(answer)["code"]) == (408, "body_too_slow")
    assert status(await said(node, request("GET /health"))) == 200


@pytest.mark.parametrize(
    ("first", "answered"),
    [
        (b"HEAD /v1/models HTTP/1.1\r\nHost: here\r\nTransfer-Encoding: chunked\r\n\r\n", b"HTTP/1.1 "),
        (request("POST /v1/completions", STREAM).replace(b"Connection: close\r\n", b""), b"HTTP/1.1 200"),
    ],
)
async def test_nonsense_where_no_answer_can_be_given_is_cut_off_and_no_defect(
    site: Site, node: Node, first: bytes, answered: bytes
) -> None:
    crashes: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: crashes.append(context))
    reader, writer = await opened(node)
    writer.write(first)
    begun = await reader.readexactly(20) if b"stream" in first else b""
    writer.write(b"zz\r\n\r\nzz\r\n\r\n")
    async with asyncio.timeout(20):
        begun += await reader.read()
    writer.close()
    assert begun.startswith(answered)
    await idle(site)
    assert crashes == []


async def test_a_chunk_whose_own_head_never_ends_is_refused(node: Node) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: here\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer = await said(node, head + b"1;" + b"x" * 2 * http_server.HEAD_BYTES_MAX)
    assert not answer or status(answer) == 400
    assert status(await said(node, request("GET /health"))) == 200


async def test_a_silent_connection_is_closed(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "IDLE_TIMEOUT_S", 0.05)
    assert await said(node, b"") == b""


async def test_connections_that_are_too_many_are_told_so_and_then_cut(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "CONNECTIONS_MAX", 3)
    monkeypatch.setattr(http_server, "REFUSALS_MAX", 2)
    async with new_site(tmp_path, tiny) as made:
        node = await made.start("full", listen=ListenSlice(client=ANY, peer=ANY, metrics=None, http=ANY))
        held = [await opened(node) for _ in range(4)]
        assert status(await said(node, request("GET /health"))) == 503
        held.append(await opened(node))
        assert await said(node, request("GET /health")) == b""
        for _, writer in held:
            writer.close()
            await writer.wait_closed()
        assert status(await said(node, request("GET /health"))) == 200


@pytest.mark.parametrize(("files", "connections"), [(-1, 4096), (65_536, 4096), (1024, 512), (256, 128)])
def test_connections_leave_files_to_the_mesh(
    monkeypatch: pytest.MonkeyPatch, files: int, connections: int
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (files, files))
    assert http_server.connections_max() == connections


async def test_a_body_that_never_ends_is_refused(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_door, "BODY_TIMEOUT_S", 0.05)
    answer = await said(node, b"POST /v1/completions HTTP/1.1\r\nHost: here\r\nContent-Length: 9\r\n\r\n{")
    assert (status(answer), error(answer)["code"]) == (408, "body_too_slow")


async def test_a_reader_that_stops_is_cut_and_its_engine_freed(
    site: Site, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "WRITE_TIMEOUT_S", 0.05)
    line = request("POST /v1/chat/completions", ASK + b',"stream":true,"logprobs":true,"top_logprobs":20}')
    narrow = socket.socket()
    narrow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    narrow.setblocking(False)
    await asyncio.get_running_loop().sock_connect(narrow, _address(node))
    reader, writer = await asyncio.open_connection(sock=narrow, limit=1024)
    writer.write(line)
    begun = await reader.readexactly(100)
    assert begun.startswith(b"HTTP/1.1 200")
    await idle(site)
    async with asyncio.timeout(20):
        rest = await reader.read()
    writer.close()
    assert b"[DONE]" not in rest


def _address(node: Node) -> tuple[str, int]:
    assert node.http_address is not None
    return node.http_address.host, node.http_address.port


async def test_a_defect_is_answered_in_words_and_the_node_lives(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("seeded")

    monkeypatch.setattr(node._service, "ask", broken)
    answer = await said(node, request("POST /v1/chat/completions", ASK + b"}"))
    assert (status(answer), error(answer)["code"]) == (500, "internal")
    assert b"seeded" not in answer


async def test_a_node_that_leaves_fails_its_health(node: Node) -> None:
    node._service.drain()
    answer = await said(node, request("GET /health"))
    assert (status(answer), error(answer)["code"]) == (503, "draining")


async def test_nothing_listens_where_http_is_off(tmp_path: Path, tiny: Path) -> None:
    async with new_site(tmp_path, tiny) as made:
        off = await made.start("off", listen=ListenSlice(client=ANY, peer=ANY, metrics=None, http=None))
        assert off.http_address is None


def test_http_beyond_loopback_needs_the_words_for_it() -> None:
    wide = Address(host="0.0.0.0", port=7480)
    with pytest.raises(ConfigError) as caught:
        NodeConfig(listen=ListenSlice(http=wide)).validate()
    assert caught.value.field == "listen.http"
    NodeConfig(listen=ListenSlice(http=wide, insecure=True)).validate()
    with pytest.raises(ConfigError, match=r"listen\.http is 127\.0\.0\.1:7419, as another listener"):
        NodeConfig(listen=ListenSlice(http=Address(host="127.0.0.1", port=7419))).validate()


def test_every_status_of_ours_has_one_of_http() -> None:
    assert set(HTTP_STATUSES) == set(Status)


async def test_small_parts_are_sent_at_once(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once: list[int] = []
    made = BoundedProtocol.connection_made

    def connection_made(protocol: BoundedProtocol, transport: asyncio.Transport) -> None:
        accepted = transport.get_extra_info("socket")
        at_once.append(accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        made(protocol, transport)

    monkeypatch.setattr(BoundedProtocol, "connection_made", connection_made)
    assert status(await said(node, request("GET /health"))) == 200
    assert at_once == [1]


async def test_a_port_that_another_took_between_bind_and_listen_is_a_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def taken(*_: object) -> None:
        raise OSError(98, "Address already in use")

    monkeypatch.setattr(socket.socket, "listen", taken)
    async with http_server.listening(ANY, lambda: pytest.fail("no application is needed")) as address:
        assert address is None
