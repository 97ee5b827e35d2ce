"""The crawler against a site that this test serves on the loopback address, traps and all."""

from __future__ import annotations

import gzip
import json
import random
import shutil
import signal
import sqlite3
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from warcio.archiveiterator import ArchiveIterator

from fledge.core.addresses import RefusedAddress
from fledge.core.artifact import Artifact
from fledge.core.errors import FledgeError
from fledge.data.crawl import archive as archives
from fledge.data.crawl import crawl as crawling
from fledge.data.crawl import fetch
from fledge.data.crawl.archive import Archive, Spot
from fledge.data.crawl.scope import Scope
from fledge.data.crawl.stages import Crawl
from fledge.records.kinds import Document
from fledge.records.rejects import read_rejects
from fledge.records.shards import read
from tests.data.conftest import Runner, digests
from tests.data.crawl_site import Answer, Site, html, links, page, redirect, serve


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crawling, "FIRST_WAIT", 0.02)


def options(site: Site, *paths: str, **fields: Any) -> Crawl:
    """A crawl of the site: no pauses, loopback allowed."""
    return Crawl(
        **{"start": [site.url + path for path in paths or ("/",)], "delay": 0, "allow_private": True, "timeout": 5}
        | fields
    )


def pages(artifact: Artifact) -> dict[str, Document]:
    """Documents by path and query."""
    records = [record for record in read(artifact, "documents") if isinstance(record, Document)]
    return {record.meta["url"].split("/", 3)[3]: record for record in records}


def refusals(artifact: Artifact) -> dict[str, tuple[str, str]]:
    """(reason, value) by path and query; URLs of other hosts whole."""
    found = {}
    for row in read_rejects(artifact.path):
        url = row["row"].split("/", 3)
        name = url[3] if "127.0.0.1" in row["row"] and len(url) > 3 else row["row"]
        assert name not in found
        found[name] = (row["reason"], row["value"])
    return found


def answers(artifact: Artifact) -> list[tuple[str, str, bytes]]:
    """(type, URL, payload) of every record in the WARC files, its digests checked."""
    found = []
    for file in sorted((artifact.path / "warc").glob("*.warc.gz")):
        with file.open("rb") as stream:
            for record in ArchiveIterator(stream, check_digests="raise"):
                url = record.rec_headers.get_header("WARC-Target-URI") or ""
                found.append((record.rec_type, url, record.raw_stream.read()))
    return found


def endless(handler: BaseHTTPRequestHandler) -> None:
    """A page that never ends."""
    handler.send_response(200)
    handler.send_header("Content-Type", "text/html")
    handler.send_header("Connection", "close")
    handler.end_headers()
    handler.wfile.write(b"<html><body>")
    while True:
        handler.wfile.write(b"<p>and so on and on</p>" * 1000)


def dripping(handler: BaseHTTPRequestHandler) -> None:
    """A page that comes a byte at a time, each in time for a time-out of reading."""
    handler.send_response(200)
    handler.send_header("Content-Type", "text/html")
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    while True:
        handler.wfile.write(b"x")
        handler.wfile.flush()
        time.sleep(0.05)


