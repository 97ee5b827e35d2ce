"""Raw files into records: every format found by itself, every wrong row named, nothing lost."""

from __future__ import annotations

import ast
import gzip
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import fledge.records
from fledge.core.errors import FledgeError
from fledge.core.language import catalogue
from fledge.records.formats import FORMATS, detect, load
from fledge.records.kinds import (
    Answer,
    Conversation,
    Document,
    Labelled,
    Message,
    Preference,
    Prompt,
    Rating,
    Record,
    from_row,
    kind_of,
    texts,
    to_row,
)
from fledge.records.raw.files import PIECE
from fledge.records.rejects import Rejects, read_rejects
from fledge.records.values import Misfit
from fledge.records.writers import FILES, KIND_OF_FORMAT, WRITERS, write_format
from tests.records import strategies

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a file: bytes as they are, texts as lines, anything else as JSON lines."""

    def write(name: str, *rows: Any) -> Path:
        lines = [r if isinstance(r, bytes) else (r if isinstance(r, str) else json.dumps(r)).encode() for r in rows]
        (tmp_path / name).write_bytes(b"".join(line + b"\n" for line in lines))
        return tmp_path / name

    return write


def u(text: str) -> Message:
    return Message("user", text)


def a(text: str) -> Message:
    return Message("assistant", text)


S = Message("system", "s")
QA = Conversation((u("q"), a("a")))
EXAMPLES: dict[str, tuple[Any, str, str, Record]] = {
    "alpaca": ({"instruction": "q", "input": "", "output": "a"}, "alpaca", "conversations", QA),
    "alpaca with all": (
        {"instruction": "q", "input": "i", "output": "a", "system": "s", "history": [["q0", "a0"]]},
        "alpaca", "conversations", Conversation((S, u("q0"), a("a0"), u("q\ni"), a("a"))),
    ),
    "sharegpt": (
        {"conversations": [
            {"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        "messages", "conversations", Conversation((S, u("q"), a("a"))),
    ),
    "sharegpt with a tool": (
        {"system": "s", "conversations": [
            {"from": "human", "value": "q"}, {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
            {"from": "observation", "value": "42"}, {"from": "gpt", "value": "a"}]},
        "messages", "conversations",
        Conversation((
            S, u("q"),
            Message("assistant", "", tool_calls='[{"type": "function", "function": {"name": "f", "arguments": {}}}]'),
            Message("tool", "42"), a("a"),
        )),
    ),
    "openai": (
        {"messages": [
            {"role": "developer", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": "q"}], "name": "z"},
            {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
            {"role": "tool", "content": "42", "tool_call_id": "1"}]},
        "messages", "conversations",
        Conversation((
            S, Message("user", "q", "z"), Message("assistant", "", tool_calls='[{"id": "1"}]'),
            Message("tool", "42", tool_call_id="1"),
        )),
    ),
    "conversation": (
        {"conversation": [{"role": "user", "content": "q"}]}, "messages", "conversations", Conversation((u("q"),)),
    ),
    "prompt and response": ({"prompt": "q", "response": "a"}, "pair", "conversations", QA),
    "question and answer": ({"question": "q", "answer": "a"}, "pair", "conversations", QA),
    "query and completion": ({"query": "q", "completion": "a"}, "pair", "conversations", QA),
    "preference of texts": (
        {"prompt": "q", "chosen": "a", "rejected": "b"}, "preference", "preferences",
        Preference((u("q"),), (Answer("a", 1), Answer("b", 2))),
    ),
    "preference with a system prompt and input": (
        {"system": "s", "instruction": "q", "input": "i", "chosen": "a", "rejected": "b"}, "preference", "preferences",
        Preference((S, u("q\ni")), (Answer("a", 1), Answer("b", 2))),
    ),
    "preference of whole conversations": (
        {"chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
         "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}]},
        "preference", "preferences", Preference((u("q"),), (Answer("a", 1), Answer("b", 2))),
    ),
    "preference that says its prompt twice": (
        {"prompt": "q", "chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
         "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}]},
        "preference", "preferences", Preference((u("q"),), (Answer("a", 1), Answer("b", 2))),
    ),
    "preference of single messages": (
        {"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "a"},
         "rejected": {"from": "gpt", "value": "b"}},
        "preference", "preferences", Preference((u("q"),), (Answer("a", 1), Answer("b", 2))),
    ),
    "preference as in HH": (
        {"chosen": "\n\nHuman: q\n\nAssistant: r\n\nHuman: t\n\nAssistant: a",
         "rejected": "\n\nHuman: q\n\nAssistant: r\n\nHuman: t\n\nAssistant: b"},
        "preference", "preferences", Preference((u("q"), a("r"), u("t")), (Answer("a", 1), Answer("b", 2))),
    ),
    "ranking by scores": (
        {"prompt": "q", "responses": ["a", "b", "c"], "scores": [0.5, 2, 0.5]}, "ranking", "preferences",
        Preference((u("q"),), (Answer("a", 2), Answer("b", 1), Answer("c", 2))),
    ),
    "ranking by ranks": (
        {"question": "q", "answers": ["a", "b"], "ranks": [2, 1]}, "ranking", "preferences",
        Preference((u("q"),), (Answer("a", 2), Answer("b", 1))),
    ),
    "ranking of objects": (
        {"instruction": "q", "completions": [{"response": "a", "score": 1, "model": "m"}, {"text": "b", "score": 4}]},
        "ranking", "preferences", Preference((u("q"),), (Answer("a", 2, "m"), Answer("b", 1))),
    ),
    "preference as OpenAI has it": (
        {"input": {"messages": [{"role": "user", "content": "q"}]},
         "preferred_output": [{"role": "assistant", "content": "a"}],
         "non_preferred_output": [{"role": "assistant", "content": "b"}]},
        "preference", "preferences", Preference((u("q"),), (Answer("a", 1), Answer("b", 2))),
    ),
    "comparison won by the second": (
        {"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": 1}, "comparison", "preferences",
        Preference((u("q"),), (Answer("a", 2), Answer("b", 1))),
    ),
    "comparison of conversations, a tie": (
        {"conversation_a": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
         "conversation_b": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}],
         "winner": "tie (bothbad)"},
        "comparison", "preferences", Preference((u("q"),), (Answer("a", 1), Answer("b", 1))),
    ),
    "outputs, the best first": (
        {"instruction": "q", "input": "i", "output": ["a", "b", "c"]}, "ordered", "preferences",
        Preference((u("q\ni"),), (Answer("a", 1), Answer("b", 2), Answer("c", 3))),
    ),
    "ranking as in UltraFeedback": (
        {"instruction": "q", "completions": [
            {"response": "a", "overall_score": 3.0, "model": "m"}, {"response": "b", "overall_score": 9}]},
        "ranking", "preferences", Preference((u("q"),), (Answer("a", 2, "m"), Answer("b", 1))),
    ),
    "KTO": ({"prompt": "q", "completion": "a", "label": False}, "judged", "ratings", Rating((u("q"),), "a", 0.0)),
    "OpenOrca": (
        {"id": "flan.1", "system_prompt": "s", "question": "q", "response": "a"}, "pair", "conversations",
        Conversation((S, u("q"), a("a")), "flan.1"),
    ),
    "OpenOrca without a system prompt": (
        {"id": "niv.2", "system_prompt": "", "question": "q", "response": "a"}, "pair", "conversations",
        Conversation(QA.messages, "niv.2"),
    ),
    "UltraChat": (
        {"id": "0", "data": ["q", "a", "t", "r"]}, "messages", "conversations",
        Conversation((u("q"), a("a"), u("t"), a("r")), "0"),
    ),
    "UltraChat 200k": (
        {"prompt": "q", "prompt_id": "7", "messages": [
            {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        "messages", "conversations", Conversation(QA.messages, meta={"prompt": "q", "prompt_id": "7"}),
    ),
    "rounds": (
        {"conversation_id": "5", "conversation": [{"human": "q", "assistant": "a"}, {"human": "t", "assistant": "r"}]},
        "messages", "conversations",
        Conversation((u("q"), a("a"), u("t"), a("r")), meta={"conversation_id": "5"}),
    ),
    "turns named by their speaker": (
        {"dialogue": [{"user": "q"}, {"assistant": "a"}]}, "messages", "conversations", QA,
    ),
    "lists of roles and contents": (
        {"conversations": {"from": ["human", "gpt"], "value": ["q", "a"]}}, "messages", "conversations", QA,
    ),
    "messages in a cell": (
        {"messages": '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]'},
        "messages", "conversations", QA,
    ),
    "tools and their list": (
        {"tools": [{"name": "f"}], "messages": [
            {"role": "user", "content": "q"}, {"role": "tool_call", "content": '{"name": "f", "arguments": {}}'},
            {"role": "tool_response", "content": "42"}, {"role": "assistant", "content": "a"}]},
        "messages", "conversations",
        Conversation((
            u("q"),
            Message("assistant", "", tool_calls='[{"type": "function", "function": {"name": "f", "arguments": {}}}]'),
            Message("tool", "42"), a("a"),
        ), meta={"tools": '[{"name": "f"}]'}),
    ),
    "tools as Anthropic has them": (
        {"messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": [
                {"type": "text", "text": "wait"}, {"type": "tool_use", "id": "1", "name": "f", "input": {"x": 1}}]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "1", "content": "42"}, {"type": "text", "text": "go on"}]}]},
        "messages", "conversations",
        Conversation((
            u("q"),
            Message("assistant", "wait", tool_calls='[{"id": "1", "type": "function", '
                    '"function": {"name": "f", "arguments": "{\\"x\\": 1}"}}]'),
            Message("tool", "42", tool_call_id="1"), u("go on"),
        )),
    ),
    "Dolly": (
        {"instruction": "q", "context": "i", "response": "a", "category": "open_qa"}, "alpaca", "conversations",
        Conversation((u("q\ni"), a("a")), meta={"category": "open_qa"}),
    ),
    "a task type": (
        {"task_type": {"major": ["问答"], "minor": ["百科"]}, "instruction": "q", "input": "", "output": "a"},
        "alpaca", "conversations",
        Conversation(QA.messages, meta={"task_type": '{"major": ["问答"], "minor": ["百科"]}'}),
    ),
    "Firefly": ({"kind": "Q", "input": "q", "target": "a"}, "pair", "conversations",
                Conversation(QA.messages, meta={"kind": "Q"})),
    "problem and solution": ({"problem": "q", "solution": "a"}, "pair", "conversations", QA),
    "Chinese keys": ({"问题": "q", "回答": "a"}, "pair", "conversations", QA),
    "Chinese Alpaca": ({"指令": "q", "输入": "i", "输出": "a"}, "alpaca", "conversations",
                       Conversation((u("q\ni"), a("a")))),
    "classification with metadata": (
        {"text": "t", "label": "pos", "metadata": {"n": 1}}, "classification", "labelled",
        Labelled("t", "pos", meta={"metadata": '{"n": 1}'}),
    ),
    "two texts and a label": (
        {"premise": "p", "hypothesis": "h", "label": 2}, "classification", "labelled", Labelled("p\nh", "2"),
    ),
    "Chinese classification": ({"文本": "t", "标签": "正面"}, "classification", "labelled", Labelled("t", "正面")),
    "a page with lists of its own": (
        {"text": "t", "items": ["x", "y"], "data": ["x", "y"]}, "text", "documents",
        Document("t", meta={"items": '["x", "y"]', "data": '["x", "y"]'}),
    ),
    "rating": ({"prompt": "q", "response": "a", "score": "4"}, "rating", "ratings", Rating((u("q"),), "a", 4.0)),
    "classification": ({"text": "t", "label": 1}, "classification", "labelled", Labelled("t", "1")),
    "text": ({"text": "t", "url": "u", "n": 3}, "text", "documents", Document("t", meta={"url": "u", "n": "3"})),
    "prompt": ({"prompt": "q"}, "prompt", "prompts", Prompt((u("q"),))),
}  # fmt: skip


@pytest.mark.parametrize("name", list(EXAMPLES))
def test_each_format_is_found_by_itself(write: Write, name: str) -> None:
    row, form, kind, record = EXAMPLES[name]
    file = write("data.jsonl", row, row)
    found = detect(file)
    assert (found.name, found.kind) == (form, kind)
    assert list(load(file, kind)) == [record, record]


def test_what_a_row_says_of_itself_is_kept(write: Write) -> None:
    row = {"id": 0, "lang": "zh", "source": "web", "meta": {"a": "1"}, "text": "t", "tags": ["x"], "none": None}
    (document,) = load(write("data.jsonl", row), "documents")
    assert document == Document("t", "0", "zh", "web", {"a": "1", "tags": '["x"]'})


def test_a_file_of_several_tasks_is_read_row_by_row(write: Write, tmp_path: Path) -> None:
    file = write(
        "data.jsonl",
        {"task_type": "qa", "instruction": "q", "output": "a"}, {"task_type": "qa", "instruction": "q", "output": "a"},
        {"task_type": "chat", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"task_type": "news", "text": "no conversation"},
    )  # fmt: skip
    with Rejects(tmp_path / "out") as rejects:
        records = list(load(file, "conversations", rejects))
    assert [vars(r)["messages"] for r in records] == [QA.messages] * 3
    assert [r.meta["task_type"] for r in records] == ["qa", "qa", "chat"]
    assert [row["where"] for row in read_rejects(tmp_path / "out")] == ["data.jsonl:4"]


def test_a_folder_of_save_to_disk(tmp_path: Path) -> None:
    """As `datasets` writes it: Arrow's streaming format, classes named in the schema, splits in folders."""
    features = {
        "text": {"dtype": "string", "_type": "Value"},
        "label": {"names": ["neg", "pos"], "_type": "ClassLabel"},
    }
    noted = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    schema = pa.schema([("text", pa.string()), ("label", pa.int64())], noted)
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    for split, rows in {"test": [("c", 1)], "train": [("a", 0), ("b", 1)]}.items():
        folder = tmp_path / split
        folder.mkdir()
        table = pa.Table.from_pylist([{"text": text, "label": label} for text, label in rows], schema)
        with pa.OSFile(str(folder / "data-00000-of-00001.arrow"), "wb") as out, pa.ipc.new_stream(out, schema) as file:
            file.write_table(table)
        (folder / "dataset_info.json").write_text(json.dumps({"features": features}))
        (folder / "state.json").write_text('{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}')
    assert list(load(tmp_path, "labelled")) == [Labelled("c", "pos"), Labelled("a", "neg"), Labelled("b", "pos")]
    assert detect(tmp_path).name == "classification"
    pq.write_table(pa.table({"text": ["e"], "label": [0]}, schema=schema), tmp_path / "x.parquet")
    assert list(load(tmp_path / "x.parquet", "labelled")) == [Labelled("e", "neg")], "as on the Hub"
    with pa.OSFile(str(tmp_path / "x.feather"), "wb") as out, pa.ipc.new_file(out, schema) as file:
        file.write_table(pa.table({"text": ["d"], "label": [5]}, schema=schema))
    assert list(load(tmp_path / "x.feather", "labelled")) == [Labelled("d", "5")], "a number without a name stays one"
    (tmp_path / "broken.arrow").write_bytes(b"nothing of the kind")
    with pytest.raises(FledgeError, match="is not valid Arrow"):
        list(load(tmp_path / "broken.arrow", "labelled"))


