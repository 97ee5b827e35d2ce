"""An index: the passages of a folder, their words as inverted lists, and where a model is given their vectors.

    index.json             what it was made of and how, the digest of every file below; written last
    <generation>/          passages.parquet, terms.txt, starts.npy, docs.npy, counts.npy, lengths.npy, vectors.npy

`index.json` names the generation that counts, and is replaced in one step: a reader sees the old index or the new one.
An older index gives what has not changed: files with the same digest are not read again, passages with the same text
keep their words and vectors. The result is that of indexing anew.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fledge.core.artifact import digest_of, files_of, sha256_of, write_atomic
from fledge.core.errors import FledgeError, Problem
from fledge.core.language import t
from fledge.inference.retrieval.bm25 import BM25, Postings
from fledge.inference.retrieval.reading import Passage, passages_of
from fledge.inference.retrieval.vectors import PROBE, Embedder, Vectors, embed
from fledge.inference.retrieval.words import LONE, Segmenter, resolve, words
from fledge.records.raw.files import files_in
from fledge.records.rejects import Rejects

if TYPE_CHECKING:
    import pyarrow as pa

MANIFEST = "index.json"
FORMAT, VERSION = "fledge.index", 1
Tell = Callable[[int, int, str], Any]
"""hears how many of how many are done, and of what"""


@dataclass(frozen=True)
class Cut:
    """How texts become passages and words. An index is taken over in part only by one that was made so."""

    size: int = 200
    """units (words, or single characters of Chinese) of a passage, at most"""
    overlap: int = 40
    """units that may stand in two passages that follow one another"""
    segmenter: Segmenter = "bigrams"
    """how Chinese becomes words: `bigrams`, `jieba`, or auto: jieba where it is installed"""

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < self.size:
            raise FledgeError(
                Problem(t("the overlap of passages is smaller than they are"), "overlap", str(self.overlap),
                        f"0 … {self.size - 1}")
            )  # fmt: skip


class Index:
    """An index that is open. `passages` without scores; `bm25`; `vectors` (N, d) of length 1, or None."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any], verify: bool = True) -> None:
        self.folder, self.manifest = folder, manifest
        self._data = folder / str(manifest["generation"])
        if verify:
            _verify(self._data, manifest["files"])
        self.cut = Cut(**manifest["cut"])
        self._table = _read_table(self._data / "passages.parquet")
        self.bm25 = BM25(Postings.load(self._data), manifest["k1"], manifest["b"])
        dense = manifest.get("embedder")
        file = self._data / "vectors.npy"
        self.vectors: Vectors | None = np.load(file, mmap_mode="r", allow_pickle=False) if dense else None

    @classmethod
    def open(cls, folder: Path | str, verify: bool = True) -> Index:
        """The index in a folder. Raises FledgeError where there is none, or where a file of it is not as it was."""
        folder = Path(folder)
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            if (manifest["format"], manifest["version"]) != (FORMAT, VERSION):
                raise ValueError(f"{manifest['format']} {manifest['version']}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FledgeError(
                Problem(t("this is no index"), str(folder), str(error), fix=t("run: fledge index FOLDER --out INDEX"))
            ) from None
        try:
            return cls(folder, manifest, verify)
        except (KeyError, TypeError, AttributeError) as error:  # of our format, but not as we write it
            raise FledgeError(Problem(t("this is no index"), str(folder / MANIFEST), repr(error))) from None

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def passage(self, number: int, score: float = 0.0) -> Passage:
        """One passage, with the score by which it was found."""
        row = {name: self._table[name][number].as_py() for name in _COLUMNS}
        return Passage(**row, score=score)

    def passages(self) -> list[Passage]:
        """All passages in order."""
        return [Passage(**row) for row in self._table.to_pylist()]

    def terms(self, text: str) -> list[str]:
        """A query's words, cut as those of the passages were. Single Chinese characters alone (茶, 税) mean every word
        that has them: in the passages they seldom stand by themselves."""
        found = words(text, self.cut.segmenter)
        if not all(LONE.fullmatch(word) for word in found):
            return found
        return [term for term in self.bm25.postings.terms if any(word in term for word in found)]

    def check_embedder(self, engine: Embedder) -> None:
        """Raises FledgeError where the index has no vectors, or has them from another model."""
        dense = self.manifest.get("embedder")
        if not dense:
            raise FledgeError(
                Problem(t("this index has no vectors"), str(self.folder),
                        fix=t("make it anew with an embedding model: fledge index … --embedder MODEL"))
            )  # fmt: skip
        probe = embed(engine, [PROBE])[0]
        known = np.array(dense["probe"], np.float32)
        if probe.shape != known.shape or float(probe @ known) < 0.99:  # quantisation and bf16 stay above
            found = t("{n} dimensions", n=len(probe)) if probe.shape != known.shape else f"cos = {probe @ known:.3f}"
            raise FledgeError(
                Problem(t("this index was made with another embedding model"), str(self.folder), found,
                        allowed=str(dense["name"]))
            )  # fmt: skip


