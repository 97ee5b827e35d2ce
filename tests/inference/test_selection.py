"""Examples chosen for a question: which, in which order, and that it matters, seen on a model that learns from them."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fledge.core.errors import FledgeError
from fledge.core.intervals import mcnemar
from fledge.inference.engine import Choice, Request, Result, Scored
from fledge.inference.examples.example import Example, examples_of
from fledge.inference.examples.likelihood import likelihoods, shown
from fledge.inference.examples.order import Item, order_effect, permutations
from fledge.inference.examples.selection import BYS, ORDERS, Selector, select
from fledge.inference.native import NativeEngine
from fledge.inference.prompting import technique
from fledge.records.kinds import Answer, Conversation, Document, Labelled, Message, Preference, Prompt, Rating
from tests.inference import tiny
from tests.inference.retrieval.library import Meaning

POOL = [
    Example("How high is Mont Blanc?", "4,806 m", 0.9),
    Example("How high is the Zugspitze?", "2,962 m", 0.2),
    Example("Who wrote Faust?", "Goethe", 0.8),
    Example("珠穆朗玛峰有多高？", "8848 米", 0.7),
    Example("《红楼梦》的作者是谁？", "曹雪芹", 0.6),
    Example("泰山有多高？", "1532 米", 0.5),
    Example("How high is the Matterhorn?", "4,478 m", 0.4),
]


# ---- what is chosen


def test_the_similar_ones_are_chosen_in_both_languages() -> None:
    assert {e.answer for e in select(POOL, "How high is the Eiger?", 2)} == {"2,962 m", "4,478 m"}
    assert {e.answer for e in select(POOL, "黄山有多高？", 2)} == {"8848 米", "1532 米"}
    assert select(POOL, "《西游记》的作者是谁？", 1)[0].answer == "曹雪芹"


def test_the_order_is_the_one_that_was_asked_for() -> None:
    query = "How high is the Zugspitze really?"
    places = {order: Selector(POOL, "similar", order, seed=1).places(query, 4) for order in ORDERS}
    scores = Selector(POOL).similarity(query)
    assert places["similar_first"] == sorted(places["as_is"], key=lambda i: (-scores[i], i))
    assert places["similar_last"] == places["similar_first"][::-1]
    assert places["as_is"] == sorted(places["random"]) == sorted(places["similar_first"])
    assert places["similar_last"][-1] == 1
    draws = {tuple(Selector(POOL, "similar", "random", seed=s).places(query, 4)) for s in range(30)}
    assert len(draws) > 10


def test_an_example_that_asks_the_question_itself_is_never_taken() -> None:
    for by, order in itertools.product(BYS, ORDERS):
        engine: Any = Meaning() if by in ("embedding", "diverse") else None
        found = select(POOL, "  who wrote ＦＡＵＳＴ?", 99, by, order, engine=engine)
        assert len(found) == len(POOL) - 1 and all(e.answer != "Goethe" for e in found)


def test_random_draws_hang_on_the_seed_and_the_question_alone() -> None:
    first, second = Selector(POOL, "random", seed=5), Selector(POOL, "random", seed=5)
    first.places("something else", 3)
    assert first.places("q", 3) == second.places("q", 3)
    seen = [Selector(POOL, "random", "as_is", seed=s).places("q", 2) for s in range(200)]
    counts = np.bincount([place for places in seen for place in places], minlength=len(POOL))
    assert counts.min() > 30  # 57 expected of each


def test_quality_takes_the_best_whatever_the_question() -> None:
    for query in ("How high?", "作者？"):
        assert {e.quality for e in select(POOL, query, 3, "quality")} == {0.9, 0.8, 0.7}


def test_diversity_covers_what_similarity_repeats() -> None:
    pool = [Example(f"How high is the mountain called Peak{'!' * i}?", str(i)) for i in range(6)]
    pool += [Example("How high is a house?", "house"), Example("山有多高？", "山"), Example("那座山到底有多高？", "那")]
    for query, often, other in (
        ("How high is the mountain called K2?", "Peak", "house"),
        ("这座山有多高？", "山", "山"),
    ):
        similar, diverse = select(pool, query, 2), select(pool, query, 2, "diverse", diversity=0.6)
        assert all(often in e.question for e in similar)
        assert {e.answer for e in diverse} >= {other} and len({e.question.rstrip("!?") for e in diverse}) == 2


def test_meaning_chooses_across_languages() -> None:
    pool = [Example("锅炉怎么修？", "a"), Example("如何请假？", "b"), Example("博物馆几点开门？", "c")]
    for query, wanted in (("Who can fix the heating boiler?", "a"), ("How do I take leave?", "b"), ("museum?", "c")):
        engine: Any = Meaning()
        assert select(pool, query, 1, "embedding", engine=engine)[0].answer == wanted


def test_wrong_use_is_said() -> None:
    for options, said in (
        ({"by": "nearest"}, "by is out of range"), ({"order": "best"}, "order is out of range"),
        ({"by": "embedding"}, "needs a model"),
    ):  # fmt: skip
        with pytest.raises(FledgeError, match=said):
            select(POOL, "q", 1, **options)  # type: ignore[arg-type]
    with pytest.raises(FledgeError, match="no examples"):
        select([], "q", 1)
    with pytest.raises(FledgeError, match="needs a model"):
        select([Example("a", "b")], "q", 1, "quality")
    with pytest.raises(FledgeError, match="k is out of range"):
        select(POOL, "q", -1)
    assert select(POOL, "q", 0) == [] == select([Example("q", "a")], "q", 3)


def test_examples_come_from_records_of_every_kind() -> None:
    ask, say = Message("user", "问？"), Message("assistant", "答。")
    records = [
        Prompt((ask,), "42", meta={"score": "0.5"}), Rating((ask,), "好", 0.9),
        Labelled("text", "label", meta={"quality": "?"}),
        Preference((ask,), (Answer("bad", 2), Answer("good", 1))), Conversation((ask, say)), Conversation((ask,)),
        Prompt((ask,)), Document("no answer"),
    ]  # fmt: skip
    assert examples_of(records) == [
        Example("问？", "42", 0.5), Example("问？", "好", 0.9), Example("text", "label"), Example("问？", "good"),
        Example("问？", "答。"),
    ]  # fmt: skip


# ---- what the order does


class LastOne:
    """A scorer that believes what stood last: an answer is likely when the last example gave it."""

    context = 10_000

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]

    def score(self, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]) -> list[Scored]:
        found = []
        for prompt, continuation in zip(prompts, continuations, strict=True):
            text, answer = "".join(map(chr, prompt)), "".join(map(chr, continuation)).strip()
            blocks = text.split("\n\n")[:-1]
            good = blocks[-1].endswith((f"Answer: {answer}", f"回答：{answer}"))
            found.append(Scored((-0.1 if good else -2.0,) * len(continuation), (good,) * len(continuation)))
        return found


@pytest.mark.parametrize("wrong", [(), ("no", "否")])
def test_the_effect_of_order_is_exact_where_only_the_last_example_counts(wrong: tuple[str, ...]) -> None:
    examples = [Example("a?", "x"), Example("b?", "x"), Example("丙？", "y"), Example("丁？", "z")]
    items = [Item("q1?", "x", wrong), Item("q2?", "x", wrong), Item("问三？", "y", wrong), Item("q4?", "w", wrong)]
    engine: Any = LastOne()
    found = order_effect(engine, examples, items, orders=24)
    share = {"x": 0.5, "y": 0.25, "z": 0.0}
    assert len(found.orders) == 24 == len(set(found.orders))
    assert list(found.accuracy) == [share[examples[order[-1]].answer] for order in found.orders]
    assert found.mean == pytest.approx((12 * 0.5 + 6 * 0.25) / 24)
    assert found.spread == pytest.approx(np.std([0.5] * 12 + [0.25] * 6 + [0.0] * 6, ddof=1))
    assert found.accuracy[found.best] == 0.5 and found.accuracy[found.worst] == 0.0
    some = order_effect(engine, examples, items, orders=5, seed=3)
    assert some.orders[0] == (0, 1, 2, 3) and len(set(some.orders)) == 5
    with pytest.raises(FledgeError, match="no questions"):
        order_effect(engine, examples, [])


def test_permutations_are_all_or_different_ones() -> None:
    assert permutations(3, 99, 0) == list(itertools.permutations(range(3)))
    drawn = permutations(12, 40, 7)
    assert (
        len(set(drawn)) == 40
        and drawn[0] == tuple(range(12))
        and drawn == permutations(12, 40, 7) != permutations(12, 40, 8)
    )


def test_there_are_no_more_permutations_than_there_are() -> None:
    assert len(set(permutations(9, 400_000, 0))) == 362_880 and len(set(permutations(40, 7, 0))) == 7


def test_likelihoods_are_the_models_own(engine: NativeEngine) -> None:
    rows = [((), "What is this?", "a test"), ((POOL[0],), "这是什么？", "测试"), ((POOL[2], POOL[4]), "谁？", "我")]
    means, _ = likelihoods(engine, rows)
    for (examples, query, answer), mean in zip(rows, means, strict=True):
        prompt = shown(examples, query)
        head = engine.encode(prompt)
        whole = engine.encode(prompt + ("" if prompt.endswith("：") else " ") + answer)
        with torch.inference_mode():
            logits = engine.model(torch.tensor([whole]), use_cache=False).logits[0].double().log_softmax(-1)
        mine = [float(logits[i - 1, whole[i]]) for i in range(len(head), len(whole))]
        assert mean == pytest.approx(sum(mine) / len(mine), abs=2e-4)
    assert shown((POOL[4],), "谁？") == "问题：《红楼梦》的作者是谁？\n回答：曹雪芹\n\n问题：谁？\n回答："
    assert shown((), "Who?") == "Question: Who?\nAnswer:"


# ---- that it matters

KEYS = re.findall(r"\w+", "cat dog horse bird mouse sheep tiger whale crow bear 猫 狗 马 鸟 鼠 羊 虎 鲸 鸦 熊")
VALUES = re.findall(r"\w+", "fish bone hay seed cheese grass meat krill corn honey 鱼 骨 草 籽 酪 叶 肉 虾 谷 蜜")
ASKED, POOLED = {"en": "meal", "zh": "饭食"}, {"en": "food", "zh": "食物"}
WORDS = ["<pad>", "<unk>", *ASKED.values(), *POOLED.values(), *KEYS, *VALUES]


def language_of(word: str) -> str:
    return "en" if word.isascii() else "zh"


def told(examples: Sequence[Example], query: str) -> str:
    """`food cat fish food dog bone meal cat`."""
    return " ".join([part for e in examples for part in (e.question, e.answer)] + [query])


@pytest.fixture(scope="module")
def learner() -> Iterator[NativeEngine]:
    """A model of two layers that has learned to look an answer up in its context, whatever the facts are there."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>")
    model = tiny.llama(
        vocab_size=len(WORDS), initializer_range=0.05, intermediate_size=32, num_attention_heads=2,
        max_position_embeddings=64, pad_token_id=0,
    ).train()  # fmt: skip
    draw = np.random.default_rng(0)
    number = {word: i for i, word in enumerate(WORDS)}
    keys, values = (np.array([number[w] for w in words]) for words in (KEYS, VALUES))
    pooled, asked = (np.array([number[label[language_of(w)]] for w in KEYS]) for label in (POOLED, ASKED))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0)
    for _ in range(800):  # rows of four facts, then six questions about them; about 150 steps are enough
        places = np.argsort(draw.random((64, len(keys))), axis=1)[:, :4]
        facts, about = draw.choice(values, (64, 4)), draw.integers(0, 4, (64, 6))
        told_of, answers = np.take_along_axis(places, about, 1), np.take_along_axis(facts, about, 1)
        parts = [
            np.stack([pooled[places], keys[places], facts], 2),
            np.stack([asked[told_of], keys[told_of], answers], 2),
        ]
        ids = torch.from_numpy(np.concatenate([part.reshape(64, -1) for part in parts], 1))  # (64, 12 + 18)
        logits = model(ids, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, 13::3].flatten(0, 1), ids[:, 14::3].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss.item() < 0.01:
            break
    with NativeEngine(model.eval(), tokenizer) as made:
        yield made


