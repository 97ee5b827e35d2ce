"""Running a stage of this floor without the runner, and small made-up data in both languages."""

from __future__ import annotations

import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from fledge.core.artifact import Artifact, files_of, sha256_of
from fledge.core.events import Emitter, Event
from fledge.core.job import Job
from fledge.core.reference import resolve
from fledge.core.stage import Execution, Stage
from fledge.data.chunk import Chunk
from fledge.data.passes import write_table
from fledge.data.steps import CorpusStep, Rejected, Sketches, Step
from fledge.records.kinds import Conversation, Document, Message, Record, kind_of
from fledge.records.shards import ShardWriter

WORDS = """the river of a small town and its people who have to walk along with that old bridge every morning because
nobody remembers when it was built or why stones were carried from hills far away by hand in winter time"""
EN_WORDS = WORDS.split()
ZH_CHARACTERS = "人民法院审理案件应当以事实为根据律准绳对于公在适用上一平等不允许有任何特权第条国家保护合的自由和尊严"


def english(rng: random.Random, sentences: int = 12) -> str:
    """Sentences of random words: long enough for the rules, alike to no other."""
    return " ".join(" ".join(rng.choices(EN_WORDS, k=rng.randint(8, 16))).capitalize() + "." for _ in range(sentences))


def chinese(rng: random.Random, sentences: int = 12) -> str:
    return "".join("".join(rng.choices(ZH_CHARACTERS, k=rng.randint(12, 24))) + "。" for _ in range(sentences))


def talk(*texts: str, **fields: Any) -> Conversation:
    """A conversation whose first speaker is the user."""
    return Conversation(
        tuple(Message("assistant" if i % 2 else "user", text) for i, text in enumerate(texts)), **fields
    )


def write(folder: Path, records: Iterable[Record], kind: str = "") -> Artifact:
    """Records as an artifact's folder."""
    rows = list(records)
    with ShardWriter(folder, kind or kind_of(rows[0])) as writer:
        for record in rows:
            writer.write(record)
    return Artifact(folder)


def corpus(seed: int, documents: int) -> list[Document]:
    """Half English, half Chinese."""
    rng = random.Random(seed)
    makers: dict[str, Callable[[random.Random], str]] = {"en": english, "zh": chinese}
    return [
        Document("\n".join(makers[language](rng) for _ in range(3)), f"{language}{i}", language)
        for i in range(documents // 2)
        for language in makers
    ]


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder."""
    return {name: sha256_of(folder / name) for name in files_of(folder)}


def through(step: Step, records: Iterable[Record], counts: Counter[str] | None = None) -> list[Record | Rejected]:
    """What one step makes of records of one kind: the record, changed or not, or why it is refused, for each."""
    rows = list(records)
    chunk, counts = Chunk.of(kind_of(rows[0]), rows), Counter() if counts is None else counts
    step.start(lambda named: [Path(named.text)])
    if isinstance(step, CorpusStep):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "sketch.arrow"
            write_table(step.sketch(chunk), file)
            scratch = Path(folder) / "scratch"
            scratch.mkdir()
            verdicts = step.decide(Sketches([file], [0], len(chunk), scratch), [])
        changed, refused = step.apply(chunk, verdicts, counts)
    else:
        changed, refused = step(chunk, counts)
    assert len(changed) == len(rows)
    return [refused.get(row, record) for row, record in enumerate(changed.records)]


class Runner:
    """`run(stage, inputs)` → what the stage returned; the events it sent are in `events`."""

    def __init__(self, home: Path) -> None:
        self.home, self.attempts = home, 0
        self.events: list[Event] = []

    def __call__(
        self, stage: Stage, inputs: dict[str, Artifact] | None = None, work: str = "", seed: int = 0, **execution: Any
    ) -> Any:
        self.attempts += 1
        out, scratch = self.home / f"out{self.attempts}", self.home / (work or f"work{self.attempts}")
        out.mkdir(parents=True)
        scratch.mkdir(parents=True, exist_ok=True)
        outside = {source.text: resolve(source.text) for source in stage.outside_sources().values()}
        emitter = Emitter("test", 0, self.events.append)
        return stage.run(
            Job("test", out, scratch, seed, Execution(**{"workers": 1, **execution}), emitter, inputs or {}, outside)
        )


@pytest.fixture
def run(tmp_path: Path) -> Runner:
    return Runner(tmp_path / "jobs")
