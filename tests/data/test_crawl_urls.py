"""Canonical URLs against the examples of RFC 3986, and what the crawler's guards see in a URL."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fledge.data.crawl.urls import BadURL, NotHTTP, canonical, patterns, repeats, split

RESOLVED = {  # RFC 3986 §5.4.1 and §5.4.2, with base http://a/b/c/d;p?q; fragments are dropped here
    "g": "http://a/b/c/g", "./g": "http://a/b/c/g", "g/": "http://a/b/c/g/", "/g": "http://a/g", "//g": "http://g/",
    "?y": "http://a/b/c/d;p?y", "g?y": "http://a/b/c/g?y", "#s": "http://a/b/c/d;p?q", "g#s": "http://a/b/c/g",
    "g?y#s": "http://a/b/c/g?y", ";x": "http://a/b/c/;x", "g;x": "http://a/b/c/g;x", "g;x?y#s": "http://a/b/c/g;x?y",
    "": "http://a/b/c/d;p?q", ".": "http://a/b/c/", "./": "http://a/b/c/", "..": "http://a/b/", "../": "http://a/b/",
    "../g": "http://a/b/g", "../..": "http://a/", "../../": "http://a/", "../../g": "http://a/g",
    "../../../g": "http://a/g", "../../../../g": "http://a/g", "/./g": "http://a/g", "/../g": "http://a/g",
    "g.": "http://a/b/c/g.", ".g": "http://a/b/c/.g", "g..": "http://a/b/c/g..", "..g": "http://a/b/c/..g",
    "./../g": "http://a/b/g", "./g/.": "http://a/b/c/g/", "g/./h": "http://a/b/c/g/h", "g/../h": "http://a/b/c/h",
    "g;x=1/./y": "http://a/b/c/g;x=1/y", "g;x=1/../y": "http://a/b/c/y", "g?y/./x": "http://a/b/c/g?y/./x",
    "g?y/../x": "http://a/b/c/g?y/../x", "g#s/./x": "http://a/b/c/g", "g#s/../x": "http://a/b/c/g",
}  # fmt: skip


@pytest.mark.parametrize("reference", RESOLVED)
def test_references_resolve_as_in_the_rfc(reference: str) -> None:
    assert canonical(reference, "http://a/b/c/d;p?q") == RESOLVED[reference]


@pytest.mark.parametrize(
    ("written", "wanted"),
    [
        ("HTTP://Example.ORG:80", "http://example.org/"),
        ("https://example.org:443/a", "https://example.org/a"),
        ("https://example.org:80/a", "https://example.org:80/a"),
        ("eXAMPLE://a/./b/../b/%63/%7bfoo%7d".replace("eXAMPLE", "hTTp"), "http://a/b/c/%7Bfoo%7D"),  # §6.2.2
        ("http://example.org/%7esmith/%2e%2e/x", "http://example.org/x"),
        ("http://example.org/a%2fb%zz é", "http://example.org/a%2Fb%25zz%20%C3%A9"),
        ("http://example.org//a//b/", "http://example.org//a//b/"),
        ("  http://exa\nmple.org/\ta#frag ", "http://example.org/a"),
        ("http:\\\\example.org\\a?b\\c", "http://example.org/a?b%5Cc"),
        ("http://例子.测试/路径?词=值", "http://xn--fsqu00a.xn--0zwm56d/%E8%B7%AF%E5%BE%84?%E8%AF%8D=%E5%80%BC"),
        ("http://BÜCHER.example./", "http://xn--bcher-kva.example/"),
        ("http://[2001:DB8:0:0::1]:8080/", "http://[2001:db8::1]:8080/"),
        ("http://example.org/?", "http://example.org/"),
        ("http://example.org/a;jsessionid=0A?id=7&PHPSESSID=x", "http://example.org/a?id=7"),
        ("http://example.org/(S(abc1))/b.aspx", "http://example.org/b.aspx"),
        ("http://example.org/?utm_source=a&UTM_Medium=b&id=1&fbclid=c&spm=d", "http://example.org/?id=1"),
        ("http://example.org/?b=2&a=1&&c", "http://example.org/?b=2&a=1&c"),
        ("http://example.org/?sid=1&session=morning&clock=2", "http://example.org/?sid=1&session=morning&clock=2"),
    ],
)
def test_one_page_has_one_spelling(written: str, wanted: str) -> None:
    assert canonical(written) == wanted
    assert canonical(wanted) == wanted


@pytest.mark.parametrize(
    ("written", "why"),
    [
        ("http://user:word@example.org/", "user name"),
        ("http:///path", "no host"),
        ("http://example.org:99999/", "ort"),
        ("http://a..b/", "not a host"),
        ("http://[zz]/", "not a URL"),
    ],
)
def test_what_is_no_address_says_why(written: str, why: str) -> None:
    with pytest.raises(BadURL, match=why):
        canonical(written)


@pytest.mark.parametrize("written", ["mailto:a@b.example", "javascript:void(0)", "ftp://a/b", "tel:1", "page.html"])
def test_other_schemes_are_told_apart(written: str) -> None:
    with pytest.raises(NotHTTP):
        canonical(written)


def test_the_query_is_sorted_only_when_asked_and_written_in_the_encoding_of_the_page() -> None:
    assert canonical("http://a/?b=2&a=1", sort_query=True) == "http://a/?a=1&b=2"
    assert canonical("/词?q=中文", "http://a/", encoding="gb18030") == "http://a/%E8%AF%8D?q=%D6%D0%CE%C4"


@given(st.text(alphabet="abZ09/.:?&=%2eé中#;@[]\\ ()-", max_size=40))
def test_canonical_is_its_own_canonical(tail: str) -> None:
    try:
        once = canonical(f"http://example.org/{tail}")
    except BadURL:
        return
    assert canonical(once) == once
    assert once.isascii() and "#" not in once and "/../" not in once.partition("?")[0]
    assert split(once).origin == "http://example.org"


def test_patterns_leave_numbers_and_ids_open() -> None:
    one, other = (set(patterns(f"http://a/day/{day}?view=list&d={day}")) for day in (7, 31))
    assert one == other == {"a/day/N?d&view", "a/day/N?*"}
    assert list(patterns("http://a/x/deadbeef0123/y")) == ["a/x/H/y"]
    assert list(patterns("http://a/decade/facade")) == ["a/decade/facade"]


def test_paths_that_repeat_are_seen() -> None:
    assert repeats("http://x/a/b/a/b/a/b/") == "a/b"
    assert repeats("http://x/en/docs/en/en/en/p") == "en"
    assert repeats("http://x/a/q/b/q/c/q/d/q") == "q"
    for fine in ("http://x/a/b/a/b", "http://x/11/11/11/11", "http://x/", "http://x/a/b/c?x=a/a/a/a"):
        assert repeats(fine) == ""
