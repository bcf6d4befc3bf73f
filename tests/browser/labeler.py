"""A labeler in front of the page: one with a mouse, one with nothing but a keyboard.

Both rate a response by the number in its text, ``quality Q``, and rank by it: equal numbers are ties.
"""

from __future__ import annotations

import re
from typing import Any

from playwright.sync_api import Browser, Locator, Page, Response, expect


def quality(text: str) -> int:
    found = re.search(r"quality (\d)", text)
    assert found, text
    return int(found[1])


def wanted_ranks(texts: list[str]) -> list[int]:
    """The rank that each text must come out with."""
    best_first = sorted({quality(text) for text in texts}, reverse=True)
    return [best_first.index(quality(text)) + 1 for text in texts]


class Labeler:
    """A tab of the page, and every answer that the server acknowledged to it."""

    def __init__(self, browser: Browser, link: str, **context: Any) -> None:
        self.browser = browser
        self.link = link
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **context})
        self.acknowledged: list[str] = []
        self.errors: list[str] = []
        self.open()

    def open(self) -> None:
        """Open the personal link in a new tab."""
        self.page: Page = self.context.new_page()
        self.page.on("response", self._note)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(self.link)
        expect(self.page.locator("#task h1")).to_be_visible()

    def close_tab(self) -> None:
        expect(self.page.locator("#saved")).to_have_text("Draft saved")
        self.page.close()

    def _note(self, response: Response) -> None:
        if response.url.endswith(("/api/answer", "/api/skip")) and response.status == 200:
            self.acknowledged.append(response.request.post_data_json["key"])

    @property
    def title(self) -> str:
        return self.page.locator("#task h1").inner_text()

    @property
    def prompt(self) -> str:
        return self.page.locator(".prompt .text").inner_text()

    @property
    def done(self) -> int:
        return int(self.page.locator("#progress-text").inner_text().split()[0])

    @property
    def texts(self) -> list[str]:
        return self.page.locator(".card .text").all_inner_texts()

    def ladder(self) -> list[list[int]]:
        """The order on the page: levels from the best, each with the responses that share it."""
        return self.page.locator(".level").evaluate_all(
            "levels => levels.map(l => [...l.querySelectorAll('.chip')].map(c => Number(c.dataset.response)))"
        )

    def save(self) -> None:
        """Save, by whatever means, and wait for the next task."""
        before = self.done
        self.press_save()
        expect(self.page.locator("#progress-text")).to_have_text(re.compile(rf"^{before + 1} done"), timeout=30_000)

    def press_save(self) -> None:
        raise NotImplementedError

    def rate(self) -> None:
        raise NotImplementedError

    def order(self) -> None:
        raise NotImplementedError


class MouseLabeler(Labeler):
    """Clicks and drags; never touches the keyboard."""

    def press_save(self) -> None:
        self.page.click("#save")

    def rate(self) -> None:
        for index, text in enumerate(self.texts):
            self.page.locator(".card").nth(index).locator(".scale label").nth(quality(text) - 1).click()

    def order(self) -> None:
        """Best first, each below the last level, or onto it."""
        texts = self.texts
        ranks = wanted_ranks(texts)
        for response in sorted(range(len(texts)), key=ranks.__getitem__):
            levels = self.page.locator(".level").count()
            tied = levels >= ranks[response]
            target = self.page.locator(".level .rank").last if tied else self.page.locator(".gap").last
            self.drag(response, target)

    def drag(self, response: int, target: Locator) -> None:
        grip = self.page.locator(f".chip[data-response='{response}'] .grip")
        grip.scroll_into_view_if_needed()
        start, end = grip.bounding_box(), target.bounding_box()
        assert start
        assert end
        mouse = self.page.mouse
        mouse.move(start["x"] + start["width"] / 2, start["y"] + start["height"] / 2)
        mouse.down()
        mouse.move(end["x"] + end["width"] / 2, end["y"] + end["height"] / 2, steps=5)
        mouse.up()


class KeyboardLabeler(Labeler):
    """Presses keys and looks where the focus is; never touches the mouse."""

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    def focused(self) -> int | None:
        """The response whose chip has the focus."""
        found = self.page.evaluate("document.activeElement.closest('.chip')?.dataset.response ?? null")
        return None if found is None else int(found)

    def press_save(self) -> None:
        self.press("Control+Enter")

    def rate(self) -> None:
        self.press("k")  # from outside: the last one
        for text in reversed(self.texts):
            self.press(str(quality(text)), "k")

    def order(self) -> None:
        """Best first: Tab to a response that is not placed, Enter puts it last, Up ties it with the one above."""
        texts = self.texts
        ranks = wanted_ranks(texts)
        for place, response in enumerate(sorted(range(len(texts)), key=ranks.__getitem__)):
            self.press("l")
            for _ in texts:
                if self.focused() == response:
                    break
                self.press("Tab")
            assert self.focused() == response
            levels = len(self.ladder())
            self.press("Enter")
            if place and levels >= ranks[response]:
                self.press("ArrowUp")
            assert self.focused() == response  # the focus goes along