def test_a_further_key_is_no_slip(write: Write) -> None:
    (record,) = load(write("data.jsonl", {"prompt": "q", "response": "a", "story": "1", "ids": 2}), "conversations")
    assert record == Conversation((u("q"), a("a")), meta={"story": "1", "ids": "2"})


def test_the_kind_wanted_decides_between_readings(write: Write) -> None:
    file = write("data.jsonl", {"question": "1+1?", "answer": "2", "score": 5})
    assert list(load(file, "conversations")) == [Conversation((u("1+1?"), a("2")), meta={"score": "5"})]
    assert list(load(file, "prompts")) == [Prompt((u("1+1?"),), "2", meta={"score": "5"})]
    assert list(load(file, "ratings")) == [Rating((u("1+1?"),), "2", 5.0)]
    (document,) = load(file, "documents")
    assert isinstance(document, Document) and document.text == "1+1?\n2"
    chat = write("chat.jsonl", {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]})
    assert list(load(chat, "prompts")) == [Prompt((u("q"),), "a")]


# --- files ----------------------------------------------------------------------------------------------------------

PAIRS = [Conversation((u('Hi, "you"\n2'), a("Hello"))), Conversation((u("你好"), a("好")))]


@pytest.mark.parametrize(
    "name", ["d.jsonl", "d.ndjson", "d.json", "d.csv", "d.tsv", "d.parquet", "data.json", "lines.json"]
)
@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
def test_every_kind_of_file_holds_the_same(tmp_path: Path, name: str, packing: str) -> None:
    rows = [{"prompt": c.messages[0].content, "response": c.messages[1].content} for c in PAIRS]
    match name:
        case "d.json":
            content = json.dumps(rows, indent=1).encode()
        case "data.json":
            content = json.dumps({"version": 1, "data": rows}).encode()
        case "d.csv" | "d.tsv":
            comma = "," if name == "d.csv" else "\t"
            quoted = (comma.join(f'"{v}"' for v in (r["prompt"].replace('"', '""'), r["response"])) for r in rows)
            content = ("\ufeff" + "\r\n".join([f"prompt{comma}response", *quoted])).encode()
        case "d.parquet":
            pq.write_table(pa.Table.from_pylist(rows), tmp_path / "bare.parquet")
            content = (tmp_path / "bare.parquet").read_bytes()
        case _:
            content = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
            content = b"\xef\xbb\xbf" * (name == "d.ndjson") + content
    if packing == ".gz":
        content = gzip.compress(content)
    elif packing == ".zst":
        content = pa.compress(content, codec="zstd", asbytes=True)
    file = tmp_path / (name + packing)
    file.write_bytes(content)
    assert list(load(file, "conversations")) == PAIRS


