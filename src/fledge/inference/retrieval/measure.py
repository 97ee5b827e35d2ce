"""With and without retrieval on the same questions: how many are right, how many made up, how many left open.

An answer is *right* when it holds one of the accepted ones, *open* when it says that it does not know, and *made up*
otherwise. Of a question without an accepted answer (one that the sources do not hold) open is right.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fledge.core.errors import FledgeError, Problem
from fledge.core.intervals import Interval, mcnemar, paired_proportions, wilson
from fledge.core.language import t
from fledge.inference.retrieval.answering import Answer, RetrievalAugmented
from fledge.inference.retrieval.ranking import ndcg_at, recall_at, reciprocal_rank
from fledge.inference.retrieval.reading import Passage
from fledge.inference.retrieval.wording import abstains

Verdict = Literal["right", "open", "made up"]
_TOGETHER = 32


@dataclass(frozen=True)
class Question:
    """A question, the answers that are accepted (none: the sources do not hold one), and where it is answered."""

    text: str
    answers: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    """files, or places of files (`guide.md#L12-L18`), that hold the answer; empty where nobody has said"""


@dataclass(frozen=True)
class Side:
    """What one way of answering reached."""

    right: Interval
    made_up: Interval
    open: Interval
    answers: tuple[str, ...]
    verdicts: tuple[Verdict, ...]


@dataclass(frozen=True)
class Comparison:
    """The same questions without sources (`closed`) and with them (`with_sources`)."""

    questions: tuple[Question, ...]
    closed: Side
    with_sources: Side
    gain: Interval
    """how much oftener the answer is right with sources"""
    p_value: float
    """McNemar's exact test of that"""
    recall: float | None
    """the share of the questions' sources that were among the passages; None where none are named"""
    grounded: tuple[Answer, ...]
    """the answers with their passages and citations"""

    def to_json(self) -> dict[str, Any]:
        """The numbers as JSON values."""
        sides = {"closed": self.closed, "with_sources": self.with_sources}
        shares = ("right", "made_up", "open")
        return {
            "questions": len(self.questions),
            **{name: {key: getattr(side, key).to_json() for key in shares} for name, side in sides.items()},
            "gain": self.gain.to_json(), "p_value": self.p_value, "recall": self.recall,
        }  # fmt: skip


def compare(
    assistant: RetrievalAugmented,
    questions: Sequence[Question],
    tell: Callable[[int, int], Any] = lambda done, all: None,
) -> Comparison:
    """Ask every question twice: without sources, and with what the retriever finds. Greedy answers by default."""
    if not questions:
        raise FledgeError(Problem(t("there are no questions")))
    closed: list[str] = []
    grounded: list[Answer] = []
    texts = [question.text for question in questions]
    for start in range(0, len(texts), _TOGETHER):
        some = texts[start : start + _TOGETHER]
        closed += [answer.text for answer in assistant.closed_book(some)]
        grounded += assistant.answer_all(some)
        tell(start + len(some), len(texts))
    sides = _side(questions, closed), _side(questions, [answer.text for answer in grounded])
    right = [[one == "right" for one in side.verdicts] for side in sides]
    lost, won = (sum(a and not b for a, b in zip(right[i], right[1 - i], strict=True)) for i in (0, 1))
    named = [(q, a) for q, a in zip(questions, grounded, strict=True) if q.sources]
    recalls = [recall_at(*_judged(question, answer.passages), len(answer.passages)) for question, answer in named]
    return Comparison(
        tuple(questions), *sides, paired_proportions(won, lost, len(texts)), mcnemar(won, lost),
        sum(recalls) / len(recalls) if recalls else None, tuple(grounded),
    )  # fmt: skip


def _side(questions: Sequence[Question], answers: Sequence[str]) -> Side:
    verdicts = tuple(verdict(question, answer) for question, answer in zip(questions, answers, strict=True))
    counts = {name: wilson(verdicts.count(name), len(verdicts)) for name in ("right", "made up")}
    left_open = sum(abstains(answer) for answer in answers)
    return Side(counts["right"], counts["made up"], wilson(left_open, len(answers)), tuple(answers), verdicts)


def verdict(question: Question, answer: str) -> Verdict:
    """Whether an answer is right, made up, or leaves the question open."""
    if abstains(answer):
        return "open" if question.answers else "right"
    text = _plain(answer)
    return "right" if any(_plain(accepted) in text for accepted in question.answers) else "made up"


def search_quality(retriever: Any, questions: Sequence[Question], k: int = 10) -> dict[str, float]:
    """Mean recall@k, reciprocal rank and nDCG@k of a retriever on questions that name their sources."""
    named = [question for question in questions if question.sources]
    if not named:
        raise FledgeError(Problem(t("none of the questions says where it is answered"), allowed='"sources": ["file"]'))
    totals = {f"recall@{k}": 0.0, "mrr": 0.0, f"ndcg@{k}": 0.0}
    for question in named:
        ranked, relevant = _judged(question, retriever.search(question.text, k))
        totals[f"recall@{k}"] += recall_at(ranked, relevant, k)
        totals["mrr"] += reciprocal_rank(ranked, relevant)
        totals[f"ndcg@{k}"] += ndcg_at(ranked, dict.fromkeys(relevant, 1.0), k)
    return {name: total / len(named) for name, total in totals.items()}


def _judged(question: Question, passages: Sequence[Passage]) -> tuple[list[str], set[str]]:
    """(for each passage the source of the question that it is of, or its own place; the question's sources)."""
    relevant = set(question.sources)
    return [p.where if p.where in relevant or p.source not in relevant else p.source for p in passages], relevant


def read_questions(file: Path) -> list[Question]:
    """Lines of JSON: `question`, `answers` (a list, or one as `answer`), `sources` (optional)."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FledgeError(Problem(t("the file cannot be read"), str(file), str(error))) from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            answers = row.get("answers", row.get("answer", []))
            answers = [answers] if isinstance(answers, str) else answers
            found.append(Question(str(row["question"]), tuple(map(str, answers)), tuple(row.get("sources", ()))))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise FledgeError(
                Problem(t("this line is no question"), f"{file}:{number}", line[:120],
                        '{"question": "…", "answers": ["…"], "sources": ["…"]}')
            ) from None  # fmt: skip
    if not found:
        raise FledgeError(Problem(t("there are no questions"), str(file)))
    return found


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
