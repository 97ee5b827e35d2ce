"""Answers from passages (Lewis et al., 2020): found, numbered, put before the model; cited, the citations checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from fledge.core.errors import FledgeError, Problem
from fledge.core.language import t
from fledge.inference.engine import Engine, PromptTooLong, Request
from fledge.inference.retrieval.citations import Citation, Claim, Quote, citations, claims, marked, quotes
from fledge.inference.retrieval.reading import Passage
from fledge.inference.retrieval.wording import abstains, wording_for
from fledge.records.kinds import Message


class Searches(Protocol):
    """Whatever finds passages: a `Retriever`, or a search engine of your own."""

    def search(self, query: str, k: int = 4) -> list[Passage]:
        """The k best passages, best first."""


@dataclass(frozen=True)
class Answer:
    """An answer and what it stands on. `text` is the model's own; `shown` has a mark at numbers that do not exist."""

    question: str
    text: str
    passages: tuple[Passage, ...] = ()
    """those that the model was given, [1] first"""
    prompt_tokens: int = 0
    new_tokens: int = 0
    asked: bool = True
    """False where no passage was found, so that the model was not asked at all"""

    @cached_property
    def citations(self) -> list[Citation]:
        """Every number that is cited, and whether it exists."""
        return citations(self.text, len(self.passages))

    @cached_property
    def quotes(self) -> list[Quote]:
        """Every quotation, and the passages in which it stands."""
        return quotes(self.text, self.passages)

    @cached_property
    def claims(self) -> list[Claim]:
        """Its sentences, what each cites, and how far the words of what it cites bear it out."""
        return claims(self.text, self.passages)

    @property
    def abstained(self) -> bool:
        """Whether it says that the answer is not in the sources."""
        return abstains(self.text)

    @property
    def shown(self) -> str:
        """The text with `[7?]` where a passage 7 does not exist."""
        return marked(self.text, len(self.passages)).strip()

    @property
    def sources(self) -> list[str]:
        """The passages that are cited, a line each: `[1] guide.md#L12-L18 Guide › Installing`."""
        cited = sorted({citation.number for citation in self.citations if citation.exists})
        rows = ((number, self.passages[number - 1]) for number in cited)
        return [f"[{number}] {passage.where} {passage.heading}".rstrip() for number, passage in rows]

    @property
    def problems(self) -> list[str]:
        """What is wrong with its citations and quotations, in the user's language."""
        missing = sorted({citation.number for citation in self.citations if not citation.exists})
        found = [t("there is no passage [{n}]", n=number) for number in missing]
        found += [t("not in the passages word for word: {quote}", quote=q.text) for q in self.quotes if not q.verified]
        if self.passages and not self.abstained and not any(citation.exists for citation in self.citations):
            found.append(t("the answer cites none of the passages"))
        return found