def test_a_folder_is_all_its_files_in_order(write: Write, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    write("b.jsonl", {"text": "2"})
    write("a.txt", "1")
    write("sub/c.md", "# 3")
    write("picture.png", "no")
    write(".git/x.txt", "no")
    assert [d.text for d in load(tmp_path, "documents") if isinstance(d, Document)] == ["1", "2", "# 3"]


def test_a_small_text_is_one_document_and_a_big_one_is_cut_at_blank_lines(write: Write) -> None:
    small = write("small.txt", "", "One.", "", "", "Two.")
    assert list(load(small, "documents")) == [Document("One.\n\n\nTwo.")]
    paragraphs = [f"{i} " + "x" * 500 for i in range(60)]
    file = write("big.txt", *(line for p in paragraphs for line in (p, "")))
    documents = [d.text for d in load(file, "documents") if isinstance(d, Document)]
    assert "\n\n".join(documents) == "\n\n".join(paragraphs)
    assert len(documents) == 4 and all(PIECE <= len(d) < PIECE + 600 for d in documents[:-1])
    unbroken = write("unbroken.txt", *(["y" * 99] * 1000))
    documents = [d.text for d in load(unbroken, "documents") if isinstance(d, Document)]
    assert "\n".join(documents) == "\n".join(["y" * 99] * 1000) and len(documents) == 4


# --- what is wrong --------------------------------------------------------------------------------------------------

GOOD = {"prompt": "q", "response": "a"}
BAD_ROWS: dict[str, tuple[Any, str]] = {
    "misspelt key": ({"prompt": "q", "respones": "a"}, '"respones" is unknown; did you mean "response"?'),
    "misspelt optional key": ({**GOOD, "histori": []}, '"histori" is unknown; did you mean "history"?'),
    "missing key": ({"prompt": "q"}, '"response" is missing'),
    "null": ({"prompt": "q", "response": None}, '"response" is empty'),
    "blank": ({"prompt": "q", "response": " \n"}, '"response" is empty'),
    "number": ({"prompt": "q", "response": 3}, '"response" is a number where a text is wanted'),
    "list": (["q", "a"], 'is a list where an object with "prompt", "response" is wanted'),
    "not JSON": ('{"prompt": "q", "respon', "is not valid JSON: Unterminated string starting at"),
    "not UTF-8": (b'{"prompt": "\xc4\xe3", "response": "a"}', "is not UTF-8"),
    "half a surrogate pair": ('{"prompt": "\\ud800", "response": "a"}', "is not UTF-8"),
    "depth": ("[" * 100_000, "is not valid JSON"),
}


@pytest.mark.parametrize("name", list(BAD_ROWS))
def test_a_bad_row_is_set_aside_with_its_line_and_reason(write: Write, tmp_path: Path, name: str) -> None:
    bad, reason = BAD_ROWS[name]
    file = write("data.jsonl", GOOD, "", GOOD, bad, GOOD)
    with Rejects(tmp_path / "out") as rejects:
        assert len(list(load(file, "conversations", rejects))) == 3
    (row,) = read_rejects(tmp_path / "out")
    assert (row["step"], row["where"]) == ("read", "data.jsonl:4") and row["reason"].startswith(reason)
    assert rejects.counts == {"read": 1}
    kept = bad.decode(errors="backslashreplace") if isinstance(bad, bytes) else bad
    assert row["row"] == (kept if isinstance(kept, str) else json.dumps(kept))


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ({"role": "asistant", "content": "a"}, '"messages[1].role: asistant" is unknown; did you mean "assistant"?'),
        ({"role": "owl", "content": "a"}, '"messages[1].role: owl" is unknown; allowed: system, user, assistant, tool'),
        ({"role": "assistant", "contents": "a"}, '"messages[1].contents" is unknown; did you mean "content"?'),
        ({"role": "assistant"}, '"messages[1].content" is missing'),
        ({"content": "a"}, '"messages[1].role" is missing'),
        ({"role": "assistant", "content": ""}, '"messages[1].content" is empty'),
        ({"role": "user", "content": [{"type": "image_url"}]}, '"messages[1].content" has parts that are not text'),
        ("a", '"messages[1]" is a text where a message is wanted'),
    ],
)
def test_a_bad_turn_is_named(write: Write, turn: Any, reason: str) -> None:
    file = write("chat.jsonl", {"messages": [{"role": "user", "content": "q"}, turn]})
    with pytest.raises(FledgeError) as error:
        list(load(file, "conversations"))
    assert error.value.problems[0].what == reason and error.value.problems[0].where == f"{file}:1"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": {"role": ["user", "assistant"], "content": ["q"]}}, '"messages" has lists of different lengths'),
        ({"messages": ["q", ""]}, '"messages[1]" is empty'),
        ({"conversation": [{"human": "q", "assistant": 3}]}, '"conversation[0].assistant" is a number'),
        ({"messages": [{"role": "tool_call", "content": "{"}]}, '"messages[0].content" is not valid JSON'),
        ({"instruction": "q", "output": "a", "history": 3}, '"history" is a number where a list is wanted'),
        ({"instruction": "q", "output": "a", "history": [["q"]]}, '"history[0]" is not a pair of texts'),
    ],
)
def test_a_conversation_in_another_spelling_names_its_fault_too(write: Write, row: Any, reason: str) -> None:
    with pytest.raises(FledgeError) as error:
        list(load(write("data.jsonl", row), "conversations"))
    assert error.value.problems[0].what.startswith(reason)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, '"chosen" and "rejected" are the same'),
        ({"chosen": "a", "rejected": "b"}, '"chosen" is not one answer after the same prompt'),
        ({"prompt": "q", "answers": ["a", "b"]}, '"scores" is nothing where a number is wanted'),
        ({"prompt": "q", "answers": ["a", "b"], "scores": [1]}, 'there is not one rank or score for each of "answers"'),
        ({"prompt": "q", "answers": ["a", "b"], "scores": [1, "NaN"]}, '"scores" is a text where a number is wanted'),
        (
            {"prompt": "q", "response_a": "a", "response_b": "b", "winner": "c"},
            '"winner: c" is unknown; allowed: a, b, tie',
        ),
        ({"prompt": "q", "answers": ["a"], "scores": [1]}, '"answers" is not a list of two answers or more'),
    ],
)
def test_a_preference_that_says_nothing_is_refused(write: Write, row: Any, reason: str) -> None:
    with pytest.raises(FledgeError) as error:
        list(load(write("data.jsonl", row), "preferences"))
    assert error.value.problems[0].what == reason


