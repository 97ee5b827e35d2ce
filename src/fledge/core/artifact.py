"""The second noun. An artifact is the immutable output of one stage: a folder with `artifact.json`.

`artifact.json` is written last, and the folder is renamed into place whole: without it the folder does not exist.
The kinds below are all there are; what a kind's files look like is the business of the floor that reads them.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

MANIFEST = "artifact.json"
EVENTS = "events.jsonl"
"""How an artifact was made lies beside its payload and is not part of it."""


@dataclass(frozen=True)
class Artifact:
    """A typed folder (or, where a person names it, a raw file). `metrics` are the numbers its stage measured."""

    path: Path
    metrics: Mapping[str, Any] = field(default_factory=dict)

    kind: ClassVar[str] = "artifact"

    def __init_subclass__(cls, kind: str = "", **rest: Any) -> None:
        super().__init_subclass__(**rest)
        cls.kind = kind or cls.kind

    @property
    def manifest(self) -> dict[str, Any]:
        """What `artifact.json` says; empty for raw files and folders from outside. Parts ask their parent."""
        for folder in (self.path, self.path.parent):
            if (folder / MANIFEST).is_file():
                return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))  # type: ignore[no-any-return]
        return {}

    @classmethod
    def problem_with(cls, path: Path) -> str:
        """Why the raw file or folder `path` cannot stand for this kind; empty when it can. Cheap."""
        return "" if path.exists() else "does not exist"


class Records(Artifact, kind="records"):
    """Rows of one record kind in Parquet shards (`records/`), rejected rows in `rejected/` beside them."""


class Documents(Records, kind="documents"):
    """Plain text: `records.kinds.Document`."""


class Conversations(Records, kind="conversations"):
    """Turns of system, user and assistant: `records.kinds.Conversation`."""


class Preferences(Records, kind="preferences"):
    """Ranked answers to one prompt: `records.kinds.Preference`."""


class Labelled(Records, kind="labelled"):
    """Texts with a label: `records.kinds.Labelled`."""


class Prompts(Records, kind="prompts"):
    """Prompts, with a verifiable answer where there is one: `records.kinds.Prompt`."""


class Ratings(Records, kind="ratings"):
    """Answers with a score: `records.kinds.Rating`."""


class Tokens(Artifact, kind="tokens"):
    """Texts as token ids in rows of one length, packed for training: `data.tokens.rows.TokenRows`."""

    @classmethod
    def problem_with(cls, path: Path) -> str:
        packed = (path / "index.json").is_file() and (path / "tokens").is_dir()
        return "" if packed else "is not a folder of packed tokens (it has no index.json and tokens/)"


class NGram(Artifact, kind="ngram"):
    """An n-gram language model of a reference corpus: how likely a text is under it."""

    @classmethod
    def problem_with(cls, path: Path) -> str:
        return "" if (path / "ngram.json").is_file() else "is not an n-gram model (it has no ngram.json)"


class Classifier(Artifact, kind="classifier"):
    """A classifier of texts (quality, topic): its labels and weights."""

    @classmethod
    def problem_with(cls, path: Path) -> str:
        return "" if (path / "labels.json").is_file() else "is not a classifier (it has no labels.json)"


class Tokenizer(Artifact, kind="tokenizer"):
    """A Hugging Face tokenizer folder: `tokenizer.json`, `tokenizer_config.json`, `chat_template.jinja`."""

    @classmethod
    def problem_with(cls, path: Path) -> str:
        return "" if (path / "tokenizer.json").is_file() else "is not a tokenizer folder (it has no tokenizer.json)"


class Model(Artifact, kind="model"):
    """A Hugging Face model folder: `config.json`, safetensors, the tokenizer, `chat_template.jinja`."""

    @classmethod
    def problem_with(cls, path: Path) -> str:
        if any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
            return ""
        return "is not a model folder (it has neither config.json nor adapter_config.json)"


class Adapter(Model, kind="adapter"):
    """A PEFT adapter folder whose base is another model folder. It stands wherever a model may."""


class RewardModel(Artifact, kind="reward-model"):
    """A sequence-classification model with one label: the score of an answer."""

    problem_with = Model.problem_with


class TaskModel(Artifact, kind="task-model"):
    """A Hugging Face model folder that does not write: a head for classes or tags (their names in `config.json`), or
    none, for vectors. An adapter's folder has its `config.json` beside the adapter's own."""

    problem_with = Model.problem_with


class Study(Artifact, kind="study"):
    """What a search over settings measured: `study.json` with every point."""

    @classmethod
    def problem_with(cls, path: Path) -> str:
        return "" if (path / "study.json").is_file() else "is no study (it has no study.json)"


class GGUF(Artifact, kind="gguf"):
    """One `.gguf` file for llama.cpp and its kin."""


class Index(Artifact, kind="index"):
    """Texts that can be searched: `index.json`, and below it passages, inverted lists and, where a model was given,
    vectors (`inference.retrieval.index`)."""

    @classmethod
    def problem_with(cls, path: Path) -> str:
        return "" if (path / "index.json").is_file() else "is no index (it has no index.json)"


class Contamination(Artifact, kind="contamination"):
    """Which evaluation items stand in a corpus: `contamination.json` with the evidence."""

    @classmethod
    def problem_with(cls, path: Path) -> str:
        return "" if (path / "contamination.json").is_file() else "is no report on contamination"


class Scores(Artifact, kind="scores"):
    """What an evaluation measured: `scores.json` and the items behind every number."""


KINDS: dict[str, type[Artifact]] = {
    cls.kind: cls
    for cls in (
        Artifact, Records, Documents, Conversations, Preferences, Ratings, Labelled, Prompts,
        Tokens, NGram, Classifier, Tokenizer, Model, Adapter, RewardModel, TaskModel, Study, GGUF, Contamination,
        Index, Scores,
    )
}  # fmt: skip


def files_of(folder: Path) -> Iterator[str]:
    """Relative names of all payload files below `folder`, sorted, with `/` between the parts."""
    found = ((Path(root) / name).relative_to(folder).as_posix() for root, _, names in os.walk(folder) for name in names)
    return iter(sorted(name for name in found if name not in (MANIFEST, EVENTS)))


def sha256_of(file: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest_of(value: object) -> str:
    """SHA-256 of `value` as canonical JSON, in hex: the one way in which fledge turns a description into a name."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def write_atomic(file: Path, text: str) -> None:
    """Write `text` so that `file` holds either its old content or the new one, whatever happens."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)
