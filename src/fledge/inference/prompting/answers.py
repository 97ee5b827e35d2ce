"""What an answer says, freed from its words: what is voted on, compared and reported.

Looked for in this order: what follows "the answer is" / "答案是" / "####" / "\\\\boxed{", else the last line; in it a
choice, a number or the text, by the kind that was asked for.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from fledge.inference.prompting.numerals import NUMBER, number_in, numbers, plain

Kind = Literal["auto", "number", "choice", "text"]

_MARKED = re.compile(
    r"(?:(?:final\s+)?answer\s*(?:\([^()]*\)\s*)?(?:is|=|:)\s*:?|best\s+choice\s+is"
    r"|(?:答案|选择|结果)(?:\s*[(（][^()（）]*[)）]\s*)?(?:应该是|应当是|应是|是|为|选|[:：])\s*[:：]?"
    r"|(?:故|因此|所以|应该?|故应)选(?:择)?\s*[:：]?|####)\s*",
    re.IGNORECASE,
)
_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_CHOICE = re.compile(r"^[\s*_(\[【\"'“‘]*(?:option|choice|选项|选择|选)?\s*[(\[【\"'“‘]*([A-Ja-j])(?![A-Za-z'’])")
_IN_BRACKETS = re.compile(r"[(\[【]([A-J])[)\]】]")
_LONE = re.compile(r"(?<![A-Za-z])([A-J])(?![A-Za-z'’]| [a-z])")
_FRACTION = re.compile(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}")
_MEASURED = re.compile(
    rf"\W*?(?:{NUMBER.pattern})"
    r"\s*(?:(?(arabic)[^\W\d_]{1,12}|[个元块只条张本人次天年月日岁米克斤里时分秒度倍名位辆台件份页角]{1,2}))?\W*"
)
"""Nothing but a number and its unit: 18 dollars, 20个, 十八元; not 三国演义."""
_SHORT = 200
"""characters in which a choice or a lone number is looked for: a model may write anything, at any length"""
_ITEM = re.compile(
    r"(?:[(（]?\d{1,3}\s*[.．)）、:：](?!\d)\s*|[-*•·]\s+|[①-⑳]\s*|[一二三四五六七八九十]{1,3}[、.．]\s*"
    r"|[(（][一二三四五六七八九十]{1,3}[)）]\s*|第[一二三四五六七八九十]{1,3}[步点]?[,，:：、]\s*)(.*)"
)
_EMPHASIS = re.compile(r"^(?:#+\s+)?(?:\*\*(.+?)\*\*)?")
"""Markdown before an item: a heading's signs, and what is in bold"""
_EDGES = " \t\r\n.。!！?？,，;；:：、*_`\"'“”‘’「」『』"
_SAME = {"是": "yes", "是的": "yes", "对": "yes", "正确": "yes", "true": "yes", "correct": "yes", "incorrect": "no"}
_SAME |= {"否": "no", "不是": "no", "不对": "no", "错": "no", "错误": "no", "false": "no", "wrong": "no"}


def extract(text: str, kind: Kind = "auto", marked: bool = False) -> str:
    """The answer that a text gives, normalised; "" when it has none of this kind.

    "auto" takes a number or a choice only where nothing else is said: "Hastings, 1066" stays as it is. `marked`: only
    where the text says that it is the answer.
    """
    text = _FRACTION.sub(r"\1/\2", text).strip()
    said = marked_part(text)
    if not said and marked:
        return ""
    if kind == "text":
        return said.strip(_EDGES) or _last_line(text)
    if kind == "choice":
        whole = plain(text)
        return _choice(said) or _choice(text) or _last(_IN_BRACKETS.findall(whole)) or _last(_LONE.findall(whole))
    if kind == "number":
        return _first(numbers(said.rpartition("=")[2])) or _last(numbers(text))
    place = said or _last_line(text)
    measured = _MEASURED.fullmatch(plain(place).rpartition("=")[2].strip()[:_SHORT])
    found = _choice(place) or (number_in(measured.group()) if measured else "")
    return found or _last(_IN_BRACKETS.findall(plain(place))) or place.strip(_EDGES)


def marked_part(text: str) -> str:
    """What stands behind the last "the answer is", to the end of its sentence or line; "" where nothing does."""
    boxed = _BOXED.findall(text)
    if boxed:
        return str(boxed[-1]).strip()
    for place in reversed(list(_MARKED.finditer(text))):
        rest = text[place.end() :].strip()
        said = re.split(r"\n|[。;；]|\.(?=\s|$)", rest, maxsplit=1)[0].strip()
        if said.strip(_EDGES):
            return said
    return ""


def key(answer: str, kind: Kind = "auto") -> str:
    """What two answers share that mean the same: 18 and "18 dollars", B and (b), 是 and yes."""
    text = plain(answer).strip()
    if kind in ("auto", "choice") and (letter := _choice(text)):
        return letter
    if kind in ("auto", "number") and (number := number_in(text)):
        return number
    words = " ".join(text.casefold().strip(_EDGES).split())
    return _SAME.get(words, words)


def majority(answers: Sequence[str], kind: Kind = "auto") -> tuple[str, Counter[str]]:
    """The answer that most of them give, as the first of them writes it, and all votes. The earlier of equals wins;
    empty answers do not vote, unless there are no others."""
    votes = Counter(key(answer, kind) for answer in answers if answer.strip())
    if not votes:
        return "", votes
    best = max(votes, key=lambda vote: votes[vote])  # a Counter keeps the order of arrival: the first maximum
    return next(answer for answer in answers if answer.strip() and key(answer, kind) == best), votes


def listed(text: str, most: int) -> list[str]:
    """The items of a numbered or bulleted list, at most `most`; without any, its lines."""
    lines = [_EMPHASIS.sub(r"\1", line.strip()) for line in text.splitlines() if line.strip()]
    items = [found[1] for line in lines if (found := _ITEM.match(line))]
    return [item for item in (items or lines) if item][:most]


def _choice(text: str) -> str:
    """`B` for "(b) a tree", "选Ｂ", "B."; "" for words that begin with a letter, as "A dog"."""
    text = plain(text[:_SHORT])
    found = _CHOICE.match(text)
    if not found:
        return ""
    rest = text[found.end() :].lstrip()
    in_brackets = text[: found.start(1)].endswith(("(", "[", "【"))
    return found[1].upper() if not rest or in_brackets or not rest[0].isalnum() else ""


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip(_EDGES)]
    return lines[-1].strip(_EDGES) if lines else ""


def _first(found: Sequence[str]) -> str:
    return found[0] if found else ""


def _last(found: Sequence[str]) -> str:
    return found[-1] if found else ""
