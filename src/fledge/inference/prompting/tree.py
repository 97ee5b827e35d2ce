"""Tree of Thoughts: several next steps are thought of, judged, and the best ones followed, with ways back."""

from __future__ import annotations

import re
from collections import Counter
from typing import Literal, TypeAlias

from pydantic import Field

from fledge.inference.prompting.answers import Kind, extract, listed
from fledge.inference.prompting.base import Technique
from fledge.inference.prompting.program import Program
from fledge.inference.prompting.reasoning import ANSWER
from fledge.inference.prompting.talk import Ask, Question, Solution, Talk
from fledge.inference.prompting.wordings import say

State: TypeAlias = tuple[str, ...]
"""The thoughts so far."""

VALUES = {"sure": 20.0, "likely": 1.0, "impossible": 0.001}
"""What a judgement counts (Yao et al., 2023, in their code for the Game of 24)."""
_JUDGEMENT = re.compile(r"\b(sure|likely|impossible)\b|(肯定|不可能|可能)", re.IGNORECASE)
_CHINESE = {"肯定": "sure", "可能": "likely", "不可能": "impossible"}


class TreeOfThoughts(Technique):
    """Deliberate search over thoughts (Yao et al., 2023).

    `bfs` keeps the `breadth` best states of every depth; `dfs` follows the best thought first, turns back where all of
    them are at or below `threshold`, and stops at the first state of full depth. Thoughts of one model call (`propose`)
    or of several samples (`sample`); judged alone (`value`: sure, likely, impossible) or against each other (`vote`).
    All questions about one depth enter the engine as one batch.
    """

    use: Literal["tree_of_thoughts"] = Field("tree_of_thoughts", description="a search over next steps")
    search: Literal["bfs", "dfs"] = Field("bfs", description="breadth first or depth first")
    depth: int = Field(3, ge=1, le=20, description="thoughts from the question to the answer")
    breadth: int = Field(3, ge=1, le=20, description="states that breadth-first search keeps at every depth")
    thoughts: int = Field(4, ge=1, le=20, description="next thoughts that are considered in a state")
    thought: str = Field("", description="what one thought is, in the language of the questions")
    generate: Literal["propose", "sample"] = Field("propose", description="one list of thoughts, or so many samples")
    judge: Literal["value", "vote"] = Field("value", description="each state alone, or all of them against each other")
    judgements: int = Field(1, ge=1, le=20, description="how often a state is judged, or a vote is held")
    threshold: float = Field(0.5, ge=0, description="depth-first search turns back from states worth no more than this")
    states: int = Field(100, ge=1, le=10_000, description="states whose next thoughts are asked for, at most")
    temperature: float = Field(0.7, ge=0, le=100, description="of sampled thoughts and repeated judgements")
    answer: Kind = ANSWER

    def calls(self) -> float:
        return 1 + self.depth * (self.breadth if self.search == "bfs" else 1) * (1 + self.thoughts * self.judgements)

    def program(self, question: Question, talk: Talk) -> Program[Solution]:
        search = _Search(self, question, talk)
        best = yield from (search.breadth_first() if self.search == "bfs" else search.depth_first())
        asked = question.asking(say(question.language, "tree_of_thoughts", "answer", state=search.told(best)))
        text = yield from talk.ask("answer", asked)
        return Solution(extract(text, self.answer) or text, "\n".join([*best, text]))


