"""Numbers as people write them."""

from __future__ import annotations

import pytest

from fledge.core.units import parse_bytes, parse_count, show_bytes, show_count, show_seconds


@pytest.mark.parametrize(
    ("text", "value"),
    [("200M", 200_000_000), ("3k", 3_000), ("1.5B", 1_500_000_000), ("1_000", 1_000), (7, 7), ("2 T", 2 * 10**12)],
)
def test_counts(text: object, value: int) -> None:
    assert parse_count(text) == value


@pytest.mark.parametrize(
    ("text", "value"), [("4GiB", 4 * 2**30), ("100kB", 100_000), ("1.5 MB", 1_500_000), (12, 12), ("64KiB", 65_536)]
)
def test_bytes(text: object, value: int) -> None:
    assert parse_bytes(text) == value


@pytest.mark.parametrize("text", ["many", "3 apples", "", "-3M", None, True, 1.5, "4GiB"])
def test_what_is_no_count_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="3M"):
        parse_count(text)


def test_what_is_shown() -> None:
    assert [show_count(v) for v in (0.5, 999, 1_000, 2_360_000, 7e9)] == ["0.5", "999", "1.0k", "2.4M", "7.0B"]
    assert [show_bytes(v) for v in (12, 4_000, 4.3e9)] == ["12 B", "4.0 kB", "4.3 GB"]
    assert [show_seconds(v) for v in (0.25, 59, 61, 272.4, 7_260)] == [
        "0.2 s",
        "59 s",
        "1 min 01 s",
        "4 min 32 s",
        "2 h 01 min",
    ]
