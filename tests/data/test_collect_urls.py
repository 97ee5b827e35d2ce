"""Sources behind URLs: an S3 server on loopback, HTTP with redirects and changes, a Hub cache without a network."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from fledge.core.errors import FledgeError
from fledge.core.plan import make_plan
from fledge.core.recipe import from_values
from fledge.core.reference import Outside, fetch, is_url, resolve
from fledge.core.runner import Runner as RecipeRunner
from fledge.core.store import Store
from fledge.data.stages import Collect
from fledge.records.shards import read

from .conftest import Runner


def row(text: str) -> bytes:
    return json.dumps({"text": text}).encode() + b"\n"


def texts(path: Any) -> list[str]:
    return [record.text for record in read(path, "documents")]  # type: ignore[union-attr]


# --- S3 -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    yield f"http://{host}:{port}"
    moto.stop()


@pytest.fixture
def bucket(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A bucket called `corpus` on a real server; `s3://` leads to it through the usual variables."""
    boto3 = pytest.importorskip("boto3", reason="boto3 comes with moto[server]")
    for name, value in (
        ("AWS_ENDPOINT_URL", server), ("AWS_ACCESS_KEY_ID", "test"), ("AWS_SECRET_ACCESS_KEY", "test"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
    ):  # fmt: skip
        monkeypatch.setenv(name, value)
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    store = boto3.resource("s3").Bucket("corpus")
    store.create()
    for key, text in (
        ("raw/a.jsonl", "one"),
        ("raw/b.jsonl", "two"),
        ("raw/deep/c.jsonl", "three"),
        ("other.txt", "x"),
    ):
        store.put_object(Key=key, Body=row(text))
    yield store
    store.objects.delete()
    store.delete()


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("s3://corpus/raw/*.jsonl", ["one", "two"]),
        ("s3://corpus/raw/b.jsonl", ["two"]),
        ("s3://corpus/raw", ["one", "two", "three"]),
        ("s3://corpus/raw/", ["one", "two", "three"]),
        ("s3://corpus/**/c.*", ["three"]),
    ],
)
def test_objects_prefixes_and_globs_of_a_bucket(bucket: Any, run: Runner, url: str, found: list[str]) -> None:
    made = run(Collect(kind="documents", sources=[url]))
    assert texts(made) == found and list(made.metrics["rows_by_source"]) == [url]


def test_an_objects_digest_is_its_content_and_its_size_is_known(bucket: Any) -> None:
    before = resolve("s3://corpus/raw/*.jsonl")
    assert before.size == len(row("one") + row("two")) and before.scheme == "url"
    bucket.put_object(Key="raw/a.jsonl", Body=row("one"))  # written again: the same bytes
    assert resolve("s3://corpus/raw/*.jsonl").digest == before.digest
    bucket.put_object(Key="raw/a.jsonl", Body=row("One"))
    assert resolve("s3://corpus/raw/*.jsonl").digest != before.digest


def test_what_changes_or_vanishes_after_planning_is_an_error(bucket: Any, tmp_path: Path) -> None:
    found = resolve("s3://corpus/raw/*.jsonl")
    bucket.put_object(Key="raw/a.jsonl", Body=row("changed"))
    with pytest.raises(FledgeError, match="has changed since the run was planned"):
        fetch(found, tmp_path / "f")
    bucket.objects.delete()
    with pytest.raises(FledgeError, match="no file matches"):
        fetch(found, tmp_path / "f")
    assert not list((tmp_path / "f").rglob("*")) if (tmp_path / "f").exists() else True
    with pytest.raises(FledgeError, match="no file matches"):
        resolve("s3://corpus/raw/*.jsonl")
    with pytest.raises(FledgeError, match="s3://nobodys-bucket"):
        resolve("s3://nobodys-bucket/x*")


