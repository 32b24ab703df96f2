"""The web page's routes. Goal: a browser is given only what is ours, and what it watches is true and bounded.

Method: raw HTTP to one node with a fake engine, and to two where requests travel.
"""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from fieldmesh.core.model import NodeState
from fieldmesh.runtime import http_page
from fieldmesh.runtime.node import Node
from tests.gateway.site import doors, slow_down
from tests.runtime.test_http import error, header, node, opened, request, said, site, status
from tests.runtime.test_node import Site, idle, tiny

__all__ = ["doors", "node", "site", "tiny"]

ROOT = Path(__file__).resolve().parents[2]
CODING = "Write a function that adds two numbers"
FILES = sorted(path for path in http_page.FOLDER.iterdir())
BYTES = {path.name: path.read_bytes() for path in FILES}
DOCUMENT = (http_page.FOLDER / "index.html").read_text(encoding="utf-8")


def body(answer: bytes) -> bytes:
    return answer.partition(b"\r\n\r\n")[2]


def ask(text: str, *headers: str, **options: object) -> bytes:
    wanted = {"model": "auto", "messages": [{"role": "user", "content": text}], **options}
    return request("POST /v1/chat/completions", json.dumps(wanted).encode(), *headers)


class Watch:
    """A page that watches: the view as its events add up."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.nodes: dict[str, Any] = {}
        self.seen: dict[str, Any] = {}
        self.said: list[dict[str, Any]] = []

    @classmethod
    async def begin(cls, of: Node) -> Watch:
        reader, writer = await opened(of)
        writer.write(request("GET /mesh/events"))
        head = await reader.readuntil(b"\r\n\r\n")
        assert status(head) == 200
        assert header(head, "content-type") == ["text/event-stream; charset=utf-8"]
        return cls(reader, writer)

    async def event(self) -> dict[str, Any]:
        while not (line := await self._reader.readline()).startswith(b"data: "):
            assert line, "the stream has ended"
        change: dict[str, Any] = json.loads(line[6:])
        self.said.append(change)
        self.nodes.update(change.get("nodes", {}))
        self.seen.update(change)
        return change

    async def until(self, name: str, state: str) -> None:
        async with asyncio.timeout(20):
            while not any(n["name"] == name and n["state"] == state for n in self.nodes.values()):
                await self.event()

    async def leave(self) -> None:
        self._writer.close()
        await self._writer.wait_closed()


@pytest.fixture
async def watch(node: Node) -> AsyncIterator[Watch]:
    made = await Watch.begin(node)
    yield made
    await made.leave()


# --- files -------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.name))
async def test_every_file_is_served_and_asked_for_again_only_where_it_changed(node: Node, path: Path) -> None:
    where = "/" if path.name == "index.html" else f"/page/{path.name}"
    answer = await said(node, request(f"GET {where}"))
    assert (status(answer), body(answer)) == (200, BYTES[path.name])
    assert header(answer, "cache-control") == ["no-cache"]
    (tag,) = header(answer, "etag")
    same = await said(node, request(f"GET {where}", b"", f"If-None-Match: W/{tag}"))
    assert (status(same), body(same), header(same, "etag")) == (304, b"", [tag])
    other = await said(node, request(f"GET {where}", b"", 'If-None-Match: "older"'))
    assert status(other) == 200
    head = await said(node, request(f"HEAD {where}"))
    assert (status(head), body(head)) == (200, b"")
    assert header(head, "content-length") == [str(len(BYTES[path.name]))]


async def test_a_browser_is_told_to_load_and_run_nothing_else(node: Node) -> None:
    answer = await said(node, request("GET /"))
    (policy,) = header(answer, "content-security-policy")
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert header(answer, "x-content-type-options") == ["nosniff"]
    assert header(answer, "referrer-policy") == ["no-referrer"]


@pytest.mark.parametrize(
    "name", ["nothing.js", "..%2fhttp_page.py", "%2e%2e/http_page.py", "", "__init__.py"]
)
async def test_nothing_but_the_pages_files_is_served(node: Node, name: str) -> None:
    assert status(await said(node, request(f"GET /page/{name}"))) == 404


def test_the_page_needs_nothing_from_elsewhere_and_has_no_code_of_its_own_between_the_lines() -> None:
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert set(re.findall(r"\w+://[^\s\"'`)]*", text)) <= {"http://www.w3.org/2000/svg"}, path.name
    assert re.findall(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=", DOCUMENT) == []
    linked = set(re.findall(r"(?:src|href)=\"page/([^\"]+)\"", DOCUMENT))
    imported = {
        name
        for path in FILES
        if path.suffix == ".js"
        for name in re.findall(r'from "\./([^"]+)"', path.read_text(encoding="utf-8"))
    }
    assert linked | imported | {"index.html"} == {path.name for path in FILES}


def test_an_installed_node_has_the_page_too(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, timeout=60)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        names = set(packed.namelist())
    assert {f"fieldmesh/runtime/page/{path.name}" for path in FILES} <= names


NEWER = {
    "?.": r"\?\.(?!\d)",
    "??": r"\?\?",
    "spread of objects": r"\{\s*\.\.\.",
    "private names": r"#\w+\s*[=(;]",
    "at()": r"\.at\(",
    "replaceAll": r"\.(replaceAll|replaceChildren|flatMap|flat|matchAll|fromEntries)\(",
    "catch without a name": r"catch\s*\{",
    "big integers": r"\b\d+n\b",
    "markup": r"innerHTML|outerHTML|insertAdjacentHTML|document\.write",
}
NEWER_STYLES = {
    "selectors": r":(has|is|where)\(",
    "gap of flex boxes": r"(?<!-)\bgap:|inset:|aspect-ratio:",
    "functions": r"color-mix\(|\bclamp\(|\bmin\(|\bmax\(|light-dark\(|\bd[vh]{2}\b",
    "layers": r"@(layer|container|scope|property)",
}


def test_scripts_and_styles_use_only_what_browsers_of_2019_know() -> None:
    found = [
        f"{path.name}: {what}"
        for path in FILES
        for what, pattern in (NEWER if path.suffix == ".js" else NEWER_STYLES).items()
        if path.suffix in (".js", ".css") and re.search(pattern, path.read_text(encoding="utf-8"))
    ]
    assert found == []
    assert re.search(NEWER["?."], "a?.b")
    assert re.search(NEWER_STYLES["selectors"], "a:has(b)")


# --- the mesh ----------------------------------------------------------------------------


async def test_a_snapshot_is_the_nodes_view(node: Node) -> None:
    answer = await said(node, request("GET /mesh"))
    assert (status(answer), header(answer, "cache-control")) == (200, ["no-store"])
    found = json.loads(body(answer))
    assert found["local"] == node.key.id
    (own,) = found["nodes"].values()
    assert (own["name"], own["state"], own["engine"]) == ("general", "alive", "ready")
    assert own["pages"] == [f"http://clinic.example:{node.http_address.port}/"]  # as it is to be called
    assert found["log"]["role"] == "none"


async def test_a_page_that_watches_is_told_of_a_node_that_joins_and_of_its_leaving(
    site: Site, watch: Watch
) -> None:
    first = await watch.event()
    assert {"mesh", "local", "nodes", "log", "requests", "models"} <= first.keys()
    other = await site.start("code", "code")
    await watch.until("code", "alive")
    await other._driver.close()
    await watch.until("code", "left")
    assert all("mesh" not in change for change in watch.said[1:])


async def test_a_page_hears_the_node_also_where_nothing_changes(
    watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_page, "INTERVAL_S", 0.01)
    monkeypatch.setattr(http_page, "BEAT_S", 0.05)
    async with asyncio.timeout(20):
        while await watch.event():
            pass


async def test_pages_that_watch_are_bounded_and_one_that_leaves_makes_room(
    node: Node, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_page, "WATCHERS_MAX", 1)
    await watch.event()
    full = await said(node, request("GET /mesh/events"))
    assert (status(full), error(full)["code"]) == (429, "rate_limit_exceeded")
    assert header(full, "retry-after") == ["5"]
    await watch.leave()
    async with asyncio.timeout(20):
        while status(await said(node, request("GET /mesh/events"), "data: ")) == 429:
            pass


async def test_a_page_that_watches_does_not_keep_the_node_from_ending(site: Site, watch: Watch) -> None:
    await watch.event()
    async with asyncio.timeout(20):
        await site.stack.aclose()


# --- requests ----------------------------------------------------------------------------


async def test_a_request_is_seen_on_its_way_at_both_its_ends(doors: Site) -> None:
    slow_down(doors, "code")
    asked, asker = await opened(doors.nodes["general"])
    asker.write(ask(CODING, max_tokens=2000, ignore_eos=True, stream=True))
    await asked.readuntil(b"data: ")
    ends = {name: node.key.id for name, node in doors.nodes.items()}
    for end in doors.nodes.values():
        watch = await Watch.begin(end)
        await watch.event()
        (flow,) = watch.seen["requests"]
        assert (flow["entry"], flow["serving"]) == (ends["general"], ends["code"])
        assert (flow["state"], flow["profile"]) == ("running", "code")
        await watch.leave()
    watch = await Watch.begin(doors.nodes["general"])
    await watch.event()
    asker.close()
    async with asyncio.timeout(20):
        while watch.seen["requests"][0]["state"] == "running":
            await watch.event()
    (flow,) = watch.seen["requests"]
    assert (flow["state"], flow["code"]) == ("failed", "CANCELLED")
    await watch.leave()
    await idle(doors)


async def test_why_a_request_went_where_it_went_is_told_to_who_knows_its_id(doors: Site) -> None:
    entry = doors.nodes["general"]
    answer = await said(entry, ask(CODING, "X-Fieldmesh-Explain: 1", max_tokens=5))
    (made,) = header(answer, "x-request-id")
    document = json.loads(body(await said(entry, request(f"GET /mesh/requests/{made}"))))
    assert (document["domain"], document["classified_domain"]) == ("programming", "programming")
    assert document["classified_confidence"] > 0.5
    assert document["candidates"][0]["name"] == "code"
    assert document["candidates"][0]["eligible"]
    assert "done in" in document["candidates"][0]["reason"]
    assert [attempt["reason"] for attempt in document["attempts"]] == ["served"]
    snapshot = json.loads(body(await said(entry, request("GET /mesh"))))
    assert [flow["key"] for flow in snapshot["requests"]] == [document["key"]]
    assert made not in json.dumps(snapshot)
    unknown = await said(entry, request("GET /mesh/requests/none"))
    assert (status(unknown), error(unknown)["code"]) == (404, "request_not_found")


async def test_neither_questions_nor_answers_are_told(doors: Site) -> None:
    entry = doors.nodes["general"]
    answer = json.loads(body(await said(entry, ask(f"{CODING}, secretly", max_tokens=8, ignore_eos=True))))
    told = body(await said(entry, request("GET /mesh"))).decode()
    assert json.loads(told)["requests"][0]["tokens"] == 8
    assert "secretly" not in told
    assert answer["choices"][0]["message"]["content"] not in told


async def test_nodes_tell_each_other_where_their_pages_are(doors: Site) -> None:
    watch = await Watch.begin(doors.nodes["general"])
    async with asyncio.timeout(20):
        while not all(found["pages"] for found in watch.nodes.values()) or len(watch.nodes) < 2:
            await watch.event()
    pages = {found["name"]: found["pages"] for found in watch.nodes.values()}
    assert pages == {name: [f"http://{node.http_address}/"] for name, node in doors.nodes.items()}
    assert {found["state"] for found in watch.nodes.values()} == {NodeState.ALIVE.value}
    await watch.leave()
