"""Threads of a forum as JSON lines, a post a line: `id`, `parent_id`, `text`, and where there is one `author`, `score`,
`title`. Reddit's dumps (`parent_id: t3_…`, `body`) are of this kind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fledge.data.sources import Setting
from fledge.data.sources.posts import Post, Posts
from fledge.records.kinds import Conversation, Message, Record, Role
from fledge.records.raw.files import rows_of

_TEXTS = ("text", "body", "content")
_AUTHORS = ("author", "author_name", "user", "username")
_SCORES = ("score", "votes", "likes")
_TAKEN_AWAY = ("[deleted]", "[removed]")


def read(file: Path, setting: Setting) -> Iterator[Record]:
    """A conversation a thread: from the post that begins it along the best answer each time. Who began it is the user,
    everybody else the assistant; what one side says in a row is one turn. Threads without an answer are set aside,
    and so are posts whose thread's beginning is not there."""
    posts = Posts(setting.scratch)
    try:
        posts.fill(_posts(file, setting))
        for root in posts.roots():
            path, seen = [root], {root.id}
            while answer := next((post for post in posts.answers(path[-1]) if post.id not in seen), None):
                path.append(answer)
                seen.add(answer.id)
            turns = _turns(path)
            if len(turns) < 2:
                setting.reject("has no answer", "", root.text, f"post {root.id}")
                continue
            meta = {"title": root.title, "score": f"{root.score:g}", "authors": str(len({p.author for p in path}))}
            yield Conversation(turns, root.id, "", "", {key: value for key, value in meta.items() if value})
        for post in posts.lost():
            setting.reject("answers a post that is not there", post.parent, post.text, f"post {post.id}")
    finally:
        posts.close()


def _turns(path: list[Post]) -> tuple[Message, ...]:
    turns: list[Message] = []
    for number, post in enumerate(path):
        text = "\n\n".join(filter(None, (post.title if number == 0 else "", post.text)))
        same = post.author == path[0].author if post.author else number % 2 == 0
        role: Role = "user" if same else "assistant"
        if turns and turns[-1].role == role:
            turns[-1] = Message(role, f"{turns[-1].content}\n\n{text}")
        else:
            turns.append(Message(role, text))
    return tuple(turns)


def _posts(file: Path, setting: Setting) -> Iterator[Post]:
    """The usable posts of the file."""
    for row in rows_of(file, setting.limits):
        if row.error:
            setting.reject(row.error.said("en"), row.found, row.text, row.where)
            continue
        post = row.value if isinstance(row.value, dict) else {}
        text, identity = _first(post, _TEXTS), post.get("id")
        if not isinstance(text, str) or not text.strip() or identity in (None, ""):
            setting.reject("has no text" if identity else "has no id", "", row.text, row.where)
        elif text.strip() in _TAKEN_AWAY:
            setting.reject("was taken away", text.strip(), row.text, row.where)
        else:
            score = _first(post, _SCORES)
            yield Post(
                _bare(identity), _bare(post.get("parent_id") or ""), str(_first(post, _AUTHORS) or ""), text.strip(),
                float(score) if isinstance(score, (int, float)) else 0.0, str(post.get("title") or ""),
            )  # fmt: skip


def _first(post: dict[str, Any], keys: tuple[str, ...]) -> Any:
    return next((post[key] for key in keys if post.get(key) is not None), None)


def _bare(identity: Any) -> str:
    """`t1_abc` and `t3_abc` are what Reddit calls `abc` elsewhere."""
    text = str(identity)
    return text[3:] if text[:3] in ("t1_", "t3_") else text
