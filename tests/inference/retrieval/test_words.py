"""Words for search: folded and singular in English, segmented or in pairs in Chinese, nothing lost in between."""

from __future__ import annotations

import pytest

from fledge.inference.retrieval.words import pairs, resolve, singular, words


@pytest.mark.parametrize(
    ("word", "stem"),
    [("ponies", "pony"), ("houses", "house"), ("cats", "cat"), ("dies", "dy"), ("class", "class"), ("virus", "virus"),
     ("toes", "toes"), ("bus", "bus"), ("is", "is"), ("trees", "trees"), ("köpfes", "köpfes")],
)  # fmt: skip
def test_the_s_stemmer_follows_harman(word: str, stem: str) -> None:
    assert singular(word) == stem


def test_chinese_becomes_pairs_and_a_single_character_stays() -> None:
    assert pairs("图书馆") == ["图书", "书馆"]
    assert pairs("图") == ["图"]
    assert words("图书馆，书", "bigrams") == ["图书", "书馆", "书"]
    assert words("图书\n 馆\n\n书", "bigrams") == ["图书", "书馆", "书"]  # a hard line break says nothing


def test_full_width_case_and_both_scripts_in_one_sentence() -> None:
    assert words("ＧＰＴ-4 的 Layers 很多", "bigrams") == ["gpt", "4", "的", "layer", "很多"]


def test_jieba_cuts_words_and_leaves_other_scripts_to_pairs() -> None:
    found = words("南京市长江大桥", "jieba")
    assert {"南京市", "长江", "大桥", "长江大桥"} <= set(found)
    assert words("ひらがな", "jieba") == ["ひら", "らが", "がな"]
    assert words("", "jieba") == [] == words("。！ ?", "bigrams")
    assert resolve("auto") == "jieba" and resolve("bigrams") == "bigrams"
