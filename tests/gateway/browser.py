"""A real browser for tests of the web page: Debian's Chromium, driven by Playwright."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from axe_playwright_python.async_playwright import Axe
from playwright.async_api import ConsoleMessage, Locator, Page, async_playwright

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DESKTOP = (1280, 800)
PHONE = (390, 844)
SMALL_PHONE = (320, 568)

needs_browser = pytest.mark.skipif(
    CHROMIUM is None,
    reason="NO CHROMIUM: the web page was not tested in a browser (apt-get install chromium)",
)


class Tab:
    """One page in a browser of its own, and what its console complained of."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.complaints: list[str] = []
        page.on("console", self._heard)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))

    def _heard(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def find(self, selector: str) -> Locator:
        return self.page.locator(selector)

    async def see(self, selector: str, text: str = "", timeout_s: float = 20.0) -> Locator:
        """The first element of this kind with this text, as soon as it can be seen."""
        found = (
            self.page.locator(selector, has_text=text).first if text else self.page.locator(selector).first
        )
        await found.wait_for(timeout=timeout_s * 1000)
        return found

    async def ask(self, question: str) -> None:
        await self.page.fill("#question", question)
        await self.page.press("#question", "Enter")

    async def answered(self, timeout_s: float = 60.0) -> str:
        """What the latest answer says, when it has ended."""
        await self.page.wait_for_selector("[data-running]", state="detached", timeout=timeout_s * 1000)
        return await self.find(".answered .said").last.inner_text()

    async def barriers(self) -> list[str]:
        """What axe-core finds that keeps people out."""
        found = await Axe().run(self.page)
        return [
            f"{violation['id']}: {node['html'][:120]}"
            for violation in found.response["violations"]
            for node in violation["nodes"]
        ]

    async def overflow(self) -> int:
        """Pixels by which the page is wider than its window."""
        wide = await self.page.evaluate("document.scrollingElement.scrollWidth - window.innerWidth")
        assert isinstance(wide, int)
        return wide


@asynccontextmanager
async def opened_tab(url: str, *, still: bool = False) -> AsyncIterator[Tab]:
    """``url`` when it shows the mesh; ``still`` for who wants nothing to move."""
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox"] if os.geteuid() == 0 else [],  # Chromium has none for root
        )
        page = await browser.new_page(
            viewport={"width": DESKTOP[0], "height": DESKTOP[1]},
            reduced_motion="reduce" if still else "no-preference",
        )
        tab = Tab(page)
        await page.goto(url)
        await tab.see("#link", "live")
        yield tab
        await browser.close()
