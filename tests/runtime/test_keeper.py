"""``fieldmesh models`` and its service. Goal: an operator sees and changes the models of exactly the node
that was asked. Method: the commands as a person gives them, against a whole node with fake engines,
which run in another thread.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from fieldmesh.cli.app import run
from fieldmesh.client.models import ModelKeeper
from fieldmesh.core.errors import InvalidRequest, NodeUnreachable
from fieldmesh.core.model import Address
from fieldmesh.runtime.node import Node
from tests.runtime.test_models import ROOM_FOR_ONE
from tests.runtime.test_node import Site, tiny

__all__ = ["tiny"]


@pytest.fixture
def node(tmp_path: Path, tiny: Path) -> Iterator[Node]:
    """A node with room for one of its two models, in an event loop of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    stop = asyncio.Event()

    async def live(started: asyncio.Future[Node]) -> None:
        async with AsyncExitStack() as stack:
            site = Site(folder=tmp_path, model=tiny, stack=stack, nodes={}, engines={})
            node = await site.start("both", "general,code", engine=ROOM_FOR_ONE)
            await site.formed()
            started.set_result(node)
            await stop.wait()

    async def begin() -> tuple[Node, asyncio.Task[None]]:
        started = asyncio.get_running_loop().create_future()
        life = asyncio.create_task(live(started))
        await asyncio.wait((started, life), return_when=asyncio.FIRST_COMPLETED)
        return started.result(), life

    async def end(life: asyncio.Task[None]) -> None:
        stop.set()
        await life

    node, life = asyncio.run_coroutine_threadsafe(begin(), loop).result(30)
    yield node
    asyncio.run_coroutine_threadsafe(end(life), loop).result(30)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def document(capsys: pytest.CaptureFixture[str]) -> Any:
    """The JSON document that a command printed, among lines that the node in this process logged."""
    out = capsys.readouterr().out
    return json.JSONDecoder().raw_decode(out[out.index("{\n") :])[0]


def test_models_are_listed_loaded_and_unloaded(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("--node", str(node.client_address))

    def states() -> dict[str, str]:
        assert run(["models", "list", *asked, "--json"]) == 0
        found = document(capsys)
        assert found["budget_bytes"] == ROOM_FOR_ONE.memory_mib_max << 20
        return {model["profile"]: model["state"] for model in found["models"]}

    assert states() == {"general": "ready", "code": "cold"}
    assert run(["models", "load", "code", *asked]) == 0
    assert "code: ready\n" in capsys.readouterr().out
    assert states() == {"general": "cold", "code": "ready"}
    assert run(["models", "unload", "code", *asked, "--json"]) == 0
    assert document(capsys)["state"] == "cold"
    assert run(["models", "list", *asked]) == 0
    assert "general" in capsys.readouterr().out


def test_a_model_in_use_and_a_profile_of_nobody_are_refused(
    node: Node, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("--node", str(node.client_address))
    node.models._loading._models["general"].users += 1
    assert run(["models", "unload", "general", *asked]) == 1
    assert "[MODEL_IN_USE]" in capsys.readouterr().err
    node.models._loading._models["general"].users -= 1
    for command in ("load", "unload", "verify"):
        assert run(["models", command, "nobody", *asked]) == 4
        assert "it serves general, code" in capsys.readouterr().err


def test_verify_tells_a_changed_file_by_its_exit_code(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("--node", str(node.client_address))
    hosted = node.models.hosted["code"]
    assert run(["models", "verify", "code", *asked, "--json"]) == 0
    verified = document(capsys)
    assert verified["same"] and verified["found"] == hosted.fingerprint
    hosted.fingerprint = "0" * 64
    assert run(["models", "verify", "code", *asked]) == 1
    assert "not the one on record" in capsys.readouterr().out


def test_nobody_answers_in_the_place_of_the_node_that_was_named(node: Node) -> None:
    with ModelKeeper(Address(host="127.0.0.1", port=9)) as keeper, pytest.raises(NodeUnreachable):
        keeper.list()
    with ModelKeeper(node.client_address) as keeper, pytest.raises(InvalidRequest):
        keeper.unload("")
