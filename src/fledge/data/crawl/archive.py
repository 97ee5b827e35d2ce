"""What was fetched, kept as WARC files (ISO 28500): a request and a response record each, gzip members of their own.

A file only grows; where its last committed record ends stands in the frontier. After a kill, what was written behind
that point is cut off, so that the archive holds whole records and every answer once.
"""

from __future__ import annotations

import os
import shutil
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from fledge.core.errors import missing_extra
from fledge.data.crawl.fetch import Response

FILE_BYTES = 1_000_000_000
_HOP_BY_HOP = ("transfer-encoding", "connection", "keep-alive")


class Spot(NamedTuple):
    """Where a record begins, or where the next one will: number of the file and bytes from its start."""

    file: int
    offset: int


class Archive:
    """WARC files in one folder. `end` is where the next record goes: keep it together with what it refers to."""

    def __init__(self, folder: Path, end: Spot, about: dict[str, str]) -> None:
        try:
            from warcio.warcwriter import WARCWriter
        except ImportError:
            raise missing_extra("warcio", "data") from None
        self.folder, self.end, self._about, self._writer_of = folder, end, about, WARCWriter
        folder.mkdir(parents=True, exist_ok=True)
        for file in folder.glob("crawl-*.warc.gz"):
            if int(file.name[6:11]) > end.file:
                file.unlink()
        self._open()

    def _path(self, number: int) -> Path:
        return self.folder / f"crawl-{number:05d}.warc.gz"

    def _open(self) -> None:
        path = self._path(self.end.file)
        self._stream = path.open("r+b" if path.exists() else "w+b")
        self._stream.truncate(self.end.offset)
        self._stream.seek(self.end.offset)
        self._writer: Any = self._writer_of(self._stream, gzip=True, warc_version="1.1")
        if not self.end.offset:
            self._writer.write_record(self._writer.create_warcinfo_record(path.name, self._about))
            self.end = Spot(self.end.file, self._stream.tell())

    def add(self, response: Response) -> Spot:
        """Append an answer and its request. Returns where the answer's record begins."""
        from warcio.statusandheaders import StatusAndHeaders

        if self.end.offset >= FILE_BYTES:
            self._stream.close()
            self.end = Spot(self.end.file + 1, 0)
            self._open()
        begins = self.end
        date = response.date.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        about = {"WARC-Date": date} | ({"WARC-IP-Address": response.peer} if response.peer else {})
        if not response.whole:
            about["WARC-Truncated"] = "length"
        headers = [  # chunks are put together already: what speaks of them is kept under another name
            (f"X-Crawler-{name}" if name.lower() in _HOP_BY_HOP else name, value) for name, value in response.headers
        ]
        status = StatusAndHeaders(f"{response.status} {response.phrase}".strip(), headers, protocol=response.version)
        answer = self._writer.create_warc_record(
            response.url, "response", BytesIO(response.wire), len(response.wire), "", about, http_headers=status
        )
        target = response.url.partition("//")[2].partition("/")[2]
        asked = StatusAndHeaders(f"GET /{target} HTTP/1.1", list(response.sent), is_http_request=True)
        request = self._writer.create_warc_record(response.url, "request", http_headers=asked)
        self._writer.write_request_response_pair(request, answer)
        self._stream.flush()
        self.end = Spot(self.end.file, self._stream.tell())
        return begins

    def read(self, spot: Spot) -> bytes:
        """The body of the answer that begins there, as it came over the wire."""
        from warcio.archiveiterator import ArchiveIterator

        with self._path(spot.file).open("rb") as stream:
            stream.seek(spot.offset)
            body: bytes = next(iter(ArchiveIterator(stream))).raw_stream.read()
            return body

    def close(self) -> None:
        """Let go of the file."""
        self._stream.close()

    def deliver(self, folder: Path) -> int:
        """The files, in `folder` too: a crawl that is interrupted while it writes its records still has them here.
        Returns how many there are."""
        folder.mkdir(parents=True, exist_ok=True)
        files = sorted(self.folder.glob("crawl-*.warc.gz"))
        for file in files:
            try:
                os.link(file, folder / file.name)
            except OSError:
                shutil.copyfile(file, folder / file.name)
        return len(files)
