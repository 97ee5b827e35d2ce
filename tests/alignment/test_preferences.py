"""Preference pairs: the better side, what tells nothing (length), what must not leak, and going on after a kill."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fledge.alignment import samples
from fledge.alignment.contexts import Reply, one_each, replies
from fledge.alignment.preferences import _pair, evened_out, fault
from fledge.alignment.samples import Sample
from fledge.alignment.stages import PreferencePairs
from fledge.core.artifact import Artifact, Conversations, Model, files_of, sha256_of
from fledge.core.errors import FledgeError
from fledge.core.events import Event
from fledge.inference.engine import Choice, Result
from fledge.records.kinds import Conversation, Message, Preference
from fledge.records.rejects import Rejects, read_rejects
from fledge.records.shards import read
from tests.alignment.conftest import dialogue

Run = Callable[..., Any]
STAGE = PreferencePairs(
    model="chat", conversations="talk", samples=50, dictionary_pairs=40, max_new_tokens=24, min_tokens=2, held_out=0.3
)


class Speaker:
    """An engine that answers words of a length drawn from the seed, one token a character; now and then without end."""

    context = 256
    asked = 0
    parameters = 0

    def encode(self, text: str) -> list[int]:
        return list(range(len(text) // 2))

    def generate(self, requests: Any) -> list[Result]:
        Speaker.asked += len(requests)
        return [Result(tuple(self._choice(r, i) for i in range(r.n))) for r in requests]

    def _choice(self, request: Any, index: int) -> Choice:
        drawn = (request.seed >> index) % 97
        text = "uh " * (drawn % 13)
        return Choice(text, tuple(range(len(text))), "length" if drawn % 10 == 0 else "stop")

    def close(self) -> None:
        pass


@pytest.fixture
def speaker(monkeypatch: pytest.MonkeyPatch) -> type[Speaker]:
    from fledge.inference.native import NativeEngine

    monkeypatch.setattr(NativeEngine, "from_folder", lambda *_: Speaker())
    Speaker.asked = 0
    return Speaker


@pytest.fixture
def inputs(model: Path, conversations: Path) -> dict[str, Artifact]:
    return {"model": Model(model), "conversations": Conversations(conversations)}


def rows(artifact: Artifact) -> list[Preference]:
    return [row for row in read(artifact, "preferences") if isinstance(row, Preference)]


def test_a_real_model_is_sampled_and_every_pair_says_who_wrote_what(run: Run, inputs: Any, heard: list[Event]) -> None:
    settings = STAGE.model_copy(update={"even_lengths": False, "max_new_tokens": 40})
    made = run(settings, **inputs)
    pairs = rows(made["train"]) + rows(made["held_out"])
    kinds = Counter(pair.meta["kind"] for pair in pairs)
    assert {kind for kind in kinds if kind.startswith("dictionary>")} == {
        f"dictionary>{kind}" for kind in ("shuffle", "reorder", "drop", "repeat", "swap")
    }
    people = {
        f"{c.id}:{i}": c.messages[i].content
        for c in read(inputs["conversations"], "conversations")
        for i in (1, 3, 5)
        if i < len(c.messages)
    }
    for pair in pairs:
        chosen, rejected = next(pair.pairs())
        assert chosen.content == people[pair.id] and rejected.content not in ("", chosen.content)
        assert chosen.by == pair.meta["kind"].partition(">")[0]
        assert rejected.by == (
            "model" if chosen.by == "person" else f"corruption:{pair.meta['kind'].partition('>')[2]}"
        )
        assert pair.prompt[-1].role == "user" and pair.prompt[0].role == "user"
    rejected_rows = list(read_rejects(made["train"].path))
    assert len(pairs) + len(rejected_rows) == 50 + 40  # nothing is lost without a word
    assert sum(made["train"].metrics["rejected"].values()) == len(rejected_rows)
    assert any(event.kind == "progress" and event.value == 50 for event in heard)


def test_the_same_bytes_again_and_after_a_kill(
    run: Run, inputs: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(samples, "CHUNK", 16)
    settings = STAGE.model_copy(update={"even_lengths": False})
    whole = run(settings, **inputs)

    class Killed(BaseException):
        pass

    write, written = samples.write_atomic, []

    def write_two(file: Path, text: str) -> None:
        if len(written) == 2:
            raise Killed
        written.append(file)
        write(file, text)

    work = tmp_path / "work"
    with monkeypatch.context() as patched:
        patched.setattr(samples, "write_atomic", write_two)
        with pytest.raises(Killed):
            run(settings, work=work, **inputs)
    stamps = [file.stat().st_mtime_ns for file in written]
    resumed = run(settings, work=work, **inputs)
    assert [file.stat().st_mtime_ns for file in written] == stamps and len(list(work.glob("samples-*"))) == 4
    for part in ("train", "held_out"):
        names = list(files_of(whole[part].path))
        assert names == list(files_of(resumed[part].path))
        assert all(sha256_of(whole[part].path / n) == sha256_of(resumed[part].path / n) for n in names)


def test_length_tells_nothing(run: Run, inputs: Any, speaker: type[Speaker]) -> None:
    made = run(STAGE, **inputs)
    for part in made.values():
        pairs = rows(part)
        by_side = {side: [p for p in pairs if p.meta["kind"].startswith(side)] for side in ("person", "dictionary")}
        for side, some in by_side.items():
            wins = [len(p.answers[0].content) - len(p.answers[1].content) for p in some]
            assert sum(w > 0 for w in wins) == sum(w < 0 for w in wins), (side, wins)
        assert part.metrics["longer_answer_accuracy"] == 0.5
        assert part.metrics["pairs"] == len(pairs) == sum(part.metrics["by_kind"].values())
    assert {p.language for p in rows(made["train"]) if p.meta["kind"] == "person>model"} == {"en", "zh"}


def test_nothing_is_in_both_parts(run: Run, inputs: Any, speaker: type[Speaker], tmp_path: Path) -> None:
    made = run(STAGE.model_copy(update={"even_lengths": False}), **inputs)
    train, held_out = rows(made["train"]), rows(made["held_out"])
    assert train and held_out
    assert not {p.meta["conversation"] for p in train} & {p.meta["conversation"] for p in held_out}
    assert not {p.prompt for p in train} & {p.prompt for p in held_out}


def test_a_prompt_that_two_conversations_share_is_trained_on_only_where_it_is_not_tested(
    run: Run, model: Path, speaker: type[Speaker], tmp_path: Path
) -> None:
    lines = [
        {
            "messages": [
                {"role": "user", "content": "same words"},
                {"role": "assistant", "content": f"my own answer {i}"},
            ]
        }
        for i in range(40)
    ]
    file = tmp_path / "raw.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    settings = STAGE.model_copy(update={"even_lengths": False, "dictionary_pairs": 0})
    with pytest.raises(FledgeError, match="no preference pairs"):  # all prompts are the same: all are held out
        run(settings, model=Model(model), conversations=Conversations(file))


def test_samples_that_give_themselves_away_are_set_aside() -> None:
    reply = Reply(dialogue(3, "en"), 1)
    engine: Any = Speaker()
    assert fault(Sample("", True, 1), reply, engine, 2) == "the sample is empty"
    assert fault(Sample("some words", False, 9), reply, engine, 2) == "the sample has no end within its budget"
    assert fault(Sample(reply.text, True, 9), reply, engine, 2) == "the sample is what the person said"
    assert fault(Sample("ok", True, 9), reply, engine, 2) == "the sample is too short"
    assert fault(Sample("some words", True, 9), reply, engine, 2) == ""


def test_evening_out_takes_the_surplus_of_each_band(tmp_path: Path) -> None:
    def pair(number: int, chosen: int, rejected: int) -> Any:
        messages = (Message("user", f"q{number}"), Message("assistant", "x" * chosen))
        return _pair(Reply(Conversation(messages, str(number), "en"), 1), 5, "person", "model", "y" * rejected)

    slightly = [pair(i, 11, 10) for i in range(6)] + [pair(10 + i, 10, 11) for i in range(4)]
    far = [pair(20 + i, 10, 80) for i in range(5)] + [pair(30, 80, 10)]
    even = [pair(40 + i, 10, 10) for i in range(3)]
    with Rejects(tmp_path) as rejects:
        kept = evened_out(slightly + far + even, 0, rejects)
        assert rejects.counts == {"preferences": 2 + 4}
    assert len([p for p in kept if 0 < abs(p.lean) < 0.5]) == 8
    assert Counter(math.copysign(1, p.lean) for p in kept if abs(p.lean) > 2) == {1: 1, -1: 1}
    assert len([p for p in kept if p.lean == 0]) == 3


def test_languages_take_turns_and_every_conversation_gives_one_reply() -> None:
    talks = [dialogue(i, "en") for i in range(30)] + [dialogue(i, "zh") for i in range(5)]
    drawn = list(one_each(talks, 7, lambda reply: len(reply.text) > 3))
    assert [reply.conversation.language for reply in drawn[:10]] == ["en", "zh"] * 5
    assert len({reply.conversation.id for reply in drawn}) == len(drawn) == 35
    assert drawn == list(one_each(reversed(talks), 7, lambda reply: len(reply.text) > 3))
    assert {reply.index for reply in drawn} == {1, 3, 5}


def test_the_context_is_cut_to_turns_that_begin_with_a_user() -> None:
    talk = Conversation((Message("system", "be kind"), *dialogue(0, "en").messages), "x", "en")
    last = list(replies(talk))[-1]
    assert last.index == 6
    assert [m.role for m in last.prompt(5)] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert [m.role for m in last.prompt(2)] == ["system", "user"]
    assert last.prompt(2)[-1] == talk.messages[5]


def test_wrong_settings_are_refused() -> None:
    nothing = PreferencePairs(model="m", conversations="c", samples=0, dictionary_pairs=0)
    assert [p.what for p in nothing.check()] == ["nothing is asked for"]
    backwards = PreferencePairs(model="m", conversations="c", min_tokens=70)
    assert [p.what for p in backwards.check()] == ["min_tokens must be less than max_new_tokens"]
