"""The report in a real browser: no errors, both languages, no sideways scrolling on a telephone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fledge.evaluation.report import write_report
from tests.evaluation.made_up import run_view


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("browser")
    write_report(run_view(folder), folder / "report.html")
    return (folder / "report.html").as_uri()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_the_report_in_a_browser(browser: Any, address: str, width: int, scheme: str) -> None:
    complaints: list[str] = []
    context = browser.new_context(viewport={"width": width, "height": 850}, color_scheme=scheme, offline=True)
    page = context.new_page()
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("requestfailed", lambda request: complaints.append(request.url))
    page.goto(address)
    heading = page.locator("#models h2")
    assert heading.inner_text() == "The models side by side"
    page.get_by_role("button", name="中文").click()
    assert heading.inner_text() == "模型对比"
    assert page.get_attribute("html", "lang") == "zh-CN"
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert page.locator(".scroll").first.evaluate("e => e.scrollWidth >= e.clientWidth")
    page.get_by_role("button", name="English").click()
    assert heading.inner_text() == "The models side by side"
    assert page.title() == "hatch · fledge"  # nothing that a model wrote has run
    sizes = page.locator("figure svg").evaluate_all("list => list.map(e => [e.clientWidth, e.clientHeight])")
    assert len(sizes) > 8 and all(w > 250 and h > 50 for w, h in sizes)
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(20, 23, 26)") is (scheme == "dark")
    assert complaints == []
    context.close()


def test_the_report_prints(browser: Any, address: str, tmp_path: Path) -> None:
    page = browser.new_page()
    page.goto(address)
    page.emulate_media(media="print")
    assert not page.locator(".switch").is_visible()
    page.pdf(path=str(tmp_path / "report.pdf"))
    assert (tmp_path / "report.pdf").stat().st_size > 50_000