def test_every_url_is_taken_or_refused_with_its_reason(run: Runner) -> None:
    chinese = "<meta charset=gbk><p>人民法院审理案件，应当以事实为根据，以法律为准绳。</p>"
    bomb = gzip.compress(b"<html>" + b"0" * 20_000_000)
    site = Site(
        {
            "/robots.txt": page(b"User-agent: *\nDisallow: /secret\nSitemap: /map.xml\n", "text/plain"),
            "/map.xml": page(b"<sitemapindex><sitemap><loc>/deep.xml.gz</loc></sitemap></sitemapindex>", "text/xml"),
            "/deep.xml.gz": page(
                gzip.compress(
                    b"<urlset><url><loc>/listed</loc><lastmod>2026-05-01</lastmod></url>"
                    b"<url><loc>/stale</loc><lastmod>2019</lastmod></url></urlset>"
                ),
                "application/gzip",
            ),
            "/listed": page(html("only the sitemap knows")),
            "/": page(
                html(
                    "".join(
                        f'<a href="{href}">x</a>'
                        for href in (
                            "/plain?utm_source=a",
                            "/plain#part",
                            "/./plain",
                            "/secret/x",
                            "/noindex",
                            "/header",
                            "/moved",
                            "/loop1",
                            "/away",
                            "/hop/0",
                            "/into",
                            "/twin1",
                            "/twin2",
                            "/copy",
                            "/png",
                            "/octet",
                            "/words",
                            "/gbk",
                            "/long",
                            "/endless",
                            "/bomb",
                            "/missing",
                            "/file.zip",
                            "/empty",
                            "/a/b/a/b/a/b",
                            "/s;jsessionid=1",
                            "/s;jsessionid=2",
                            "http://other.example/",
                            "/br",
                            "http://[bad/",
                            "/broken",
                            "/tdm",
                            "/utf8",
                            "/half",
                        )
                    )
                    + '<a rel="nofollow" href="/paid">x</a>'
                )
            ),
            "/plain": page(html("plain")),
            "/noindex": page(html('<a href="/behind">x</a>', '<meta name="robots" content="noindex">')),
            "/behind": page(html("behind noindex")),
            "/header": page(html('<a href="/never">x</a>'), X_Robots_Tag="none"),
            "/moved": redirect("/target", 301),
            "/target": page(html("target")),
            "/loop1": redirect("/loop2"),
            "/loop2": redirect("/loop1"),
            "/away": redirect("http://other.example/x"),
            "/into": redirect("/secret/y"),
            "/twin1": page(html("the same")),
            "/twin2": page(html("the same")),
            "/copy": page(html("copy", '<link rel="canonical" href="/plain">')),
            "/png": page(b"\x89PNG\r\n\x1a\n" + b"\0" * 5000),
            "/octet": page(html("octet"), "application/octet-stream"),
            "/words": page("just words, 只有文字".encode(), "text/plain"),
            "/gbk": page(chinese.encode("gbk"), "text/html; charset=ISO-8859-1"),
            "/long": page(html("y" * 60_000)),
            "/endless": endless,
            "/bomb": page(bomb, Content_Encoding="gzip"),
            "/br": page(b"abc", Content_Encoding="br"),
            "/utf8": (301, {"Location": "/目标".encode().decode("latin-1"), "Content-Encoding": "br"}, b"odd"),
            "/%E7%9B%AE%E6%A0%87": page(html("a target in UTF-8")),
            "/half": page(gzip.compress(html("half of it"))[:-12], Content_Encoding="gzip"),
            "/broken": page(b"\x1f\x8bnot gzip", Content_Encoding="gzip"),
            "/empty": page(b"  \n"),
            "/s": page(html("session")),
            "/tdm": page(html("reserved", '<meta name="tdm-reservation" content="1">')),
        },
        lambda path, host: (
            redirect(f"/hop/{int(path[5:]) + 1}") if path.startswith("/hop/") else page(b"no such page", status=404)
        ),
    )
    with serve(site):
        out = run(options(site, max_page_bytes=50_000, since="2026-01-01", retries=1))
    kept, refused = pages(out), refusals(out)
    target = "%E7%9B%AE%E6%A0%87"
    assert set(kept) == {"", "plain", "behind", "target", "twin1", "octet", "words", "gbk", "s", "listed", target}
    assert "审理案件" in kept["gbk"].text and kept["gbk"].meta["encoding"] == "gb18030"
    assert kept["words"].meta["format"] == "text" and kept["octet"].meta["format"] == "html"
    assert kept["listed"].meta["lastmod"] == "2026-05-01" and kept["listed"].meta["depth"] == "1"
    assert kept[""].source == "127.0.0.1" and kept[""].meta["content_type"] == "text/html; charset=utf-8"
    url = site.url
    wanted = {
        "secret/x": ("robots.txt forbids it", ""), "secret/y": ("robots.txt forbids it", ""),
        "noindex": ("the page asks not to be kept", "noindex"), "header": ("the page asks not to be kept", "none"),
        "tdm": ("the page asks not to be kept", "tdm-reservation"),
        "moved": ("redirects elsewhere", f"{url}/target"), "into": ("redirects elsewhere", f"{url}/secret/y"),
        "loop1": ("redirects elsewhere", f"{url}/loop2"), "loop2": ("redirect loop", f"{url}/loop1"),
        "utf8": ("redirects elsewhere", f"{url}/{target}"), "half": ("cannot be unpacked", "it ends too early"),
        "away": ("redirects elsewhere", "http://other.example/x"),
        "http://other.example/x": ("not a host of this crawl", "other.example"),
        "http://other.example/": ("not a host of this crawl", "other.example"),
        "hop/10": ("too many redirects", f"{url}/hop/11"),
        "twin2": ("the same bytes as another page", f"{url}/twin1"),
        "copy": ("another page is its canonical one", f"{url}/plain"),
        "png": ("not a page", "image/png"), "missing": ("HTTP 404", "Not Found"), "empty": ("an empty page", ""),
        "long": ("too large", "> 50000 bytes"), "endless": ("too large", "> 50000 bytes"),
        "bomb": ("too large", "> 50000 bytes"), "br": ("packed in a way not asked for", "br"),
        "file.zip": ("not a page by its name", ".zip"), "a/b/a/b/a/b": ("its path repeats itself", "a/b"),
        "paid": ("rel=nofollow", ""), "stale": ("not changed since", "2019"),
        "map.xml": ("a sitemap", "1"), "deep.xml.gz": ("a sitemap", "2"),
        **{f"hop/{n}": ("redirects elsewhere", f"{url}/hop/{n + 1}") for n in range(10)},
    }  # fmt: skip
    assert {name: refused.get(name) for name in wanted} == wanted
    assert refused["broken"][0] == "cannot be unpacked"
    assert refused["http://[bad/"][0].startswith("not the address of a page")
    assert set(refused) == {*wanted, "broken", "http://[bad/"}
    assert not any(path.startswith(("/secret", "/paid", "/never", "/file")) for path in site.asked)
    assert {path for path, times in site.asked.items() if times > 1} == {"/half"}
    assert out.metrics["asked"] == len(site.asked) - 3  # robots.txt and two sitemaps
    assert out.metrics["rows"] == 11 and out.metrics["warc_files"] == 1
    archived = [url.removeprefix(site.url) for kind, url, _ in answers(out) if kind == "response"]
    unread = {"/half", "/png", "/long", "/endless", "/bomb", "/br", "/broken"}
    assert sorted(archived) == sorted(set(site.asked) - unread)
    by_url = {url: body for kind, url, body in answers(out) if kind == "response"}
    assert by_url[f"{url}/gbk"] == chinese.encode("gbk")


