"""What a node tells Prometheus. Goal: names and numbers are right, labels are few, the listener is bounded.

Method: whole nodes on loopback with a fake engine, asked through the client and scraped over HTTP.
"""

from __future__ import annotations

import asyncio
import shutil
import socket
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from fieldmesh.config import ListenSlice, NodeConfig
from fieldmesh.core.errors import ConfigError, FieldmeshError
from fieldmesh.core.model import Address
from fieldmesh.runtime import scrapes
from fieldmesh.runtime.node import Node
from tests.runtime.test_node import ANY, Site, new_site, tiny

__all__ = ["tiny"]

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]
GENERAL = (("model_name", "tiny"), ("profile", "general"))
WATCHED = {"listen": ListenSlice(client=ANY, peer=ANY, metrics=ANY)}


def fetch(address: Address | None, path: str = "/metrics", method: str = "GET") -> tuple[str, str]:
    """The body of an answer, and its content type."""
    assert address is not None
    request = urllib.request.Request(f"http://{address}{path}", method=method)
    with urllib.request.urlopen(request, timeout=10) as response:
        return response.read().decode(), response.headers["Content-Type"]


async def scrape(node: Node) -> Samples:
    page, _ = await asyncio.to_thread(fetch, node.metrics_address)
    return {
        (sample.name.removeprefix("fieldmesh_"), tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }


def moved(before: Samples, after: Samples, name: str, **labels: str) -> float:
    key = (name, tuple(sorted(labels.items())))
    return after[key] - before.get(key, 0.0)


async def new_pair(site: Site) -> tuple[Node, Node]:
    general = await site.start("general", "general", **WATCHED)
    code = await site.start("code", "code", **WATCHED)
    await site.formed()
    return general, code


async def test_an_answer_moves_the_numbers_of_both_nodes(tmp_path: Path, tiny: Path) -> None:
    async with new_site(tmp_path, tiny) as site:
        general, code = await new_pair(site)
        before, before_code = await scrape(general), await scrape(code)
        async with site.client("general") as client:
            for profile in ("general", "code"):
                result = await client.chat("hello", profile=profile, max_tokens=20, ignore_eos=True).result()
                assert result.completion_tokens == 20
            with pytest.raises(FieldmeshError):
                await client.chat("hello", profile="nobody").result()
            await client.nodes()
        after, after_code = await scrape(general), await scrape(code)
    models = {"model_name": "tiny", "profile": "general"}, {"model_name": "tiny", "profile": "code"}
    chat = "fieldmesh.v1.InferenceService.Chat"
    forward = "fieldmesh.v1.PeerService.Forward"
    for model, sums in zip(models, ((before, after), (before_code, after_code)), strict=True):
        assert moved(*sums, "generation_tokens_total", **model) == 20
        assert moved(*sums, "prompt_tokens_total", **model) > 0
        assert moved(*sums, "prefix_cache_queries_total", **model) > 0
        assert moved(*sums, "request_success_total", **model, finished_reason="length") == 1
        assert moved(*sums, "engine_step_seconds_count", **model, phase="prefill") == 1
        assert moved(*sums, "engine_step_seconds_count", **model, phase="decode") == 19
        assert moved(*sums, "inter_token_latency_seconds_count", **model) == 19
        assert moved(*sums, "request_queue_time_seconds_count", **model) == 1
    assert moved(before, after, "requests_total", method=chat, code="OK") == 2
    assert moved(before, after, "requests_total", method=chat, code="PROFILE_NOT_FOUND") == 1
    assert moved(before_code, after_code, "requests_total", method=forward, code="OK") == 1
    assert moved(before, after, "routing_decisions_total", reason="profile", result="local") == 1
    assert moved(before, after, "routing_decisions_total", reason="profile", result="peer") == 1
    assert moved(before, after, "time_to_first_token_seconds_count", route="local") == 1
    assert moved(before, after, "e2e_request_latency_seconds_count", route="forwarded") == 1
    assert moved(before_code, after_code, "e2e_request_latency_seconds_count", route="for_peer") == 1
    for sums, peer in (((before, after), code), ((before_code, after_code), general)):
        for direction in ("sent", "received"):
            assert moved(*sums, f"peer_{direction}_bytes_total", peer=peer.key.id, lane="tokens") > 0
            assert after[(f"peer_{direction}_bytes_total", (("lane", "control"), ("peer", code.key.id)))] > 0
    assert after[("peers", (("state", "alive"),))] == 1
    assert after[("engine_state", (*models[0].items(), ("state", "ready")))] == 1


async def test_a_repeated_prompt_shows_as_cache_hits(tmp_path: Path, tiny: Path) -> None:
    async with new_site(tmp_path, tiny) as site:
        node = await site.start("general", **WATCHED)
        await site.formed()
        async with site.client("general") as client:
            for _ in range(2):
                await client.generate("x" * 100, max_tokens=2, ignore_eos=True).result()
        sums = await scrape(node)
    hits = sums[("prefix_cache_hits_total", GENERAL)]
    assert 90 <= hits <= sums[("prefix_cache_queries_total", GENERAL)] / 2


async def test_a_lost_engine_shows_as_its_state_and_then_as_a_restart(tmp_path: Path, tiny: Path) -> None:
    async with new_site(tmp_path, tiny) as site:
        node = await site.start("general", **WATCHED)
        await site.formed()
        site.engines["general"].lose()
        lost = await scrape(node)
        site.engines["general"].recover()
        back = await scrape(node)
    assert lost[("engine_state", (*GENERAL, ("state", "lost")))] == 1
    assert lost[("engine_restarts_total", GENERAL)] == 0
    assert back[("engine_restarts_total", GENERAL)] == 1


async def test_promtool_finds_nothing_to_say(tmp_path: Path, tiny: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("PROMTOOL IS MISSING: the metrics were not checked (Debian: package prometheus)")
    async with new_site(tmp_path, tiny) as site:
        general, _ = await new_pair(site)
        async with site.client("general") as client:
            await client.chat("hello", profile="code", max_tokens=5).result()
        page, _ = await asyncio.to_thread(fetch, general.metrics_address)
    process = await asyncio.create_subprocess_exec(
        promtool, "check", "metrics", stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    said, _ = await process.communicate(page.encode())
    assert (process.returncode, said.decode()) == (0, "")


async def test_the_page_lists_what_the_manual_lists(tmp_path: Path, tiny: Path) -> None:
    manual = (Path(__file__).parents[2] / "deploy" / "METRICS.md").read_text()
    listed = {line.split("`")[1] for line in manual.splitlines() if line.startswith("| `fieldmesh_")}
    async with new_site(tmp_path, tiny) as site:
        node = await site.start("general", **WATCHED)
        page, content_type = await asyncio.to_thread(fetch, node.metrics_address)
    assert content_type.startswith("text/plain")
    shown = {line.split()[2] for line in page.splitlines() if line.startswith("# TYPE fieldmesh_")}
    assert shown == listed


async def test_nothing_listens_where_metrics_are_off(tmp_path: Path, tiny: Path) -> None:
    async with new_site(tmp_path, tiny) as site:
        node = await site.start("general", listen=ListenSlice(client=ANY, peer=ANY, metrics=None))
        assert node.metrics_address is None


async def test_a_taken_port_does_not_keep_a_node_from_answering(tmp_path: Path, tiny: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = Address(host="127.0.0.1", port=taken.getsockname()[1])
        async with new_site(tmp_path, tiny) as site:
            node = await site.start("general", listen=ListenSlice(client=ANY, peer=ANY, metrics=address))
            await site.formed()
            assert node.metrics_address is None


def test_metrics_beyond_loopback_need_the_words_for_it() -> None:
    wide = Address(host="0.0.0.0", port=7419)
    with pytest.raises(ConfigError) as caught:
        NodeConfig(listen=ListenSlice(metrics=wide)).validate()
    assert caught.value.field == "listen.metrics"
    NodeConfig(listen=ListenSlice(metrics=wide, insecure=True)).validate()


# --- the listener ------------------------------------------------------------------------


async def said(address: Address, data: bytes) -> bytes:
    """What the listener answers to these bytes."""
    reader, writer = await asyncio.open_connection(address.host, address.port)
    writer.write(data)
    try:
        async with asyncio.timeout(10):
            return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.close()


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        (b"GET /metrics HTTP/1.1", b"200"),
        (b"HEAD /metrics HTTP/1.0", b"200"),
        (b"GET /metrics?x=1 HTTP/1.1", b"200"),
        (b"POST /metrics HTTP/1.1", b"405"),
        (b"GET / HTTP/1.1", b"404"),
        (b"\xff\x00 nonsense", b"404"),
    ],
)
async def test_only_the_page_is_served(request_line: bytes, status: bytes) -> None:
    async with scrapes.listening(ANY, lambda _: (b"x 1\n", "text/plain")) as address:
        assert address is not None
        answer = await said(address, request_line + b"\r\nHost: x\r\n\r\n")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.split()[1] == status
    assert body == (b"x 1\n" if status == b"200" and request_line.startswith(b"GET") else b"")


async def test_the_scraper_says_which_format_it_takes() -> None:
    async with scrapes.listening(ANY, lambda accept: (accept.encode(), "text/plain")) as address:
        assert address is not None
        answer = await said(address, b"GET /metrics HTTP/1.1\r\nACCEPT: this one\r\n\r\n")
    assert answer.endswith(b"\r\n\r\nthis one")


async def test_a_request_without_end_is_not_read_for_ever() -> None:
    async with scrapes.listening(ANY, lambda _: (b"", "text/plain")) as address:
        assert address is not None
        assert await said(address, b"GET /metrics" + b"x" * (2 * scrapes.HEAD_BYTES_MAX)) == b""


async def test_a_silent_connection_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scrapes, "TIMEOUT_S", 0.05)
    async with scrapes.listening(ANY, lambda _: (b"", "text/plain")) as address:
        assert address is not None
        assert await said(address, b"GET /met") == b""


async def test_more_connections_than_a_few_are_refused() -> None:
    async with scrapes.listening(ANY, lambda _: (b"x 1\n", "text/plain")) as address:
        assert address is not None
        idle = [
            await asyncio.open_connection(address.host, address.port) for _ in range(scrapes.CONNECTIONS_MAX)
        ]
        assert await said(address, b"GET /metrics HTTP/1.1\r\n\r\n") == b""
        for _, writer in idle:
            writer.close()
