"""What `fledge data inspect` finds."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import random
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner
from tokenizers import Tokenizer

from fledge.cli.main import cli
from fledge.core.errors import FledgeError
from fledge.core.intervals import wilson
from fledge.core.language import catalogue
from fledge.data.inspection.bars import bar, histogram, interval, short
from fledge.data.inspection.inspect import EDGES, Lengths, inspect
from fledge.data.inspection.inspect_page import TEMPLATES, page
from fledge.data.inspection.spot_check import Verdicts, write_table
from fledge.data.inspection.variety import Distinct
from fledge.data.stages import Refine
from fledge.data.texts import size_of
from fledge.data.tokens.stages import TrainTokenizer
from fledge.records.kinds import Answer, Conversation, Document, Labelled, Message, Preference
from fledge.records.shards import read

from .conftest import Runner, corpus, english, talk, write


def test_a_folder_of_records(tmp_path: Path, run: Runner) -> None:
    rows = [*(talk("hi", "hello", language="en", id=str(i)) for i in range(3)), talk("你好", "你好呀，请坐。", id="zh")]
    rows.append(talk(english(random.Random(0)), "ok"))
    report = inspect(run(Refine(data="a", steps=["exact_dedup"]), {"a": write(tmp_path / "a", rows)}).path)
    assert (report.kind, report.rows) == ("conversations", 3)
    assert report.bytes == sum(map(size_of, [rows[0], *rows[3:]]))
    assert report.languages == {"en": 2, "zh": 1}, "named where the rows do not say"
    assert sum(report.lengths) == 3 and report.lengths[0] == 2 and len(report.lengths) == len(EDGES)
    assert report.fields["messages"] == 3 and report.fields["language"] == 1 and "meta" not in report.fields
    assert report.examples[0] == "hi ⏎ hello"
    assert report.rejected == {"exact_dedup": {"same text": 2}}
    text = report.to_text()
    assert "3 rows" in text and "same text  2" in text and "你好" in text
    assert json.loads(json.dumps(report.to_json()))["rows"] == 3


def test_in_chinese(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEDGE_LANG", "zh")
    text = inspect(write(tmp_path / "a", corpus(1, 4)).path).to_text()
    assert "4 行" in text and "示例" in text and "rows" not in text


def test_a_raw_file_with_bad_lines(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text('{"instruction": "a?", "output": "b"}\n{"instruction": \n', encoding="utf-8")
    report = inspect(file)
    assert (report.kind, report.rows, report.unreadable) == ("conversations", 1, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["x.jsonl"], "nothing is left beside it"
    with pytest.raises(FledgeError):
        inspect(tmp_path / "none.jsonl")


def test_records_are_read_once_and_unchanged(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", corpus(2, 6)).path
    before = [p.read_bytes() for p in sorted(folder.rglob("*.parquet"))]
    inspect(folder)
    assert before == [p.read_bytes() for p in sorted(folder.rglob("*.parquet"))]
    assert len(list(read(folder, "documents"))) == 6


# --- more than a count ----------------------------------------------------------------------------------------------


def test_schema_lengths_and_what_only_this_kind_has(tmp_path: Path) -> None:
    call = Message("assistant", "", tool_calls='[{"function": {"name": "f"}}]')
    rows = [
        talk("one two", "three", meta={"topic": "a"}),
        talk("一二三", "四", "五", "六", meta={"topic": "b", "n": "1"}),
        Conversation((Message("user", "q"), call, Message("tool", "42"), Message("assistant", "a"))),
    ]
    report = inspect(write(tmp_path / "a", rows).path)
    assert report.schema["id"] == "string" and "struct" in report.schema["messages"]
    assert report.meta == {"topic": 2, "n": 1}, "counted, not added up"
    assert report.measured["units"].total == 3 + 6 + 3 and report.measured["units"].longest == 6
    assert report.measured["characters"].total == len("one two\nthree") + len("一二三\n四\n五\n六") + len("q\n\n42\na")
    assert report.facts["turns"] == {"2": 1, "4": 2} and report.facts["tools"] == {"with calls": 1}
    assert report.facts["roles"] == {"assistant": 5, "user": 4, "tool": 1}
    labelled = [Labelled(f"t{i}", "b" if i % 3 else "a") for i in range(6)]
    assert inspect(write(tmp_path / "b", labelled).path).facts == {"labels": {"b": 4, "a": 2}}
    answers = (Answer("long answer", 2), Answer("short", 1))
    ranked = inspect(write(tmp_path / "c", [Preference((Message("user", "q"),), answers)]).path).facts
    assert ranked["longest answer"] == {"ranked lower": 1} and ranked["best answer"] == {"one": 1}


def test_quantiles_are_of_the_lengths_themselves() -> None:
    lengths = Lengths.of(dict.fromkeys(range(1, 101), 1))
    assert (lengths.low, lengths.median, lengths.high, lengths.longest) == (6, 51, 95, 100)
    assert lengths.mean == 50.5 and sum(lengths.histogram) == 100 and lengths.histogram[0] == 31
    assert Lengths.of({}).total == Lengths.of({}).longest == 0
    often = Lengths.of({7: 90, 1_000: 10})
    assert (often.low, often.median, often.high, often.mean) == (7, 7, 1_000, 106.3)


def test_lengths_in_tokens(tmp_path: Path, run: Runner) -> None:
    data = write(tmp_path / "a", corpus(1, 10))
    tokenizer = run(TrainTokenizer(data="a", vocab_size=300), {"a": data})
    report = inspect(data.path, tokenizer=tokenizer.path)
    coder = Tokenizer.from_file(str(tokenizer.path / "tokenizer.json"))
    wanted = [len(coder.encode(vars(r)["text"], add_special_tokens=False).ids) for r in read(data, "documents")]
    assert report.measured["tokens"] == Lengths.of(Counter(wanted)) and sum(wanted) > 1000
    with pytest.raises(FledgeError, match="is not a tokenizer folder"):
        inspect(data.path, tokenizer=tmp_path)


def test_variety_says_how_much_repeats(tmp_path: Path) -> None:
    rng = random.Random(1)
    rich = [" ".join(f"w{rng.randrange(10**9)}" for _ in range(500)) for _ in range(8)]
    poor = ["the same words again and again " * 90] * 8
    found = {
        name: inspect(
            write(tmp_path / name, [Document(t, f"{name}{i}", "en", f"s{i % 2}") for i, t in enumerate(texts)]).path
        ).variety
        for name, texts in (("rich", rich), ("poor", poor))
    }
    assert (found["rich"].texts, found["poor"].texts, found["rich"].sources) == (8, 1, 2)
    assert found["rich"].words["en"].type_token == pytest.approx(1.0, abs=0.001)
    assert found["poor"].words["en"].type_token == 0.005 and found["poor"].words["en"].vocabulary == 5
    assert found["poor"].openings == [("the same words again", 8)] and found["rich"].openings == []
    assert found["poor"].by_source == [("s0", 4), ("s1", 4)]
    chat = [talk(f"问{i}", "当然可以，下面我来回答这个问题") for i in range(3)]
    assert inspect(write(tmp_path / "chat", chat).path).variety.openings == [("当然可以下面我来", 3)], "of the answer"


@pytest.mark.parametrize("things", [10, 1_000, 40_000])
def test_distinct_things_are_counted_in_bounded_memory(things: int) -> None:
    seen = Distinct(kept=4_096)
    for i in range(2 * things):
        seen.add(f"thing {i % things}")
    if things <= 4_096:
        assert len(seen) == things
    assert abs(len(seen) - things) < 0.06 * things and len(seen._seen) <= 4_096


# --- spot checks ----------------------------------------------------------------------------------------------------


def judged(file: Path, wrong: list[str]) -> Path:
    with file.open(encoding="utf-8-sig", newline="") as source:
        rows = list(csv.DictReader(source))
    with file.open("w", encoding="utf-8-sig", newline="") as out:
        table = csv.DictWriter(out, rows[0].keys())
        table.writeheader()
        table.writerows({**row, "wrong": said} for row, said in zip(rows, wrong, strict=True))
    return file


def test_a_spot_check_there_and_back(tmp_path: Path, run: Runner) -> None:
    rows = [
        *(talk("=问题", f"答{i}", id=str(i)) for i in range(30)),
        *(talk("no answer", id=f"x{i}") for i in range(5)),
    ]
    data = run(Refine(data="a", steps=[{"check": {"rules": ["answer"]}}]), {"a": write(tmp_path / "a", rows)})
    report = inspect(data.path, shown=6)
    assert len(report.spot.kept) == 6 and len(report.spot.rejected) == 5
    assert {row.text for row in report.spot.rejected} == {"no answer"} and report.spot.rejected[0].step == "check"
    assert inspect(data.path, shown=6).spot == report.spot != inspect(data.path, shown=6, seed=1).spot
    file = tmp_path / "judge.csv"
    assert write_table(report.spot, file) == 11
    assert "'=问题" in file.read_text("utf-8-sig"), "no formula for a spreadsheet"
    verdicts = Verdicts.read(judged(file, ["n", "对", "N", "y", "", "no", "错", "0", "no", "n", "n"]))
    assert verdicts.kept == wilson(1, 5) and verdicts.rejected == verdicts.steps["check"] == wilson(1, 5)
    assert verdicts.unjudged == 1 and "20.0 % (3.6–62.4, n = 5)" in verdicts.to_text()
    with pytest.raises(FledgeError, match="neither yes nor no") as error:
        Verdicts.read(judged(file, ["n", "maybe", *[""] * 9]))
    assert error.value.problems[0].where == f"{file}: 2" and error.value.problems[0].found == "maybe"
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(FledgeError, match="not a table of a spot check"):
        Verdicts.read(tmp_path / "other.csv")


# --- the page -------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """The page's elements and its words, by language."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.lost: list[str] = []
        self.outside: list[str] = []
        self.words: dict[str, list[str]] = {"en": [], "zh": []}
        self._lang = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.outside += [v for k, v in attrs if k in ("src", "href") and v and not v.startswith("data:")]
        self._lang = given.get("data-lang") or ""
        if tag not in ("meta", "link", "input", "rect"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        self._lang = ""
        if tag != "rect" and (not self.open or self.open.pop() != tag):
            self.lost.append(tag)

    def handle_data(self, data: str) -> None:
        if self._lang:
            self.words[self._lang].append(data)


def test_the_page_is_whole_bilingual_and_loads_nothing(tmp_path: Path, run: Runner) -> None:
    rows = [
        talk("<script>alert(1)</script>", "答案", "再问", "再答", id="<b>", source="a&b"),
        talk("q", "a"),
        talk("x"),
    ]
    data = run(Refine(data="a", steps=[{"check": {"rules": ["answer"]}}]), {"a": write(tmp_path / "a", rows)})
    html = page(inspect(data.path), Verdicts(wilson(1, 9), None, {"check": wilson(0, 4)}, 0))
    found = Page(html)
    assert not found.lost and not found.open and not found.outside
    assert "<script>alert" not in html and html.count("<script>") == 1 and "&lt;b&gt;" in html
    assert not re.search(r"https?:|url\(|@import", html), "nothing to load"
    assert len(found.words["en"]) == len(found.words["zh"]) > 30
    pairs = list(zip(found.words["en"], found.words["zh"], strict=True))
    assert ("Spot check", "抽查") in pairs and all(re.search("[一-鿿]", zh) for _, zh in pairs if zh != "meta")
    assert "11.1 % (2.0–43.5, n = 9)" in html and html.count('class="histogram"') == 2
    script = re.search(r"<script>(.*?)</script>", html, re.S)
    assert script and base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode() in html
    assert page(inspect(data.path)) == page(inspect(data.path)), "the same bytes each time"


def test_every_sentence_of_the_page_has_a_translation() -> None:
    template = (TEMPLATES / "inspect.html.jinja").read_text(encoding="utf-8")
    sentences = re.findall(r'\bsay\("([^"]*)"', template)
    assert len(sentences) > 30 and sorted(set(sentences) - catalogue("zh").keys()) == []


def test_bars_are_as_long_as_their_share() -> None:
    assert 'class="fill" width="50"' in bar(5, 10) and 'class="fill" width="0"' in bar(0, 10)
    svg = histogram(["0", "≥32", "≥128", "≥512"], [0, 4, 2, 0])
    heights = [float(h) for h in re.findall(r'height="([\d.]+)" rx', svg)]
    assert len(heights) == 2 and heights[0] == 2 * heights[1], "empty bins at the ends are left out"
    assert 'x="25" y="3" width="50"' in interval(0.25, 0.5, 0.75)
    assert [short(n) for n in (7, 1_234, 56_000_000)] == ["7", "1.23k", "56M"]


def test_the_command(tmp_path: Path) -> None:
    folder, page_file, table = write(tmp_path / "a", corpus(1, 6)).path, tmp_path / "p.html", tmp_path / "t.csv"
    done = CliRunner().invoke(cli, ["data", "inspect", str(folder), "--html", str(page_file)])
    assert done.exit_code == 0 and "<!DOCTYPE html>" in page_file.read_text("utf-8")
    done = CliRunner().invoke(cli, ["data", "inspect", str(folder), "--spot-check", "2", "--csv", str(table)])
    assert done.exit_code == 0 and len(table.read_text("utf-8-sig").splitlines()) >= 3
    judged(table, ["n", "y"])
    done = CliRunner().invoke(cli, ["data", "inspect", str(folder), "--json", "--judged", str(table)])
    assert json.loads(done.output)["judged"]["kept"] == wilson(1, 2).to_json()
