"""Posts of a forum and who answers whom, on disk: the posts of a dump come in any order, and there may be millions."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple


class Post(NamedTuple):
    """One post. `parent` is "" where it begins a thread; `accepted` is the id of the answer its author chose."""

    id: str
    parent: str
    author: str
    text: str
    score: float = 0.0
    title: str = ""
    accepted: str = ""
    tags: str = ""
    date: str = ""


class Posts:
    """All posts of one dump in a database in `folder`, numbered as they came."""

    def __init__(self, folder: Path) -> None:
        self._db = sqlite3.connect(folder / "posts.db")
        self._db.executescript(
            "PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF;"
            "CREATE TABLE posts (number INTEGER PRIMARY KEY, id TEXT, parent TEXT, author TEXT, text TEXT, score REAL,"
            " title TEXT, accepted TEXT, tags TEXT, date TEXT);"
        )

    def fill(self, posts: Iterable[Post]) -> None:
        """Take them all in."""
        with closing(self._db.cursor()) as cursor:
            cursor.executemany(
                "INSERT INTO posts (id, parent, author, text, score, title, accepted, tags, date)"
                " VALUES (?,?,?,?,?,?,?,?,?)",
                posts,
            )
        self._db.executescript("CREATE INDEX ids ON posts (id); CREATE INDEX parents ON posts (parent);")
        self._db.commit()

    def roots(self) -> Iterator[Post]:
        """The posts that answer none, in the order of the dump."""
        return map(Post._make, self._db.execute(f"SELECT {_COLUMNS} FROM posts WHERE parent = '' ORDER BY number"))

    def answers(self, post: Post) -> list[Post]:
        """What answers a post: the accepted one first, then by score, then as they came."""
        rows = self._db.execute(
            f"SELECT {_COLUMNS} FROM posts WHERE parent = ? ORDER BY id = ? DESC, score DESC, number",
            (post.id, post.accepted or "\0"),
        )
        return [Post._make(row) for row in rows]

    def lost(self) -> Iterator[Post]:
        """Posts that answer one which is not there."""
        rows = self._db.execute(
            f"SELECT {_COLUMNS} FROM posts WHERE parent != '' AND parent NOT IN (SELECT id FROM posts) ORDER BY number"
        )
        return map(Post._make, rows)

    def close(self) -> None:
        self._db.close()


_COLUMNS = ", ".join(Post._fields)
