"""The library, indexed once by words and once with vectors."""

from __future__ import annotations

from pathlib import Path

import pytest

from fledge.inference.retrieval.index import Cut, Index, build_index
from fledge.inference.retrieval.retriever import Retriever
from tests.inference.retrieval import library

CUT = Cut(size=60, overlap=10, segmenter="bigrams")


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library's folder; not to be changed."""
    return library.write(tmp_path_factory.mktemp("library") / "files")


@pytest.fixture(scope="session")
def index(shelf: Path, tmp_path_factory: pytest.TempPathFactory) -> Index:
    out = tmp_path_factory.mktemp("indexed") / "index"
    build_index(shelf, out, CUT, library.Meaning(), embedder="meaning")
    return Index.open(out)


@pytest.fixture(scope="session")
def by_words(index: Index) -> Retriever:
    return Retriever(index)
