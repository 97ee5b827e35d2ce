"""How many mistakes of spelling and grammar a text holds, as far as a reference corpus can tell.

Nothing is looked up in a dictionary: the words and characters that the reference corpus uses, with their counts, are
the n-gram model's vocabulary. The rules aim at few false alarms; what they count grows with the mistakes in a text
(the tests put known shares of mistakes into real sentences), but it is not all of them.

| kind | English | Chinese |
|---|---|---|
| word | an unknown word of 4 letters or more, in lower case, one edit (Damerau, 1964) from a frequent one | |
| character | | one of a group of look-alikes and homophones, where another of the group is e^margin times likelier |
| doubled | the the | 的的 |
| article | a apple, an house | |
| capital | no capital after a full stop, in a text that has them elsewhere | |
| punctuation | | half-width marks between Chinese characters in a text that has full-width ones |
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache

from fledge.data.judges.ngram_model import NGramModel, Stream
from fledge.data.ngrams import Words64, unit_hashes
from fledge.data.texts import HAN

_GROUPS = """
的地得 在再 做作 已以 己已 像象 那哪 坐座 帐账 侯候 拔拨
折拆 入人 即既 历厉 型形 须需 密蜜 辩辨 博搏 副幅 徒徙 晴睛
清请 日曰 未末 士土 戴带 代带 决绝 度渡 复覆 练炼 篇编 偏遍
瑞端 第弟 刻克 连联 粱梁 陪赔 培陪 辟僻 卷券 稍梢 申伸 受授
熟塾 拴栓 提题 往住 惟准 霄宵 协胁 性姓 暄喧 必心 于干 天夫
今令 竞竟 贷货 免兔 乌鸟 析折 治冶 予矛 持待 抄钞 查察 部布
记计 权全 实施 期其 事是 有又 和合 由有 及级 定订 立力 制治
法发
"""
CONFUSED = _GROUPS.split()
"""Groups of characters that are typed or read for one another: by sound, or by shape."""
_A, _AN = re.compile(r"\b[Aa] (?=[aeio][a-z]{2})(\w+)"), re.compile(r"\b[Aa]n (?=[bcdfgjklmnpqrstvwyz][a-z]{2})(\w+)")
_SOUNDS_LIKE_A_CONSONANT = re.compile(r"one|once|eu|ewe|oui")
_NO_ARTICLE = {"and", "are", "also", "into", "its", "about", "after", "all", "any", "each", "even", "ever", "our"}
_SPOKEN_LETTERS = re.compile(r"[^aeiouy]+$")
_TWICE = re.compile(
    r"\b(the|a|an|of|to|in|and|is|it|for|on|with|at|by|from|or|was|be|as|this|are|not|but|we)\s+\1\b", re.I
)
_NO_CAPITAL = re.compile(r"[a-z]{3,}[.?!] +(?!www|http)[a-z]{2,}(?![a-z]*[.@/])")
_CAPITAL = re.compile(r"[a-z]{3,}[.?!] +[A-Z]")
_ABBREVIATIONS = re.compile(
    r"\b(?:etc|vs|approx|dept|fig|figs|incl|excl|resp|est|ext|viz|vol|sec|art|arts|para|cf|eds)\. "
)
_WORD = re.compile(r"(?<![\w'’@./&#-])[a-z]{4,}(?![\w'’@/-]|\.\w)")
_TWICE_ZH = re.compile(
    r"的的(?!确)|(?<![一不])了了(?!之|解|[无于])|(?<!一)着着|(?<!自)得得|与与|和和(?!气|睦|美)|被被|把把(?!关)|在在|及及|或或|是是(?!非)"
)
_HALF = re.compile(rf"(?<=[{HAN}])(?:[,;:?!](?=\s*[{HAN}])|\.(?=\s*(?:[{HAN}]|$)))", re.MULTILINE)
_FULL = re.compile(r"[，；：？！。]")
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Speller:
    """Counts mistakes by what a reference model knows. `frequent` is how often a word stands in the reference that an
    unknown one is taken for; `margin` by how much (natural logarithm) another character must be likelier."""

    def __init__(self, model: NGramModel, frequent: int = 20, margin: float = 8.0) -> None:
        self.model, self.margin = model, margin
        self.known = model.vocabulary
        self.frequent = {w for w, n in self.known.items() if n >= frequent and len(w) >= 3 and w.isascii()}
        self.meant = lru_cache(maxsize=2**16)(self._meant)
        groups: dict[str, str] = {}
        for group in CONFUSED:
            for character in group:
                others = groups.get(character, "") + group.replace(character, "")
                groups[character] = "".join(c for c in dict.fromkeys(others) if c in self.known)
        self.others = {character: others for character, others in groups.items() if others}

    def count(
        self, texts: Sequence[str], words: Sequence[Sequence[str]], languages: Sequence[str]
    ) -> list[Counter[str]]:
        """Mistakes of each kind in every text (`words` are its units); none where the language is neither en nor zh."""
        found = [
            self.english(text) if language == "en" else chinese(text) if language == "zh" else Counter[str]()
            for text, language in zip(texts, languages, strict=True)
        ]
        rows = [row for row, language in enumerate(languages) if language == "zh"]
        for row, wrong in zip(rows, self.characters([words[row] for row in rows]), strict=True):
            found[row].update({"character": len(wrong)} if wrong else {})
        return found

    # English

    def english(self, text: str) -> Counter[str]:
        """Mistakes by kind."""
        found = Counter[str]()
        found["word"] = sum(self.meant(word) != "" for word in _WORD.findall(text))
        found["doubled"] = sum(1 for _ in _TWICE.finditer(text))
        found["article"] = sum(1 for _ in _articles(text))
        if _CAPITAL.search(text):
            plain = _ABBREVIATIONS.sub(" ", text)
            found["capital"] = sum(1 for _ in _NO_CAPITAL.finditer(plain))
        return +found

    def _meant(self, word: str) -> str:
        """The frequent word that an unknown one is probably meant to be; "" where it is known or nothing is near."""
        if word in self.known:
            return ""
        near = [other for other in one_edit(word) if other in self.frequent and not _same_word(word, other)]
        return max(near, key=lambda other: (self.known[other], other), default="")

    # Chinese

    def characters(self, texts: Sequence[Sequence[str]]) -> list[list[tuple[int, str]]]:
        """For each text (as units) the places of characters that are probably wrong, with the one that is meant."""
        reach = self.model.notes.order - 1
        places: list[tuple[int, int, str]] = []  # text, place, instead ("" is what stands there)
        windows: list[Words64] = []
        instead = {c: unit_hashes(list(others)) for c, others in self.others.items()}
        for row, units in enumerate(texts):
            hashes = unit_hashes(units)
            for at, unit in enumerate(units):
                if unit in self.others:
                    start = max(0, at - reach)
                    window = hashes[start : at + reach + 1]
                    places.append((row, at, ""))
                    windows.append(window)
                    for other, value in zip(self.others[unit], instead[unit], strict=True):
                        changed = window.copy()
                        changed[at - start] = value
                        places.append((row, at, other))
                        windows.append(changed)
        wrong: list[list[tuple[int, str]]] = [[] for _ in texts]
        stream = Stream.of(windows, marks=False)
        sums = stream.sums(self.model.logp(stream)).tolist()
        best, base = self.margin, 0.0
        for (row, at, other), score in zip(places, sums, strict=True):
            if not other:
                best, base = self.margin, score
            elif score - base > best:
                if wrong[row] and wrong[row][-1][0] == at:
                    wrong[row].pop()
                best = score - base
                wrong[row].append((at, other))
        return wrong


def one_edit(word: str) -> Iterator[str]:
    """Every string that one letter left out, put in, exchanged or swapped with its neighbour makes of a word."""
    for i in range(len(word) + 1):
        head, tail = word[:i], word[i:]
        if tail:
            yield head + tail[1:]
            yield from (head + letter + tail[1:] for letter in _LETTERS if letter != tail[0])
        if len(tail) > 1:
            yield head + tail[1] + tail[0] + tail[2:]
        yield from (head + letter + tail for letter in _LETTERS)


def _same_word(word: str, other: str) -> bool:
    """Whether the two differ by an ending (cats, baked, baker) or by the spelling of another country."""
    longer, shorter = (word, other) if len(word) > len(other) else (other, word)
    if longer[:-1] == shorter and longer[-1] in ("sdryn" if longer == word else "sd"):
        return True
    return _american(word) == _american(other)


def _american(word: str) -> str:
    for british, american in (
        ("our", "or"),
        ("is", "iz"),
        ("ys", "yz"),
        ("ll", "l"),
        ("ae", "e"),
        ("oe", "e"),
        ("nce", "nse"),
    ):
        word = word.replace(british, american)
    return re.sub("re$", "er", word)


def _articles(text: str) -> Iterator[str]:
    for match in _A.finditer(text):
        word = match[1].lower()
        if not _SOUNDS_LIKE_A_CONSONANT.match(word) and word not in _NO_ARTICLE:
            yield match[0]
    for match in _AN.finditer(text):
        if not _SPOKEN_LETTERS.match(match[1].lower()):
            yield match[0]


def chinese(text: str) -> Counter[str]:
    """Mistakes that need no model."""
    half = len(_HALF.findall(text))
    full = len(_FULL.findall(text)) if half else 0
    return +Counter({"doubled": len(_TWICE_ZH.findall(text)), "punctuation": min(half, full)})
