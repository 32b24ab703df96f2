"""Two nodes whose HTTP doors are open: a generalist that is asked, and a programmer that is not."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from fieldmesh.config import ListenSlice
from fieldmesh.engine.cost import CostModel
from fieldmesh.engine.fake import FakeModel, FakeSampler
from tests.runtime.test_node import ANY, Site, new_site, tiny

__all__ = ["doors", "say", "slow_down", "tiny", "url"]

OPEN = {"listen": ListenSlice(client=ANY, peer=ANY, metrics=None, http=ANY)}


@pytest.fixture
async def doors(tmp_path: Path, tiny: Path) -> AsyncIterator[Site]:
    async with new_site(tmp_path, tiny) as site:
        await site.start("general", "general", **OPEN)
        await site.start("code", "code", **OPEN)
        await site.formed()
        yield site


def slow_down(site: Site, name: str) -> None:
    """Let an answer of 2,000 tokens take twice as long as ``idle`` waits: it can only have been stopped."""
    site.engines[name]._cost = CostModel(step_base_s=0.01, decode_row_s=0.0, prefill_token_s=0.0)


def url(site: Site, name: str = "general") -> str:
    """Where a node's HTTP door is."""
    return f"http://{site.nodes[name].http_address}"


def say(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Let every answer be ``text``, a byte a token, for what is done with it is not the model's doing."""
    (end,) = FakeModel.end_tokens
    tokens = [*text.encode(), end]
    monkeypatch.setattr(FakeSampler, "_token", lambda _, index: tokens[min(index, len(tokens) - 1)])
