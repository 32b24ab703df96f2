"""Whole nodes that agree on a configuration. Goal: what is set through one node is obeyed by all without a
restart, the mesh looks after its voters itself, and a lone survivor can go on. Method: as in ``test_node``.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from fieldmesh.cli.app import run
from fieldmesh.client import Client
from fieldmesh.client.admin import Admin
from fieldmesh.config import ConsensusSlice
from fieldmesh.core.errors import ChangeRefused, InvalidRequest, QuotaExceeded
from fieldmesh.core.settings import Change
from fieldmesh.runtime.council_model import CouncilStatus
from fieldmesh.runtime.node import Node
from tests.engine.tiny_model import write_tiny_model
from tests.runtime.test_node import Site

QUICK = {"automatic": True, "stable_s": 0.5, "gone_s": 1.5}


class Mesh(Site):
    """Nodes that can be ended one by one."""

    lives: dict[str, AsyncExitStack]

    async def start(self, name: str, profile: str = "general", **slices: object) -> Node:
        everything, self.stack = self.stack, await self.stack.enter_async_context(AsyncExitStack())
        try:
            self.lives[name] = self.stack
            return await super().start(name, profile, **slices)
        finally:
            self.stack = everything

    async def close(self, name: str) -> None:
        """End a node without a goodbye that counts as one for good."""
        del self.nodes[name]
        await self.lives.pop(name).aclose()


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Mesh]:
    model = write_tiny_model(tmp_path / "tiny.gguf")
    async with AsyncExitStack() as stack:
        made = Mesh(folder=tmp_path, model=model, stack=stack, nodes={}, engines={})
        made.lives = {}
        yield made


async def founded(site: Mesh, *others: str) -> Node:
    """A mesh with one founder, ``a``, and others that follow."""
    founder = await site.start("a", consensus=ConsensusSlice(found=True))
    for name in others:
        await site.start(name)
    await site.formed()
    for node in site.nodes.values():
        await until(node, lambda status: status.leader is not None)
    return founder


async def until(node: Node, holds: Callable[[CouncilStatus], bool]) -> None:
    """Return when this holds of what ``node`` knows of the log."""
    async with asyncio.timeout(30):
        while not holds(node.council.status()):
            await asyncio.wait([asyncio.ensure_future(node.council.wait_changed())], timeout=0.2)


async def asked(node: Node, what: Callable[[Admin], Any]) -> Any:
    """Ask a node as an operator does."""

    def ask() -> Any:
        with Client([node.client_address]) as client:
            return what(Admin(client, author="ann"))

    return await asyncio.to_thread(ask)


async def put(node: Node, key: str, value: object) -> int:
    text = json.dumps(value)
    revision: int = await asked(node, lambda admin: admin.write([Change(key=key, value=text)]))
    return revision


async def seen(node: Node, revision: int) -> None:
    await until(node, lambda status: status.revision >= revision)


async def explained(site: Mesh, name: str, **target: str) -> Any:
    async with site.client(name) as client:
        return await client.chat("hello", max_tokens=2, explain=True, **target).result()


async def test_a_policy_set_through_one_node_is_the_policy_of_every_node(site: Mesh) -> None:
    founder = await founded(site, "b", "c")
    assert (await explained(site, "c")).explanation.policy == "expected-time"
    revision = await put(site.nodes["b"], "routing/policy", "round-robin")
    for name, node in site.nodes.items():
        await seen(node, revision)
        assert (await explained(site, name)).explanation.policy == "round-robin"
    revision = await asked(founder, lambda admin: admin.rollback(0)[0])
    await seen(site.nodes["c"], revision)
    assert (await explained(site, "c")).explanation.policy == "expected-time"


async def test_a_limit_set_through_one_node_binds_every_node(site: Mesh) -> None:
    await founded(site, "b")
    await seen(site.nodes["a"], await put(site.nodes["b"], "limits/output_tokens_max", 3))
    async with site.client("a") as client:
        with pytest.raises(InvalidRequest, match="3"):
            await client.chat("hello", max_tokens=4).result()
        assert (await client.chat("hello", max_tokens=3, ignore_eos=True).result()).completion_tokens == 3


async def test_a_quota_set_through_one_node_binds_its_tenant_at_every_node(site: Mesh) -> None:
    await founded(site, "b")
    revision = await put(site.nodes["b"], "quotas/ann", {"requests_per_minute": 1})
    for name, node in site.nodes.items():
        await seen(node, revision)
        async with site.client(name) as client:
            await client.chat("hello", max_tokens=2, tenant="ann").result()
            with pytest.raises(QuotaExceeded) as caught:
                await client.chat("hello", max_tokens=2, tenant="ann").result()
            assert 0 < (caught.value.retry_after_s or 0) <= 60
            await client.chat("hello", max_tokens=2, tenant="bob").result()
    revision = await put(site.nodes["a"], "quotas/ann", {"tokens_per_minute": 1})
    await seen(site.nodes["a"], revision)
    async with site.client("a") as client:
        await client.chat("hello", max_tokens=2, tenant="ann").result()
        with pytest.raises(QuotaExceeded, match="tokens_per_minute"):
            await client.chat("hello", max_tokens=2, tenant="ann").result()


async def test_the_mesh_says_who_owns_a_domain(site: Mesh) -> None:
    await site.start("code", "code")
    await founded(site)
    assert (await explained(site, "a", domain="programming")).served_by == "code"
    revision = await put(site.nodes["a"], "domains/programming", {"profiles": ["general"]})
    await seen(site.nodes["code"], revision)
    result = await explained(site, "code", domain="programming")
    assert (result.served_by, result.fallback) == ("a", False)


async def test_the_mesh_takes_in_voters_by_itself_and_gives_up_one_that_is_gone(site: Mesh) -> None:
    founder = await founded(site, "b", "c")
    await put(founder, "voters/policy", QUICK)
    await until(founder, lambda status: len(status.voters) == 3)
    assert founder.council.status().learners == ()
    async with asyncio.timeout(10):
        while not (await asked(founder, lambda admin: admin.status())).advice.startswith("3 voters"):
            pass
    away = site.nodes["c"].key.id
    await site.close("c")
    await until(founder, lambda status: status.learners != () and away not in status.voters)
    status = founder.council.status()
    assert (len(status.voters), len(status.learners)) == (1, 1)
    await put(founder, "app/x", 1)


async def test_a_leader_that_leaves_hands_its_office_over_first(site: Mesh) -> None:
    founder = await founded(site, "b", "c")
    await put(founder, "voters/policy", QUICK)
    await until(founder, lambda status: len(status.voters) == 3)
    term = founder.council.status().term
    await founder.drain(0.1, asyncio.Event())
    status = founder.council.status()
    assert status.leader in (site.nodes["b"].key.id, site.nodes["c"].key.id)
    assert status.term == term + 1


async def test_the_log_is_told_whom_the_mesh_misses(site: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    a = await founded(site, "b")
    missed: asyncio.Queue[str] = asyncio.Queue(1)
    monkeypatch.setattr(a.council.host, "doubt", lambda node: missed.full() or missed.put_nowait(node))
    gone = site.nodes["b"].key.id
    await site.close("b")
    async with asyncio.timeout(15):
        assert await missed.get() == gone


async def test_a_lone_survivor_goes_on_and_those_who_come_back_are_shown_the_way_in(site: Mesh) -> None:
    founder = await founded(site, "b", "c")
    await put(founder, "voters/policy", QUICK)
    await until(founder, lambda status: len(status.voters) == 3)
    await put(founder, "voters/policy", {**QUICK, "automatic": False})
    revision = await put(founder, "app/kept", 1)
    survivor = site.nodes["b"]
    await seen(survivor, revision)
    with pytest.raises(ChangeRefused, match="leader"):
        await asked(survivor, lambda admin: admin.recover())
    await site.close("a")
    with pytest.raises(ChangeRefused):  # c is still there: a leader or a voter that answers
        await asked(survivor, lambda admin: admin.recover(confirm=True))
    await site.close("c")
    await until(survivor, lambda status: status.leader is None)
    await until_gone(survivor)
    planned = await asked(survivor, lambda admin: admin.recover())
    assert (planned.done, planned.epoch, len(planned.given_up)) == (False, 1, 2)
    assert (await asked(survivor, lambda admin: admin.recover(confirm=True))).done
    await put(survivor, "app/x", 2)
    found = await asked(survivor, lambda admin: admin.all("app/", level="current"))
    assert {s.key: s.value for s in found.settings} == {"app/kept": 1, "app/x": 2}

    # Two of the three old voters would be a majority, if they did not hear of the new epoch.
    returned = [await site.start("a"), await site.start("c")]
    for back in returned:
        await until(back, lambda status: "raft forget" in status.stopped_why)
        assert not back.council.leading
        told = await asked(back, lambda admin: admin.status())
        assert told.stopped.startswith("the mesh went on without it")
    assert survivor.council.status().voters == (survivor.key.id,)
    found = await asked(returned[0], lambda admin: admin.get("app/x"))
    assert found.settings[0].value == 2  # it follows what counts now, although its own log rests

    await site.close("c")
    assert await asyncio.to_thread(run, ["raft", "forget", "--state-folder", str(site.folder / "c")]) == 0
    again = await site.start("c")
    await seen(again, survivor.council.state.revision)
    await put(again, "voters/policy", QUICK)
    await until(survivor, lambda status: status.learners == (again.key.id,))


async def until_gone(node: Node) -> None:
    """Return when ``node`` takes nobody else for alive."""
    view = node.view
    async with asyncio.timeout(20):
        while any(
            m.state.value in ("alive", "suspect", "unreachable") for m in view.members if m.id != node.key.id
        ):
            view = await node._driver.wait_view_changed(view.revision)
