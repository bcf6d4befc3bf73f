"""The page itself: all kinds of tasks, hostile texts, what screen readers are told, phones, and the order's steps."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lit_instruct.feedback.guidelines import parse_markdown
from lit_instruct.feedback.store import Store
from lit_instruct.feedback.tasks import read_task
from tests.helpers.labelling import rank_row, rank_tasks, serving

pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
from playwright.sync_api import expect

from tests.browser.labeler import KeyboardLabeler, MouseLabeler

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

HOSTILE = [
    "<script>document.title='owned'</script><b onclick=\"document.title='owned'\">x</b>",
    "<img src=x onerror=\"document.title='owned'\"> <svg onload=document.title='owned'>",
    "\u202egnp.exe \u2066isolate \u200f right to left \u05d0\u05d1",
    "nul \0 and bell \x07\ttab\nline",
    "javascript:alert(1) ${alert(1)} {{alert(1)}} ]]> --> &lt;b&gt;",
    "x" * 1_000_000,
]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "labels.sqlite") as opened:
        yield opened


def link_of(client: Any) -> str:
    return f"{client.page}#{client.token}"


def test_hostile_texts_are_shown_and_nothing_else(browser: Browser, store: Store) -> None:
    store.add_tasks([read_task(rank_row(1) | {"prompt": HOSTILE[0], "responses": HOSTILE})])
    guidelines = parse_markdown("# G\n\n" + HOSTILE[1] + "\n\n[x](javascript:document.title='owned')")
    guidelines.append({"tag": "script", "children": ["document.title='owned'"]})
    guidelines.append({"tag": "a", "href": "javascript:document.title='owned'", "children": ["y"]})
    with serving(store, ["ann"], guidelines=guidelines) as clients:
        ann = MouseLabeler(browser, link_of(clients["ann"]))
        page, dialogs, asked = ann.page, [], []
        page.on("dialog", lambda dialog: dialogs.append(dialog.message))
        page.on("request", lambda request: asked.append(request.url))
        shown = page.locator(".card .text").evaluate_all("nodes => nodes.map(node => node.textContent)")
        pictured = [text.replace("\0", "\u2400").replace("\x07", "\u2407") for text in HOSTILE]
        assert sorted(shown) == sorted(pictured)
        assert page.locator(".text *").count() == 0  # texts hold no elements
        page.click("#guidelines-button")
        assert page.locator("#guidelines-text").locator("script, img, svg, a[href^=java]").count() == 0
        page.get_by_text("y", exact=True).click()
        page.keyboard.press("Escape")
        for index in range(len(HOSTILE)):
            page.locator(".card").nth(index).locator(".scale label").nth(3).click()
        page.get_by_role("button", name="Order by rating").click()
        ann.save()
        assert page.title() == "Labelling: ann"
        assert page.evaluate("document.documentElement.scrollWidth") <= 1280
        assert not dialogs
        assert not ann.errors
        assert all(url.startswith(clients["ann"].page) for url in asked)
    assert len(store.labels()) == 1


def test_the_policy_of_the_page_stops_scripts_and_html(browser: Browser, store: Store) -> None:
    """A second wall behind the first: even code of the page could not put a text in as HTML, or run one."""
    store.add_tasks(rank_tasks(1))
    with serving(store, ["ann"]) as clients:
        page = MouseLabeler(browser, link_of(clients["ann"])).page
        for attempt in (
            "document.body.innerHTML = '<b>x</b>'",
            "const s = document.createElement('script'); s.textContent = 'window.ran = 1'; document.body.append(s)",
            "window.setTimeout('window.ran = 1', 0)",
            "const b = document.createElement('button'); b.setAttribute('onclick', 'window.ran = 1'); b.click()",
        ):
            page.evaluate(f"() => {{ try {{ {attempt} }} catch (error) {{ }} }}")
        page.wait_for_timeout(50)
        assert page.evaluate("window.ran ?? null") is None
        assert page.locator("#task h1").count() == 1


def test_other_kinds_of_tasks_skip_and_undo(browser: Browser, store: Store) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    rows: list[dict[str, Any]] = [
        {"task": "demonstrate", "id": "d", "prompt": chat},
        {"task": "write_prompt", "id": "w", "instruction": "A few-shot prompt"},
        {"task": "flag_prompt", "id": "f", "prompt": "Write to x@example.org"},
        {"task": "demonstrate", "id": "s", "prompt": "\u05e9\u05dc\u05d5\u05dd"},
    ]
    store.add_tasks([read_task(row) for row in rows])
    with serving(store, ["ann"]) as clients:
        ann = KeyboardLabeler(browser, link_of(clients["ann"]))
        page = ann.page
        assert page.locator(".turn h3").all_inner_texts() == ["System", "User"]
        ann.press_save()
        expect(page.locator("#problem")).to_contain_text("Write a response")
        expect(page.locator("#writing")).to_be_focused()  # it leads to what is missing
        page.keyboard.type("Hi? gus 7")  # keys that are shortcuts elsewhere
        ann.save()
        expect(page.locator("#task")).to_contain_text("A few-shot prompt")
        page.locator("#writing").focus()
        page.keyboard.type("Translate:\na -> b")
        ann.save()
        page.get_by_role("checkbox", name="Holds personal data").focus()
        ann.press("Space")
        ann.save()
        ann.press("s")
        ann.press("Enter")
        expect(page.locator("#skip-problem")).to_contain_text("Choose a reason")
        page.get_by_label("I do not speak the language").focus()
        ann.press("Space", "Enter")
        expect(page.locator("#task h1")).to_have_text("Nothing left for you")
        ann.press("u", "u")
        expect(page.locator("#progress-text")).to_contain_text("3 done, 1 left")
        page.reload()
        assert ann.title == "Write the response"
        ann.press("s")
        page.get_by_label("Another reason").focus()
        ann.press("Space")
        page.locator("#skip-note").focus()
        page.keyboard.type("cannot read it")
        page.get_by_role("button", name="Skip", exact=True).press("Enter")
        expect(page.locator("#progress-text")).to_contain_text("3 done, 1 skipped")
        assert not ann.errors
    contents = {label.task.id: label.content for label in store.labels()}
    assert contents == {
        "d": {"response": "Hi? gus 7", "note": ""},
        "w": {"prompt": "Translate:\na -> b", "note": ""},
        "f": {"flags": ["personal_data"], "note": ""},
        "s": {"reason": "other", "note": "cannot read it"},
    }


def test_who_comes_back_to_the_page_finds_what_is_new(browser: Browser, store: Store) -> None:
    store.add_tasks([read_task({"task": "demonstrate", "prompt": "the first"})])
    with serving(store, ["ann"]) as clients:
        ann = KeyboardLabeler(browser, link_of(clients["ann"]))
        page = ann.page
        page.locator("#writing").fill("A response")
        ann.save()
        expect(page.locator("#task h1")).to_have_text("Nothing left for you")
        store.add_tasks([read_task({"task": "demonstrate", "prompt": "the second"})])
        page.wait_for_timeout(300)
        expect(page.locator("#task h1")).to_have_text("Nothing left for you")  # an unwatched page takes no task
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.route("**/api/next", lambda route: route.abort())  # as while no server runs
        page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
        page.wait_for_timeout(1500)
        assert len(asked) == 1  # it does not go on by itself
        page.unroute("**/api/next")
        page.evaluate("dispatchEvent(new Event('focus'))")
        expect(page.locator("#task")).to_contain_text("the second")
        page.locator("#writing").fill("Half a resp")
        page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
        expect(page.locator("#saved")).to_have_text("Draft saved")
        expect(page.locator("#writing")).to_have_value("Half a resp")
        assert not ann.errors


def test_what_is_missing_is_told(browser: Browser, store: Store) -> None:
    store.add_tasks(rank_tasks(1, responses=3))
    with serving(store, ["ann"]) as clients:
        ann = KeyboardLabeler(browser, link_of(clients["ann"]))
        ann.press("j", "4", "j", "j", "6")
        ann.press_save()
        told = ann.page.locator("#problem")
        expect(told).to_have_text("Still to do: rate B, and place all responses in the order.")
        expect(ann.page.locator(".card").nth(1)).to_be_focused()
        ann.press("2", "o")
        expect(told).to_have_text("")
        assert ann.ladder() == [[2], [0], [1]]
        ann.press("ArrowDown")  # C joins A
        ann.press("ArrowDown")  # and goes below
        assert ann.ladder() == [[0], [2], [1]]
        expect(ann.page.locator(".hint")).to_have_text("A (rated 4) stands above C (rated 6). Is that meant?")
        ann.save()
    assert store.events()[0].kind == "answer"


def test_moves_are_told_to_screen_readers_and_everything_has_a_name(browser: Browser, store: Store) -> None:
    store.add_tasks(rank_tasks(1, responses=3))
    with serving(store, ["ann"], guidelines=parse_markdown("# G")) as clients:
        ann = KeyboardLabeler(browser, link_of(clients["ann"]))
        told = ann.page.locator("#announcer")
        ann.press("l", "Enter")
        expect(told).to_have_text("Response A, not rated, rank 1 of 1")
        ann.press("l", "Tab", "Enter")
        expect(told).to_have_text("Response B, not rated, rank 2 of 2")
        ann.press("ArrowUp")
        expect(told).to_have_text("Response B, not rated, rank 1 of 1, tied with A")
        ann.press("ArrowUp")
        expect(told).to_have_text("Response B, not rated, rank 1 of 2")
        ann.press("Delete")
        expect(told).to_have_text("Response B, not rated, not placed")
        assert told.get_attribute("aria-live") == "polite"
        nameless = ann.page.evaluate(
            """() => {
                const byId = (node) => document.getElementById(node.getAttribute('aria-labelledby') ?? '');
                const name = (node) => node.labels?.[0]?.textContent || node.getAttribute('aria-label') ||
                    byId(node)?.textContent || node.textContent;
                const nodes = [...document.querySelectorAll('button, input, textarea, dialog, progress')];
                return nodes.filter((node) => !name(node).trim()).map((node) => node.outerHTML);
            }"""
        )
        assert nameless == []


def test_the_focus_is_seen_and_goes_from_top_to_bottom(browser: Browser, store: Store) -> None:
    store.add_tasks(rank_tasks(1, responses=2))
    with serving(store, ["ann"]) as clients:
        ann = KeyboardLabeler(browser, link_of(clients["ann"]))
        stops = []
        for _ in range(14):
            ann.press("Tab")
            stops.append(
                ann.page.evaluate(
                    """() => { const node = document.activeElement, box = node.closest('label') ?? node;
                    const seen = [node, box].some(n => getComputedStyle(n).outlineStyle === 'solid');
                    return [node.name || node.id || node.className || node.tagName, seen] }"""
                )
            )
        assert all(seen for name, seen in stops if name != "BODY"), stops
        order = [name for name, _ in stops]
        assert order[:9] == [
            "rating-0", "SUMMARY", "rating-1", "SUMMARY", "plain by-rating", "chip-main", "chip-main", "SUMMARY", "skip"
        ]  # fmt: skip


def test_letters_can_be_switched_off(browser: Browser, store: Store) -> None:
    store.add_tasks(rank_tasks(1))
    with serving(store, ["ann"]) as clients:
        ann = KeyboardLabeler(browser, link_of(clients["ann"]))
        ann.press("?")
        expect(ann.page.locator("#help")).to_be_visible()
        ann.page.get_by_label("Keys of a single letter").focus()
        ann.press("Space", "Escape", "s")
        expect(ann.page.locator("#skip-dialog")).to_be_hidden()
        ann.page.reload()
        ann.press("s")
        expect(ann.page.locator("#skip-dialog")).to_be_hidden()


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_the_page_fits(browser: Browser, store: Store, width: int) -> None:
    """Nothing sticks out sideways, and what is to be tapped is large enough for a finger."""
    store.add_tasks([read_task(rank_row(1, 9, prompt="w" * 300))])
    with serving(store, ["ann"], guidelines=parse_markdown("# G")) as clients:
        ann = MouseLabeler(browser, link_of(clients["ann"]), viewport={"width": width, "height": 800})
        assert ann.page.evaluate("document.documentElement.scrollWidth") == width
        ann.page.locator("summary").first.click()
        small = ann.page.locator("button:visible, summary:visible, .scale label:visible, .check:visible").evaluate_all(
            "nodes => nodes.filter(n => n.getBoundingClientRect().height < 30).map(n => n.outerHTML)"
        )
        assert small == []


def test_where_a_response_is_dropped(browser: Browser, store: Store) -> None:
    store.add_tasks(rank_tasks(1, responses=3))
    with serving(store, ["ann"]) as clients:
        ann = MouseLabeler(browser, link_of(clients["ann"]))
        page = ann.page
        ann.drag(0, page.locator(".gap").first)
        ann.drag(1, page.locator(".level").first)
        assert ann.ladder() == [[0, 1]]
        ann.drag(2, page.locator("h1"))  # nowhere
        assert ann.ladder() == [[0, 1]]
        ann.drag(2, page.locator(".gap").first)
        assert ann.ladder() == [[2], [0, 1]]
        ann.drag(0, page.locator(".gap").nth(1))
        assert ann.ladder() == [[2], [0], [1]]
        box = page.locator(".chip[data-response='1'] .grip").bounding_box()
        assert box
        page.mouse.move(box["x"] + 5, box["y"] + 5)
        page.mouse.down()
        page.mouse.move(box["x"] + 5, box["y"] - 100, steps=3)
        assert page.locator(".dragged").count() == 1
        page.keyboard.press("Escape")
        page.mouse.up()
        assert ann.ladder() == [[2], [0], [1]]
        assert page.locator(".dragged, .target").count() == 0
        assert not ann.errors


def test_fingers_drag_by_the_grip(browser: Browser, store: Store) -> None:
    store.add_tasks(rank_tasks(1, responses=2))
    with serving(store, ["ann"]) as clients:
        ann = MouseLabeler(
            browser, link_of(clients["ann"]), viewport={"width": 390, "height": 800}, has_touch=True, is_mobile=True
        )
        touch = ann.context.new_cdp_session(ann.page)
        grip = ann.page.locator(".grip").nth(1)
        grip.scroll_into_view_if_needed()
        start, end = grip.bounding_box(), ann.page.locator(".gap").bounding_box()
        assert start
        assert end
        path = [(start["x"] + 5, start["y"] + 5), (start["x"] + 8, start["y"] - 9), (end["x"] + 40, end["y"] + 15)]
        for index, (x, y) in enumerate(path):
            kind = "touchStart" if index == 0 else "touchMove"
            touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [{"x": x, "y": y}]})
        touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
        expect(ann.page.locator(".level")).to_have_count(1)
        assert ann.ladder() == [[1]]


def test_links_that_are_not_valid(browser: Browser, store: Store) -> None:
    store.add_tasks(rank_tasks(1))
    with serving(store, ["ann", "bob"]) as clients:
        page = browser.new_page()
        page.goto(clients["ann"].page)
        expect(page.locator("#task")).to_contain_text("Open the personal link")
        page.goto(f"{clients['ann'].page}#{'A' * 43}")
        expect(page.locator("#task")).to_contain_text("This link is not valid")
        page.goto(link_of(clients["ann"]))
        expect(page.locator("#labeler")).to_have_text("ann")
        page.goto(link_of(clients["bob"]))  # in the same tab
        expect(page.locator("#labeler")).to_have_text("bob")
        page.reload()
        expect(page.locator("#labeler")).to_have_text("bob")
        assert "#" not in page.url
        assert page.context.cookies() == []


def test_a_task_that_is_done_in_another_tab(browser: Browser, store: Store) -> None:
    store.add_tasks(rank_tasks(2))
    with serving(store, ["ann"]) as clients:
        one, other = (KeyboardLabeler(browser, link_of(clients["ann"])) for _ in range(2))
        for tab in (one, other):
            for digit in "4444":
                tab.press("j", digit)
            tab.press("o")
        one.save()
        other.press_save()
        expect(other.page.locator(".prompt .text")).to_have_text("prompt 1")
    assert len(store.labels()) == 1


# -- the order's steps, against a second account of them


STEPS_OF = 5  # responses


def oracle(levels: list[list[int]], response: int, move: Any) -> tuple[list[list[int]], list[int]]:
    """What a move does, told by positions: level i stands at i, and a level of its own between two at a half."""
    at = {other: float(level) for level, group in enumerate(levels) for other in group}
    alone = response in at and list(at.values()).count(at[response]) == 1
    last = len(levels) - 1
    if move in (-1, 1):
        if response not in at:
            target = last + 1.0 if move == -1 else None
        elif alone:
            target = at[response] + move if 0 <= at[response] + move <= last else at[response]
        else:
            target = at[response] + move / 2
    else:
        target = {"into": lambda i: float(i), "before": lambda i: i - 0.5, "out": lambda i: None}[move[0]](move[1])
    at.pop(response, None)
    if target is not None:
        at[response] = target
    found = [sorted(other for other in at if at[other] == place) for place in sorted(set(at.values()))]
    return found, sorted(set(range(STEPS_OF)) - set(at))


def test_steps_and_places(browser: Browser, store: Store) -> None:
    store.add_tasks(rank_tasks(1))
    with serving(store, ["ann"]) as clients:
        page: Page = MouseLabeler(browser, link_of(clients["ann"])).page
        moves: list[tuple[int, Any]] = []
        states: list[tuple[list[list[int]], list[int]]] = [([], list(range(STEPS_OF)))]
        for _ in range(400):
            levels, _ = states[-1]
            response = random.randrange(STEPS_OF)
            into = ("into", random.randrange(len(levels))) if levels else -1
            move = random.choice([-1, 1, -1, 1, into, ("before", random.randint(0, len(levels))), ("out", 0)])
            moves.append((response, move))
            states.append(oracle(levels, response, move))
        got = page.evaluate(
            """async ([moves, count]) => {
                const { fromRanks, toRanks, place, step } = await import('/ladder.js');
                let ladder = fromRanks(new Array(count).fill(null));
                return moves.map(([response, move]) => {
                    const to = Array.isArray(move) && (move[0] === 'out' ? {} : { [move[0]]: move[1] });
                    ladder = to ? place(ladder, response, to) : step(ladder, response, move);
                    const again = fromRanks(toRanks(ladder, count));
                    if (JSON.stringify(again) !== JSON.stringify(ladder)) throw new Error('other ranks');
                    return [ladder.levels, ladder.tray];
                });
            }""",
            [moves, STEPS_OF],
        )
        assert [tuple(state) for state in got] == states[1:]
        by_rating = page.evaluate("async () => (await import('/ladder.js')).byRating([3, 7, 3, 1]).levels")
        assert by_rating == [[1], [0, 2], [3]]


def test_the_time_in_view_is_counted(browser: Browser, store: Store) -> None:
    store.add_tasks(rank_tasks(1, responses=2))
    with serving(store, ["ann"]) as clients:
        ann = KeyboardLabeler(browser, link_of(clients["ann"]))
        ann.page.wait_for_timeout(1200)
        ann.press("j", "3", "j", "3", "o")
        ann.save()
    (label,) = store.labels()
    assert 1.2 <= label.seconds < 60
    assert re.fullmatch(r"[0-9a-f]{32}", label.key)
