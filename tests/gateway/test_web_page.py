"""The web page in a real browser. Goal: who can use a browser can ask, stop, and see who answered and why.

Method: Chromium at nodes in this process, whose model alone is fake; an answer takes so long, where that
matters, that it can only have been stopped.
"""

from __future__ import annotations

import asyncio

import pytest

from fieldmesh.engine import fake
from tests.gateway.browser import DESKTOP, PHONE, SMALL_PHONE, needs_browser, opened_tab
from tests.gateway.site import doors, slow_down, tiny, url
from tests.runtime.test_node import Site, idle

__all__ = ["doors", "tiny"]

pytestmark = [pytest.mark.browser, needs_browser]

CODING = "Write a function that adds two numbers"


@pytest.fixture(autouse=True)
def _answers_end_by_their_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake, "_END_EVERY_TOKENS", 10**9)


async def test_a_question_is_answered_and_the_page_says_by_whom_and_why(doors: Site) -> None:
    async with opened_tab(url(doors)) as tab:
        await tab.see("#where", "mesh test, through general")
        await tab.ask(CODING)
        said = await tab.answered()
        assert said.strip()
        meta = await tab.find(".meta").inner_text()
        assert meta.startswith("answered by code · first token after 0.")
        assert "tokens/s · 384 tokens" in meta
        await tab.page.click(".why summary")
        why = await tab.find(".why").inner_text()
        assert "By its words the question is about programming" in why
        assert "code: done in" in why
        assert "general: others are nearer to the wish" in why
        await tab.see("#requests .done", "general → code")
        assert (await tab.find("#spoken").inner_text()).split() == f"code answered: {said}".split()
        assert tab.complaints == []


async def test_a_conversation_goes_on_with_whom_is_chosen_and_begins_anew(doors: Site) -> None:
    async with opened_tab(url(doors)) as tab:
        await tab.page.select_option("#target", "general")
        for count in (1, 2):
            await tab.ask(CODING)
            await tab.answered()
            assert await tab.find(".answered").count() == count
            await tab.see(".meta", "answered by general")
        asked: list[object] = []
        tab.page.on("request", lambda made: asked.append(made.post_data_json) if made.post_data else None)
        await tab.page.click("#new")
        assert await tab.find(".answered").count() == 0
        await tab.see("#samples button", CODING)
        await tab.page.click("#samples button")
        await tab.answered()
        (body,) = asked
        assert isinstance(body, dict)
        assert body["messages"] == [{"role": "user", "content": CODING}]
        assert tab.complaints == []


@pytest.mark.parametrize("how", ["button", "escape"])
async def test_an_answer_is_stopped_and_the_engine_with_it(doors: Site, how: str) -> None:
    slow_down(doors, "code")
    async with opened_tab(url(doors)) as tab:
        await tab.ask(CODING)
        await tab.see(".meta", "code is answering")
        await tab.see(".box.well .slot.busy")
        if how == "button":
            await tab.page.click("#stop")
        else:
            await tab.page.keyboard.press("Escape")
        await tab.see(".problem.stopped", "Stopped.")
        await idle(doors)
        await tab.see("#requests .failed", "stopped by its asker")
        assert await tab.page.evaluate("document.activeElement.id") == "question"
        await tab.see("#send")
        assert tab.complaints == []


async def test_a_refusal_is_shown_in_the_words_of_the_api(doors: Site) -> None:
    async with opened_tab(url(doors)) as tab:
        await tab.ask("long " * 20_000)
        problem = await tab.see(".problem:not(:empty)")
        assert "tokens" in await problem.inner_text()
        assert await tab.find(".answered").count() == 1
        await tab.ask("short")
        assert await tab.answered()
        # The browser itself writes of every answer that is not 200.
        assert all("status of 400" in line for line in tab.complaints)


async def test_what_a_model_says_is_shown_and_never_obeyed(
    doors: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    nasty = b"<img src=x onerror=alert(1)>```js\nalert(2)\n``` & <script>alert(3)</script>"
    monkeypatch.setattr(fake.FakeModel, "piece", lambda _, token: nasty if token >= 256 else b"")
    async with opened_tab(url(doors)) as tab:
        tab.page.on("dialog", lambda dialog: tab.complaints.append(dialog.message))
        await tab.ask(CODING)
        assert "<img src=x onerror=alert(1)>" in await tab.answered()
        assert (await tab.find(".said pre").first.inner_text()).strip() == "alert(2)"
        assert await tab.find(".said img, .said script").count() == 0
        assert tab.complaints == []


async def test_the_page_can_be_used_by_keyboard_alone(doors: Site) -> None:
    async with opened_tab(url(doors), still=True) as tab:
        press = tab.page.keyboard.press
        await press("Tab")
        await tab.see(".skip:focus", "Skip to the question")
        await press("Enter")
        assert await tab.page.evaluate("document.activeElement.id") == "question"
        await tab.page.keyboard.type("first")
        await press("Shift+Enter")
        await tab.page.keyboard.type("second")
        assert await tab.page.input_value("#question") == "first\nsecond"
        await press("Enter")
        await tab.answered()
        await press("Shift+Tab")
        await press("Shift+Tab")
        assert await tab.page.evaluate("document.activeElement.id") == "target"
        seen = set()
        for _ in range(20):
            await press("Tab")
            seen.add(
                await tab.page.evaluate("document.activeElement.id || document.activeElement.textContent")
            )
            ring = await tab.page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
            assert ring == "solid" or await tab.page.evaluate("document.activeElement === document.body")
        assert {"question", "send", "new", "open"} <= seen
        assert tab.complaints == []


async def test_nobody_is_kept_out(doors: Site) -> None:
    async with opened_tab(url(doors)) as tab:
        assert await tab.barriers() == []
        await tab.ask(CODING)
        await tab.answered()
        await tab.page.click(".why summary")
        for size in (DESKTOP, PHONE, SMALL_PHONE):
            await tab.page.set_viewport_size({"width": size[0], "height": size[1]})
            for pane in ("chat",) if size == DESKTOP else ("mesh", "chat"):
                if size != DESKTOP:
                    await tab.page.click(f"[data-show={pane}]")
                    assert await tab.find("#question").is_visible() is (pane == "chat")
                for scheme in ("light", "dark"):
                    await tab.page.emulate_media(color_scheme=scheme)
                    assert await tab.barriers() == [], (size, pane, scheme)
                    assert await tab.overflow() <= 0, (size, pane)
        assert await tab.find("#send").is_visible()
        assert tab.complaints == []
        await tab.page.evaluate("document.querySelector('label[for=question]').remove()")
        assert any(line.startswith("label") for line in await tab.barriers())


async def test_many_nodes_are_drawn_apart(doors: Site) -> None:
    await asyncio.gather(*(doors.start(f"more-{number}", "health") for number in range(3)))
    async with opened_tab(url(doors)) as tab:
        for size in (DESKTOP, (900, 700), PHONE):
            await tab.page.set_viewport_size({"width": size[0], "height": size[1]})
            if size == PHONE:
                await tab.page.click("[data-show=mesh]")
            await tab.page.wait_for_function("document.querySelectorAll('.box').length === 5")
            boxes = [await box.bounding_box() for box in await tab.find(".box .frame").all()]
            assert not any(
                a and b and abs(a["x"] - b["x"]) < a["width"] and abs(a["y"] - b["y"]) < a["height"]
                for index, a in enumerate(boxes)
                for b in boxes[:index]
            )
            assert await tab.find("#nodes tr").count() == 5