_COLUMNS = ("text", "source", "place", "heading")


def build_index(
    data: Path,
    out: Path,
    cut: Cut = Cut(),
    engine: Embedder | None = None,
    *,
    embedder: str = "",
    k1: float = 1.2,
    b: float = 0.75,
    previous: Index | None = None,
    tell: Tell = lambda done, total, what: None,
) -> dict[str, Any]:
    """Index a file or a folder into the folder `out` (new, or an index that is replaced); returns the metrics.

    `engine` gives the vectors (none: words only), `embedder` is what the manifest calls it. What cannot be read is kept
    in `out/rejected` with its reason. Raises FledgeError where nothing can be read.
    """
    cut = replace(cut, segmenter=resolve(cut.segmenter))
    if previous is not None and (previous.cut != cut or (engine and not _same_embedder(previous, engine))):
        previous = None
    out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(out / "rejected", ignore_errors=True)
    passages, sources, reused = _collect(data, out, cut, previous, tell)
    if not passages:
        raise FledgeError(Problem(t("no text was found in the files"), str(data)))
    made = out / ".making"
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    old = _places_of(previous) if previous else {}
    taken = np.array([old.get(passage.key, -1) for passage in passages], np.int64)
    _postings(passages, taken, previous, cut, tell).save(made)
    dense = _vectors(passages, taken, previous, engine, made, tell) if engine else 0
    _write_table(passages, made / "passages.parquet")
    files = {name: sha256_of(made / name) for name in files_of(made)}
    generation = digest_of(files)[:16]
    shutil.rmtree(out / generation, ignore_errors=True)
    made.rename(out / generation)
    probe = embed(engine, [PROBE])[0].tolist() if engine else None
    manifest = {
        "format": FORMAT, "version": VERSION, "generation": generation, "passages": len(passages),
        "cut": asdict(cut), "k1": k1, "b": b, "sources": sources, "files": files,
        "embedder": {"name": embedder, "dimensions": dense, "probe": probe} if engine else None,
    }  # fmt: skip
    write_atomic(out / MANIFEST, json.dumps(manifest, ensure_ascii=False, indent=1, sort_keys=True) + "\n")
    for stale in out.iterdir():
        if stale.is_dir() and stale.name not in (generation, "rejected"):
            shutil.rmtree(stale, ignore_errors=True)
    return {
        "files": len(sources), "files_unchanged": reused, "passages": len(passages),
        "passages_taken_over": int((taken >= 0).sum()), "dimensions": dense,
        "rejected": sum(row["rejected"] for row in sources.values()),
    }  # fmt: skip


