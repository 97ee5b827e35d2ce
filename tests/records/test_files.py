"""Raw files as streams of rows: packings, files that break off, bombs, lines without end; memory stays bounded."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import tracemalloc
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fledge.core.errors import FledgeError
from fledge.records.formats import load
from fledge.records.kinds import Document
from fledge.records.raw.files import READERS, RawRow, files_in, rows_of
from fledge.records.raw.json_rows import json_file, json_lines
from fledge.records.raw.packed import spans
from fledge.records.raw.rows import Limits, lines
from fledge.records.raw.tables import table
from fledge.records.rejects import Rejects, read_rejects

PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".zst": lambda data: pa.compress(data, codec="zstd", asbytes=True),  # type: ignore[no-any-return]
    ".bz2": bz2.compress,
    ".xz": lambda data: lzma.compress(data, preset=0),
}
SMALL = Limits(row=1_000_000, small=1_000_000)


def rows_in_json(count: int) -> bytes:
    """Rows that do not compress to nothing."""
    return b"".join(json.dumps({"text": os.urandom(60).hex()}).encode() + b"\n" for _ in range(count))


def reasons(rows: list[RawRow]) -> list[tuple[str, str]]:
    return [(row.where, row.error.said("en")) for row in rows if row.error]


@pytest.mark.parametrize("packing", list(PACKERS))
def test_every_packing_is_read_two_members_behind_each_other_too(tmp_path: Path, packing: str) -> None:
    first, second = rows_in_json(50), rows_in_json(30)
    file = tmp_path / f"d.jsonl{packing}"
    file.write_bytes(PACKERS[packing](first) + PACKERS[packing](second))
    wanted = [json.loads(line) for line in (first + second).splitlines()]
    assert [row.value for row in rows_of(file)] == wanted


@pytest.mark.parametrize("packing", list(PACKERS))
def test_of_a_file_that_breaks_off_all_before_the_break_is_kept(tmp_path: Path, packing: str) -> None:
    content = rows_in_json(30_000)  # several blocks of every packing
    file = tmp_path / f"d.jsonl{packing}"
    file.write_bytes((whole := PACKERS[packing](content))[: len(whole) * 2 // 3])
    *kept, last = rows_of(file)
    wanted = [json.loads(line) for line in content.splitlines()]
    assert 10_000 < len(kept) < 30_000 and [row.value for row in kept] == wanted[: len(kept)]
    assert last.error and "breaks off" in last.error.said("en") and last.found and last.last
    with Rejects(tmp_path / "out") as rejects:
        assert len(list(load(file, "documents", rejects))) == len(kept)
    (rejected,) = read_rejects(tmp_path / "out")
    assert rejected["value"] == last.found and rejected["where"] == file.name
    with pytest.raises(FledgeError, match="cannot be read"):  # where nobody counts, nobody would hear of it
        list(load(file, "documents"))


def test_the_paragraph_before_a_break_is_not_lost(tmp_path: Path) -> None:
    whole = gzip.compress(b"".join(os.urandom(30).hex().encode() + b"\n" for _ in range(100)))
    (tmp_path / "a.txt.gz").write_bytes(whole[:-800])
    text, last = rows_of(tmp_path / "a.txt.gz")
    assert len(text.value) > 3_000 and last.error and "breaks off" in last.error.said("en")


@pytest.mark.parametrize("packing", list(PACKERS))
def test_a_bomb_is_stopped_by_its_ratio(tmp_path: Path, packing: str) -> None:
    file = tmp_path / f"bomb.txt{packing}"
    file.write_bytes(PACKERS[packing](b"0" * 64_000_000))
    tracemalloc.start()
    (row,) = rows_of(file, SMALL)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert row.error and row.error.said("en") == "unpacks to more than a file may hold"
    assert "for each byte of the file" in row.found and peak < 12_000_000


def test_a_packed_file_of_more_than_the_limit_is_stopped_by_its_size(tmp_path: Path) -> None:
    file = tmp_path / "big.jsonl.gz"
    file.write_bytes(gzip.compress(content := rows_in_json(20_000)))
    *kept, last = rows_of(file, Limits(unpacked=len(content) // 2))
    assert reasons([last]) == [("big.jsonl.gz", "unpacks to more than a file may hold")] and len(kept) > 7_000
    assert len(list(rows_of(file, Limits(unpacked=len(content))))) == 20_000


class Endless(io.RawIOBase):
    """`before`, a line of `length` bytes, `after`: made while it is read."""

    def __init__(self, before: bytes, length: int, after: bytes, filler: bytes = b"x") -> None:
        self.parts = [io.BytesIO(before), length, io.BytesIO(after)]
        self.filler = filler * (1 << 16)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        first, left, last = self.parts
        if size := first.readinto(buffer):  # type: ignore[union-attr]
            return size
        if left:
            size = min(left, len(buffer), len(self.filler))  # type: ignore[call-overload]
            buffer[:size] = self.filler[:size]
            self.parts[1] = left - size  # type: ignore[operator]
            return size
        return last.readinto(buffer)  # type: ignore[union-attr, no-any-return]


READ_LONG = {
    "json lines": (json_lines, b'{"text": "1"}\n', b'"}\n{"text": "2"}\n', b"x", ["1", "2"]),
    "csv": (table(","), b"text\n1\n", b"\n2\n", b"x", ["1", "2"]),
    "json": (json_file, b'[{"text": "1"}, {"text": "', b'"}, {"text": "2"}]', b"x", ["1"]),
    "text": (READERS[".txt"], b"1\n", b"\n2\n", b"x", ["1\n2"]),
}


@pytest.mark.parametrize("name", list(READ_LONG))
def test_a_line_of_64_mb_is_set_aside_in_bounded_memory(name: str) -> None:
    reader, before, after, filler, kept = READ_LONG[name]
    length = 64_000_000
    stream = io.BufferedReader(Endless(before, length, after, filler))
    tracemalloc.start()
    rows = list(reader(stream, "f", SMALL))  # type: ignore[arg-type]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 12 * SMALL.row, f"{peak} bytes at the peak"
    ((_, reason),) = reasons(rows)
    (bad,) = [row for row in rows if row.error]
    assert reason == "is longer than a row may be" and len(bad.text) <= 2_000
    if name != "json":  # nobody can tell where an element of an array ends that is not read
        assert length <= int(bad.found.split()[0]) < length + 20 and bad.where == ("f:3" if name == "csv" else "f:2")
    texts = [row.value if isinstance(row.value, str) else row.value["text"] for row in rows if not row.error]
    assert texts == kept


def test_lines_know_their_number_and_length() -> None:
    assert list(lines(io.BytesIO(b"\xef\xbb\xbfab\r\n\nx"), 9)) == [(1, b"ab", 2), (2, b"", 0), (3, b"x", 1)]
    assert list(lines(io.BytesIO(b"ab\nabcdef\nx"), 4)) == [(1, b"ab", 2), (2, b"abcde", 7), (3, b"x", 1)]
    assert list(lines(io.BytesIO(b"abcd\nabcdef"), 4)) == [(1, b"abcd", 4), (2, b"abcde", 6)]


def test_an_array_is_read_element_by_element_across_pieces(tmp_path: Path) -> None:
    rows = [{"text": f"第{i}条 " + "字" * (i % 700), "n": i} for i in range(6_000)]
    file = tmp_path / "a.json"
    file.write_text("\ufeff" + json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    assert file.stat().st_size > 3 << 20
    read = list(rows_of(file))
    assert [row.value for row in read] == rows
    assert [read[0].where, read[-1].where] == ["a.json:2", f"a.json:{2 + 4 * 5_999}"]
    file.write_text("[1, 2, 3", encoding="utf-8")
    *good, bad = rows_of(file)
    assert [row.value for row in good] == [1, 2, 3] and bad.error and "from here on" in bad.error.said("en")
    file.write_bytes(b'[{"text": "1"},\n{"text": "\xff"}, {"text": "2"}]')
    read = list(rows_of(file))
    assert reasons(read) == [("a.json:2", "is not UTF-8")] and [row.value for row in read if row.value] == [
        {"text": "1"}, {"text": "2"}
    ]  # fmt: skip


def test_an_object_of_json_that_is_too_big_is_said_to_be(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps({"data": [{"text": "x" * 100}] * 100}), encoding="utf-8")
    (row,) = rows_of(file, Limits(whole=1_000))
    assert row.error and "JSON lines" in row.error.said("en")
    assert len(list(rows_of(file))) == 100


def test_the_spans_of_a_file_are_the_file(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(content := rows_in_json(5_000))
    cut = spans(file, 50_000)
    assert len(cut) > 5 and cut[0][0] == 0 and cut[-1][1] == len(content)
    assert all(a[1] == b[0] for a, b in pairwise(cut))
    values = [row.value for span in cut for row in rows_of(file, span=span)]
    assert values == [json.loads(line) for line in content.splitlines()]
    (tmp_path / "empty.jsonl").write_bytes(b"")
    assert spans(tmp_path / "empty.jsonl", 10) == [(0, 0)]


def test_a_row_group_that_swells_beyond_measure_is_not_unpacked(tmp_path: Path) -> None:
    rows = pa.table({"text": ["a" * 1_000_000] * 20})
    pq.write_table(rows, tmp_path / "a.parquet", compression="zstd", row_group_size=10, use_dictionary=False)
    bad = list(rows_of(tmp_path / "a.parquet", Limits(whole=1_000_000)))
    assert [row.where for row in bad] == ["a.parquet[0]", "a.parquet[10]"] and all("from" in row.found for row in bad)
    assert len(list(rows_of(tmp_path / "a.parquet"))) == 20


def test_a_damaged_parquet_file_keeps_what_was_read(tmp_path: Path) -> None:
    rows = pa.table({"text": [os.urandom(500).hex() for _ in range(4_000)]})
    file = tmp_path / "a.parquet"
    pq.write_table(rows, file, compression="zstd", row_group_size=1_000)
    content = bytearray(file.read_bytes())
    middle = len(content) * 3 // 4
    content[middle : middle + 5_000] = bytes(5_000)
    file.write_bytes(content)
    *kept, last = rows_of(file)
    assert len(kept) >= 2_000 and last.error and "not valid Parquet" in last.error.said("en")


def test_a_file_that_may_not_be_opened_or_is_gone_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(FledgeError, match="cannot be read"):
        list(rows_of(tmp_path / "gone.jsonl"))
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(FledgeError, match="cannot be read"):
        list(rows_of(tmp_path / "folder.jsonl"))


def test_a_folder_without_a_file_that_can_be_read_says_what_can(tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    with pytest.raises(FledgeError, match="holds no data file") as error:
        files_in(tmp_path)
    assert ".warc" in error.value.problems[0].allowed and ".zst" in error.value.problems[0].allowed


def test_bytes_of_another_encoding_cost_their_own_line_only(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "1"}\n{"text": "\xc4\xe3"}\n{"text": "2"}\n')
    with Rejects(tmp_path / "out") as rejects:
        assert [d.text for d in load(file, "documents", rejects) if isinstance(d, Document)] == ["1", "2"]
    assert [row["where"] for row in read_rejects(tmp_path / "out")] == ["a.jsonl:2"]
