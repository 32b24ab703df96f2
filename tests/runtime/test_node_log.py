"""Whole nodes and the replicated configuration. Goal: a mesh agrees on what is configured, whoever joins
later, and a node whose log cannot work goes on answering. Method: as in ``test_node``: real listeners, real
channels, the real core, a fake model.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from fieldmesh.config import ConsensusSlice
from fieldmesh.core.errors import StateUnwritable
from fieldmesh.core.model import SeatKind
from fieldmesh.core.raft_model import Save
from fieldmesh.core.settings import Code
from fieldmesh.runtime.node import Node
from fieldmesh.runtime.raft_store import LOG_FILE
from fieldmesh.runtime.state import StateFolder
from tests.engine.tiny_model import write_tiny_model
from tests.runtime.council_lab import put
from tests.runtime.test_node import Site, new_site

FOUND = ConsensusSlice(found=True)


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with new_site(tmp_path, write_tiny_model(tmp_path / "tiny.gguf")) as made:
        yield made


async def seated(node: Node, kind: SeatKind) -> None:
    """Return when the node has this part in a log."""
    async with asyncio.timeout(20):
        while node.council.seat is None or node.council.seat.kind is not kind:
            await node.council.wait_changed()


async def knows_leader(node: Node) -> None:
    """Return when the node has heard who leads: a disk may keep an election longer than a write waits."""
    async with asyncio.timeout(20):
        while node.council.view is None or node.council.view.leader is None:
            await node.council.wait_changed()


async def has(node: Node, revision: int) -> None:
    async with asyncio.timeout(20):
        while node.council.state.revision < revision:
            await node.council.wait_changed()


async def answers(site: Site, name: str) -> None:
    async with site.client(name) as client:
        result = await client.chat("hello", max_tokens=2).result()
    assert result.completion_tokens == 2


async def test_nodes_find_the_log_that_one_of_them_founded(site: Site) -> None:
    one = await site.start("one", consensus=FOUND)
    await seated(one, SeatKind.VOTER)
    two, three = await site.start("two"), await site.start("three")
    for node in (two, three):
        await seated(node, SeatKind.OBSERVER)
    await knows_leader(three)
    outcome = await put(three.council, "app/x", 1)
    assert (outcome.code, outcome.revision) == (Code.DONE, 1)
    for node in (one, two, three):
        await has(node, 1)
    logs = {node.council.seat.log for node in (one, two, three) if node.council.seat}
    assert len(logs) == 1
    async with asyncio.timeout(20):
        view = one.view
        while sum(m.row is not None and m.row.seat is not None for m in view.members) < 3:
            view = await one._driver.wait_view_changed(view.revision)


async def test_without_a_founder_nodes_serve_and_agree_on_nothing(site: Site) -> None:
    await site.start("one")
    await site.start("two")
    await site.formed()
    await answers(site, "two")
    assert all(node.council.seat is None for node in site.nodes.values())


async def test_a_disk_that_refuses_the_log_does_not_stop_inference(site: Site) -> None:
    node = await site.start("one", consensus=FOUND)
    await seated(node, SeatKind.VOTER)
    await site.formed()

    def refuse(*saves: Save) -> None:
        raise StateUnwritable("no space left")

    store = node.council.host._store
    store.save = refuse  # type: ignore[method-assign]
    writing = asyncio.create_task(put(node.council, "app/x", 1, timeout_s=0.5))
    async with asyncio.timeout(20):
        while not node.council.status().stopped_why:
            await node.council.wait_changed()
    assert "no space left" in node.council.status().stopped_why
    await answers(site, "one")
    await asyncio.gather(writing, return_exceptions=True)


async def test_a_node_with_a_damaged_log_starts_serves_and_says_so(site: Site) -> None:
    folder = site.folder / "one"
    config = site.config("one")
    assert config.node.state_folder == str(folder)
    StateFolder.open(folder).close()
    (folder / LOG_FILE).write_bytes(b"not a database at all" * 100)
    node = await site.start("one")
    await site.formed()
    await answers(site, "one")
    assert "cannot be used" in node.council.status().stopped_why
