"""Every sentence that a person sees exists in both languages and gets the values that it names."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from string import Formatter

import pytest

from tests.house.sources import SOURCE, modules, nodes, place

CATALOGUES = sorted((SOURCE / "core" / "locale" / "zh").glob("*.json"))
CHINESE = re.compile(r"[\u3400-\u9fff]")


def placeholders(sentence: str) -> set[str]:
    """{"path", "count"} for "Wrote {count:,} rows to {path}"."""
    return {re.split(r"[.\[]", name)[0] for _, name, _, _ in Formatter().parse(sentence) if name is not None}


def calls() -> Iterator[tuple[str, ast.Call]]:
    """Every call of `t(...)` or `language.t(...)` in the package with its place."""
    for file in modules():
        for node in nodes(file):
            if isinstance(node, ast.Call) and node.args:
                name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
                owner = getattr(getattr(node.func, "value", None), "id", "")
                if name == "t" and (isinstance(node.func, ast.Name) or owner == "language"):
                    yield place(file, node.lineno), node


def literal_calls() -> Iterator[tuple[str, str, ast.Call]]:
    """Of those, the ones whose sentence stands in the call."""
    for where, call in calls():
        if isinstance(call.args[0], ast.Constant) and isinstance(call.args[0].value, str):
            yield where, call.args[0].value, call


@pytest.fixture(scope="module")
def chinese() -> dict[str, str]:
    """The whole catalogue. Two floors may share a sentence only if they translate it alike."""
    sentences: dict[str, str] = {}
    for file in CATALOGUES:
        for key, value in json.loads(file.read_text(encoding="utf-8")).items():
            assert sentences.setdefault(key, value) == value, f"{file.name}: {key!r} is translated in two ways"
    return sentences


def test_every_sentence_has_a_translation(chinese: dict[str, str]) -> None:
    missing = sorted({f"{where}: {text!r}" for where, text, _ in literal_calls() if text not in chinese})
    assert not missing, "no Chinese for\n" + "\n".join(missing)


def test_a_sentence_is_never_put_together_before_it_is_looked_up() -> None:
    glued = [where for where, call in calls() if isinstance(call.args[0], (ast.JoinedStr, ast.BinOp))]
    assert not glued, "t() of an f-string or a sum finds no translation: " + ", ".join(glued)


def test_translations_name_the_same_values_and_are_chinese(chinese: dict[str, str]) -> None:
    wrong = [key for key, value in chinese.items() if placeholders(key) != placeholders(value)]
    assert not wrong, f"other placeholders than the English: {wrong}"
    words = {key: re.findall(r"[a-z]{3,}", re.sub(r"{.*?}", "", key)) for key in chinese}
    english = [key for key, value in chinese.items() if words[key] and not CHINESE.search(value)]
    assert not english, f"not translated: {english}"


def test_every_value_that_a_sentence_names_is_given() -> None:
    wrong = []
    for where, sentence, call in literal_calls():
        given = {keyword.arg for keyword in call.keywords} - {"lang"}
        if None not in given and given != placeholders(sentence):
            wrong.append(f"{where}: {sentence!r} is given {sorted(map(str, given))}")
    assert not wrong, "\n".join(wrong)


def test_no_translation_is_left_of_a_sentence_that_is_gone(chinese: dict[str, str]) -> None:
    texts = {n.value for f in modules() for n in nodes(f) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    pages = [file.read_text(encoding="utf-8") for file in SOURCE.rglob("*.html.jinja")]
    texts |= {text for page in pages for text in re.findall(r'\bsay\("([^"]*)"', page)}
    gone = sorted(set(chinese) - texts)
    assert not gone, f"no sentence of the package: {gone}"