def test_a_calendar_without_end_is_left_after_a_while(run: Runner) -> None:
    def calendar(path: str, host: str) -> Answer:
        day = int(path.split("/")[2]) if path.startswith("/day/") else 0
        return page(links(f"/day/{day + 1}/", f"/day/{day + 2}/", f"/day/{day}/?view={day}", "/about", text=path))

    site = Site(fallback=calendar)
    with serve(site):
        out = run(options(site, depth=1000, per_pattern=20, sitemaps=False))
    assert sum(path.startswith("/day/") for path in site.asked) <= 40  # days, and days with a query
    assert "about" in pages(out)
    reasons = Counter(reason for reason, _ in refusals(out).values())
    assert reasons["too many URLs of one pattern"] >= 2


def test_sitemaps_without_end_stop_with_the_budget(run: Runner) -> None:
    def more(path: str, host: str) -> Answer:
        number = int(path[4:-4]) if path.startswith("/map") else 0
        if path.endswith(".xml"):
            inner = f"<sitemap><loc>/map{number + 1}.xml</loc></sitemap>"
            urls = "".join(f"<url><loc>/p/{number}/{n}</loc></url>" for n in range(5))
            return page(f"<sitemapindex>{inner}{urls}</sitemapindex>".encode(), "text/xml")
        return page(html(path))

    site = Site({"/robots.txt": page(b"Sitemap: /map0.xml\n", "text/plain")}, more)
    with serve(site):
        out = run(options(site, pages=12, per_pattern=3))
    assert sum("map" in path for path in site.asked) <= 4
    assert out.metrics["asked"] == out.metrics["rows"] == 12  # what a sitemap lists is no trap of patterns
    assert "the budget of pages is spent" in {reason for reason, _ in refusals(out).values()}


def test_a_page_that_drips_is_given_up(run: Runner) -> None:
    site = Site({"/": page(links("/slow", "/fine")), "/slow": dripping, "/fine": page(html("fine"))})
    started = time.monotonic()
    with serve(site):
        out = run(options(site, timeout=0.8, retries=1))
    assert refusals(out)["slow"] == ("no whole answer in time", "0.8 s")
    assert "fine" in pages(out) and site.asked["/slow"] == 2
    assert time.monotonic() - started < 10