def test_a_misspelt_key_in_every_row_is_named_with_file_and_line(write: Write) -> None:
    file = write("data.jsonl", *[{"prompt": "q", "respones": "a"}] * 20)
    with pytest.raises(FledgeError) as error:
        next(load(file, "conversations"))
    assert str(error.value).startswith(f'{file}:1: "respones" is unknown; did you mean "response"?')


def test_the_first_problems_are_shown_where_no_row_can_be_used(write: Write) -> None:
    file = write("data.jsonl", *[{"prompt": "q", "response": ""}] * 20)
    with pytest.raises(FledgeError) as error:
        list(load(file, "conversations"))
    assert [p.where for p in error.value.problems] == [f"{file}:{i}" for i in range(1, 6)]


def test_another_kind_is_named(write: Write) -> None:
    with pytest.raises(FledgeError, match="holds documents where preferences are wanted"):
        next(load(write("data.jsonl", {"text": "t"}), "preferences"))


def test_text_in_another_encoding_comes_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "gbk.txt").write_bytes("你好，世界".encode("gbk"))
    with pytest.raises(FledgeError, match="is not UTF-8") as error:
        next(load(tmp_path / "gbk.txt", "documents"))
    assert "iconv" in error.value.problems[0].fix


@pytest.mark.parametrize(
    ("name", "what"),
    [("none.jsonl", "does not exist"), ("a.exe", "is not a data file"), ("empty.jsonl", "has no rows")],
)
def test_a_file_that_holds_nothing_is_said_to(write: Write, tmp_path: Path, name: str, what: str) -> None:
    if name != "none.jsonl":
        write(name)
    with pytest.raises(FledgeError, match=what):
        next(load(tmp_path / name, "documents"))


