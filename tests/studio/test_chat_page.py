"""The chat page in a real Chromium: what a person does and sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.inference import tiny

Open = Callable[..., Any]


def say(page: Any, text: str) -> None:
    page.locator(".fl-input").fill(text)
    page.keyboard.press("Enter")


def finished(page: Any, number: int = 1) -> str:
    """The text of the last answer once `number` of them are whole."""
    page.wait_for_function(
        """n => document.querySelectorAll('.fl-under').length === n
            && !document.querySelector('.fl-writing, [data-old]')""",
        arg=number,
    )
    return str(page.locator(".fl-answer").last.inner_text()).strip()


def try_again(page: Any) -> None:
    page.evaluate("document.querySelector('.fl-turn').dataset.old = 1")
    page.get_by_role("button", name="Try again").click()


def pick(page: Any, model: str) -> None:
    """Choose a model and wait until the page was drawn anew for it: its title is the last thing to change."""
    page.get_by_label("Model").select_option(model)
    page.wait_for_function("model => document.title.startsWith(model + ' ')", arg=model)


@pytest.mark.parametrize(("locale", "ask"), [("en-US", "Hello"), ("zh-CN", "你好")])
def test_a_message_is_answered_as_it_is_written(open_page: Open, locale: str, ask: str) -> None:
    page = open_page(locale=locale)
    page.evaluate(
        """() => { window.seen = []; new MutationObserver(() => {
            const text = document.querySelector('.fl-writing .fl-answer')?.innerText.trim();
            if (text && seen.at(-1) !== text) seen.push(text);
        }).observe(document.body, { childList: true, subtree: true, characterData: true }) }"""
    )
    say(page, ask)
    assert finished(page) == tiny.TAUGHT[ask]
    seen = page.evaluate("seen")
    assert len(seen) >= 3 and seen[0] != tiny.TAUGHT[ask], "it came at once, not bit by bit"
    assert all(tiny.TAUGHT[ask].startswith(text) for text in seen)
    assert page.locator(".fl-user").inner_text() == ask
    assert page.locator(".fl-input").input_value() == ""
    assert page.evaluate("document.documentElement.lang") == locale.replace("-US", "")


def test_stop_and_try_again(open_page: Open) -> None:
    page = open_page()
    say(page, "long")
    page.wait_for_function("document.querySelector('.fl-answer')?.innerText.length > 20")
    page.get_by_role("button", name="Stop").click()
    stopped = finished(page)
    assert tiny.TAUGHT["long"].startswith(stopped) and len(stopped) < len(tiny.TAUGHT["long"])
    assert page.get_by_text("(stopped)").is_visible()
    try_again(page)
    assert finished(page) == tiny.TAUGHT["long"]
    assert page.locator(".fl-user").count() == 1 and not page.get_by_text("(stopped)").is_visible()
    page.get_by_role("button", name="New chat").click()
    page.wait_for_selector(".fl-example")
    assert page.locator(".fl-user").count() == 0


def test_what_the_model_writes_shows_as_text(open_page: Open) -> None:
    page = open_page()
    say(page, "markup")
    assert finished(page) == tiny.TAUGHT["markup"].replace("**", "")
    assert page.evaluate("[...document.querySelectorAll('.fl-answer *')].map(e => e.tagName)") == ["P", "STRONG"]
    say(page, "<img src=x onerror='window.pwned = 3'>")
    finished(page, 2)
    assert page.locator(".fl-user").last.inner_text() == "<img src=x onerror='window.pwned = 3'>"
    assert page.evaluate("window.pwned") is None


def test_the_language_is_switched_and_remembered(open_page: Open) -> None:
    page = open_page()
    say(page, "Hello")
    finished(page)
    page.get_by_role("button", name="中文").click()
    page.get_by_role("button", name="新对话").wait_for()
    assert page.locator(".fl-input").get_attribute("placeholder") == "输入消息"
    assert page.evaluate("document.documentElement.lang") == "zh-CN"
    assert page.locator(".fl-answer").inner_text().strip() == tiny.TAUGHT["Hello"], "the conversation stays"
    page.reload()
    page.get_by_role("button", name="新对话").wait_for()
    page.get_by_role("button", name="English").click()
    page.get_by_role("button", name="New chat").wait_for()


def test_the_keys(open_page: Open) -> None:
    page = open_page()
    box = page.locator(".fl-input")
    box.fill("你")
    box.evaluate(
        """e => { for (const how of [{ isComposing: true }, { keyCode: 229 }])
            e.dispatchEvent(new KeyboardEvent('keydown', { key: 'Enter', bubbles: true, ...how })) }"""
    )
    page.keyboard.press("Shift+Enter")
    box.press_sequentially("好")
    assert box.input_value() == "你\n好"
    page.wait_for_timeout(300)
    assert page.locator(".fl-user").count() == 0, "Enter that ends a composition, or Shift+Enter, must not send"
    assert box.bounding_box()["height"] > 60, "the field grows with its lines"
    box.fill("   ")
    page.keyboard.press("Enter")
    page.wait_for_timeout(300)
    assert page.locator(".fl-user").count() == 0
    box.fill("Hello")
    page.get_by_role("button", name="Send").click()
    assert finished(page) == tiny.TAUGHT["Hello"]


def test_writing_ahead_keeps_what_was_typed(open_page: Open) -> None:
    page = open_page()
    say(page, "long")
    page.wait_for_selector(".fl-writing")
    say(page, "Hello")
    assert page.locator(".fl-input").input_value() == "Hello"
    assert page.locator(".fl-user").count() == 1
    page.get_by_role("button", name="Stop").click()
    finished(page)


@pytest.mark.parametrize("locale", ["en-US", "zh-CN"])
def test_on_a_phone_nothing_runs_out_of_the_side(open_page: Open, locale: str) -> None:
    page = open_page(360, 740, locale, is_mobile=True, has_touch=True)
    wide = "[document.documentElement.scrollWidth, document.querySelector('.fl-scroll').scrollWidth]"
    assert page.evaluate(wide) == [360, 360]
    say(page, "x" * 200 + " https://example.org/" + "path/" * 30)
    finished(page)
    say(page, "long")
    finished(page, 2)
    assert page.evaluate(wide) == [360, 360]
    inside = """() => [...document.querySelectorAll('.fl-bar *, .fl-user, .fl-answer, .fl-box, .fl-send')]
        .filter(e => e.getClientRects().length).every(e => { const r = e.getBoundingClientRect();
        return r.left >= 0 && r.right <= 360.5 })"""
    assert page.evaluate(inside)
    below = "document.querySelector('.fl-scroll')"
    assert page.evaluate(f"{below}.scrollTop + {below}.clientHeight >= {below}.scrollHeight - 2"), "it follows the text"
    assert page.locator(".fl-input").bounding_box()["y"] < 740


def test_errors_are_messages_and_the_page_goes_on(open_page: Open) -> None:
    page = open_page()
    say(page, "word " * 2000)
    page.get_by_role("alert").wait_for()
    assert page.get_by_role("alert").inner_text() == "This message is too long for the model."
    page.get_by_role("button", name="New chat").click()
    pick(page, "base")
    say(page, "Hello")
    page.get_by_role("alert").wait_for()
    assert "no chat template" in page.get_by_role("alert").inner_text()
    pick(page, "taught")
    try_again(page)
    assert finished(page) == tiny.TAUGHT["Hello"]


def test_settings_reach_the_model(open_page: Open) -> None:
    page = open_page()
    page.get_by_role("button", name="Settings").click()
    slider = page.get_by_role("slider", name="Longest answer")
    slider.wait_for()
    slider.focus()
    page.keyboard.press("Home")
    page.wait_for_function("document.querySelectorAll('.fl-field-head')[1].innerText.includes('32')")
    page.keyboard.press("Escape")
    say(page, "long")
    answer = finished(page)
    assert tiny.TAUGHT["long"].startswith(answer) and len(answer) < 100
    assert page.get_by_text("The answer reached its longest length.").is_visible()


def test_light_and_dark(open_page: Open) -> None:
    page = open_page(color_scheme="dark")
    shade = "getComputedStyle(document.body).backgroundColor"
    page.wait_for_function("document.body.classList.contains('body--dark')")
    dark = page.evaluate(shade)
    page.get_by_role("button", name="Light or dark").click()
    page.wait_for_function("!document.body.classList.contains('body--dark')")
    assert page.evaluate(shade) != dark
    page.reload()
    page.wait_for_selector(".fl-example")
    page.wait_for_function("!document.body.classList.contains('body--dark')")


def test_an_example_is_a_click_away(open_page: Open) -> None:
    page = open_page()
    text = page.locator(".fl-example").first.inner_text()
    page.locator(".fl-example").first.click()
    finished(page)
    assert page.locator(".fl-user").inner_text() == text