def test_what_is_fetched_already_is_not_fetched_again(bucket: Any, tmp_path: Path) -> None:
    found = resolve("s3://corpus/raw")
    first = fetch(found, tmp_path / "f")
    (tmp_path / "f/a.jsonl").write_bytes(b"mine")  # told apart from the object's
    (tmp_path / "f/deep/c.jsonl").unlink()
    assert fetch(found, tmp_path / "f") == first
    assert (tmp_path / "f/a.jsonl").read_bytes() == b"mine" and (tmp_path / "f/deep/c.jsonl").read_bytes() == row(
        "three"
    )
    bucket.objects.delete()
    assert fetch(found, tmp_path / "f") == first, "whole: nobody is asked"


def test_a_whole_run_from_a_bucket_is_planned_made_and_kept(bucket: Any, tmp_path: Path) -> None:
    store = Store(tmp_path / "home")
    values = {
        "name": "s3",
        "stages": {"corpus": {"use": "data.collect", "kind": "documents", "sources": ["s3://corpus/raw/*.jsonl"]}},
    }
    (path,) = RecipeRunner(make_plan(from_values(values), store), store).run().values()
    assert texts(path) == ["one", "two"]
    assert [step.status for step in make_plan(from_values(values), store).steps] == ["cached"]
    bucket.put_object(Key="raw/b.jsonl", Body=row("new"))
    assert [step.status for step in make_plan(from_values(values), store).steps] == ["make"]


# --- HTTP -----------------------------------------------------------------------------------------------------------


class Site:
    """A server of files by path; `answers` maps a path to (status, headers, body)."""

    def __init__(self) -> None:
        site = self
        self.answers: dict[str, tuple[int, dict[str, str], bytes]] = {}
        self.asked: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                site.asked.append(self.path)
                status, headers, body = site.answers.get(self.path, (404, {}, b""))
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("FLEDGE_ALLOW_PRIVATE", "1")
    site = Site()
    yield site
    site.server.shutdown()
    site.server.server_close()


def test_a_file_on_a_web_server_redirects_followed(site: Site, run: Runner) -> None:
    site.answers["/d.jsonl"] = (200, {"ETag": '"1"'}, row("one") + row("two"))
    site.answers["/old"] = (302, {"Location": "/d.jsonl"}, b"")
    url = f"{site.url}/d.jsonl?token=x"
    site.answers["/d.jsonl?token=x"] = site.answers["/d.jsonl"]
    assert texts(run(Collect(kind="documents", sources=[url]))) == ["one", "two"]
    assert resolve(url).files == ("d.jsonl",) and resolve(url).size == len(row("one") * 2)
    before = resolve(f"{site.url}/old").digest
    site.answers["/d.jsonl"] = (200, {"ETag": '"2"'}, row("new"))
    assert resolve(f"{site.url}/old").digest != before


def test_what_a_web_server_may_do_wrong(site: Site, tmp_path: Path) -> None:
    site.answers["/round"] = (301, {"Location": "/round"}, b"")
    site.answers["/file"] = (301, {"Location": "file:///etc/hostname"}, b"")
    site.answers["/short.txt"] = (200, {"Content-Length": "100"}, b"too short")
    for path, what in (("/round", "more than 5 redirects"), ("/none", "HTTP 404"), ("/file", "a redirect to file:")):
        with pytest.raises(FledgeError, match="cannot be fetched") as error:
            resolve(site.url + path)
        assert what in error.value.problems[0].found
    with pytest.raises(FledgeError, match="cannot be fetched"):
        fetch(resolve(f"{site.url}/short.txt"), tmp_path / "f")
    assert not [file for file in (tmp_path / "f").rglob("*") if file.is_file()], "no half of a file stays"
    site.server.shutdown()
    site.server.server_close()
    with pytest.raises(FledgeError, match="cannot be fetched"):
        resolve(f"{site.url}/d.jsonl")


