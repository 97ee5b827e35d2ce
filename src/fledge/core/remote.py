"""Sources behind a URL: object stores and whatever else fsspec knows (`s3://bucket/key*`), and `http(s)://` files.

When a run is planned a source is only listed: ETag, version, size or time of change of each file stand for its bytes.
When its stage runs the files are fetched into the stage's work folder, one by one, each appearing whole; a stage that
was killed fetches what is missing. What changed in between is an error.

HTTP connects to public addresses only, checked anew for each redirect, unless `FLEDGE_ALLOW_PRIVATE=1`. Where an object
store is reached (`AWS_ENDPOINT_URL`) is the user's own setting and not checked.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit

from fledge.core.addresses import RefusedAddress, refuse_private
from fledge.core.artifact import digest_of
from fledge.core.errors import FledgeError, Problem, missing_extra, need
from fledge.core.language import t
from fledge.core.reference import Outside

PIECE = 1 << 20
_REDIRECTS = 5
_AT_ONCE = 8  # files
_TIMES = {"connect": 20.0, "read": 60.0, "write": 20.0, "pool": 20.0}  # seconds
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}
_IDENTITY = ("ETag", "etag", "md5", "content_hash", "version_id", "generation", "mtime", "created", "LastModified")


def find(text: str) -> Outside:
    """What a URL names: the files with the digest of what the store says of them, nothing fetched.

    Raises FledgeError where there is nothing, or where it cannot be reached."""
    if text.startswith(("http://", "https://")):
        with _get(text) as answer:
            about = {name: answer.headers.get(name, "") for name in ("etag", "last-modified", "content-length")}
        size = int(about["content-length"] or 0)
        return Outside(text, Path(), digest_of({"url": text, **about}), (_name_in(text),), size)
    files = {name: info for name, info in _listed(text)}
    if not files:
        raise FledgeError(Problem(t('no file matches "{text}"', text=text)))
    about_each = {name: [info.get("size"), _identity(info)] for name, info in files.items()}
    size = sum(int(info.get("size") or 0) for info in files.values())
    return Outside(text, Path(), digest_of(about_each), tuple(files), size)


def fetch(found: Outside, folder: Path) -> Outside:
    """The files, on this machine: those that are not below `folder` yet are fetched.

    Raises FledgeError where they are not what they were when the run was planned."""
    missing = [name for name in found.files if not (folder / name).is_file()]
    if missing and find(found.text).digest != found.digest:
        raise FledgeError(
            Problem(t("has changed since the run was planned"), where=found.text, fix=t("start the run again"))
        )
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(lambda name: _fetch_one(found.text, name, folder / name), missing))
    if len(found.files) == 1:
        only = folder / found.files[0]
        return replace(found, path=only, files=(only.name,))
    return replace(found, path=folder)


def _fetch_one(text: str, name: str, target: Path) -> None:
    """One file, which appears whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    making = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with making.open("wb") as out:
            out.writelines(_content(text, name))
        making.replace(target)
    finally:
        making.unlink(missing_ok=True)


def _content(text: str, name: str) -> Iterator[bytes]:
    """The bytes of one file, piece by piece."""
    if text.startswith(("http://", "https://")):
        with _get(text) as answer:
            yield from answer.iter_stream()  # fewer bytes than promised are a protocol error
        return
    system, pattern = file_system(text)
    with speaking(text), system.open(f"{_base(system, pattern)}/{name}".lstrip("/"), "rb") as stream:
        yield from iter(lambda: stream.read(PIECE), b"")


# --- object stores --------------------------------------------------------------------------------------------------


