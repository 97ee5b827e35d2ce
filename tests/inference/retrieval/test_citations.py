"""Citations and quotations in both scripts: found, checked, marked."""

from __future__ import annotations

import pytest

from fledge.inference.retrieval.citations import citations, claims, marked, quotes, without_marks
from fledge.inference.retrieval.reading import Passage

PASSAGES = [
    Passage("The boiler was built in 1987 and is repaired by the harbour workshop.", "guide.md"),
    Passage("差旅费在出差结束后十五天内报销，\n由财务部审核。", "handbook.md"),
]


@pytest.mark.parametrize(
    ("answer", "numbers"),
    [
        ("It is old [1].", [1]), ("It is old [1][2], and [3].", [1, 2, 3]), ("见［1］、【2】。", [1, 2]),
        ("all [1, 2; 4]", [1, 2, 4]), ("all [1-3]", [1, 2, 3]), ("都在〔1〕", []), ("list[0] = x[i]", [0]),
        ("由财务部审核[２]。", [2]), ("[1–999]", [1, 999]), ("nothing (1) cited", []), ("", []),
    ],
)  # fmt: skip
def test_numbers_are_found_in_every_spelling(answer: str, numbers: list[int]) -> None:
    found = citations(answer, 2)
    assert [citation.number for citation in found] == numbers
    assert [citation.exists for citation in found] == [1 <= number <= 2 for number in numbers]
    assert all(str(c.number) in answer[c.start : c.end] or "２" in answer or "-" in answer for c in found)


def test_a_number_that_no_passage_has_is_marked() -> None:
    assert marked("Old [1], new [3], both [1, 7].", 2) == "Old [1], new [3?], both [1, 7?]."
    assert marked("都有【1】和【9】。", 2) == "都有【1】和[9?]。"
    assert without_marks("Old [1], new[3]. 财务部 【2】。") == "Old, new. 财务部。"


def test_quotations_must_stand_in_what_they_cite() -> None:
    found = quotes(
        'He said "repaired by  the HARBOUR workshop" [1] and "repaired by robots" [1] and "built in 1987" [2].',
        PASSAGES,
    )
    assert [(q.cited, q.found, q.verified) for q in found] == [
        ((1,), (1,), True), ((1,), (), False), ((2,), (1,), False)
    ]  # fmt: skip
    chinese = quotes("手册写道：“十五天内报销，由财务部审核”[2]，还有「二十天内」。", PASSAGES)
    assert [q.verified for q in chinese] == [True, False]
    assert quotes('the letters "a" and "b", 所谓“书”', PASSAGES) == []  # words that are named
    assert quotes('uncited "is repaired by the harbour workshop."', PASSAGES)[0].verified


def test_claims_say_how_far_their_sources_bear_them_out() -> None:
    answer = "The boiler was built in 1987. [1] The workshop repairs it [1]. 财务部审核。【2】 猫爱鱼 [1]。 No source."
    found = claims(answer, PASSAGES)
    assert [claim.cited for claim in found] == [(1,), (1,), (2,), (1,), ()]
    assert found[0].support == 1.0 == found[2].support
    assert 0 < found[1].support < 1 and found[3].support == 0.0 == found[4].support
    assert claims("[1]", PASSAGES) == [] == claims("", PASSAGES)