def test_a_broken_array_keeps_what_stands_before_the_break(write: Write, tmp_path: Path) -> None:
    file = write("data.json", "[", ' {"text": "1"},', ' {"text": "2"},', ' {"text": ', "]")
    with Rejects(tmp_path / "out") as rejects:
        assert [d.text for d in load(file, "documents", rejects) if isinstance(d, Document)] == ["1", "2"]
    (row,) = read_rejects(tmp_path / "out")
    assert row["where"] == "data.json:4" and row["reason"].startswith("is not valid JSON from here on")


def test_a_table_sets_aside_its_ragged_rows_and_its_other_encodings(write: Write, tmp_path: Path) -> None:
    file = write("data.csv", "text,label", '"two', 'lines",a', "x", b"\xc4\xe3,b", "y,c", "")
    with Rejects(tmp_path / "out") as rejects:
        assert list(load(file, "labelled", rejects)) == [Labelled("two\nlines", "a"), Labelled("y", "c")]
    rows = [(row["where"], row["reason"]) for row in read_rejects(tmp_path / "out")]
    assert rows == [("data.csv:4", "has 1 cells where the header has 2"), ("data.csv:5", "is not UTF-8")]


def test_a_broken_archive_is_an_error_not_a_traceback(tmp_path: Path) -> None:
    for name in ("a.jsonl.gz", "a.jsonl.zst", "a.parquet"):
        (tmp_path / name).write_bytes(b"not an archive")
        with pytest.raises(FledgeError):
            next(load(tmp_path / name, "documents"))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "t"}\n' * 999)[:-20])
    with pytest.raises(FledgeError, match="cannot be read"):
        list(load(tmp_path / "b.jsonl.gz", "documents"))


