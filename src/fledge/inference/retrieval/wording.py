"""What is said to a model that answers from passages, in the language of the question."""

from __future__ import annotations

from dataclasses import dataclass

from fledge.data.language import is_chinese


@dataclass(frozen=True)
class Wording:
    """The sentences of one language."""

    passages: str
    """what to do with passages"""
    cite: str
    """how to cite"""
    abstain: str
    """what to write where the answer is not there; {nothing} is the sentence itself"""
    closed: str
    """what to do without passages"""
    unknown: str
    """what to write where the model does not know; {nothing} as above"""
    nothing: str
    """the sentence of an answer that abstains"""
    question: str
    answer: str
    sources: str


ENGLISH = Wording(
    passages="Answer the question from the numbered passages alone, briefly and in your own words or theirs.",
    cite="Behind every statement put the number of the passage that it comes from, as in [1].",
    abstain="If the passages do not hold the answer, write only: {nothing}",
    closed="Answer the question briefly.",
    unknown="If you do not know the answer, write only: {nothing}",
    nothing="Not in the sources.",
    question="Question: {question}",
    answer="Answer:",
    sources="Passages:",
)
CHINESE = Wording(
    passages="只根据下面编号的资料回答问题，答案要简短，可以用自己的话，也可以引用原文。",
    cite="每句话后面注明所依据资料的编号，例如 [1]。",
    abstain="如果资料中没有答案，就只写：{nothing}",
    closed="请简短地回答问题。",
    unknown="如果不知道答案，就只写：{nothing}",
    nothing="资料中没有答案。",
    question="问题：{question}",
    answer="回答：",
    sources="资料：",
)
_SAID = tuple(wording.nothing.rstrip(".。").casefold() for wording in (ENGLISH, CHINESE))


def wording_for(question: str) -> Wording:
    """The sentences in the question's language: Chinese where it is written in Chinese, else English."""
    return CHINESE if is_chinese(question) else ENGLISH


def abstains(answer: str) -> bool:
    """Whether an answer says, in either language, that the sources do not hold it."""
    return any(said in " ".join(answer.casefold().split()) for said in _SAID)
