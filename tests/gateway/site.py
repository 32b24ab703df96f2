"""Two nodes whose HTTP doors are open: a generalist that is asked, and a programmer that is not."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from fieldmesh.config import ListenSlice
from tests.runtime.test_node import ANY, Site, new_site, tiny

__all__ = ["doors", "tiny", "url"]

OPEN = {"listen": ListenSlice(client=ANY, peer=ANY, metrics=None, http=ANY)}


@pytest.fixture
async def doors(tmp_path: Path, tiny: Path) -> AsyncIterator[Site]:
    async with new_site(tmp_path, tiny) as site:
        await site.start("general", "general", **OPEN)
        await site.start("code", "code", **OPEN)
        await site.formed()
        yield site


def url(site: Site, name: str = "general") -> str:
    """Where a node's HTTP door is."""
    return f"http://{site.nodes[name].http_address}"