def test_without_a_place_for_them_bad_rows_are_counted_aloud(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    file = write("data.jsonl", {"text": "1"}, "nonsense", {"text": "2"})
    with caplog.at_level(logging.WARNING):
        assert len(list(load(file, "documents"))) == 2
    assert "1 of 3 rows were set aside" in caplog.text and f"{file}:2" in caplog.text


def test_rejected_rows_do_not_depend_on_the_readers_language(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLEDGE_LANG", "zh")
    file = write("data.jsonl", GOOD, {"prompt": "q", "respones": "a"}, {"prompt": "q", "response": 3})
    with Rejects(tmp_path / "out") as rejects:
        list(load(file, "conversations", rejects))
    assert [row["reason"] for row in read_rejects(tmp_path / "out")] == [
        '"respones" is unknown; did you mean "response"?',
        '"response" is a number where a text is wanted',
    ]
    with pytest.raises(FledgeError, match="未知的“respones”；是不是想写“response”？"):
        list(load(write("bad.jsonl", {"prompt": "q", "respones": "a"}), "conversations"))


def test_every_reason_has_a_translation() -> None:
    sentences = set()
    for file in sorted(Path(fledge.records.__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("Reason", "Misfit") and node.args:
                sentences |= {n.value for n in ast.walk(node.args[0]) if isinstance(n, ast.Constant)}
    assert len(sentences) > 20
    assert sorted(s for s in sentences - catalogue("zh").keys() if s != "{type}") == []


KEYS = sorted({key for form in FORMATS for keys in (*form.required.values(), *form.optional.values()) for key in keys})
TURN_KEYS = ["role", "from", "content", "value", "human", "assistant", "tool_calls", "function_call", "type", "text"]
WORDS = st.sampled_from(
    ["", "q", "user", "gpt", "tie", "model_a", "function_call", "[1]", "[{}]", '{"a": 1}', "tool_use"]
)
SCALARS = st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | WORDS
TURNS = st.dictionaries(st.sampled_from(TURN_KEYS), SCALARS | st.lists(SCALARS, max_size=2), max_size=4)
VALUES = st.recursive(
    SCALARS | TURNS | st.lists(TURNS, max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(TURN_KEYS), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(row=st.dictionaries(st.sampled_from([*KEYS, "id", "meta", "x"]), VALUES, max_size=5) | VALUES)
def test_no_row_whatever_it_holds_brings_the_reader_down(row: Any) -> None:
    for form in FORMATS:
        form.fits(row)
        try:
            record = form.record(row)
        except Misfit as misfit:
            assert misfit.reason.said("zh")
        else:
            assert kind_of(record) == form.kind and from_row(form.kind, to_row(record)) == record


# --- and back -------------------------------------------------------------------------------------------------------

ROUND_TRIPS = {
    "alpaca": strategies.alpacas(),
    "sharegpt": strategies.records("conversations"),
    "messages": strategies.records("conversations"),
    "preference": strategies.preference_pairs(),
    "ranking": strategies.records("preferences").map(lambda record: gapless(record)),
    "rating": strategies.records("ratings"),
    "classification": strategies.records("labelled").filter(lambda r: bool(vars(r)["label"].strip())),
    "text": strategies.records("documents"),
    "prompt": strategies.records("prompts").filter(
        lambda r: len(vars(r)["messages"]) == 1 or vars(r)["messages"][-1].role != "assistant"
    ),
}


def repr_of(record: Record) -> str:
    return "\n".join([*texts(record), record.id, str(vars(record).get("label", ""))])


def gapless(record: Record) -> Record:
    """The preference with ranks 1, 2, … in the same order, as files give them."""
    assert isinstance(record, Preference)
    ranks = sorted({answer.rank for answer in record.answers})
    answers = (replace(answer, rank=ranks.index(answer.rank) + 1) for answer in record.answers)
    return replace(record, answers=tuple(answers))


@pytest.mark.parametrize("ending", list(FILES))
@pytest.mark.parametrize("name", list(WRITERS))
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_what_is_written_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, name: str, ending: str, data: st.DataObject
) -> None:
    rows = data.draw(st.lists(ROUND_TRIPS[name], min_size=1, max_size=4))
    assume(ending != ".csv" or "\r" not in "".join(map(repr_of, rows)))  # a table's lines may end in it
    file = tmp_path_factory.mktemp("formats") / f"data{ending}"
    assert write_format(rows, name, file) == len(rows)
    assert list(load(file, KIND_OF_FORMAT[name])) == rows
    assert detect(file).kind == KIND_OF_FORMAT[name], "found by itself"


def test_a_record_that_a_format_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FledgeError, match="cannot be written"):
        write_format([Conversation((u("q"), u("q")))], "alpaca", tmp_path / "x.jsonl")
    with pytest.raises(FledgeError, match="cannot be written"):
        write_format([QA, Document("t")], "messages", tmp_path / "x.jsonl")
    with pytest.raises(FledgeError, match="is not a file that can be written"):
        write_format([QA], "messages", tmp_path / "x.txt")
    assert not list(tmp_path.iterdir()), "whole or not at all"
    with pytest.raises(FledgeError, match='did you mean "alpaca"'):
        write_format([], "alpacca", tmp_path / "x.jsonl")


def test_a_row_without_an_answer_does_not_make_prompts_of_conversations(write: Write) -> None:
    """Every conversation could be read as a prompt with its answer; what most rows are decides."""
    talk = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    file = write("data.jsonl", talk, talk, {"instruction": "no answer"}, talk, {"messages": talk["messages"][:1]})
    assert detect(file).name == "messages"
    assert (
        detect(write("other.jsonl", {"prompt": "q"}, {"prompt": "r", "answer": "2"}, {"prompt": "s"})).kind == "prompts"
    )