class _Search:
    """One search: what it asks, what it knows about states already."""

    def __init__(self, settings: TreeOfThoughts, question: Question, talk: Talk) -> None:
        self.settings, self.question, self.talk = settings, question, talk
        self.lang = question.language
        self.expanded = 0
        self.known: dict[State, float] = {}
        repeated = settings.judgements > 1
        self.judging = talk.within("judge", temperature=settings.temperature) if repeated else talk
        self.sampling = talk.within("think", temperature=settings.temperature)

    def breadth_first(self) -> Program[State]:
        """The best state of the last depth that was reached."""
        frontier: list[State] = [()]
        for depth in range(1, self.settings.depth + 1):
            found = yield from self.next_states(frontier[: self.settings.states - self.expanded])
            if not found:
                break
            values = yield from self.values(found)
            order = sorted(range(len(found)), key=lambda i: -values[i])  # stable: the earlier of equals
            frontier = [found[i] for i in order[: self.settings.breadth]]
            self.report("keep", f"depth {depth}", [(found[i], values[i]) for i in order[: self.settings.breadth]])
        return frontier[0]

    def depth_first(self) -> Program[State]:
        """The first state of full depth worth more than the threshold; else the deepest and best that was seen."""
        pending: list[tuple[State, float]] = [((), float("inf"))]
        best: tuple[int, float, State] = (0, 0.0, ())
        while pending:
            state, value = pending.pop()
            if len(state) == self.settings.depth:
                return state
            if self.expanded >= self.settings.states:
                break
            found = yield from self.next_states([state])
            values = yield from self.values(found)
            ranked = sorted(zip(found, values, strict=True), key=lambda pair: -pair[1])
            good = [pair for pair in ranked if pair[1] > self.settings.threshold]
            if ranked and (len(ranked[0][0]), ranked[0][1]) > best[:2]:
                best = (len(ranked[0][0]), ranked[0][1], ranked[0][0])
            if not good:
                self.report("back", f"depth {len(state)}", [(state, value)])
            pending += reversed(good)  # the best is the next to be looked at
        return best[2]

    def next_states(self, states: list[State]) -> Program[list[State]]:
        """The states that one more thought leads to, each once, in order."""
        settings, page = self.settings, "tree_of_thoughts"
        self.expanded += len(states)
        thought = settings.thought or say(self.lang, page, "thought")
        asks, owners = [], []
        for state in states:
            values = {"state": self.told(state), "thought": thought, "count": settings.thoughts}
            asked = self.question.asking(say(self.lang, page, settings.generate, **values))
            times = settings.thoughts if settings.generate == "sample" else 1
            asks += [Ask(asked, f"{n}") for n in range(times)] if times > 1 else [Ask(asked)]
            owners += [state] * times
        talk = self.sampling if settings.generate == "sample" else self.talk
        texts = yield from talk.ask_all("propose", asks)
        found = []
        for state, text in zip(owners, texts, strict=True):
            thoughts = listed(text, settings.thoughts) if settings.generate == "propose" else [text]
            found += [(*state, thought) for thought in thoughts if thought]
        return list(dict.fromkeys(found))

    def values(self, states: list[State]) -> Program[list[float]]:
        """What each state is worth."""
        if self.settings.judge == "vote":
            return (yield from self._votes(states))
        new = [state for state in states if state not in self.known]
        times = self.settings.judgements
        asks = []
        for state in new:
            asked = self.question.asking(say(self.lang, "tree_of_thoughts", "value", state=self.told(state)))
            asks += [Ask(asked, f"{n}" if times > 1 else "") for n in range(times)]
        texts = yield from self.judging.ask_all("value", asks)
        for index, state in enumerate(new):
            said = texts[index * times : (index + 1) * times]
            self.known[state] = sum(map(_worth, said)) / times
        return [self.known[state] for state in states]

    def _votes(self, states: list[State]) -> Program[list[float]]:
        """How many votes each state got."""
        if not states:
            return []
        page, times = "tree_of_thoughts", self.settings.judgements
        options = "\n".join(
            say(self.lang, page, "option", number=number, thoughts="\n".join(state))
            for number, state in enumerate(states, start=1)
        )
        asked = self.question.asking(say(self.lang, page, "vote", question=self.question.text, options=options))
        asks = [Ask(asked, f"{n}" if times > 1 else "") for n in range(times)]
        texts = yield from self.judging.ask_all("vote", asks)
        votes = Counter(extract(text, "number") for text in texts)
        return [float(votes[str(number)]) for number in range(1, len(states) + 1)]

    def told(self, state: State) -> str:
        """The question and the thoughts so far."""
        thoughts = "\n".join(state) or say(self.lang, "tree_of_thoughts", "none")
        return say(self.lang, "tree_of_thoughts", "state", question=self.question.text, thoughts=thoughts)

    def report(self, role: str, where: str, states: list[tuple[State, float]]) -> None:
        """A decision of the search, into the trace."""
        lines = [f"{value:g}: " + " → ".join(state) for state, value in states]
        self.talk.within(where).decide(role, observation="\n".join(lines))


def _worth(judgement: str) -> float:
    """The value of the last judgement in a text; nothing where there is none."""
    found = [english.lower() or _CHINESE[chinese] for english, chinese in _JUDGEMENT.findall(judgement)]
    return VALUES[found[-1]] if found else 0.0
