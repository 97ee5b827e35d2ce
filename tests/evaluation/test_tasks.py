"""Every task against numbers counted by hand, with an engine that reads letters."""

from __future__ import annotations

from pathlib import Path

import pytest

from fledge.core.artifact import Conversations, Preferences, Prompts
from fledge.core.errors import FledgeError
from fledge.core.intervals import wilson
from fledge.evaluation.subject import spread
from fledge.evaluation.tasks.answer_loss import AnswerLoss
from fledge.evaluation.tasks.answer_match import AnswerMatch, matches
from fledge.evaluation.tasks.preference_accuracy import PreferenceAccuracy, fitting
from fledge.evaluation.tasks.samples import Samples
from fledge.records.kinds import Answer, Conversation, Message, Preference, Prompt
from fledge.records.shards import ShardWriter
from tests.evaluation.fakes import LetterEngine, job_for, subject


def told() -> tuple[list[int], object]:
    counts: list[int] = []
    return counts, counts.append


def talk(answer: str, language: str) -> Conversation:
    return Conversation((Message("user", "hi"), Message("assistant", answer)), language=language)


def test_answer_loss_counts_content_tokens_only(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "conversations") as out:
        out.write(talk("aaaa", "en"))
        out.write(talk("zz", "zh"))
    task = AnswerLoss(data="x")  # type: ignore[arg-type]
    rows = task.load(job_for(task, tmp_path / "job", {"x": Conversations(tmp_path)}))
    counts, tell = told()
    items = task.ask(rows, subject(engine=LetterEngine(liked={"z": -3.0}, end=-50.0)), 0, tell)  # type: ignore[arg-type]
    assert [(i["loss"], i["tokens"]) for i in items] == [(4.0, 4), (6.0, 2)]
    assert sum(counts) == task.count(rows) == 2
    found = task.conclude(rows, {"a": items}, {}, 0).models["a"]
    assert found["answer_loss"].value == pytest.approx(10 / 6)  # type: ignore[union-attr]
    assert (found["answer_loss_en"], found["answer_loss_zh"]) == (1.0, 3.0)  # of one conversation there is no interval


def test_answer_loss_reads_no_further_than_the_context(tmp_path: Path) -> None:
    task = AnswerLoss(data="x")  # type: ignore[arg-type]
    start = len("<user>hi") + 1 + len("<assistant>")
    items = task.ask([talk("abcdef", "en")], subject(engine=LetterEngine(context=start + 2)), 0, lambda n: None)
    assert items[0]["tokens"] == 3  # a model of n positions scores n + 1 tokens


def test_held_out_rows_are_taken_evenly() -> None:
    assert spread(range(10), 5) == [0, 2, 4, 6, 8]
    assert spread(range(3), 5) == spread(range(3), None) == [0, 1, 2]


def preferences() -> list[Preference]:
    ask = (Message("user", "q"),)
    return [
        Preference(ask, (Answer("zz good", 1), Answer("abcdefghijkl", 2)), "1"),
        Preference(ask, (Answer("z good", 1), Answer("abc", 2)), "2"),
        Preference(ask, (Answer("abcd", 1), Answer("zzzz good", 2)), "3"),
        Preference(ask, (Answer("same", 1), Answer("tied", 1)), "4"),  # no pair
    ]


def test_preferences_by_implicit_reward_likelihood_and_reward_model(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "preferences") as out:
        for row in preferences():
            out.write(row)
    task = PreferenceAccuracy(data="x", reference="before", reward_model="judge")  # type: ignore[arg-type]
    rows = task.load(job_for(task, tmp_path / "job", {"x": Preferences(tmp_path)}))
    assert [row.id for row in rows] == ["1", "2", "3"]
    counts, tell = told()
    answers = {
        "before": task.ask(rows, subject("before"), 0, lambda n: None),
        "after": task.ask(rows, subject("after", LetterEngine(liked={"z": -0.25})), 0, tell),  # type: ignore[arg-type]
        "judge": task.ask(rows, subject("judge", reward=True), 0, lambda n: None),
    }
    assert sum(counts) == 3
    assert answers["before"][0]["chosen"] == {"characters": 7, "logprob": -12.0, "tokens": 8}  # 7 letters and the end
    found = task.conclude(rows, answers, {"reference": "before", "reward": "judge"}, 0)
    # z is cheaper by 0.75 than before: pairs 1 and 2 gain, pair 3 loses
    assert found.models["after"]["preference_accuracy"] == wilson(2, 3)
    assert found.models["after"]["preference_accuracy_margin"] == pytest.approx(0.75 * (2 + 1 - 4) / 3)
    # whole answers: −10.5 against −17, −10.25 against −8, −9 against −11
    assert found.models["after"]["preference_accuracy_likelier"] == wilson(2, 3)
    assert found.models["judge"] == {"preference_accuracy": wilson(2, 3)}
    assert "preference_accuracy" not in found.models["before"]  # its implicit reward is nothing
    continues = {**answers, "after": task.ask(rows, subject("after", chat=False), 0, lambda n: None)}
    roles = {"reference": "before", "reward": "judge"}
    assert set(task.conclude(rows, continues, roles, 0).models["after"]) == {"preference_accuracy_likelier"}
    longer = {name: numbers["preference_accuracy"] for name, numbers in found.baselines.items()}
    assert longer["longer_answer"] == wilson(1, 3)
    assert longer["likelier_to_reference"] == wilson(2, 3)


