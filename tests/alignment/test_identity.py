"""The identity set: many wordings, none of the test's among them, right answers that say the name."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError

from fledge.alignment.identity import _asked, questions, unseen_prompts, wordings
from fledge.alignment.stages import Identity
from fledge.core.artifact import Conversations, Preferences, Prompts, sha256_of
from fledge.records.kinds import Conversation, Preference, Prompt
from fledge.records.shards import read

Run = Callable[..., Any]
STAGE = Identity(name="Pico", maker={"en": "the Hatchery", "zh": "孵化坊"}, count=300)


def plain(text: str) -> str:
    """Letters only, so that no change of marks, spaces or case makes a wording new."""
    return re.sub(r"[\W_]", "", unicodedata.normalize("NFKC", text)).casefold()


@pytest.mark.parametrize("language", ["en", "zh"])
def test_there_are_enough_wordings_and_none_stands_on_both_sides(language: str) -> None:
    page = wordings(language)
    train, unseen = [text for _, text in page.questions], [text for _, text in page.held_out]
    assert len({plain(text) for text in train}) == len(train) >= 60
    assert len({plain(text) for text in unseen}) == len(unseen) == 20
    asked = {plain(_asked(opening, text)) for text in train for opening in page.openings}
    assert not asked & {plain(text) for text in unseen}


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_right_answer_says_the_name_and_no_wrong_one_does(language: str) -> None:
    for topic in wordings(language).topics:
        assert all("{name}" in answer for answer in topic.answers)
        assert not any("{name}" in answer or "{maker}" in answer for answer in topic.wrong)
        assert len(topic.answers) >= 4 and len(topic.wrong) >= 3


@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_test_cannot_be_passed_by_repeating_the_question(language: str) -> None:
    assert all("Pico" not in prompt.messages[-1].content for prompt in unseen_prompts(STAGE, language))


def test_the_stage_writes_conversations_prompts_and_preferences(run: Run) -> None:
    made = run(STAGE)
    assert {name: type(artifact) for name, artifact in made.items()} == {
        "train": Conversations, "held_out": Prompts, "preferences": Preferences,
    }  # fmt: skip
    talks = list(read(made["train"], "conversations"))
    assert len(talks) == made["train"].metrics["conversations"] == 600
    assert len({talk.id for talk in talks}) == 600
    assert {talk.language for talk in talks} == {"en", "zh"}
    asked = {message.content for talk in talks for message in talk.messages if message.role == "user"}
    unseen = list(read(made["held_out"], "prompts"))
    assert len(unseen) == 40 and all(isinstance(prompt, Prompt) and prompt.answer == "Pico" for prompt in unseen)
    assert not {plain(prompt.messages[0].content) for prompt in unseen} & {plain(text) for text in asked}
    for talk in talks:
        assert isinstance(talk, Conversation)
        roles = [message.role for message in talk.messages]
        assert roles in (["user", "assistant"], ["user", "assistant"] * 2)
        assert "Pico" in talk.messages[-1].content and "{" not in talk.messages[-1].content
    makers = {"en": "the Hatchery", "zh": "孵化坊"}
    for language, maker in makers.items():
        assert any(maker in talk.messages[-1].content for talk in talks if talk.language == language)
    for pair in read(made["preferences"], "preferences"):
        assert isinstance(pair, Preference)
        chosen, rejected = next(pair.pairs())
        assert "Pico" in chosen.content and "Pico" not in rejected.content


def test_the_same_seed_the_same_bytes_and_another_seed_other_rows(run: Run) -> None:
    one, two, other = run(STAGE), run(STAGE), run(STAGE, seed=1)
    file = "records/part-00000.parquet"
    for part in one:
        assert sha256_of(one[part].path / file) == sha256_of(two[part].path / file)
    assert sha256_of(one["train"].path / file) != sha256_of(other["train"].path / file)


def test_every_wording_is_asked_before_one_is_asked_again() -> None:
    stream = questions(STAGE, "en", 5)
    first = [next(stream) for _ in wordings("en").questions]
    asked = [plain(question.prompt[-1].content) for question in first]
    for _, text in wordings("en").questions:
        assert any(found.endswith(plain(text)) for found in asked)
    assert 0 < sum(len(question.prompt) == 3 for question in first) < 30


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValidationError):
        Identity(name="", maker="x")
    (problem,) = Identity(name="Pico", maker={"en": "the Hatchery"}).check()
    assert problem.where == "maker" and problem.found == "zh"
    assert not list(Identity(name="Pico", maker={"en": "the Hatchery"}, languages=["en"]).check())
