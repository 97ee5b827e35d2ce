"""Classification, tagging, embeddings and meta-learning as the runner calls them, in both languages."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
)

from fledge.core.artifact import Artifact, Conversations, Documents, Labelled, Model, Preferences, TaskModel
from fledge.core.errors import FledgeError
from fledge.models.save import save_model
from fledge.records.entities import Entity, entities_of, from_tags, marked
from fledge.records.formats import load
from fledge.records.kinds import Answer, Conversation, Document, Message, Preference
from fledge.records.kinds import Labelled as Row
from fledge.records.shards import ShardWriter
from fledge.training.objective import as_batch
from fledge.training.objectives.contrastive import embed as vectors_of
from fledge.training.understanding.examples import Encoder, Example, collate
from fledge.training.understanding.measures import class_scores, entity_scores
from fledge.training.understanding.stages import Classify, Embed, Meta, Tag
from fledge.training.understanding.words import Words, aligned, labels_of
from tests.training.toys import tiny, tokenizer

Run = Callable[..., Any]
QUICK = {"batch_size": 8, "max_length": 48, "log_every": 5, "dtype": "float32", "lr": 5e-3}
TOPICS = {
    "sea": ["ship", "wave", "shark", "port"], "sky": ["cloud", "bird", "star", "wind"],
    "法": ["法院", "人民", "律师", "判决"], "食": ["米饭", "面条", "饺子", "豆腐"],
}  # fmt: skip
NAMES = {"PER": ["Ada", "Bob Ray", "张三", "李小四"], "LOC": ["Rome", "New York", "北京", "上海市"]}


def texts(count: int, seed: int) -> list[Row]:
    rng, found = random.Random(seed), []
    for index in range(count):
        topic = rng.choice(sorted(TOPICS))
        words = [rng.choice(TOPICS[topic]) for _ in range(1 + index % 4)]
        found.append(Row(("" if topic > "z" else " ").join(words), topic, meta={"half": str(topic > "z")}))
    return found


def sentences(count: int, seed: int) -> list[Row]:
    rng, found = random.Random(seed), []
    for _ in range(count):
        chinese = rng.random() < 0.5
        who, where = (rng.choice(NAMES[kind][2:] if chinese else NAMES[kind][:2]) for kind in ("PER", "LOC"))
        pieces = [
            (who, "PER"),
            ("去了" if chinese else " goes to ", ""),
            (where, "LOC"),
            ("。" if chinese else ".", ""),
        ]
        text, entities = "", []
        for piece, kind in pieces:
            entities += [Entity(len(text), len(text) + len(piece), kind)] if kind else []
            text += piece
        found.append(marked(text, entities))
    return found


def write(folder: Path, kind: str, records: list[Any]) -> Path:
    with ShardWriter(folder, kind) as shards:
        for record in records:
            shards.write(record)
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    root = tmp_path_factory.mktemp("world")
    names = tokenizer()
    save_model(tiny(vocab=len(names)), names, root / "llama")
    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    save_model(BertModel(BertConfig(**small, vocab_size=len(names), max_position_embeddings=64)), names, root / "bert")
    chats = [Conversation((Message("user", f"what about {w}?"), Message("assistant", f"{t}: {w}")))
             for t, words in TOPICS.items() for w in words]  # fmt: skip
    tones = [
        Conversation((Message("user", word), Message("assistant", word + tone)), source=tone)
        for tone in ("!", "?", "...") for words in TOPICS.values() for word in words
    ]  # fmt: skip
    wishes = [Preference(c.messages[:1], (Answer(c.messages[1].content, 1), Answer("no", 2))) for c in chats]
    return {
        "llama": Model(root / "llama"),
        "bert": Model(root / "bert"),
        "texts": Labelled(write(root / "texts", "labelled", texts(160, 1))),
        "unseen": Labelled(write(root / "unseen", "labelled", texts(60, 2))),
        "marked": Labelled(write(root / "marked", "labelled", sentences(80, 1))),
        "marked_unseen": Labelled(write(root / "marked_unseen", "labelled", sentences(30, 2))),
        "documents": Documents(
            write(root / "documents", "documents", [Document(f"{r.text} {i}") for i, r in enumerate(texts(64, 3))])
        ),
        "chats": Conversations(write(root / "chats", "conversations", chats)),
        "tones": Conversations(write(root / "tones", "conversations", tones)),
        "wishes": Preferences(write(root / "wishes", "preferences", wishes)),
    }


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_classifier_loads_in_transformers_and_says_the_same(
    run: Run, world: dict[str, Artifact], family: str
) -> None:
    stage = Classify(
        model=family, data="texts", held_out="unseen", class_weights="balanced", label_smoothing=0.05,
        train={**QUICK, "epochs": 4, "evaluate_every": 20},
    )  # fmt: skip
    assert stage.output_kinds() == {"": TaskModel}
    made = run(stage)
    metrics = made.metrics
    assert metrics["accuracy"] > 0.95 > 0.5 > metrics["majority_accuracy"] and metrics["macro_f1"] > 0.9
    assert metrics["labels"] == sorted(TOPICS) and sum(c["rows"] for c in metrics["classes"].values()) == 60
    json.dumps(metrics)
    model, names = (
        AutoModelForSequenceClassification.from_pretrained(made.path),
        AutoTokenizer.from_pretrained(made.path),
    )
    assert model.config.id2label == dict(enumerate(sorted(TOPICS)))
    right = 0
    for row in texts(60, 2):  # one by one, with nothing of ours
        with torch.no_grad():
            logits = model(**names(row.text, return_tensors="pt")).logits
        right += model.config.id2label[int(logits.argmax())] == row.label
    assert right / 60 == pytest.approx(metrics["accuracy"])


def test_an_adapter_carries_its_head_and_its_labels(run: Run, world: dict[str, Artifact]) -> None:
    lora = {"rank": 4, "alpha": 8}
    made = run(
        Classify(model="llama", data="texts", held_out="unseen", lora=lora, train={**QUICK, "epochs": 4, "lr": 0.02})
    )
    assert type(made) is TaskModel and made.metrics["accuracy"] > 0.8
    assert made.metrics["trained_parameters"] < 0.3 * made.metrics["parameters"]
    config = AutoConfig.from_pretrained(made.path)
    base = AutoModelForSequenceClassification.from_pretrained(world["llama"].path, config=config)
    model = PeftModel.from_pretrained(base, made.path).eval()
    names = AutoTokenizer.from_pretrained(made.path)
    found = [
        model.config.id2label[int(model(**names(row.text, return_tensors="pt")).logits.argmax())]
        for row in texts(60, 2)
    ]
    right = sum(label == row.label for label, row in zip(found, texts(60, 2), strict=True)) / 60
    assert right == pytest.approx(made.metrics["accuracy"])


@pytest.mark.parametrize("head", ["tokens", "body"])
def test_adapters_in_bf16_for_tags_and_vectors(run: Run, world: dict[str, Artifact], head: str) -> None:
    given: dict[str, Any] = {"model": "bert", "lora": {"rank": 4, "alpha": 8}}
    train = {**QUICK, "dtype": "bfloat16", "lr": 0.02}
    if head == "tokens":
        made = run(Tag(**given, data="marked", held_out="marked_unseen", train={**train, "epochs": 6}))
        assert made.metrics["entity_f1"] > 0.5
        auto: Any = AutoModelForTokenClassification
    else:
        made = run(Embed(**given, data="chats", held_out="chats", train={**train, "epochs": 10, "lr": 5e-3}))
        assert made.metrics["recall_at_1"] > made.metrics["recall_at_1_before"]
        auto = AutoModel
    assert made.metrics["trained_parameters"] < 0.5 * made.metrics["parameters"]
    base = auto.from_pretrained(world["bert"].path, config=AutoConfig.from_pretrained(made.path))
    model = PeftModel.from_pretrained(base, made.path)
    found = {name: p for name, p in model.named_parameters() if "lora_" in name or "modules_to_save" in name}
    kept = load_file(made.path / "adapter_model.safetensors")
    assert len(kept) == len(found) and all(weight.dtype == torch.float32 for weight in kept.values())
    assert any("classifier" in name for name in kept) == (head == "tokens"), "the head goes with the adapter"


def test_what_cannot_be_classified_is_said(run: Run, world: dict[str, Artifact], tmp_path: Path) -> None:
    world["one"] = Labelled(write(tmp_path / "one", "labelled", [Row("a", "x"), Row("b", "x")]))
    with pytest.raises(FledgeError, match="no two classes"):
        run(Classify(model="llama", data="one", train=QUICK))
    with pytest.raises(FledgeError, match="no text has this class"):
        run(Classify(model="llama", data="texts", class_weights={"land": 2.0}, train=QUICK))
    with pytest.raises(FledgeError, match="no entity is marked"):
        run(Tag(model="llama", data="texts", train=QUICK))


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_tagger_finds_whole_entities_in_both_languages(run: Run, world: dict[str, Artifact], family: str) -> None:
    stage = Tag(
        model=family, data="marked", held_out="marked_unseen", align="last" if family == "llama" else "first",
        train={**QUICK, "epochs": 8, "evaluate_every": 40},
    )  # fmt: skip
    made = run(stage)
    metrics = made.metrics
    assert metrics["entity_f1"] > 0.9 and metrics["entities"] == 60 and set(metrics["types"]) == {"LOC", "PER"}
    assert metrics["overlapping_entities"] == 0 and metrics["dropped_rows"] == 0
    model = AutoModelForTokenClassification.from_pretrained(made.path)
    assert [model.config.id2label[i] for i in range(5)] == ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]
    # the F1 once more, from the saved folder, one text at a time, by another way of counting
    encode = Encoder(AutoTokenizer.from_pretrained(made.path), 48)
    both = given = wanted = 0
    for row in sentences(30, 2):
        words = Words.of(row.text)
        ids, carries = aligned(encode, words, stage.align)
        with torch.no_grad():
            best = model(input_ids=torch.tensor([ids])).logits[0].argmax(dim=-1).tolist()
        tags = {word: model.config.id2label[tag] for word, tag in zip(carries, best, strict=True) if word is not None}
        found = conlleval([tags.get(i, "O") for i in range(len(words.places))])
        gold = conlleval(words.tags(entities_of(row) or []))
        both, given, wanted = both + len(found & gold), given + len(found), wanted + len(gold)
    assert 2 * both / (given + wanted) == pytest.approx(metrics["entity_f1"])


def conlleval(tags: list[str]) -> set[tuple[int, int, str]]:
    """Chunks by conlleval's rules for a chunk's beginning and its end, written down as they stand there."""
    found, start, previous = set(), 0, "O"
    for index, tag in enumerate([*tags, "O"]):
        (mark, _, kind), (old, _, of) = tag.partition("-"), previous.partition("-")
        if old != "O" and (mark in ("B", "O") or kind != of):
            found.add((start, index, of))
        if mark == "B" or (mark == "I" and (old == "O" or kind != of)):
            start = index
        previous = tag
    return found


def test_tags_are_read_as_conlleval_reads_them_and_scored_exactly() -> None:
    rng = random.Random(0)
    choices = labels_of(["X", "Y"])
    golds, founds = [], []
    for _ in range(300):
        tags = rng.choices(choices, k=rng.randrange(0, 9))
        assert {(e.start, e.end, e.type) for e in from_tags(tags)} == conlleval(tags)
        golds.append(from_tags(tags))
        founds.append(from_tags([rng.choice(choices) if rng.random() < 0.3 else tag for tag in tags]))
    both = sum(len(set(a) & set(b)) for a, b in zip(golds, founds, strict=True))
    precision, recall = both / sum(map(len, founds)), both / sum(map(len, golds))
    scores = entity_scores(golds, founds)
    assert scores["entity_f1"] == pytest.approx(2 * precision * recall / (precision + recall))
    assert from_tags(["S-X", "B-Y", "I-Y", "E-Y", "U-X"]) == [Entity(0, 1, "X"), Entity(1, 4, "Y"), Entity(4, 5, "X")]
    known = class_scores([0, 0, 0, 1, -1], [0, 0, 1, 1, 1], ["a", "b", "c"])  # precision and recall by hand
    assert known["accuracy"] == 3 / 5 and known["macro_f1"] == pytest.approx((0.8 + 0.5) / 2)


def test_words_are_characters_in_chinese_and_entities_survive_being_tagged() -> None:
    words = Words.of("张三 goes to New  York，ok_don't")
    assert [words.text[a:b] for a, b in words.places] == [
        "张", "三", "goes", "to", "New", "York", "，", "ok", "_", "don", "'", "t",
    ]  # fmt: skip
    for row in sentences(20, 4):
        cut = Words.of(row.text)
        assert cut.entities(cut.tags(entities_of(row) or [])) == entities_of(row)
    assert Words.of("New York City").tags([Entity(0, 8, "A"), Entity(0, 13, "B")]) == ["B-B", "I-B", "I-B"]
    changed = Row("x" + sentences(1, 1)[0].text, "", meta=sentences(1, 1)[0].meta)
    assert entities_of(changed) is None, "its offsets point elsewhere now"
    with pytest.raises(FledgeError, match="does not lie within"):
        marked("ab", [Entity(1, 3, "X")])


def test_rows_with_tags_become_entities(tmp_path: Path) -> None:
    rows = [
        {"tokens": ["张", "三", "去", "北", "京"], "tags": ["B-PER", "I-PER", "O", "B-LOC", "E-LOC"]},
        {"words": ["Ada", "is", "in", "Rome", "."], "ner_tags": ["B-PER", "O", "O", "B-LOC", "O"]},
        {"text": "Ada is in Rome.", "entities": [{"start": 10, "end": 14, "label": "LOC"}]},
        {"text": "Ada", "entities": [{"start": 1, "end": 9, "label": "LOC"}]},
    ]
    file = tmp_path / "ner.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    found = list(load(file, "labelled"))
    assert [row.text for row in found] == ["张三去北京", "Ada is in Rome .", "Ada is in Rome."]
    told = [[row.text[e.start : e.end] + e.type for e in entities_of(row) or []] for row in found]
    assert told == [["张三PER", "北京LOC"], ["AdaPER", "RomeLOC"], ["RomeLOC"]]


@pytest.mark.parametrize(("data", "pooling", "family"), [("chats", "mean", "bert"), ("wishes", "last", "llama")])
def test_embeddings_find_their_partners(
    run: Run, world: dict[str, Artifact], data: str, pooling: Any, family: str
) -> None:
    train = {**QUICK, "batch_size": 8, "epochs": 12, "lr": 3e-3, "evaluate_every": 8}
    made = run(Embed(model=family, data=data, held_out="chats", pooling=pooling, train=train), micro_batch=3)
    metrics = made.metrics
    assert metrics["recall_at_1"] > max(0.8, metrics["recall_at_1_before"]) and metrics["held_out_rows"] == 16
    assert metrics["hard_negatives"] == (data == "wishes")
    model, names = AutoModel.from_pretrained(made.path), AutoTokenizer.from_pretrained(made.path)
    assert model.config.pooling == pooling
    pairs = [(f"what about {w}?", f"{t}: {w}") for t, words in TOPICS.items() for w in words]
    sides = [torch.stack([by_hand(model, names, pair[side], pooling) for pair in pairs]) for side in (0, 1)]
    right = (torch.cosine_similarity(sides[0][:, None], sides[1][None], dim=-1).argmax(dim=1) == torch.arange(16)).sum()
    assert int(right) / 16 == pytest.approx(metrics["recall_at_1"])


def by_hand(model: Any, names: Any, text: str, pooling: str) -> torch.Tensor:
    with torch.no_grad():
        hidden = model(**names(text, return_tensors="pt")).last_hidden_state[0]
    return hidden.mean(dim=0) if pooling == "mean" else hidden[-1]


def test_simcse_needs_dropout_and_spreads_texts_out(run: Run, world: dict[str, Artifact]) -> None:
    train = {**QUICK, "batch_size": 16, "epochs": 6, "lr": 1e-3}
    with pytest.raises(FledgeError, match="without dropout"):
        run(Embed(model="bert", data="documents", train={**train, "dropout": {"hidden": 0.0, "attention": 0.0}}))
    made = run(Embed(model="bert", data="documents", held_out="documents", train=train), "b")
    assert made.metrics["uniformity"] < made.metrics["uniformity_before"] - 0.3
    with pytest.raises(FledgeError, match="cannot be learned from together"):
        run(Embed(model="bert", data=["documents", "chats"], train=train), "c")


def test_a_vector_does_not_depend_on_padding() -> None:
    model = tiny().model
    alone, together = (
        as_batch(collate(examples, 0)) for examples in ([Example([5, 6, 7])], [Example([5, 6, 7]), Example([9] * 20)])
    )
    for pooling in ("mean", "last", "cls"):
        torch.testing.assert_close(vectors_of(model, alone, pooling)[0], vectors_of(model, together, pooling)[0])


def hidden(count: int, seed: int) -> list[Row]:
    """One of eight digits among letters decides the class: little to go by, until one knows where to look."""
    rng, found = random.Random(seed), []
    for _ in range(count):
        digit = rng.randrange(8)
        signs = [*rng.choices("abcdefghij", k=6), str(digit)]
        rng.shuffle(signs)
        found.append(Row("".join(signs), "wxyz"[digit // 2]))
    return found


def test_meta_learning_makes_a_new_task_easier(run: Run, world: dict[str, Artifact], tmp_path: Path) -> None:
    world["hidden"] = Labelled(write(tmp_path / "hidden", "labelled", hidden(200, 1)))
    world["hidden_unseen"] = Labelled(write(tmp_path / "hidden_unseen", "labelled", hidden(120, 2)))
    given: dict[str, Any] = {
        "model": "llama", "data": "hidden", "ways": 2, "shots": 6, "inner_steps": 6, "inner_batch": 12,
        "inner_lr": 3e-3, "test_tasks": 48, "test_steps": 6, "test_queries": 6,
    }  # fmt: skip
    train = {"batch_size": 2, "lr": 0.7, "dtype": "float32", "log_every": 10}
    made = run(Meta(**given, held_out="hidden_unseen", train={**train, "steps": 140}))
    metrics = made.metrics
    assert type(made) is TaskModel
    gained = metrics["few_shot_accuracy"] - metrics["plain_few_shot_accuracy"]
    assert gained > 0.12 > 2 * metrics["few_shot_accuracy_error"], metrics
    assert metrics["few_shot_loss"] < 0.7 * metrics["plain_few_shot_loss"]
    assert AutoModelForSequenceClassification.from_pretrained(made.path).config.num_labels == 2
    small = [run(Meta(**given, train={**train, "steps": 3}), name).path / "model.safetensors" for name in "bc"]
    assert small[0].read_bytes() == small[1].read_bytes()


def test_meta_learning_of_ways_to_answer(run: Run, world: dict[str, Artifact]) -> None:
    stage = Meta(
        model="llama", data="tones", held_out="tones", learn="answers", group="source", shots=8, inner_steps=3,
        inner_lr=3e-3, test_tasks=4, test_steps=3, test_queries=4,
        train={"steps": 12, "batch_size": 2, "dtype": "float32"},
    )  # fmt: skip
    assert stage.output_kinds() == {"": Model}
    made = run(stage)
    assert type(made) is Model and made.metrics["families"] == 3
    assert made.metrics["few_shot_loss"] < made.metrics["plain_few_shot_loss"] - 0.5
    AutoModelForCausalLM.from_pretrained(made.path)
    with pytest.raises(FledgeError, match="no group with enough examples"):
        run(Meta(model="llama", data="texts", ways=9, train={"steps": 2}), "b")
    assert [p.where for p in Meta(model="m", data="d", learn="answers").check()] == ["group"]
