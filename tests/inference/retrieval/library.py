"""A small library in English and Chinese, a model of meaning that can be followed, and a reader that cannot cheat."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from fledge.core.errors import FledgeError
from fledge.inference.engine import Choice, Delta, PromptTooLong, Request, Result
from fledge.inference.retrieval.words import words

GUIDE = """# House guide

Welcome. This page is for whoever looks after the house.

## Boiler

The boiler stands in the cellar. It was built in 1987 and is repaired by the harbour workshop, whose number is 0170.

```
# not a heading
```

## Garden

The apple trees are pruned in February. Water the roses twice a week in summer.
"""
HANDBOOK = """# 员工手册

## 请假

员工请假须提前三天向部门主管提出申请。病假需要提交医院证明。

## 报销

差旅费在出差结束后十五天内报销，由财务部审核。
"""
LAW = """第一章 总则

第一条 为了保护图书馆的藏书，制定本规则。

第二章 借阅

第二条 每位读者每次最多借阅五本图书，期限为三十天。
"""
PAGE = (
    "<html><head><title>The lighthouse of Amrum</title></head><body><nav><a href=/>Home</a></nav><article>"
    "<h1>The lighthouse of Amrum</h1><p>The lighthouse of Amrum is sixty-three metres high and was lit for the first "
    "time on the first of January 1875. Its keepers lived in the house beside it for more than a century.</p>"
    "<p>Visitors climb two hundred and ninety-seven steps to the gallery, from which all islands can be seen.</p>"
    "</article></body></html>"
)
ROWS = [
    {"text": "The museum opens at ten and closes at six, on Thursdays at nine.", "id": "hours"},
    {"text": "博物馆每周一闭馆，门票二十元，学生半价。", "id": "票价", "meta": {"title": "博物馆"}},
]


def write(folder: Path) -> Path:
    """The library's files below `folder`."""
    (folder / "rules").mkdir(parents=True)
    (folder / "guide.md").write_text(GUIDE, encoding="utf-8")
    (folder / "handbook.md").write_text(HANDBOOK, encoding="utf-8")
    (folder / "rules" / "library.txt").write_text(LAW, encoding="utf-8")
    (folder / "lighthouse.html").write_text(PAGE, encoding="utf-8")
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    (folder / "museum.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


MEANINGS = (
    {"boiler", "heating", "锅炉"}, {"repair", "repaired", "fix"}, {"apple", "tree", "fruit"},
    {"prune", "pruned", "cut"},
    {"请假", "休假", "leave"}, {"报销", "差旅", "expense"}, {"图书", "借阅", "book", "borrow"},
    {"lighthouse", "tower", "灯塔"}, {"museum", "博物", "exhibition"}, {"rose", "water"},
)  # fmt: skip


class Meaning:
    """An embedding model whose dimensions are known: one for each set of synonyms, across languages."""

    context = 512

    def __init__(self) -> None:
        self.seen: list[str] = []

    def embed(self, texts: Sequence[str]) -> list[list[float]]:
        self.seen += texts
        return [[float(len(own & set(words(text)))) for own in MEANINGS] + [0.1] for text in texts]

    def encode(self, text: str) -> list[int]:
        return list(range(len(words(text))))


class Reader:
    """An engine that knows nothing but its prompt. It answers with the passage's sentence that shares most words with
    the question and cites it; without passages, or where no sentence shares two words, it does as it was told, or makes
    something up."""

    def __init__(self, context: int = 4096, chat: bool = True) -> None:
        self.context, self.chat = context, chat
        self.prompts: list[str] = []

    def count(self, request: Request) -> int:
        if request.messages is not None and not self.chat:
            raise FledgeError("no chat template")
        tokens = len(self._prompt(request))
        if tokens >= self.context:
            raise PromptTooLong("too long")
        return tokens

    def generate(self, requests: Sequence[Request]) -> list[Result]:
        return [self._result(request) for request in requests]

    def stream(self, request: Request) -> Iterator[Delta]:
        text = self._result(request).text
        yield from (Delta(letter, (ord(letter),)) for letter in text)

    def _prompt(self, request: Request) -> str:
        return request.messages[-1].content if request.messages else str(request.text)

    def _result(self, request: Request) -> Result:
        prompt = self._prompt(request)
        self.prompts.append(prompt)
        text = self._answer(prompt)
        return Result((Choice(text, tuple(map(ord, text)), "stop"),), len(prompt))

    def _answer(self, prompt: str) -> str:
        question = (re.findall(r"(?:Question: |问题：)(.*)", prompt) or [prompt])[-1]
        asked = set(words(question))
        best, score = "", 1
        passages = re.split(r"\n\n(?=\[\d+\] )|(?:Passages:|资料：)\n(?=\[1\] )", prompt)[1:]
        for passage in passages:
            number = re.match(r"\[(\d+)\]", passage)
            assert number
            body = passage.split("\n", 1)[1].split("\n\nQuestion: ")[0].split("\n\n问题：")[0]
            for sentence in re.findall(r"[^。.\n]+[。.]?", body):
                if (shared := len(asked & set(words(sentence)))) > score:
                    best, score = f"{sentence.strip()} [{number[1]}]", shared
        if best:
            return best
        told = re.search(r"(?:write only: |就只写：)(.*)", prompt)
        return told[1] if told else "42."
