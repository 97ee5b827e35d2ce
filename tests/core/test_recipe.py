# ruff: noqa: E501
"""A recipe is checked whole: one error lists every problem with its file, line and key."""

from __future__ import annotations

from pathlib import Path

import pytest

from fledge.core.errors import FledgeError
from fledge.core.recipe import load

GOOD = """\
name: good
seed: 3
stages:
  words: {use: toy.words, count: 4}
  halves: {use: toy.halves, data: words}
  learn:
    use: toy.learn
    data: [halves.first, halves.second]
    train: {lr: 0.2}
"""


def problems(text: str, *settings: str) -> list[str]:
    """Every problem of a recipe as text."""
    Path("r.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(FledgeError) as caught:
        load(Path("r.yaml"), settings)
    return [str(problem) for problem in caught.value.problems]


def test_a_good_recipe_is_put_into_running_order() -> None:
    stages = GOOD.split("stages:\n")[1]
    backwards = "name: good\nstages:\n" + stages[stages.index("  learn") :] + stages[: stages.index("  learn")]
    Path("r.yaml").write_text(backwards, encoding="utf-8")
    recipe = load(Path("r.yaml"), ["words.count=7", "seed=9", "execution.threads=1"])
    assert [node.name for node in recipe.nodes] == ["words", "halves", "learn"]
    assert recipe.node("words").stage.count == 7  # type: ignore[attr-defined]
    assert {node.seed for node in recipe.nodes} == {9}
    assert recipe.node("learn").execution.threads == 1
    assert recipe.node("learn").parents == {"data.0": ("halves", "first"), "data.1": ("halves", "second")}


def test_every_problem_is_listed_at_once() -> None:
    text = (
        GOOD.replace("count: 4", "cuont: 4")
        .replace("lr: 0.2", "lr: -1, schedule: cosin")
        .replace("toy.halves", "toy.halvs")
    )
    found = problems(text)
    assert any(
        p.startswith('r.yaml:4 (stages.words.cuont): unknown key "cuont"') and 'did you mean "count"?' in p
        for p in found
    )
    assert any(p.startswith("r.yaml:5 (stages.halves.use)") and 'did you mean "toy.halves"?' in p for p in found)
    assert any(
        p.startswith("r.yaml:9 (stages.learn.train.lr)") and "must be greater than 0" in p and "found: -1" in p
        for p in found
    )
    assert any("stages.learn.train.schedule" in p and 'did you mean "cosine"?' in p for p in found)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("data: words", "data: wrods"), ["r.yaml:5 (stages.halves.data)", 'did you mean "words"?']),
        (("data: words", "data: learn"), ["in a circle", "halves → learn → halves"]),
        (("halves.second", "halves.third"), ["r.yaml:8", '"halves" has no output "third"', "halves.first, halves.second"]),
        (("train: {lr: 0.2}", "base: halves.first"), ['"halves.first" is a documents', "allowed: model"]),
        (("train: {lr: 0.2}", "base: missing/folder"), ["neither a stage of this recipe nor a file or folder"]),
        (("train: {lr: 0.2}", "fetch: [package:no-such-thing, nowhere.txt]"), ["no-such-thing is not installed", "nowhere.txt"]),
        (("  words:", "  words: {use: toy.words}\n  words:"), ['"words" stands twice']),
        (("name: good", "nmae: good"), ['unknown key "nmae"', 'did you mean "name"?', '"name" is missing']),
        (("count: 4", "count: 0"), ["stages.words.count", "greater than 0"]),
        (("count: 4", "count: many"), ["stages.words.count", "must be a whole number", "found: 'many'"]),
        (("stages:", "stages: ["), ["not valid YAML"]),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(change: tuple[str, str], expected: list[str]) -> None:
    found = "\n".join(problems(GOOD.replace(*change)))
    for words in expected:
        assert words in found


def test_a_folder_of_the_wrong_kind_is_refused() -> None:
    Path("data").mkdir()
    found = "\n".join(problems(GOOD.replace("train: {lr: 0.2}", "base: data/")))
    assert "is not a model folder" in found


def test_rules_between_fields_speak_of_their_line() -> None:
    Path("base").mkdir()
    Path("base/config.json").write_text("{}")
    found = problems(GOOD.replace("train: {lr: 0.2}", "base: base/\n    train: {lr: 2}"))
    assert found == ["r.yaml:10 (stages.learn.train.lr): a rate above 1 destroys the base"]


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("wrods.count=3", 'did you mean "words"?'),
        ("words.cuont=3", '--set stages.words.cuont: unknown key "cuont"'),
        ("words", "--set takes stage.key=value"),
        ("words.count.x=3", "has no keys below it"),
        ("learn.data.7=words", "has no such entry"),
    ],
)
def test_settings_are_checked_like_the_file(setting: str, expected: str) -> None:
    assert expected in "\n".join(problems(GOOD, setting))
