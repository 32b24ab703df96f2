"""The web page over a real mesh: real nodes, the real model, a real browser; nodes die while it is open."""

from __future__ import annotations

import os
import signal
import subprocess

import pytest

from tests.cli.test_real_mesh import FIRST_PORT, QUESTION, mesh, node_process
from tests.gateway.browser import needs_browser, opened_tab

__all__ = ["mesh"]

pytestmark = [pytest.mark.browser, pytest.mark.mesh, needs_browser]

PAGE = f"http://127.0.0.1:{FIRST_PORT + 60}/"
OTHER_PAGE = f"http://127.0.0.1:{FIRST_PORT + 64}/"


async def test_the_death_of_who_served_is_seen_and_another_answers(mesh: subprocess.Popen[str]) -> None:
    async with opened_tab(PAGE) as tab:
        assert await tab.find(".box.well").count() == 3
        await tab.ask(QUESTION)
        await tab.see(".said:not(:empty)")
        assert await tab.answered()
        await tab.see(".meta", "answered by code")

        node_process(mesh, "code").kill()
        await tab.see("#events .dead", "code was found dead")
        await tab.see(".box.dead .name", "code")
        await tab.see("#alive", "2 of 3 nodes alive")
        await tab.see("#nodes .dead", "code")

        await tab.ask("And in one line?")
        assert await tab.answered()
        assert "answered by code" not in await tab.find(".meta").last.inner_text()
        assert tab.complaints == []


async def test_the_death_of_the_pages_own_node_is_told_with_the_others_and_its_return_is_noticed(
    mesh: subprocess.Popen[str],
) -> None:
    own = node_process(mesh, "general").pid
    async with opened_tab(PAGE) as tab:
        os.kill(own, signal.SIGSTOP)
        try:
            gone = await tab.see("#gone", "general does not answer.", timeout_s=30)
        finally:
            os.kill(own, signal.SIGCONT)
        assert await gone.get_by_role("link", name="health").get_attribute("href") == OTHER_PAGE
        await tab.page.wait_for_selector("#gone", state="hidden")
        await tab.see("#events .alive", "answers again")

        node_process(mesh, "general").kill()
        await tab.see("#gone", "general does not answer.", timeout_s=30)
        await tab.ask(QUESTION)
        await tab.see(".problem", "The node did not answer")
        async with tab.page.context.expect_page() as opening:
            await tab.page.click("#gone >> text=health")
        other = await opening.value
        await other.wait_for_selector("#link.live")
        await other.fill("#question", QUESTION)
        await other.press("#question", "Enter")
        await other.wait_for_selector(".meta:has-text('answered by')")
        # That the node is gone is written by the browser itself, and nothing else.
        assert [line for line in tab.complaints if "net::ERR" not in line] == []
