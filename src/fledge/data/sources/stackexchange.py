"""Stack Exchange's `Posts.xml`: each question with its accepted answer, or the best where none was accepted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from fledge.data.sources import Setting
from fledge.data.sources.posts import Post, Posts
from fledge.data.sources.xml import elements
from fledge.records.kinds import Conversation, Message, Record
from fledge.records.raw.markup import plain

_QUESTION, _ANSWER = "1", "2"


def read(file: Path, setting: Setting) -> Iterator[Record]:
    """A conversation a question: its title and text, then the answer. `meta` has the title, both scores, the tags and
    whether the answer was `accepted` or is the `best`. Questions without an answer of a score above or equal to 0 are
    set aside, as are answers to questions that are not there."""
    posts = Posts(setting.scratch)
    try:
        posts.fill(_posts(file, setting))
        for question in posts.roots():
            answer = next(iter(posts.answers(question)), None)
            if answer is None:
                setting.reject("has no answer", "", question.title, f"question {question.id}")
            elif answer.score < 0 and answer.id != question.accepted:
                setting.reject("has no good answer", f"{answer.score:g}", question.title, f"question {question.id}")
            else:
                yield _conversation(question, answer)
        for answer in posts.lost():
            setting.reject("answers a question that is not there", answer.parent, answer.text, f"answer {answer.id}")
    finally:
        posts.close()


def _conversation(question: Post, answer: Post) -> Conversation:
    asked = "\n\n".join(filter(None, (question.title, plain(question.text))))
    meta = {
        "title": question.title, "score": f"{question.score:g}", "answer_score": f"{answer.score:g}",
        "answer": "accepted" if answer.id == question.accepted else "best",
        "tags": " ".join(filter(None, question.tags.replace("<", " ").replace(">", " ").replace("|", " ").split())),
        "date": question.date,
    }  # fmt: skip
    turns = (Message("user", asked), Message("assistant", plain(answer.text)))
    return Conversation(turns, question.id, "", "", {key: value for key, value in meta.items() if value})


def _posts(file: Path, setting: Setting) -> Iterator[Post]:
    """The questions and answers; other posts (wikis, moderators' notes) are set aside."""
    for name, row in elements(file, {"row"}, setting):
        if not name:
            continue
        get = row.get
        where = f"post {get('Id', '')}"
        if get("PostTypeId") not in (_QUESTION, _ANSWER):
            setting.reject("is neither a question nor an answer", f"type {get('PostTypeId', '')}", where=where)
        elif not plain(get("Body", "")):
            setting.reject("holds no text", "", ElementTree.tostring(row, "unicode")[:500], where)
        else:
            parent = get("ParentId", "") if get("PostTypeId") == _ANSWER else ""
            if parent or get("PostTypeId") == _QUESTION:
                yield Post(
                    get("Id", ""), parent, get("OwnerUserId", ""), get("Body", ""), _number(get("Score", "")),
                    get("Title", ""), get("AcceptedAnswerId", ""), get("Tags", ""), get("CreationDate", ""),
                )  # fmt: skip
            else:
                setting.reject("answers a question that is not there", "", get("Body", ""), where)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0
