"""An assistant's name, maker and manner, as conversations to learn from and unseen wordings to test it with.

The wordings stand in `wordings/<language>.yaml`. Each has topics (name, self, maker, other, nature, manner) with ways
to ask in training, others to ask in the test, right answers and wrong ones. Training asks every wording in turn, in
several openings, now and then in the middle of a talk, and answers it in several ways; the test asks its own wordings.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import yaml

from fledge.alignment.contexts import lottery
from fledge.records.kinds import Answer, Conversation, Message, Preference, Prompt, Record

if TYPE_CHECKING:
    from fledge.alignment.stages import Identity as Settings
    from fledge.alignment.stages import Language

SOURCE = "identity"
TALK = 0.15  # of the questions come in the middle of a talk


@dataclass(frozen=True)
class Topic:
    """One thing to ask about: how training and the test ask it, and what is said then."""

    name: str
    train: tuple[str, ...]
    held_out: tuple[str, ...]
    answers: tuple[str, ...]
    wrong: tuple[str, ...]


@dataclass(frozen=True)
class Wordings:
    """A language's page: `others` are (name, maker) of others, `talk` (user, assistant) before a question."""

    language: str
    openings: tuple[str, ...]
    talk: tuple[tuple[str, str], ...]
    others: tuple[tuple[str, str], ...]
    topics: tuple[Topic, ...]

    @property
    def questions(self) -> list[tuple[Topic, str]]:
        """Every wording of the training part with its topic."""
        return [(topic, text) for topic in self.topics for text in topic.train]

    @property
    def held_out(self) -> list[tuple[Topic, str]]:
        """Every wording of the test with its topic."""
        return [(topic, text) for topic in self.topics for text in topic.held_out]


@cache
def wordings(language: str) -> Wordings:
    """The page of `en` or `zh`."""
    page = yaml.safe_load((Path(__file__).parent / "wordings" / f"{language}.yaml").read_text(encoding="utf-8"))
    topics = tuple(
        Topic(name, *(tuple(topic[key]) for key in ("train", "held_out", "answers", "wrong")))
        for name, topic in page["topics"].items()
    )
    pairs = {key: tuple((a, b) for a, b in page[key]) for key in ("talk", "others")}
    return Wordings(language, tuple(page["openings"]), pairs["talk"], pairs["others"], topics)


@dataclass(frozen=True)
class Question:
    """A training question with its right and a wrong answer."""

    prompt: tuple[Message, ...]
    right: str
    wrong: str
    topic: str
    language: str


def questions(settings: Settings, language: Language, seed: int) -> Iterator[Question]:
    """Without end: all wordings in a drawn order, then again in another, each time asked and answered anew."""
    page, round_ = wordings(language), 0
    names = {"name": settings.name, "maker": settings.maker_in(language), "manner": settings.manner_in(language)}
    others = [pair for pair in page.others if pair[0].casefold() != settings.name.casefold()]
    while True:
        rng = Random(lottery(seed, language, round_))
        for topic, text in rng.sample(page.questions, len(page.questions)):
            before = rng.choice(page.talk) if rng.random() < TALK else ()
            opening = "" if before else rng.choice(page.openings)
            other, other_maker = rng.choice(others)
            said = [*before, _asked(opening, text)]
            yield Question(
                tuple(Message("assistant" if i % 2 else "user", words) for i, words in enumerate(said)),
                _filled(rng.choice(topic.answers), names),
                _filled(rng.choice(topic.wrong), {"other": other, "other_maker": other_maker}),
                topic.name,
                language,
            )
        round_ += 1


def _asked(opening: str, text: str) -> str:
    """The question behind its opening; in English it goes on in small letters after a comma or a colon."""
    if opening.endswith((", ", "but ", ": ")) and text[:2] != "I " and text[:2] != "I'":
        text = text[0].lower() + text[1:]
    return opening + text


def _filled(template: str, values: Mapping[str, str]) -> str:
    text = template.format(**values)
    return text[0].upper() + text[1:]


def take(settings: Settings, language: Language, seed: int) -> list[Question]:
    """`count` different questions (prompt and right answer), or as many as chance finds in ten times as many draws."""
    found: dict[tuple[tuple[Message, ...], str], Question] = {}
    for question in islice(questions(settings, language, seed), 10 * settings.count):
        found.setdefault((question.prompt, question.right), question)
        if len(found) == settings.count:
            break
    return list(found.values())


def conversation(question: Question) -> Conversation:
    """The question and its right answer, to learn from."""
    messages = (*question.prompt, Message("assistant", question.right))
    return Conversation(messages, "", question.language, SOURCE, {"topic": question.topic})


def preference(question: Question) -> Preference:
    """The right answer over the wrong one."""
    answers = (Answer(question.right, 1, "identity"), Answer(question.wrong, 2, "another identity"))
    return Preference(question.prompt, answers, "", question.language, SOURCE, {"topic": question.topic})


def unseen_prompts(settings: Settings, language: str) -> list[Prompt]:
    """The unseen wordings; an answer is right when it says the name."""
    return [
        Prompt((Message("user", text),), settings.name, "", language, SOURCE, {"topic": topic.name})
        for topic, text in wordings(language).held_out
    ]


def make_identity(settings: Settings, seed: int, out: Path) -> dict[str, dict[str, Any]]:
    """Write `train`, `held_out` and `preferences` below `out`; their metrics."""
    from fledge.records.shards import ShardWriter

    rows = [question for language in settings.languages for question in take(settings, language, seed)]
    rows.sort(key=lambda question: lottery(seed, "order", question.prompt, question.right))
    unseen = [prompt for language in settings.languages for prompt in unseen_prompts(settings, language)]
    parts: dict[str, tuple[str, Sequence[Record]]] = {
        "train": ("conversations", [conversation(row) for row in rows]),
        "held_out": ("prompts", unseen),
        "preferences": ("preferences", [preference(row) for row in rows]),
    }
    for name, (kind, records) in parts.items():
        with ShardWriter(out / name, kind) as writer:
            for record in records:
                writer.write(record)
    seen = {question.prompt[-1].content for question in rows}
    return {
        "train": {"conversations": len(rows), "different_questions": len(seen)},
        "held_out": {"prompts": len(unseen)},
        "preferences": {"pairs": len(rows)},
    }