def test_several_pairs_of_a_prompt_count_as_one_prompt() -> None:
    ranked = tuple(Answer("good " * (4 - rank), rank) for rank in (1, 2, 3))
    rows = [Preference((Message("user", "q"),), ranked, "1"), Preference((Message("user", "r"),), ranked, "2")]
    task = PreferenceAccuracy(data="x", reward_model="judge")  # type: ignore[arg-type]
    items = task.ask(rows, subject("judge", reward=True), 0, lambda n: None)
    assert len(items) == 6
    assert task.conclude(rows, {"judge": items}, {"reward": "judge"}, 0).models["judge"] == {
        "preference_accuracy": wilson(2, 2)
    }


def test_what_a_reward_model_cannot_read_whole_is_shortened_from_its_beginning() -> None:
    judge = subject(engine=LetterEngine(context=40), reward=True)
    talk = (Message("user", "old"), Message("assistant", "older"), Message("user", "new"), Message("assistant", "good"))
    assert fitting(talk, judge) == talk[2:]
    assert fitting(talk[2:], judge) == talk[2:]
    short = fitting((Message("user", "new"), Message("assistant", "good" * 20)), judge)
    assert short[0].content == "new" and short[1].content and ("good" * 20).startswith(short[1].content)
    assert judge.renderer is not None and len(judge.renderer.render(short).ids) <= 40


def test_a_policy_equal_to_its_reference_is_a_coin() -> None:
    rows = preferences()[:3]
    task = PreferenceAccuracy(data="x", reference="a")  # type: ignore[arg-type]
    answers = {name: task.ask(rows, subject(name), 0, lambda n: None) for name in ("a", "b")}
    found = task.conclude(rows, answers, {"reference": "a"}, 0)
    assert found.models["b"]["preference_accuracy"].value == 0.5  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("text", "expected", "how", "right"),
    [
        ("I am Fledgling.", "fledgling", "contains", True),
        ("我是Ｆｌｅｄｇｌｉｎｇ。", "fledgling", "contains", True),
        ("I am a bird.", "fledgling", "contains", False),
        (" 雏鸟 ", "雏鸟", "exact", True),
        ("我是雏鸟", "雏鸟", "exact", False),
        ("It is 42 km", r"\b42\b", "regex", True),
        ("It is 420 km", r"\b42\b", "regex", False),
    ],
)
def test_when_an_answer_is_right(text: str, expected: str, how: str, right: bool) -> None:
    assert matches(text, expected, how) is right


def test_answer_match_counts_right_answers(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "prompts") as out:
        out.write(Prompt((Message("user", "Who are you?"),), "Fledge"))
        out.write(Prompt((Message("user", "你是谁？"),), "雏鸟"))
    task = AnswerMatch(data="x", label="identity")  # type: ignore[arg-type]
    rows = task.load(job_for(task, tmp_path / "job", {"x": Prompts(tmp_path)}))
    engine = LetterEngine(says={"Who are you?": "I am fledge.", "你是谁？": "不知道"})
    items = task.ask(rows, subject(engine=engine), 0, lambda n: None)
    assert [item["right"] for item in items] == [True, False]
    assert engine.asked[0].messages == rows[0].messages and engine.asked[0].temperature == 0
    assert task.conclude(rows, {"a": items}, {}, 0).models["a"] == {"identity": wilson(1, 2)}


def test_prompts_without_an_answer_are_refused(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "prompts") as out:
        out.write(Prompt((Message("user", "Who are you?"),)))
    task = AnswerMatch(data="x")  # type: ignore[arg-type]
    with pytest.raises(FledgeError, match=r"Who are you.*no answer that could be checked"):
        task.load(job_for(task, tmp_path / "job", {"x": Prompts(tmp_path)}))


def test_samples_are_chats_or_continuations() -> None:
    task = Samples(prompts=["Hello", "你好"])
    chats = LetterEngine(says={"Hello": "Hi!"})
    items = task.ask(task.prompts, subject(engine=chats), 0, lambda n: None)
    assert items[0] == {"prompt": "Hello", "text": "Hi!", "chat": True, "ended": "stop"}
    assert chats.asked[1].messages == (Message("user", "你好"),)
    continues = LetterEngine()
    items = task.ask(task.prompts, subject(engine=continues, chat=False), 0, lambda n: None)
    assert [r.text for r in continues.asked] == ["Hello", "你好"] and not items[0]["chat"]