def test_private_addresses_are_refused_unless_allowed(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.answers["/d.jsonl"] = (200, {}, row("secret"))
    monkeypatch.delenv("FLEDGE_ALLOW_PRIVATE")
    port = site.server.server_port
    for url in (
        f"{site.url}/d.jsonl", f"http://localhost:{port}/d.jsonl", f"http://[::1]:{port}/d.jsonl",
        f"http://2130706433:{port}/d.jsonl", "http://169.254.169.254/latest/meta-data",
    ):  # fmt: skip
        with pytest.raises(FledgeError, match="not on the public internet") as error:
            resolve(url)
        assert "FLEDGE_ALLOW_PRIVATE=1" in error.value.problems[0].fix
    assert site.asked == []


# --- other URLs -----------------------------------------------------------------------------------------------------


def test_file_urls_are_paths(tmp_path: Path, run: Runner) -> None:
    (tmp_path / "a b.jsonl").write_bytes(row("one"))
    url = f"file://{tmp_path}/a%20b.jsonl"
    assert not is_url(url) and resolve(url).digest == resolve(str(tmp_path / "a b.jsonl")).digest
    assert texts(run(Collect(kind="documents", sources=[url]))) == ["one"]


def test_a_file_system_of_fsspec_in_this_process(run: Runner) -> None:
    import fsspec

    system = fsspec.filesystem("memory")
    for name in ("/collect/x.jsonl", "/collect/y.jsonl"):
        system.pipe(name, row(name))
    made = run(Collect(kind="documents", sources=["memory://collect/*.jsonl"]))
    assert texts(made) == ["/collect/x.jsonl", "/collect/y.jsonl"]
    system.rm("/collect", recursive=True)


def test_a_url_where_an_artifact_is_wanted_says_to_collect_it(tmp_path: Path) -> None:
    import fsspec

    fsspec.filesystem("memory").pipe("/refine/x.jsonl", row("x"))
    values = {"name": "r", "stages": {"clean": {"use": "data.refine", "data": "memory://refine/x.jsonl"}}}
    with pytest.raises(FledgeError, match="a URL can only be a source") as error:
        from_values(values)
    assert "data.collect" in error.value.problems[0].fix


def test_an_unknown_kind_of_url_and_a_missing_client_are_named() -> None:
    with pytest.raises(FledgeError, match="no such kind of URL"):
        resolve("zzz://bucket/key")
    with pytest.raises(FledgeError, match="gcsfs is not installed"):
        resolve("gs://bucket/key")


def test_names_in_a_store_cannot_lead_out_of_the_work_folder(tmp_path: Path) -> None:
    from fledge.core.remote import _inside

    assert _inside("../../etc/passwd") == "etc/passwd" and _inside("a/./b//c") == "a/b/c"


# --- the Hub --------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that holds one data set, as the Hub's client leaves it."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository, revision = tmp_path / "hub/datasets--somebody--owls", "a" * 40
    snapshot = repository / "snapshots" / revision
    (snapshot / "data").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(revision)
    (snapshot / "README.md").write_text("---\nlicense: mit\n---\n# About the data")
    (snapshot / "data/train.jsonl").write_bytes(row("one") + row("two"))
    return snapshot


@pytest.mark.parametrize("name", ["somebody/owls", "datasets/somebody/owls", "somebody/owls@" + "a" * 40])
def test_a_data_set_of_the_hub_from_the_cache_alone(hub: Path, run: Runner, name: str) -> None:
    found = resolve(f"hub:{name}")
    assert found.path == hub and found.files == ("README.md", "data/train.jsonl")
    made = run(Collect(kind="documents", sources=[f"hub:{name}"]))
    assert texts(made) == ["one", "two"], "the data, not what is said of them"


def test_a_data_set_that_is_not_in_the_cache_is_named(hub: Path) -> None:
    with pytest.raises(FledgeError, match="nobody/nothing@main cannot be had from the Hub"):
        resolve("hub:nobody/nothing")


def test_what_is_behind_a_url_is_named_by_its_last_part() -> None:
    assert Outside("https://x.org/a/b.jsonl.gz?x=1", Path(), "").name == "b.jsonl.gz"