def _collect(
    data: Path, out: Path, cut: Cut, previous: Index | None, tell: Tell
) -> tuple[list[Passage], dict[str, dict[str, Any]], int]:
    """(all passages, by source its digest and counts, how many files were not read again)."""
    root = data if data.is_dir() else data.parent
    files = [file for file in files_in(data) if out.resolve() not in file.resolve().parents]
    known: Mapping[str, Any] = previous.manifest["sources"] if previous else {}
    old = _by_source(previous) if previous else {}
    passages: list[Passage] = []
    sources: dict[str, dict[str, Any]] = {}
    reused = 0
    with Rejects(out) as rejects:
        for number, file in enumerate(files, 1):
            source, digest = file.relative_to(root).as_posix(), sha256_of(file)
            before, refused = len(passages), sum(rejects.counts.values())
            if known.get(source, {}).get("digest") == digest and not known[source]["rejected"]:
                passages += old.get(source, [])
                reused += 1
            else:
                passages += passages_of(file, source, cut.size, cut.overlap, rejects)
            sources[source] = {
                "digest": digest,
                "passages": len(passages) - before,
                "rejected": sum(rejects.counts.values()) - refused,
            }
            tell(number, len(files), "files")
    return passages, sources, reused


def _postings(passages: Sequence[Passage], taken: Any, previous: Index | None, cut: Cut, tell: Tell) -> Postings:
    """The inverted lists: of passages that are taken over the old ones, of the others counted now."""
    new = np.flatnonzero(taken < 0)

    def counted() -> Any:
        for done, number in enumerate(new.tolist(), 1):
            yield words(passages[number].searched, cut.segmenter)
            tell(done, len(new), "passages")

    parts = [(Postings.of(counted()), new.astype(np.int64))]
    if previous is not None:
        # A passage that stands in several places now is taken from one old row: its further places are copies of it.
        rows, firsts = np.unique(taken[taken >= 0], return_index=True)
        at = np.flatnonzero(taken >= 0)
        places = np.full(len(previous), -1, np.int64)
        places[rows] = at[firsts]
        parts.append((previous.bm25.postings, places))
        repeated = np.setdiff1d(at, at[firsts])
        parts.append((Postings.of(words(passages[i].searched, cut.segmenter) for i in repeated.tolist()), repeated))
    return Postings.assembled(parts, len(passages))


def _vectors(
    passages: Sequence[Passage], taken: Any, previous: Index | None, engine: Embedder, folder: Path, tell: Tell
) -> int:
    """Write (N, d) vectors; those of passages that are taken over are copied. Returns d."""
    new = np.flatnonzero(taken < 0)
    computed = embed(engine, [passages[i].searched for i in new.tolist()], lambda done: tell(done, len(new), "vectors"))
    if previous is None or previous.vectors is None:
        np.save(folder / "vectors.npy", computed, allow_pickle=False)
        return int(computed.shape[1])
    vectors = np.zeros((len(passages), previous.vectors.shape[1]), np.float32)
    vectors[taken >= 0] = previous.vectors[taken[taken >= 0]]
    if len(new):
        vectors[new] = computed
    np.save(folder / "vectors.npy", vectors, allow_pickle=False)
    return int(vectors.shape[1])


def _same_embedder(previous: Index, engine: Embedder) -> bool:
    try:
        previous.check_embedder(engine)
    except FledgeError:
        return False
    return True


def _places_of(index: Index) -> dict[str, int]:
    """The first passage with each key."""
    places: dict[str, int] = {}
    for number, passage in enumerate(index.passages()):
        places.setdefault(passage.key, number)
    return places


def _by_source(index: Index) -> dict[str, list[Passage]]:
    found: dict[str, list[Passage]] = {}
    for passage in index.passages():
        found.setdefault(passage.source, []).append(passage)
    return found


def _verify(folder: Path, files: Mapping[str, str]) -> None:
    wrong = [
        name for name, digest in files.items() if not (folder / name).is_file() or sha256_of(folder / name) != digest
    ]
    if wrong:
        raise FledgeError(
            Problem(t("files of the index are missing or damaged"), str(folder), ", ".join(wrong),
                    fix=t("make the index anew"))
        )  # fmt: skip


def _write_table(passages: Sequence[Passage], file: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    assert {field.name for field in fields(Passage)} == {*_COLUMNS, "score"}
    columns = {name: pa.array([getattr(passage, name) for passage in passages], pa.string()) for name in _COLUMNS}
    pq.write_table(pa.table(columns), file, compression="zstd", compression_level=1)


def _read_table(file: Path) -> pa.Table:
    import pyarrow.parquet as pq

    return pq.read_table(file)