def test_errors_that_pass_are_tried_again_and_pauses_that_are_asked_for_granted(run: Runner) -> None:
    tries: Counter[str] = Counter()

    def flaky(handler: BaseHTTPRequestHandler) -> Answer:
        tries["flaky"] += 1
        return page(html("at last")) if tries["flaky"] > 2 else page(b"", status=502)

    def busy(handler: BaseHTTPRequestHandler) -> Answer:
        tries["busy"] += 1
        return page(html("free")) if tries["busy"] > 1 else page(b"", status=429, Retry_After="1")

    def cut(handler: BaseHTTPRequestHandler) -> None:
        tries["cut"] += 1
        handler.send_response(200)
        handler.send_header("Content-Length", "500")
        handler.end_headers()
        handler.wfile.write(b"<html>cut")

    site = Site(
        {
            "/": page(links("/flaky", "/busy", "/gone", "/tomorrow", "/cut", "/after")), "/flaky": flaky,
            "/busy": busy, "/gone": page(b"", status=500), "/after": page(html("after")),
            "/tomorrow": page(b"", status=503, Retry_After="86400"), "/cut": cut,
        }
    )  # fmt: skip
    with serve(site):
        out = run(options(site, retries=2))
    assert {"flaky", "busy", "after"} <= set(pages(out))
    refused = refusals(out)
    assert refused["gone"] == ("HTTP 500", "Internal Server Error") and site.asked["/gone"] == 3
    assert refused["tomorrow"] == ("HTTP 503", "Retry-After: 86400") and site.asked["/tomorrow"] == 1
    assert refused["cut"][0] == "the connection failed" and tries["cut"] == 3
    times = [at for _, at in site.times]
    busy_at = next(at for path, at in site.times if path == "/busy")
    assert min(at for at in times if at > busy_at) - busy_at >= 0.98  # the host, not the page alone, is left alone


@pytest.mark.parametrize(
    ("answer", "closed"),
    [
        (page(b"", status=404), ""),
        (page(b"", status=403), ""),
        (page(b"", status=500), "robots.txt cannot be had: HTTP 500"),
        (page(b"", status=429), "robots.txt cannot be had: HTTP 429"),
        (redirect("/other-robots"), "robots.txt forbids it: "),
        (redirect("/robots.txt"), ""),  # more than five redirects: as good as not there
        (page(b"User-agent: *\nCrawl-delay: 500", "text/plain"), "robots.txt asks for too long a pause: 500 s"),
        (page(b"User-agent: fledge\nDisallow: /\n\nUser-agent: *\nAllow: /"), "robots.txt forbids it: "),
        (page(b"User-agent: fledge-other\nDisallow: /"), ""),
    ],
)
def test_what_a_missing_broken_or_strict_robots_txt_means(run: Runner, answer: Answer, closed: str) -> None:
    forbids = page(b"User-agent: *\nDisallow: /", "application/octet-stream")
    site = Site({"/robots.txt": answer, "/other-robots": forbids, "/": page(html("open"))})
    with serve(site):
        stage = options(site, sitemaps=False, retries=1)
        if not closed:
            assert set(pages(run(stage))) == {""}
            return
        with pytest.raises(FledgeError, match="brought no page"):
            run(stage, work="closed")
        assert site.asked["/"] == 0
        assert set(pages(run(stage.model_copy(update={"obey_robots": False})))) == {""}
        assert closed.partition(": ")[0] in _reasons(run, stage)


def _reasons(run: Runner, stage: Crawl) -> str:
    with pytest.raises(FledgeError) as error:
        run(stage)
    return str(error.value)