@dataclass
class RetrievalAugmented:
    """Answers questions from what a retriever finds.

        assistant = RetrievalAugmented(engine, Retriever.open("notes-index"))
        answer = assistant.answer("Who repairs the boiler?")
        print(answer.shown, *answer.sources, *answer.problems, sep="\\n")

    The prompt is in the language of the question. Passages are left out from the last one on until prompt and answer
    fit into the model's context. `abstain`: the model may say that the answer is not there, and where nothing at all is
    found that is the answer. A model with a chat template is asked as a chat, another one by plain text.
    """

    engine: Engine
    retriever: Searches
    k: int = 4
    abstain: bool = True
    max_new_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    _chat: bool | None = field(default=None, repr=False)

    def answer(self, question: str, listen: Callable[[str], Any] | None = None) -> Answer:
        """The answer to one question. `listen` hears its text piece by piece as it is written."""
        if listen is None:
            return self.answer_all([question])[0]
        request, passages = self.prepare(question)
        if request is None:
            listen(wording_for(question).nothing)
            return Answer(question, wording_for(question).nothing, asked=False)
        text, tokens = "", 0
        for delta in self.engine.stream(request):
            listen(delta.text)
            text, tokens = text + delta.text, tokens + len(delta.token_ids)
        return Answer(question, text.strip(), tuple(passages), self.engine.count(request), tokens)

    def answer_all(self, questions: Sequence[str]) -> list[Answer]:
        """The answers to several questions, written together. Raises the first request's error, if one has any."""
        prepared = [self.prepare(question) for question in questions]
        results = iter(self.engine.generate([request for request, _ in prepared if request is not None]))
        answers = []
        for question, (request, passages) in zip(questions, prepared, strict=True):
            if request is None:
                answers.append(Answer(question, wording_for(question).nothing, asked=False))
                continue
            result = next(results)
            choice = result.choice
            text = choice.text.strip()
            answers.append(Answer(question, text, tuple(passages), result.prompt_tokens, len(choice.token_ids)))
        return answers

    def closed_book(self, questions: Sequence[str]) -> list[Answer]:
        """The answers to the same questions without any passage: what the model knows by itself."""
        requests = [self._request(GroundedPrompt.of(question, (), self.abstain)) for question in questions]
        return [
            Answer(question, result.text.strip(), (), result.prompt_tokens, len(result.choice.token_ids))
            for question, result in zip(questions, self.engine.generate(requests), strict=True)
        ]

    def prepare(self, question: str) -> tuple[Request | None, list[Passage]]:
        """(what the model is asked, the passages in it); None where nothing was found and it may say so."""
        passages = self.retriever.search(question, self.k)
        if not passages and self.abstain:
            return None, []
        while True:
            request = self._request(GroundedPrompt.of(question, passages, self.abstain))
            if self._fits(request):
                return request, passages
            if not passages:
                raise PromptTooLong(
                    Problem(
                        t("the prompt is longer than the model's context"),
                        "prompt",
                        allowed=t("at most {n} tokens", n=self.engine.context - self._room),
                    )
                )
            passages = passages[:-1]

    @property
    def _room(self) -> int:
        """Tokens kept free for the answer: a small context is not for the answer alone."""
        return min(self.max_new_tokens, self.engine.context // 2)

    def _fits(self, request: Request) -> bool:
        try:
            return self.engine.count(request) + self._room <= self.engine.context
        except PromptTooLong:
            return False

    def _request(self, prompt: GroundedPrompt) -> Request:
        if self._chat is None:
            self._chat = chats(self.engine)
        return prompt.request(self._chat, max_new_tokens=self.max_new_tokens, temperature=self.temperature,
                              seed=self.seed, stop=self.stop)  # fmt: skip


@dataclass(frozen=True)
class GroundedPrompt:
    """What to do; the passages and the question; and the word behind which an answer in plain text begins."""

    instruction: str
    body: str
    cue: str

    @classmethod
    def of(cls, question: str, passages: Sequence[Passage], abstain: bool = True) -> GroundedPrompt:
        """In the question's language; without passages the question alone."""
        wording = wording_for(question)
        asked = wording.question.replace("{question}", question)
        if not passages:
            said = [wording.closed, *([wording.unknown] if abstain else [])]
        else:
            said = [wording.passages, wording.cite, *([wording.abstain] if abstain else [])]
            shown = "\n\n".join(numbered(number, passage) for number, passage in enumerate(passages, 1))
            asked = f"{wording.sources}\n{shown}\n\n{asked}"
        instruction = "\n".join(line.replace("{nothing}", wording.nothing) for line in said)
        return cls(instruction, asked, wording.answer)

    def request(self, chat: bool, **settings: Any) -> Request:
        """As one message of a user (not every template knows a system's), or as text to go on from."""
        if chat:
            return Request(messages=(Message("user", f"{self.instruction}\n\n{self.body}"),), **settings)
        return Request(text=f"{self.instruction}\n\n{self.body}\n{self.cue}", **settings)


def numbered(number: int, passage: Passage) -> str:
    """`[1] guide.md#L12-L18 (Guide › Installing)` and the text below it."""
    heading = f" ({passage.heading})" if passage.heading else ""
    return f"[{number}] {passage.where}{heading}\n{passage.text}"


def chats(engine: Engine) -> bool:
    """Whether the engine takes conversations: one without a chat template refuses them."""
    try:
        engine.count(Request(messages=(Message("user", "?"),)))
    except PromptTooLong:
        return True
    except FledgeError:
        return False
    return True
