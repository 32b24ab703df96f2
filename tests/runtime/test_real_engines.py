"""What an engine can do reaches the caller through another node.

Goal: nothing that a request says, and nothing that an answer holds, is lost on a hop. Method: two whole nodes
in this process over the real llama.cpp with a tiny model.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from fieldmesh.client import AsyncClient
from fieldmesh.core.errors import ConstraintInvalid
from fieldmesh.runtime.node import running
from tests.engine.tiny_model import write_tiny_model
from tests.runtime.test_node import ONCE, Site, new_site

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    folder = tmp_path_factory.mktemp("real")
    async with new_site(folder, write_tiny_model(folder / "tiny.gguf")) as site:
        for name in ("general", "code"):
            site.nodes[name] = await site.stack.enter_async_context(running(site.config(name, name)))
        await site.formed()
        yield site


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(mesh: Site) -> AsyncIterator[AsyncClient]:
    """Asks the generalist; what demands the profile `code` goes over a hop."""
    async with AsyncClient(mesh.nodes["general"].client_address, persistence=ONCE) as made:
        yield made


async def test_a_constraint_holds_over_a_hop(client: AsyncClient) -> None:
    stream = client.chat("hello", profile="code", regex="(field|mesh){3}", max_tokens=50, temperature=1.0)
    result = await stream.result()
    assert (result.served_by, result.hops) == ("code", 1)
    assert re.fullmatch("(field|mesh){3}", result.text)


async def test_a_schema_that_cannot_be_enforced_is_refused_over_a_hop(client: AsyncClient) -> None:
    with pytest.raises(ConstraintInvalid, match="not") as caught:
        await client.chat("hello", profile="code", json_schema={"not": {}}).result()
    assert caught.value.field == "sampling_params.json_schema"