def test_one_request_at_a_time_to_a_host_with_its_pause_and_hosts_side_by_side(run: Runner) -> None:
    now, most = Counter[str](), Counter[str]()
    lock = threading.Lock()

    def slow(handler: BaseHTTPRequestHandler) -> Answer:
        host = handler.headers["Host"].partition(":")[0]
        with lock:
            now[host] += 1
            now["all"] += 1
            for key in (host, "all"):
                most[key] = max(most[key], now[key])
        time.sleep(0.05)
        with lock:
            now[host] -= 1
            now["all"] -= 1
        return page(links(*(f"/{n}" for n in range(8)), text=handler.headers["Host"] + handler.path))

    delay = page(b"User-agent: *\nCrawl-delay: 0.15", "text/plain")
    site = Site({f"/{n}": slow for n in range(8)} | {"/": slow, "/robots.txt": delay})
    with serve(site):
        out = run(options(site, start=[f"{site.url}/", f"http://localhost:{site.port}/"], sitemaps=False))
    assert out.metrics["rows_by_host"] == {"127.0.0.1": 9, "localhost": 9}
    assert most["127.0.0.1"] == most["localhost"] == 1 and most["all"] == 2
    by_host: dict[str, list[float]] = {}
    for headers, (_, at) in zip(site.headers, site.times, strict=True):
        by_host.setdefault(headers["Host"], []).append(at)
    for times in by_host.values():  # 0.15 s from the end of an answer that took 0.05 s; robots.txt itself took none
        assert min(b - a for a, b in pairwise(times[1:])) >= 0.19