def facts() -> tuple[list[Example], list[Item]]:
    """A pool of facts, and questions about them in other words, so that none asks what an example asks."""
    draw = np.random.default_rng(9)
    answers = [str(value) for value in draw.choice(VALUES, len(KEYS))]
    pool = [Example(f"{POOLED[language_of(key)]} {key}", answer) for key, answer in zip(KEYS, answers, strict=True)]
    items = [Item(f"{ASKED[language_of(key)]} {key}", answer) for key, answer in zip(KEYS, answers, strict=True)]
    return pool, items


def right(engine: NativeEngine, by: Any, order: Any = "similar_last") -> list[bool]:
    pool, items = facts()
    selector = Selector(pool, by, order, engine=engine if by == "embedding" else None)
    rows = [(selector.select(item.question, 4), item.question, item.answer) for item in items]
    return likelihoods(engine, rows, told)[1]


def test_similar_examples_answer_what_random_ones_cannot(learner: NativeEngine) -> None:
    similar, drawn = right(learner, "similar"), right(learner, "random")
    assert np.mean(similar) >= 0.9, "the right example stands in the context: the model finds the answer there"
    assert np.mean(drawn) <= 0.5
    only = sum(a and not b for a, b in zip(similar, drawn, strict=True))
    assert mcnemar(only, sum(b and not a for a, b in zip(similar, drawn, strict=True))) < 1e-3
    for language in ("en", "zh"):
        mine = [i for i, key in enumerate(KEYS) if language_of(key) == language]
        assert np.mean([similar[i] for i in mine]) > np.mean([drawn[i] for i in mine]) + 0.3