def file_system(text: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path in it."""
    core = need("fsspec.core", "data", "fsspec")
    try:
        return core.url_to_fs(text, use_listings_cache=False)  # type: ignore[no-any-return]
    except ImportError:
        package = _PACKAGES.get(text.partition("://")[0], "fsspec")
        if package == "s3fs":
            raise missing_extra("s3fs", "data") from None
        raise FledgeError(
            Problem(t("{package} is not installed", package=package), text, fix=f"pip install {package}")
        ) from None
    except ValueError as error:
        raise FledgeError(Problem(t("no such kind of URL"), where=text, found=str(error))) from None


def _listed(text: str) -> Iterable[tuple[str, dict[str, Any]]]:
    """(name below the base, what the store says) of every file of a URL, a prefix or a glob, sorted."""
    system, path = file_system(text)
    base = _base(system, path)
    with speaking(text):
        if any(mark in path for mark in "*?["):
            found = system.glob(path, detail=True)
        elif system.isfile(path):
            found = {path: system.info(path)}
        else:
            found = system.find(path, detail=True)
    files = [(name, info) for name, info in found.items() if info.get("type") == "file" and not name.endswith("/")]
    return sorted((_inside(name.lstrip("/").removeprefix(base.strip("/") + "/")), info) for name, info in files)


def _inside(name: str) -> str:
    """A key as a path below a folder: nothing in it may lead out."""
    parts = [part for part in name.split("/") if part not in ("", ".", "..")]
    return "/".join(parts)


def _base(system: Any, path: str) -> str:
    """The folder of all that a path can match."""
    marks = [path.find(mark) for mark in "*?[" if mark in path]
    if marks:
        return path[: min(marks)].rpartition("/")[0]
    with speaking(path):
        return path.rpartition("/")[0] if system.isfile(path) else path.rstrip("/")


def _identity(info: dict[str, Any]) -> str:
    """What says that the bytes are the same: a hash or a version where there is one, else the time of change."""
    return next((f"{key.lower()}={info[key]}" for key in _IDENTITY if info.get(key)), "")


@contextmanager
def speaking(text: str, problem: str = "") -> Iterator[None]:
    """Turn what a store's client raises into one message."""
    try:
        yield
    except FledgeError:
        raise
    except FileNotFoundError:
        raise FledgeError(Problem(t('no file matches "{text}"', text=text))) from None
    except Exception as error:  # every client has errors of its own
        raise _unreachable(text, f"{type(error).__name__}: {error}", problem) from error


def _unreachable(text: str, found: str, problem: str = "") -> FledgeError:
    fix = t("check the address, the network and your credentials")
    problem = problem or t("cannot be fetched")
    return FledgeError(Problem(problem, where=text, found=found.splitlines()[0][:300], fix=fix))


# --- HTTP -----------------------------------------------------------------------------------------------------------


def _name_in(url: str) -> str:
    name = _inside(unquote(urlsplit(url).path).rpartition("/")[2])
    return name or "index.html"


class _Answer:
    """The head of an answer, its names in lower case, and its body as it comes."""

    def __init__(self, response: Any) -> None:
        self.status = response.status
        self.headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in response.headers}
        self.iter_stream = response.iter_stream


@contextmanager
def _get(url: str) -> Iterator[_Answer]:
    """The answer to a GET, redirects followed. Raises FledgeError unless it is 200."""
    httpcore = need("httpcore", "data")
    first = url
    with httpcore.ConnectionPool(network_backend=_backend()) as pool:
        for _ in range(_REDIRECTS + 1):
            if urlsplit(url).scheme not in ("http", "https"):
                raise _unreachable(first, f"a redirect to {url}")
            try:
                with pool.stream(
                    "GET", url, headers={"User-Agent": "fledge", "Accept-Encoding": "identity"},
                    extensions={"timeout": _TIMES},
                ) as response:  # fmt: skip
                    answer = _Answer(response)
                    if answer.status == 200:
                        yield answer
                        return
                    if answer.status not in (301, 302, 303, 307, 308) or "location" not in answer.headers:
                        raise _unreachable(first, f"HTTP {answer.status}")
                    url = urljoin(url, answer.headers["location"])
            except RefusedAddress as error:
                fix = t("if it is your own network: FLEDGE_ALLOW_PRIVATE=1")
                raise RefusedAddress(*(replace(problem, where=first, fix=fix) for problem in error.problems)) from None
            except (httpcore.NetworkError, httpcore.TimeoutException, httpcore.ProtocolError) as error:
                raise _unreachable(first, f"{type(error).__name__}: {error}") from None
    raise _unreachable(first, f"more than {_REDIRECTS} redirects")


def _backend() -> Any:
    """Connects to addresses that were checked, and to no other that the name may have a moment later."""
    httpcore = need("httpcore", "data")

    class Checked(httpcore.SyncBackend):  # type: ignore[name-defined, misc]
        def connect_tcp(self, host: str, port: int, *rest: Any, **options: Any) -> Any:
            allow = os.environ.get("FLEDGE_ALLOW_PRIVATE") == "1"
            error: Exception = socket.gaierror(host)
            for address in refuse_private(host, allow):
                try:
                    return super().connect_tcp(address, port, *rest, **options)
                except httpcore.NetworkError as failed:
                    error = failed
            raise error

    return Checked()
