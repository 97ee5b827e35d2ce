"""An index is what it was made from: complete, checked, replaced in one step, and the same however it was reached."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from fledge.core.errors import FledgeError
from fledge.inference.retrieval.index import MANIFEST, Cut, Index, build_index
from fledge.inference.retrieval.retriever import Retriever
from fledge.records.rejects import read_rejects
from tests.inference.retrieval import library
from tests.inference.retrieval.conftest import CUT


def payload(folder: Path) -> dict[str, str]:
    """The digests of an index's files, and its sources."""
    manifest = json.loads((folder / MANIFEST).read_text())
    return {**manifest["files"], "sources": json.dumps(manifest["sources"], sort_keys=True)}


def test_an_index_holds_every_passage_of_every_file(shelf: Path, index: Index) -> None:
    assert {p.source for p in index.passages()} == {
        "guide.md", "handbook.md", "lighthouse.html", "museum.jsonl", "rules/library.txt"
    }  # fmt: skip
    assert len(index) == len(index.passages()) == sum(row["passages"] for row in index.manifest["sources"].values())
    assert index.vectors is not None and index.vectors.shape == (len(index), len(library.MEANINGS) + 1)
    assert np.linalg.norm(index.vectors, axis=1) == pytest.approx(1, abs=1e-6)


def test_the_same_files_give_the_same_bytes(shelf: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        build_index(shelf, tmp_path / name, CUT, library.Meaning(), embedder="meaning")
    files = {name: (tmp_path / name / MANIFEST).read_bytes() for name in ("a", "b")}
    assert files["a"] == files["b"]


def test_only_what_changed_is_read_and_embedded_again_and_nothing_is_different_for_it(tmp_path: Path) -> None:
    files, out = library.write(tmp_path / "files"), tmp_path / "index"
    build_index(files, out, CUT, library.Meaning(), embedder="meaning")
    (files / "museum.jsonl").unlink()
    (files / "handbook.md").write_text(library.HANDBOOK.replace("十五天", "二十天"), encoding="utf-8")
    (files / "zoo.txt").write_text("The zoo keeps forty penguins.\n\n动物园里有四十只企鹅。\n", encoding="utf-8")
    shutil.copy(files / "guide.md", files / "copy.md")  # the same passages once more
    model = library.Meaning()
    metrics = build_index(files, out, CUT, model, embedder="meaning", previous=Index.open(out))
    assert metrics["files_unchanged"] == 3
    embedded = [text for text in model.seen if "What can be found here" not in text]
    assert len(embedded) == metrics["passages"] - metrics["passages_taken_over"]
    assert all("二十天" in text or "zoo" in text for text in embedded)
    build_index(files, tmp_path / "anew", CUT, library.Meaning(), embedder="meaning")
    assert payload(out) == payload(tmp_path / "anew")
    found = Retriever.open(out).search("How many penguins?")
    assert found[0].source == "zoo.txt"
    assert not any(p.source == "museum.jsonl" for p in Index.open(out).passages())
    assert sorted(p.name for p in out.iterdir()) == sorted(
        [MANIFEST, json.loads((out / MANIFEST).read_text())["generation"]]
    )


def test_other_settings_take_nothing_over(shelf: Path, index: Index, tmp_path: Path) -> None:
    metrics = build_index(shelf, tmp_path / "o", Cut(30, 5, "bigrams"), previous=index)
    assert metrics["files_unchanged"] == metrics["passages_taken_over"] == 0


def test_the_old_index_stays_until_the_new_one_is_whole(shelf: Path, tmp_path: Path) -> None:
    class Broken(library.Meaning):
        def embed(self, texts: list[str]) -> list[list[float]]:  # type: ignore[override]
            raise RuntimeError("out of memory")

    build_index(shelf, tmp_path / "i", CUT)
    before = payload(tmp_path / "i")
    with pytest.raises(RuntimeError):
        build_index(shelf, tmp_path / "i", CUT, Broken(), embedder="x")
    assert payload(tmp_path / "i") == before
    assert len(Index.open(tmp_path / "i")) == len(Index.open(tmp_path / "i").passages())


def test_an_index_inside_the_folder_that_it_indexes_does_not_index_itself(tmp_path: Path) -> None:
    files = library.write(tmp_path / "files")
    for _ in range(2):
        metrics = build_index(files, files / "index", CUT)
        assert metrics["files"] == 5


def test_damage_is_found_and_what_is_no_index_is_refused(shelf: Path, tmp_path: Path) -> None:
    build_index(shelf, tmp_path / "i", CUT)
    file = next((tmp_path / "i").glob("*/counts.npy"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(FledgeError, match=r"missing or damaged(.|\n)*counts.npy"):
        Index.open(tmp_path / "i")
    for folder in (tmp_path, shelf):
        with pytest.raises(FledgeError, match="this is no index"):
            Index.open(folder)
    (tmp_path / "i" / MANIFEST).write_text('{"format": "fledge.index", "version": 99}')
    with pytest.raises(FledgeError, match="99"):
        Index.open(tmp_path / "i")


def test_another_embedding_model_is_refused(index: Index, shelf: Path, tmp_path: Path) -> None:
    class Other(library.Meaning):
        def embed(self, texts: list[str]) -> list[list[float]]:  # type: ignore[override]
            return [row[::-1] for row in super().embed(texts)]

    class Shorter(library.Meaning):
        def embed(self, texts: list[str]) -> list[list[float]]:  # type: ignore[override]
            return [row[:3] for row in super().embed(texts)]

    index.check_embedder(library.Meaning())
    for model in (Other(), Shorter()):
        with pytest.raises(FledgeError, match="another embedding model"):
            index.check_embedder(model)
    build_index(shelf, tmp_path / "words", CUT)
    with pytest.raises(FledgeError, match="no vectors"):
        Index.open(tmp_path / "words").check_embedder(library.Meaning())


def test_what_cannot_be_read_is_kept_beside_the_index(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a.jsonl").write_text('{"text": "猫"}\n{"text": 3}\n')
    metrics = build_index(tmp_path / "files", tmp_path / "i", CUT)
    assert metrics["rejected"] == 1
    assert [row["where"] for row in read_rejects(tmp_path / "i")] == ["a.jsonl:2"]
    (tmp_path / "files" / "a.jsonl").write_text('{"text": 3}\n')
    with pytest.raises(FledgeError, match="no text was found"):
        build_index(tmp_path / "files", tmp_path / "j", CUT)
    with pytest.raises(FledgeError, match="overlap"):
        Cut(10, 10)


def test_a_manifest_that_lacks_what_it_must_say_is_no_index(tmp_path: Path) -> None:
    for manifest in (
        {"format": "fledge.index", "version": 1},
        {"format": "fledge.index", "version": 1, "generation": "x"},
        [],
    ):
        (tmp_path / MANIFEST).write_text(json.dumps(manifest))
        with pytest.raises(FledgeError, match="this is no index"):
            Index.open(tmp_path)