def test_private_addresses_are_refused_unless_allowed_at_every_hop(
    run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = Site({"/": page(links("/jump")), "/inner": page(html("inner"))})
    with serve(site):
        site.pages["/jump"] = redirect(f"http://localhost:{site.port}/inner")
        with pytest.raises(FledgeError, match=r"brought no page\n.*a private address"):
            run(options(site, allow_private=False))
        assert not site.asked

        def outside(host: str, allow: bool) -> list[str]:  # 127.0.0.1 plays a public host, localhost a private one
            if host == "localhost":
                raise RefusedAddress("inside")
            return [host]

        monkeypatch.setattr(fetch, "refuse_private", outside)
        out = run(options(site, allow_private=False, allow_hosts=["localhost"]))
    assert refusals(out)[f"http://localhost:{site.port}/inner"][0] == "a private address"
    assert site.asked["/inner"] == 0


def test_a_certificate_is_checked_for_the_name_though_an_address_is_connected_to(
    run: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl, which makes the certificate of this test, is not installed")
    make = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    subprocess.run([*make.split(), "-keyout", "key.pem", "-out", "cert.pem"], cwd=tmp_path, check=True, stderr=-3)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    with serve(Site({"/": page(html("secret no more"))}), tls) as site:
        starts = [f"https://localhost:{site.port}/", f"https://127.0.0.1:{site.port}/"]
        with pytest.raises(FledgeError, match=r"no secure connection \(2\)"):
            run(options(site, start=starts, sitemaps=False))
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
        out = run(options(site, start=starts, sitemaps=False))
    assert [record.source for record in pages(out).values()] == ["localhost"]
    assert refusals(out)[""][0] == "no secure connection"


def test_the_crawl_begins_anew_where_nothing_came(run: Runner) -> None:
    site = Site({"/": page(b"", status=404)})
    with serve(site):
        with pytest.raises(FledgeError, match="HTTP 404"):
            run(options(site), work="same")
        site.pages["/"] = page(html("now it is there"))
        assert set(pages(run(options(site), work="same"))) == {""}


def test_a_host_that_is_silent_is_left_alone(run: Runner) -> None:
    def hang_up(handler: BaseHTTPRequestHandler) -> None:
        handler.connection.close()

    site = Site({"/": page(links(*(f"/{n}" for n in range(10))))} | {f"/{n}": hang_up for n in range(10)})
    with serve(site):
        out = run(options(site, retries=1, sitemaps=False))
    reasons = [refusals(out)[str(n)][0] for n in range(10)]
    assert reasons == ["the connection failed"] * 5 + ["the host does not answer"] * 5
    assert [site.asked[f"/{n}"] for n in range(10)] == [2] * 5 + [0] * 5


def test_cookies_are_not_kept_and_the_crawler_says_who_it_is(run: Runner) -> None:
    site = Site({"/": page(links("/next"), Set_Cookie="id=1; Path=/"), "/next": page(html("next"))})
    with serve(site):
        run(options(site, user_agent="testbot/1.0 (+https://example.org/bot)"))
    assert len(site.headers) >= 3
    assert all("Cookie" not in headers for headers in site.headers)
    assert {headers["User-Agent"] for headers in site.headers} == {"testbot/1.0 (+https://example.org/bot)"}


def wood(seed: int, size: int) -> Site:
    """Pages that link to one another at random, some slow, some missing, some twice the same."""
    rng = random.Random(seed)
    targets = {n: [rng.randrange(size) for _ in range(6)] for n in range(size)}
    pause = {n: rng.choice((0.0, 0.0, 0.002, 0.01)) for n in range(size)}

    def answer(path: str, host: str) -> Answer:
        if not path.startswith("/p/"):
            return page(b"", status=404)
        number = int(path[3:])
        time.sleep(pause[number])
        if number % 17 == 3:
            return page(b"", status=410)
        if number % 19 == 5:
            return redirect(f"/p/{targets[number][0]}")
        return page(links(*(f"/p/{n}" for n in targets[number]), text=f"{host} {number if number % 13 else 0}"))

    return Site(fallback=answer)


def both_hosts(site: Site) -> list[str]:
    return [f"{site.url}/p/1", f"http://localhost:{site.port}/p/1"]


def payload(artifact: Artifact) -> dict[str, str]:
    return {name: digest for name, digest in digests(artifact.path).items() if not name.startswith("warc/")}


@pytest.mark.parametrize("budget", [{}, {"pages": 60}, {"bytes": 8_000}])
def test_the_records_do_not_depend_on_the_order_of_the_answers(run: Runner, budget: dict[str, int]) -> None:
    with serve(wood(1, 80)) as site:
        first = run(options(site, start=both_hosts(site), depth=8, **budget, concurrency=1))
        again = run(options(site, start=both_hosts(site), depth=8, **budget, concurrency=8))
    assert payload(first) == payload(again) and first.metrics == again.metrics
    assert first.metrics["rows"] >= 20
    if "pages" in budget:
        assert first.metrics["asked"] == 60
    if "bytes" in budget:
        assert 8_000 <= first.metrics["downloaded_bytes"] < 12_000  # a batch of 16 small pages too many at most


CHILD = """
import resource, signal, sys
from pathlib import Path
from fledge.core.events import Emitter
from fledge.data.crawl.crawl import crawl
from fledge.data.crawl.stages import Crawl
options, work, out, most = sys.argv[1:]
if int(most):  # no file may grow beyond so many bytes, as on a full disk
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(most), int(most)))
crawl(Crawl.model_validate_json(options), 7, Path(work), Path(out), Emitter("crawl", 0, lambda event: None))
"""


def finished(work: Path) -> Iterator[str]:
    """The URLs whose answers the frontier holds."""
    file = work / "frontier.db"
    if file.exists():
        database = sqlite3.connect(f"file:{file}?mode=ro", uri=True)
        yield from (url for (url,) in database.execute("SELECT url FROM urls WHERE asked = 1"))
        database.close()


def test_killed_again_and_again_it_asks_for_nothing_twice_and_loses_nothing(run: Runner, tmp_path: Path) -> None:
    work, kills = tmp_path / "work", 0
    work.mkdir()
    with serve(wood(2, 150)) as site:
        stage = options(site, start=both_hosts(site), depth=20, delay=0.004)
        whole = run(stage, seed=0)
        site.urls.clear()
        command = [sys.executable, "-c", CHILD, json.dumps(stage.config_values()), str(work)]
        settled: dict[str, int] = {}
        while True:
            child = subprocess.Popen([*command, str(tmp_path / f"out{kills}"), "0"])
            goal = site.urls.total() + 30 + 5 * kills
            while child.poll() is None and (kills >= 4 or site.urls.total() < goal):
                time.sleep(0.001)
            if child.poll() is not None:
                break
            child.send_signal(signal.SIGKILL)
            child.wait()
            kills += 1
            time.sleep(0.05)  # what was on its way to the server has been counted
            settled |= {url: site.urls[url] for url in finished(work) if url not in settled}
    assert child.returncode == 0 and kills == 4
    out = Artifact(tmp_path / f"out{kills}")
    assert payload(out) == payload(whole)
    assert len(settled) > 50
    assert {url: site.urls[url] for url in settled} == settled  # no answer that was held was asked for again
    assert site.urls.total() - len(site.urls) <= 2 * kills  # two requests, one a host, may be under way at a kill
    archived = Counter(url for kind, url, _ in answers(out) if kind == "response")
    assert set(archived.values()) == {1} and set(archived) == {u for k, u, _ in answers(whole) if k == "response"}


def test_a_full_disk_is_said_and_the_crawl_goes_on_when_there_is_room(run: Runner, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    with serve(wood(3, 60)) as site:
        stage = options(site, start=[f"{site.url}/p/1"], depth=20)
        whole = run(stage)
        command = [sys.executable, "-c", CHILD, json.dumps(stage.config_values()), str(work), str(tmp_path / "out")]
        for most in ("20000", "200000"):
            full = subprocess.run([*command, most], capture_output=True, text=True)
            assert full.returncode == 1
            assert "FledgeError: the crawl cannot write its files\n  found: " in full.stderr
        again = subprocess.run([*command, "0"], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert payload(Artifact(tmp_path / "out")) == payload(whole)
    archived = [url for kind, url, _ in answers(Artifact(tmp_path / "out")) if kind == "response"]
    assert sorted(archived) == sorted(url for kind, url, _ in answers(whole) if kind == "response")


def test_scopes() -> None:
    scope = Scope(["Example.org", "*.wild.example"], 2, ["/docs/"], [r"\?print"], "2026-01-01")
    for url, reason in {
        "http://example.org/docs/a": "", "https://www.example.org/docs/a": "", "http://wild.example/docs/": "",
        "http://a.b.wild.example/docs/": "", "http://tamewild.example/docs/": "not a host of this crawl",
        "http://sub.example.org/docs/": "not a host of this crawl", "http://example.org/blog": "not included",
        "http://example.org/docs/?print": "excluded", "http://example.org/docs/x.PDF?a": "not a page by its name",
        "http://example.org/docs/" + "x" * 2000: "the URL is too long",
        "http://example.org/docs/" + "/".join(map(str, range(60))): "its path is too deep",
    }.items():  # fmt: skip
        assert scope.refusal(url, 2)[0] == reason
    assert scope.refusal("http://example.org/docs/a", 3) == ("too deep", "3")
    assert scope.refusal("http://example.org/docs/a", 1, lastmod="2025-12-31")[0] == "not changed since"
    assert scope.refusal("http://example.org/map.xml", 2, "sitemap")[0] == "too deep"


def test_a_config_is_checked_before_anything_is_asked() -> None:
    wrong = Crawl(start=["ftp://a/", "no url"], include=["("], since="yesterday", user_agent="机器人")
    assert len(list(wrong.check())) == 5
    hosts = ["https://a.example", "a.example:81", "a.example/x", "a b", "*.例子.测试", "WWW.a.example"]
    assert [p.found for p in Crawl(start=["http://a/"], allow_hosts=hosts).check()] == hosts[:4]
    assert not list(Crawl(start=["http://例子.测试/"], since="2026-11").check())
    estimate = Crawl(start=["http://a.example/"], pages=100).estimate({}, None)
    assert 25 <= estimate.seconds[0] <= 130 <= estimate.seconds[1]


def test_the_archive_is_cut_back_to_what_was_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    response = fetch.Response(
        "http://a.example/x", 200, "OK", "HTTP/1.1", [("Content-Type", "text/html"), ("Transfer-Encoding", "chunked")],
        b"body one", b"body one", [("Host", "a.example")], "192.0.2.1", datetime(2026, 1, 1, tzinfo=UTC),
    )  # fmt: skip
    archive = Archive(tmp_path, Spot(0, 0), {"software": "test"})
    first = archive.add(response)
    committed = archive.end
    archive.add(replace(response, wire=b"lost", body=b"lost"))
    archive.close()
    archive = Archive(tmp_path, committed, {"software": "test"})
    second = archive.add(replace(response, wire=b"body two", body=b"body two"))
    assert (archive.read(first), archive.read(second)) == (b"body one", b"body two")
    monkeypatch.setattr(archives, "FILE_BYTES", 100)
    third = archive.add(replace(response, wire=b"body three", body=b"body three"))
    archive.close()
    assert (third.file, archive.read(third)) == (1, b"body three")
    assert archive.deliver(tmp_path / "warc") == 2
    bodies = [body for kind, _, body in answers(Artifact(tmp_path)) if kind == "response"]
    assert bodies == [b"body one", b"body two", b"body three"]
