"""What comes from outside is found, digested and, when it is not there, named in one message."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fledge.core.artifact import Conversations, Documents, Model, Records
from fledge.core.db import Database
from fledge.core.errors import FledgeError
from fledge.core.reference import Ref, resolve


def test_a_folder_is_its_bytes_and_names_not_its_place(tmp_path: Path) -> None:
    for place in ("a", "b"):
        (tmp_path / place / "deep").mkdir(parents=True)
        (tmp_path / place / "deep" / "one.txt").write_text("one")
        (tmp_path / place / "two.txt").write_text("two")
    a, b = resolve(str(tmp_path / "a")), resolve(str(tmp_path / "b"))
    assert a.digest == b.digest and a.files == ("deep/one.txt", "two.txt")
    (tmp_path / "b" / "two.txt").write_text("2")
    assert resolve(str(tmp_path / "b")).digest != a.digest


def test_a_package_is_found_without_importing_it() -> None:
    found = resolve("package:pydantic")
    assert found.scheme == "package" and found.name == "pydantic"
    assert "pydantic/main.py" in found.files and (found.path / "pydantic/main.py").is_file()
    assert found.digest == resolve("package:pydantic").digest


def test_a_glob_lists_its_files(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.md"):
        (tmp_path / name).write_text(name)
    assert resolve("*.txt", root=tmp_path).files == ("a.txt", "b.txt")
    with pytest.raises(FledgeError, match="no file matches"):
        resolve("*.csv", root=tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("package:no-such-thing", "pip install --no-deps no-such-thing"),
        ("nowhere.txt", "neither a stage of this recipe nor a file or folder"),
    ],
)
def test_what_is_not_there(text: str, expected: str) -> None:
    with pytest.raises(FledgeError, match=expected):
        resolve(text)


def test_a_hub_name_without_network_is_one_message(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FledgeError, match="cannot be had from the Hub"):
        resolve("hub:nobody/nothing@" + "0" * 40)


def test_kinds() -> None:
    ref: Ref[Records] = Ref("x", (Records,))
    assert ref.accepts("documents") and ref.accepts("records") and not ref.accepts("model")
    assert Ref("x", (Conversations, Documents)).accepts("records")  # known only once the rows are read
    assert not Ref("x", (Conversations,)).accepts("documents")
    assert Ref("x", (Model,)).accepts("adapter") and not Ref("x", (Model,)).accepts("reward-model")
    assert Ref("split.train").looks_like_output and not Ref("a/b").looks_like_output


def test_digests_are_remembered_until_the_file_changes(tmp_path: Path) -> None:
    db, file = Database(tmp_path / "x.db"), tmp_path / "f"
    file.write_text("one")
    first = db.digest(file)
    stat = file.stat()
    file.write_text("two")  # same size: the time of change tells
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert db.digest(file) != first
    assert db.rate("x") is None
    for value in (1.0, 5.0, 2.0):
        db.add_rate("x", value)
    assert db.rate("x") == 2.0
