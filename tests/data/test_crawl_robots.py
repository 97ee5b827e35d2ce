"""robots.txt by the examples of RFC 9309, and the marks of a page."""

from __future__ import annotations

import pytest

from fledge.data.crawl.robots import MOST_BYTES, Robots, marks_of, product_token

SIMPLE = """User-Agent: *
Disallow: *.gif$
Disallow: /example/
Allow: /publications/

User-Agent: foobot
Disallow:/
Allow:/example/page.html
Allow:/example/allowed.gif

User-Agent: barbot
User-Agent: bazbot
Disallow: /example/page.html

User-Agent: quxbot
"""  # RFC 9309 §5.1
LONGEST = """User-Agent: foobot
Allow: /example/page/
Disallow: /example/page/disallowed.gif
"""  # §5.2


@pytest.mark.parametrize(
    ("robot", "path", "allowed"),
    [
        ("foobot", "/example/page.html", True),
        ("foobot", "/example/allowed.gif", True),
        ("foobot", "/", False),
        ("foobot", "/publications/", False),
        ("barbot", "/example/page.html", False),
        ("barbot", "/example/other.gif", True),
        ("BazBot", "/example/page.html", False),
        ("quxbot", "/example/page.html", True),
        ("quxbot", "/a.gif", True),
        ("other", "/a.gif", False),
        ("other", "/a.gif?x", True),
        ("other", "/publications/", True),
        ("other", "/example/x", False),
        ("other", "/elsewhere", True),
    ],
)
def test_groups_of_the_simple_example(robot: str, path: str, allowed: bool) -> None:
    assert Robots(SIMPLE, robot).allows(f"https://www.example.com{path}") is allowed


def test_the_longest_match_wins() -> None:
    robots = Robots(LONGEST, "foobot")
    assert robots.allows("http://a/example/page/allowed.gif")
    assert not robots.allows("http://a/example/page/disallowed.gif")
    tie = Robots("User-agent: *\nDisallow: /page\nAllow: /page\n", "any")
    assert tie.allows("http://a/page")  # §2.2.2: where they are as long, allow


@pytest.mark.parametrize(
    ("rule", "path"),
    [
        ("/foo/bar?baz=quz", "/foo/bar?baz=quz"),
        ("/foo/bar?baz=https://foo.bar", "/foo/bar?baz=https%3A%2F%2Ffoo.bar"),
        ("/foo/bar/ツ", "/foo/bar/%E3%83%84"),
        ("/foo/bar/%E3%83%84", "/foo/bar/%E3%83%84"),
        ("/foo/bar/%62%61%7A", "/foo/bar/baz"),
    ],
)
def test_escapes_are_compared_as_in_the_table_of_the_rfc(rule: str, path: str) -> None:
    robots = Robots(f"User-agent: *\nDisallow: {rule}\n", "any")
    assert not robots.allows(f"http://a{path}")
    assert robots.allows("http://a/foo/else")


def test_special_characters() -> None:
    robots = Robots("User-agent: *\nDisallow: /path/file-with-a-%2A.html # a comment\nDisallow: /end$\n", "any")
    assert not robots.allows("http://a/path/file-with-a-*.html")
    assert robots.allows("http://a/path/file-with-a-b.html")
    assert not robots.allows("http://a/end") and robots.allows("http://a/ending")


def test_groups_for_one_robot_are_joined_and_its_own_replace_the_general_ones() -> None:
    robots = Robots("User-agent: a\nDisallow: /x\n\nUser-agent: *\nDisallow: /\n\nUser-agent: A\nDisallow: /y\n", "a")
    assert [robots.allows(f"http://h{path}") for path in ("/x", "/y", "/z")] == [False, False, True]


def test_pauses_and_sitemaps() -> None:
    text = "User-agent: *\nCrawl-delay: 2.5\nSitemap: http://h/s.xml\nSitemap: http://h/t.xml\nSitemap: http://h/s.xml"
    assert Robots(text, "any").delay == 2.5
    assert Robots(text, "any").sitemaps == ["http://h/s.xml", "http://h/t.xml"]
    assert Robots("User-agent: *\nRequest-rate: 1/10\n", "any").delay == 10
    assert Robots("User-agent: *\nCrawl-delay: soon\n", "any").delay == 0


def test_bytes_beyond_the_cap_are_not_read() -> None:
    body = b"\xef\xbb\xbfUser-agent: *\nDisallow: /a\n" + b"#" * MOST_BYTES + b"\nDisallow: /b\n"
    robots = Robots.of_bytes(body, "any")
    assert not robots.allows("http://h/a") and robots.allows("http://h/b")
    assert Robots.of_bytes(b"\xff\xfe\x00<html>not robots</html>", "any").allows("http://h/a")


def test_the_product_token_is_the_name_alone() -> None:
    assert product_token("fledge/1.0 (+https://example.org/bot)") == "fledge"
    assert product_token("My-Bot_x") == "My-Bot_x"


def test_marks_of_pages_and_headers() -> None:
    assert marks_of(["NOINDEX, follow"], [], "me") == ("noindex", False)
    assert marks_of(["none"], [], "me") == ("none", True)
    assert marks_of(["index,nofollow"], [], "me") == ("", True)
    assert marks_of([], [("X-Robots-Tag", "noindex")], "me") == ("noindex", False)
    assert marks_of([], [("x-robots-tag", "otherbot: noindex, nofollow")], "me") == ("", False)
    assert marks_of([], [("x-robots-tag", "Me: nofollow")], "me") == ("", True)
    assert marks_of([], [("TDM-Reservation", "1")], "me").refused == "tdm-reservation"
    assert marks_of(["max-snippet:5"], [("x-robots-tag", "unavailable_after: 2099-01-01")], "me") == ("", False)
