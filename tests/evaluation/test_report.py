"""The report says what the numbers say, in both languages, and nothing that a model wrote can break it."""

from __future__ import annotations

import ast
import dataclasses
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import fledge.evaluation
from fledge.core.language import catalogue
from fledge.evaluation import figures
from fledge.evaluation.bilingual import Both, say
from fledge.evaluation.console import models_table
from fledge.evaluation.findings import findings, limits, repeats, verdict
from fledge.evaluation.report import write_report
from fledge.evaluation.run_view import RunView, StageView
from fledge.evaluation.side_by_side import side_by_side
from tests.evaluation.made_up import HOSTILE, PROMPTS, run_view

VOID = {"meta", "link", "br", "img", "input"}


class Page(HTMLParser):
    """Tags, texts and nesting of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunView:
    return run_view(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def text(run: RunView, tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("report") / "report.html"
    write_report(run, file)
    return file.read_text(encoding="utf-8")


def test_the_page_is_whole_and_needs_nothing_else(text: str) -> None:
    page = Page(text)
    assert page.open == []
    sources = [v for _, a in page.tags for k, v in a.items() if k in ("src", "href", "xlink:href") and v]
    assert all(value.startswith(("#", "data:")) for value in sources), sources
    assert not re.search(r"https?://(?!www\.w3\.org/)", text)
    ids = [a["id"] for _, a in page.tags if a.get("id")]
    assert len(ids) == len(set(ids))


def test_what_models_and_data_wrote_is_text(text: str, run: RunView) -> None:
    page = Page(text)
    assert [tag for tag, _ in page.tags].count("script") == 1 and "img" not in dict(page.tags)
    assert "".join(page.texts).count(HOSTILE) == 3  # a sample, a refused row, the recipe
    assert "script-src 'sha256-" in text and "default-src 'none'" in text


def test_both_languages_stand_in_the_page(text: str) -> None:
    spans = [a.get("data-lang") for tag, a in Page(text).tags if tag == "span" and "data-lang" in a]
    assert spans.count("en") == spans.count("zh") > 60
    shown = "".join(Page(text).texts)
    for sentence in (
        "The models side by side",
        "模型对比",
        "What these models cannot do",
        "这些模型做不到什么",
        *PROMPTS,
    ):
        assert sentence in shown


def test_the_same_run_gives_the_same_bytes(text: str, run: RunView, tmp_path: Path) -> None:
    write_report(run, tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == text


def test_every_number_of_the_scores_is_there(text: str, run: RunView) -> None:
    shown = re.sub(r"\s+", " ", "".join(Page(text).texts))
    for number in (
        "2.118",
        "1.781",
        "2.902",
        "65.8 %",
        "57–74 %",
        "9.4 MB",
        "3.1 MB",
        "10,112",
        "85.3 %",
        "4.21",
        "7 min 42 s",
    ):
        assert number in shown, number
    assert "neither English nor Chinese" in shown and "fledge run recipes/hatch.yaml" in shown
    assert "phone 31" in shown and "2 min 22 s – 5 min 55 s" in shown


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_the_page_opens_in_the_users_language(run: RunView, tmp_path: Path, lang: str, monkeypatch: Any) -> None:
    monkeypatch.setenv("FLEDGE_LANG", lang)
    write_report(run, tmp_path / "r.html")
    assert f'<html lang="{"zh-CN" if lang == "zh" else "en"}">' in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_a_run_that_has_hardly_begun_has_a_report(tmp_path: Path) -> None:
    stage = StageView("corpus", "data.collect", "failed")
    write_report(RunView("begun", stages=[stage]), tmp_path / "r.html")
    shown = "".join(Page((tmp_path / "r.html").read_text(encoding="utf-8")).texts)
    assert "This run is not finished: corpus." in shown and "本次运行尚未完成：corpus。" in shown
    write_report(RunView("empty"), tmp_path / "r.html")


def test_findings_say_no_more_than_their_intervals(run: RunView) -> None:
    table = side_by_side(run)
    said = {finding.text.en: finding.tone for finding in findings(run, table)}
    assert said["base compresses English better than xz -9: 2.118 bits per byte against 2.902."] == "good"
    assert (
        said["base does not compress Chinese better than the n-gram model: 1.781 bits per byte against 1.740."] == "bad"
    )
    lower = "chat lowers the loss on held-out answers against base by 0.860 nats a token (difference −0.890 to −0.830)."
    assert said[lower] == "good"
    assert any("aligned or chat has the lower loss" in s and tone == "open" for s, tone in said.items())
    assert said["HellaSwag: whether base, chat, aligned, int8 do better than guessing (25 %) is undecided."] == "open"
    assert said["int8 takes 3.1 MB on disk where aligned takes 9.4 MB: 3.0 times less."] == "note"
    assert any(
        "reward ranks the preferred answer higher in 70.0 % of 120" in s and t == "good" for s, t in said.items()
    )
    line = verdict(run, table)
    counts = [list(said.values()).count(tone) for tone in ("good", "bad", "open")]
    assert line.tone == "good" and "base is below xz -9 in every language" in line.text.en
    assert f"{counts[0]} speak for these models, {counts[1]} against, {counts[2]} are undecided" in line.text.en


def test_limits_follow_from_what_was_measured(run: RunView) -> None:
    said = [finding.text.en for finding in limits(run, side_by_side(run))]
    assert "With 2.4M parameters" in said[0] and "Nothing they say is to be believed" in said[0]
    assert "3.0M tokens" in said[1] and "47.2M" in said[1]
    assert "base repeats itself without end in 1 of 4 samples." in said
    assert any("as few as 100 items" in sentence for sentence in said)
    unmeasured = dataclasses.replace(run, stages=[s for s in run.stages if not s.use.startswith(("eval", "train"))])
    assert list(limits(unmeasured, side_by_side(unmeasured))) == []


@pytest.mark.parametrize(
    ("text", "stuck"),
    [
        ("I think so, I think so, I think so, I think so", True),
        ("的的的的的的的的", True),
        ("我想我想我想我想我想我想", True),
        ("，" * 20, True),
        ("wait ...", False),
        ("The cat sat on the mat and the dog sat on the log.", False),
        ("哈哈，今天天气不错，我去公园走了走。", False),
        ("1000000 and aaa", False),
    ],
)
def test_repetition_is_seen(text: str, stuck: bool) -> None:
    assert repeats(text) is stuck


def test_the_best_model_is_marked_and_baselines_come_last(run: RunView) -> None:
    table = side_by_side(run)
    names = [row.name.en for row in table.rows]
    assert names == [
        "base", "chat", "aligned", "int8", "reward", "the untrained network", "the n-gram model", "xz -9",
        "the longer answer", "likelier before DPO", "guessing",
    ]  # fmt: skip
    best = {c.key: [r.name.en for r in table.rows if c.key in r.cells and r.cells[c.key].best] for c in table.columns}
    assert best["bits_per_byte_en"] == ["base"] and best["answer_loss"] == ["chat"]
    assert best["preference_accuracy"] == ["aligned", "int8"]  # the reward model does not compete
    assert best["bytes"] == []
    keys = [column.key for column in table.columns if column.main]
    assert keys[:4] == ["parameters", "bytes", "bits_per_byte_en", "bits_per_byte_zh"]


def test_without_an_evaluation_pre_training_speaks_for_itself(run: RunView) -> None:
    table = side_by_side(dataclasses.replace(run, stages=[s for s in run.stages if s.use != "evaluate"]))
    assert [row.name.en for row in table.rows] == ["base", "the untrained network", "the n-gram model", "xz -9"]
    assert table.rows[0].cells["bits_per_byte_en"].text == "2.118"


def test_the_console_shows_every_model_and_what_to_beat(run: RunView) -> None:
    from rich.console import Console

    table = models_table(run)
    assert table is not None and models_table(RunView("empty")) is None
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table)
    shown = console.export_text()
    for word in ("base", "aligned", "int8", "2.118", "57–74 %", "25.0 % guessing"):
        assert word in shown
    assert max(map(len, shown.splitlines())) <= 80 and "…" not in shown


def test_figures_take_their_colours_and_letters_from_the_page() -> None:
    points = {step: 1 / step for step in range(1, 300)}
    svg = figures.curves("a", {"x": points, "y": points})
    assert svg == figures.curves("a", {"x": points, "y": points})
    assert "font-family" not in svg and "var(--s1)" in svg and "var(--s2)" in svg and "<text" in svg
    assert not re.search(r"#[0-9a-f]{6}", re.sub(r'(href="#|url\(#)[^")]*', "", svg))
    assert all(name.startswith("a-") for name in re.findall(r'\bid="([^"]*)"', svg))
    bars = figures.grouped_bars("b", ["English", "中文"], {"var(--s1)": [2.118, 1.5], "var(--b1)": [2.9, None]})
    assert all(number in bars for number in ("2.12", "1.50", "2.90", "English", "中文")) and "var(--b1)" in bars


def test_running_mean() -> None:
    assert figures.running_mean([2, 4, 6, 8], 2) == [2, 3, 5, 7]


def test_every_sentence_of_the_pages_is_translated() -> None:
    root = Path(fledge.evaluation.__file__).parent
    sentences = {
        node.args[0].value
        for file in root.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and getattr(node.func, "id", "") == "say"
        and isinstance(node.args[0], ast.Constant)
    }
    template = (root / "templates" / "report.html.jinja").read_text(encoding="utf-8")
    sentences |= set(re.findall(r'\bsay\("([^"]*)"', template))
    assert len(sentences) > 80
    missing = sorted(sentences - set(catalogue("zh")))
    assert not missing, json.dumps(missing, ensure_ascii=False)


def test_bilingual_values_are_filled_in_by_language() -> None:
    both = say("bits per byte, {language}", language=Both("English", "英文"))
    assert both == Both("bits per byte, English", "比特/字节，英文")
    assert Both("<b>", "<b>").__html__() == "&lt;b&gt;"