def test_the_order_of_sufficient_examples_is_measured_on_a_real_model(learner: NativeEngine) -> None:
    pool, items = facts()
    examples = pool[:4]
    found = order_effect(learner, examples, items[:4], orders=24, show=told)
    assert len(found.accuracy) == 24 and found.mean > 0.8
    assert found.accuracy[found.worst] <= found.mean <= found.accuracy[found.best]
    one = found.orders[5]
    again = likelihoods(learner, [([examples[i] for i in one], item.question, item.answer) for item in items[:4]], told)
    assert found.accuracy[5] == np.mean(again[1]) and found.logprob[5] == pytest.approx(np.mean(again[0]), abs=1e-5)


# ---- as a technique


class Echo:
    """Answers with the number of turns that stand before the question."""

    def generate(self, requests: Sequence[Request]) -> list[Result]:
        return [Result((Choice(str(len(r.messages or ()) // 2), (1,), "stop"),), 1) for r in requests]


def test_the_technique_puts_chosen_examples_before_the_question(tmp_path: Path) -> None:
    file = tmp_path / "pool.jsonl"
    rows = [{"prompt": e.question, "answer": e.answer, "meta": {"score": e.quality}} for e in POOL]
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    made = technique({"use": "selected_shots", "pool": str(file), "k": 2})
    for query, wanted in (("How high is the Eiger?", "Matterhorn"), ("黄山有多高？", "泰山")):
        outcome = made.run(Echo(), query)
        assert outcome.answer == "2" and [step.role for step in outcome.trace] == ["select", "answer"]
        asked = outcome.trace[-1].prompt
        assert wanted in str([message.content for message in asked])
        assert asked[-1].content == query and [m.role for m in asked] == ["user", "assistant"] * 2 + ["user"]
    best = technique({"use": "selected_shots", "pool": str(file), "k": 1, "by": "quality"}).run(Echo(), "q?")
    assert "Mont Blanc" in str(best.trace[-1].prompt)
    with pytest.raises(FledgeError):
        technique({"use": "selected_shots", "pool": str(tmp_path / "none.jsonl")}).run(Echo(), "q?")
